"""Into how many GPUs' shares quantized linears can be cut: tensor parallelism on 1, 2, 4 and 8, and why not.

    column-parallel   N is shared out: a share must be a multiple of the layout's rows (8 of packed zeros, 128 of FP8 blocks)
    row-parallel      K is shared out: of its columns, so that no group or block lies on two GPUs

What engines merge is cut member by member; on one GPU already a member that another follows must end with whole blocks.
Key and value heads fewer than GPUs are held by several: theirs is cut into as many shares as there are heads.
Sources: the `tp_multiple` of each layout; vllm distributed/utils.py, fp8_utils.py, and marlin_utils.py of the padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpub.families import Family
from quantpub.gemms import fuse, side
from quantpub.layouts.base import Layout
from quantpub.scheme import Scheme

TP_SIZES = (1, 2, 4, 8)
Modules = Mapping[str, tuple[Scheme, Layout, int, int]]  # linear → its scheme, layout, n and k
_TILES = ((64, 128), (128, 64))  # Marlin's, N × K


def tp_table(modules: Modules, family: Family, config: Mapping[str, Any]) -> dict[int, list[str]]:
    """GPUs → every reason why an engine cannot load these modules so, in their order; none where it can.

    config: of the model, for its key and value heads.
    """
    shapes = {module: (n, k) for module, (_, _, n, k) in modules.items()}
    followed = {member for members in fuse(shapes, family).values() for member in members[:-1]}
    table: dict[int, list[str]] = {}
    for size in TP_SIZES:
        found = (reason(module, modules[module], family, config, size, module in followed) for module in modules)
        table[size] = list(dict.fromkeys(why for why in found if why))
    return table


def reason(
    module: str,
    held: tuple[Scheme, Layout, int, int],
    family: Family,
    config: Mapping[str, Any],
    size: int,
    followed: bool,
) -> str | None:
    """Why one linear cannot be shared by `size` GPUs, or None. followed: whether engines stack another below it."""
    scheme, layout, n, k = held
    multiples = layout.tp_multiple(scheme)
    if multiples is None:
        return None if size == 1 else f"no engine cuts layout {layout.name}"
    cut, parts = side(family, module, size, config)
    full, multiple, name = (k, multiples[1], "in") if cut == "in" else (n, multiples[0], "out")
    parts = parts if cut else 1
    if (parts > 1 or (name == "out" and followed)) and (full % parts or full // parts % multiple):
        return f"{module}: {full} {name}_features / {parts} is not a multiple of {multiple}"
    return None


def padded(modules: Modules, family: Family, config: Mapping[str, Any], size: int) -> list[str]:
    """Engine modules of int4 and int8 weights whose share Marlin pads to its tiles at every forward pass: slower, not refused.

    Of shares that can be cut. Experts have tiles of their own and are not counted.
    """
    shapes = {module: (n, k) for module, (_, _, n, k) in modules.items()}
    found = []
    for whole, members in fuse(shapes, family).items():
        scheme, layout, _, k = modules[members[0]]
        packed = scheme.act is None and scheme.weight.number.kind == "int" and layout.tp_multiple(scheme) is not None
        if packed and ".experts." not in whole:
            cuts = {member: side(family, member, size, config) for member in members}
            n = sum(shapes[member][0] // (parts if cut == "out" else 1) for member, (cut, parts) in cuts.items())
            cut, parts = cuts[members[0]]
            k = k // parts if cut == "in" else k
            if not any(n % rows == 0 and k % columns == 0 for rows, columns in _TILES):
                found.append(whole)
    return found
