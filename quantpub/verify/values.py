"""The rule of values: every quantized tensor is decoded, dequantized once, and compared with the weight it stands for.

That is the source's, with the factors of smoothing folded into it where there are any.

SQNR = 10·log10(Σ w² / Σ (w − dequantize(q))²), in decibels, over the tensor and in the median over its rows. A wrong
nibble order or a scale off by one group costs 15 dB and more; a hard tensor costs two or three.
"""

from __future__ import annotations

import math
import statistics

import torch

from quantpub.qtensor import QTensor, dequantize, same_bits
from quantpub.verify.base import NO_SOURCE, Finding, Subject, first, passed, skipped
from quantpub.verify.source import REMOTE, source_parts

# Lowest SQNR of a sound tensor. Normal weights reach 19–20 dB at int4 in groups of 128 and 31–32 dB at FP8 E4M3;
# heavy tails cost a few dB of it.
FLOORS_DB = {"int4": 13.0, "int8": 30.0, "fp4_e2m1": 13.0, "fp8_e4m3": 25.0}


def values(subject: Subject) -> Finding:
    if not subject.weights:
        return skipped(REMOTE)
    modules = subject.decoder.modules()
    parts = source_parts(subject.source) if subject.source else {}
    problems, measured, floors = [], {}, {}
    for done, (module, _) in enumerate(modules, 1):
        q = subject.decoder.qtensor(module)
        problems += [f"{module}.{suffix}: {reason}" for suffix, reason in altered(subject, module, q)]
        floor = floors[module] = FLOORS_DB[q.scheme.weight.num]
        part = parts.get(f"{module}.weight")
        if part is None:
            problems += [f"{module}: a weight is not a finite number"] if not _finite(q) else []
        else:
            w_NK = subject.due(part)
            whole, rows = sqnr_db(w_NK, q)
            measured[module] = whole
            if not min(whole, rows) >= floor:
                problems.append(f"{module}: SQNR {min(whole, rows):.1f} dB, the floor is {floor:g} dB")
        subject.progress(done, len(modules))
    cache = subject.decoder.kv_scales()
    _leave_figures(subject, measured, floors)
    cached = f"; scales of the KV cache of {len(cache)} attentions" if cache else ""
    if not problems and subject.source is None:
        return passed(f"{len(modules)} tensors dequantized; against the source {NO_SOURCE}{cached}")
    return first(
        problems,
        f"{len(measured)} tensors, SQNR {min(measured.values(), default=0):.1f} dB or more, "
        f"floor {' and '.join(f'{value:g}' for value in sorted(set(floors.values())))} dB{cached}",
    )


def _finite(q: QTensor) -> bool:
    return bool(torch.isfinite(dequantize(q)).all())


def altered(subject: Subject, module: str, q: QTensor) -> list[tuple[str, str]]:
    """Tensors on disk that are not what the layout makes of this weight: what `unpack` does not read, engines may."""
    try:
        due = subject.decoder.treated(module).layout.pack(q)
    except AssertionError as error:
        return [("*", f"the layout cannot hold what was read ({error})")]
    found = subject.decoder.packed(module)
    return [
        (suffix, "is not what the layout makes of the weight's codes and scales")
        for suffix in due
        if (subject.ours or due[suffix].numel() > 1)  # other tools choose single numbers whose reciprocal is not exact
        and not same_bits(found.get(suffix), due[suffix].to(found[suffix].device))
    ]


def sqnr_db(w_NK: torch.Tensor, q: QTensor) -> tuple[float, float]:
    """SQNR in dB of the whole tensor, and the median over its rows that are not zero.

    The median is there because one large weight can carry a whole tensor's power. What is exact counts as 200 dB, what
    is not a number as −200.
    """
    w_NK = w_NK.double()
    noise_N = (w_NK - dequantize(q).double()).square_().sum(1)
    signal_N = w_NK.square().sum(1)
    rows_N = (signal_N / noise_N)[signal_N > 0]
    whole = _decibels(float(signal_N.sum() / noise_N.sum()), exact=not noise_N.any())
    return whole, _decibels(float(rows_N.median()) if len(rows_N) else math.inf, exact=not noise_N.any())


def _decibels(ratio: float, exact: bool) -> float:
    if exact or ratio == math.inf:
        return 200.0
    return 10 * math.log10(ratio) if ratio > 0 and math.isfinite(ratio) else -200.0


def _leave_figures(subject: Subject, measured: dict[str, float], floors: dict[str, float]) -> None:
    if not measured:
        return
    worst = min(measured, key=lambda module: measured[module])
    subject.figures["tensors"] = {
        "compared": len(measured),
        "floor_db": min(floors.values()),
        "sqnr_db": {
            "min": round(measured[worst], 3),
            "median": round(statistics.median(measured.values()), 3),
            "worst": worst,
        },
    }
    subject.figures["per_tensor"] = [
        {"module": module, "sqnr_db": round(value, 3)} for module, value in measured.items()
    ]
