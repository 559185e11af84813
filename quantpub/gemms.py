"""The GEMMs of a quantized model as a serving engine runs them: y[M, N] = x[M, K] · W[N, K]ᵀ, one entry a shape.

Engines merge q/k/v into one weight, and gate/up into one (the family's `fused` table): rows stacked in member order.
What repeats over the layers is one entry with a count, the number of such GEMMs that one token goes through in one
forward pass. Experts: of the E experts of a layer a token goes through its top-k, so each MoE layer counts top-k.
Linears that the recipe left in high precision are the same on both sides of a comparison and are not listed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from quantpub.artifact import Artifact
from quantpub.decode import Decoder
from quantpub.errors import InputError
from quantpub.families import Family
from quantpub.qtensor import QTensor, same_bits
from quantpub.scheme import PRESETS, WHOLE

LAYER = re.compile(r"^model\.layers\.(\d+)\.")
EXPERT = re.compile(r"\.experts\.(\d+)\.")
TOP_K = "num_experts_per_tok"
Shapes = Mapping[str, tuple[int, int]]  # module → (n, k)


def is_expert(module: str) -> bool:
    """One of several, each a linear of its own."""
    return EXPERT.search(f"{module}.") is not None


def some_experts(names: Iterable[str]) -> bool:
    """Of modules or tensors, those that are one parameter for all experts too."""
    return any(".experts." in f"{name}." for name in names)


@dataclass(frozen=True)
class Gemm:
    """name: the engine's module without its layer. members: the modules of its first occurrence, in row order.

    count: occurrences that one token meets. experts: how many a layer holds, 0 outside of MoE.
    """

    name: str
    n: int
    k: int
    count: int
    members: tuple[str, ...]
    experts: int = 0

    def as_json(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"name": self.name, "n": self.n, "k": self.k, "count": self.count}
        return facts | ({"experts": self.experts} if self.experts else {})


def engine_gemms(artifact: Artifact, decoder: Decoder, tp: int = 1) -> list[Gemm]:
    """The artifact's quantized GEMMs as each of `tp` GPUs runs them.

    Errors: InputError when config.json does not say what they need, or a weight cannot be cut into so many parts.
    """
    config, where, family = artifact.config(), str(artifact.path / "config.json"), decoder.family()
    shapes = {
        module: cut_shape(shape, *side(family, module, tp, config), module) for module, shape in decoder.modules()
    }
    top_k = config.get(TOP_K)
    if top_k is None and any(EXPERT.search(module) for module in shapes):
        raise InputError(
            f"it has experts, but config.json lacks {TOP_K}", where=where, next="copy config.json from the source model"
        )
    rows = {module: decoder.treated(module).scheme.weight.block[0] for module in shapes}
    return group(shapes, family, top_k or 0, rows, {module: kind(decoder, module) for module in shapes})


def kind(decoder: Decoder, module: str) -> str:
    """What a kernel makes of a module's weight: its scheme, with the group size where that is not the preset's."""
    scheme = decoder.treated(module).scheme
    own = scheme.name in PRESETS and PRESETS[scheme.name].group_size == scheme.group_size
    return scheme.name if own else f"{scheme.name} g{scheme.group_size}"


def side(family: Family, module: str, tp: int, config: Mapping[str, Any]) -> tuple[str | None, int]:
    """(`in`, `out` or None: the side that `tp` GPUs cut; into how many parts). GPUs beyond the key and value heads share one."""
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads")
    shared = module.rpartition(".")[2] in ("k_proj", "v_proj") and heads
    return family.cut(module), min(tp, heads) if shared and heads else tp


def cut_shape(shape: tuple[int, int], cut: str | None, parts: int, module: str) -> tuple[int, int]:
    """(n, k) of one GPU's part. Errors: InputError when it does not divide."""
    n, k = shape
    if cut is None or parts == 1:
        return shape
    full = n if cut == "out" else k
    if full % parts:
        what = f"{full} {cut}_features cannot be shared by {parts} GPUs"
        raise InputError(what, where=module, next="choose another number of GPUs")
    return (n // parts, k) if cut == "out" else (n, k // parts)


def group(
    shapes: Shapes,
    family: Family,
    top_k: int = 0,
    rows: Mapping[str, int] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> list[Gemm]:
    """One entry per distinct (name, N, K, kind), in the order of `shapes`. rows: module → rows of a block that share a scale.

    kinds: module → what is made of it; layers that a rule treats otherwise are GEMMs of their own. Members stay apart where
    a block would hold rows of two: no engine merges those.
    """
    found: dict[tuple[str, int, int, str], list[tuple[str, tuple[str, ...]]]] = {}
    places = [
        place
        for module, members in fuse(shapes, family).items()
        for place in (
            [(module, members)] if whole_blocks(members, shapes, rows or {}) else [(m, (m,)) for m in members]
        )
    ]
    for module, members in places:
        n, k = sum(shapes[member][0] for member in members), shapes[members[0]][1]
        name = EXPERT.sub(".experts.", LAYER.sub("", module))
        found.setdefault((name, n, k, (kinds or {}).get(members[0], "")), []).append((module, members))
    return [_entry(_longer(key, found), key[1], key[2], places, top_k) for key, places in found.items()]


def _longer(key: tuple[str, int, int, str], among: Collection[tuple[str, int, int, str]]) -> str:
    """The name, with the shape and the kind where others of that name have another."""
    name, n, k, made = key
    alike = [other for other in among if other[0] == name]
    shape = f" {n}×{k}" if any(other[1:3] != (n, k) for other in alike) else ""
    return name + shape + (f" {made}" if any(other[3] != made for other in alike) else "")


def whole_blocks(members: Sequence[str], shapes: Shapes, rows: Mapping[str, int]) -> bool:
    """Whether every member that another follows ends with a block."""
    return all(shapes[m][0] % rows[m] == 0 for m in members[:-1] if rows.get(m, WHOLE) != WHOLE)


def _entry(name: str, n: int, k: int, places: Sequence[tuple[str, tuple[str, ...]]], top_k: int) -> Gemm:
    module, members = places[0]
    if not EXPERT.search(module):
        return Gemm(name, n, k, len(places), members)
    experts = Counter(module[: match.start()] for module, _ in places if (match := EXPERT.search(module)))
    count = sum(min(top_k, held) for held in experts.values())
    return Gemm(name, n, k, count, members, max(experts.values()))


def fuse(shapes: Shapes, family: Family) -> dict[str, tuple[str, ...]]:
    """Engine module → its members. Members merge when all of them are there and read the same input."""
    merged: dict[str, tuple[str, ...]] = {}
    for module in shapes:
        prefix, _, leaf = module.rpartition(".")
        whole, members = _merge(prefix, leaf, shapes, family) or (module, (module,))
        merged.setdefault(whole, members)
    return merged


def _merge(prefix: str, leaf: str, shapes: Shapes, family: Family) -> tuple[str, tuple[str, ...]] | None:
    for engine_name, leaves in family.fused.items():
        members = tuple(f"{prefix}.{member}" for member in leaves)
        if leaf in leaves and all(member in shapes for member in members) and len({shapes[m][1] for m in members}) == 1:
            return f"{prefix}.{engine_name}", members
    return None


def stack(parts: Sequence[QTensor]) -> QTensor:
    """Rows under rows, as engines merge members: of one scheme, with one global scale."""
    first, shares = parts[0], parts[0].scheme.weight.block[0]
    assert all(part.scheme == first.scheme and same_bits(part.global_scale, first.global_scale) for part in parts)
    if shares == WHOLE:
        assert all(same_bits(part.scale, first.scale) for part in parts), "members of one scale each do not stack"
        return replace(first, codes_NK=_rows([part.codes_NK for part in parts]))
    assert shares == 1 or all(part.shape[0] % shares == 0 for part in parts[:-1]), "a block would hold two members"
    zeros = [part.zero for part in parts if part.zero is not None]
    return replace(
        first,
        codes_NK=_rows([part.codes_NK for part in parts]),
        scale=_rows([part.scale for part in parts]),
        zero=_rows(zeros) if zeros else None,
    )


def _rows(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """torch.cat has no kernel for 8-bit floats everywhere: their bytes are stacked."""
    flat = torch.cat([part.reshape(-1).view(torch.uint8) for part in parts]).view(parts[0].dtype)
    return flat.view(-1, parts[0].shape[1])
