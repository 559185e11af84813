"""Gives every kernel weights that are wrong in a known way, and kernels that answer from earlier: is each one stopped?

usage: python scripts/planted_faults.py OUT.json ARTIFACT ...        (a CUDA host; with vLLM on the path its kernels too)

For every merged GEMM of an artifact, one of each shape, and every kernel that runs here and takes it: the sound weight must
pass the check that precedes every timing, and each fault must end it with a GateError that names the kernel and the GEMM.
Reported: the relative error of each beside the tolerance. A miss, or a sound kernel that is refused, is exit code 1.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from provenance import made_by, write

from quantpub.artifact import Artifact
from quantpub.decode import Decoder
from quantpub.errors import GateError
from quantpub.gemms import engine_gemms, stack
from quantpub.kernels import KERNELS
from quantpub.kernels.base import Kernel, Operands, Weight
from quantpub.kernels.check import PROBE_ROWS, check, check_split, make_probe, relative_error, tolerance
from quantpub.layouts import LAYOUTS
from quantpub.qtensor import QTensor
from quantpub.registry import load

Fault = Callable[[Weight], Weight | None]  # None: the weight has nothing that could be wrong so
CODES = ("weight_packed", "qweight", "weight", "_weight_qdata")
SCALES = ("weight_scale", "weight_scale_inv", "scales", "_weight_scale_and_zero")
GROUPS_FIRST = ("scales", "_weight_scale_and_zero")  # [G, N]; the others are [N, G]
GLOBALS = ("weight_global_scale", "weight_scale_2")


def held(weight: Weight, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in weight.packed), None)


def with_tensor(weight: Weight, name: str, tensor: torch.Tensor) -> Weight:
    """The weight with one tensor of the file changed, and the meaning that such a file would have."""
    packed = weight.packed | {name: tensor}
    q = load(LAYOUTS, "layout", weight.layout).unpack(packed, weight.q.scheme, weight.q.shape)
    return Weight(q, packed, weight.layout)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def swapped(weight: Weight) -> Weight | None:
    """Neighbouring codes in the other order: the nibbles of each byte, or bytes of codes that fill one."""
    name = held(weight, CODES)
    assert name is not None, weight.layout
    old, raw = weight.packed[name], as_bytes(weight.packed[name])
    narrow = weight.q.scheme.weight.number.bits == 4
    new = (raw >> 4) | (raw << 4) if narrow else raw.view(-1, 2).flip(1).reshape(-1)
    return with_tensor(weight, name, new.view(old.dtype).view(old.shape))


def shifted(weight: Weight) -> Weight | None:
    """Every scale is that of the group before; where a row is one group, that of the row before."""
    name = held(weight, SCALES)
    assert name is not None, weight.layout
    old = weight.packed[name]
    if old.dim() < 2 or old.numel() == 1:
        return None  # one scale of all
    groups = 0 if name in GROUPS_FIRST else 1
    sized = old.view(torch.uint8).reshape(*old.shape, -1) if old.element_size() > 1 else old.view(torch.uint8)
    new = sized.roll(1, groups if old.shape[groups] > 1 else 1 - groups).contiguous()
    return with_tensor(weight, name, new.view(old.dtype).view(old.shape))


def inverted(weight: Weight) -> Weight | None:
    """A divisor taken for a multiplier: the global scale, or with FP8 the scale itself."""
    floats = weight.q.scheme.weight.number.kind == "float" and weight.q.scheme.weight.scale_dtype != "e8m0"
    name = held(weight, GLOBALS) or (held(weight, SCALES) if floats else None)
    return (
        with_tensor(weight, name, weight.packed[name].float().reciprocal().to(weight.packed[name].dtype))
        if name
        else None
    )


FAULTS: dict[str, Fault] = {"codes swapped": swapped, "scale off by one": shifted, "scale inverted": inverted}


def stale_call(kernel: Kernel) -> Kernel:
    """Answers every later call of a shape with the first one's result."""
    first: dict[tuple[int, ...], torch.Tensor] = {}

    def run(x_MK: torch.Tensor, operands: Operands) -> torch.Tensor:
        key = (*x_MK.shape, *operands[0].shape)
        if key not in first:
            first[key] = kernel.run(x_MK, operands)
        return first[key]

    return replace(kernel, run=run)


def stale_weight(kernel: Kernel) -> Kernel:
    """Keeps the first weight of a shape."""
    first: dict[tuple[int, int], Operands] = {}

    def prepare(weight: Weight) -> Operands:
        if weight.q.shape not in first:
            first[weight.q.shape] = kernel.prepare(weight)
        return first[weight.q.shape]

    return replace(kernel, prepare=prepare)


def judged(kernel: Kernel, gemm: str, given: Weight, q: QTensor) -> tuple[float, GateError | None]:
    """(the relative error, what the check said) of a kernel that is given a weight and should multiply by q."""
    operands, probe = kernel.prepare(given), make_probe(q)
    error = None
    try:
        check_split(kernel, gemm, operands, probe, q)
        for m in (1, PROBE_ROWS):
            check(kernel, gemm, operands, probe, m)
    except GateError as caught:
        error = caught
    kernel.run(probe.others(PROBE_ROWS), operands)
    return relative_error(kernel.run(probe.x_PK, operands), probe.y_PN), error


def planted(kernel: Kernel, gemm: str, weight: Weight) -> Iterator[dict[str, Any]]:
    """One entry for the sound weight, one for each fault. `right`: the sound one passes, a fault is stopped by its names."""
    allowed = tolerance(kernel, weight.q.scheme)
    found, said = judged(kernel, gemm, weight, weight.q)
    yield entry("none", found, allowed, said, said is None)
    for name, fault in FAULTS.items():
        if (given := fault(weight)) is not None:
            found, said = judged(kernel, gemm, given, weight.q)
            yield entry(name, found, allowed, said, named(said, kernel, gemm))
    found, said = judged(stale_call(kernel), gemm, weight, weight.q)
    yield entry("stale call", found, allowed, said, named(said, kernel, gemm))
    stale = stale_weight(kernel)
    if earlier := swapped(weight):
        stale.prepare(earlier)
    found, said = judged(stale, gemm, weight, weight.q)
    yield entry("stale weight", found, allowed, said, named(said, kernel, gemm))


def named(said: GateError | None, kernel: Kernel, gemm: str) -> bool:
    return said is not None and kernel.name in str(said) and gemm in str(said)


def entry(fault: str, error: float, allowed: float, said: GateError | None, right: bool) -> dict[str, Any]:
    finite = round(error, 6) if error == error and error < 1e30 else str(error)
    facts = {"fault": fault, "relative_error": finite, "tolerance": round(allowed, 6), "stopped": said is not None}
    return facts | {"right": right} | ({"said": str(said)[:240]} if said else {})


def on(q: QTensor, device: str) -> QTensor:
    names = ("codes_NK", "scale", "zero", "global_scale", "input_scale")
    return replace(q, **{name: value.to(device) for name in names if (value := getattr(q, name)) is not None})


def weights(decoder: Decoder, device: str) -> Iterator[tuple[str, Weight]]:
    """(GEMM, its weight), the members merged."""
    for gemm in engine_gemms(decoder.artifact, decoder):
        layout = decoder.treated(gemm.members[0]).layout
        parts = [on(decoder.qtensor(member), device) for member in gemm.members]
        q = parts[0] if len(parts) == 1 else stack(parts)
        yield gemm.name, Weight(q, layout.pack(q), layout.name)


def rows(folder: str, device: str) -> Iterator[dict[str, Any]]:
    decoder = Decoder(Artifact.open(Path(folder)))
    for gemm, weight in weights(decoder, device):
        (n, k), scheme = weight.q.shape, weight.q.scheme
        facts = {
            "artifact": Path(folder).name,
            "scheme": scheme.name,
            "layout": weight.layout,
            "gemm": gemm,
            "n": n,
            "k": k,
        }
        for name in KERNELS:
            kernel: Kernel = load(KERNELS, "kernel", name)
            reason = f"it does not run on {device}" if device not in kernel.devices else None
            reason = reason or kernel.refuses(scheme, weight.layout, n, k) or kernel.unavailable()
            if reason:
                yield facts | {"kernel": name, "not_run": reason}
                continue
            try:
                yield from (facts | {"kernel": name} | each for each in planted(kernel, gemm, weight))
            except Exception as error:  # said in the evidence, not hidden
                yield facts | {"kernel": name, "right": False, "failed": f"{type(error).__name__}: {error!s:.300}"}


def main(out: str, *folders: str) -> int:
    torch.backends.cuda.matmul.allow_tf32 = False
    found = []
    with torch.inference_mode():
        for folder in folders:
            for row in rows(folder, "cuda"):
                found.append(row)
                print(json.dumps(row), flush=True)
    made = made_by("scripts/planted_faults.py", ("torch", "vllm", "flashinfer-python"), cuda=torch.version.cuda)
    wrong = [row for row in found if not row.get("right", True)]
    tried = [row for row in found if "fault" in row]
    write(out, made, summary={"tried": len(tried), "wrong": len(wrong)}, rows=found)
    print(f"{len(tried)} tried, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
