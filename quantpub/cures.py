"""Other layouts for weights whose own layout leads to a slow kernel: what to measure beside it, and to name as the cure.

A cure keeps the codes and their scales. `lossless` says whether the other layout holds the very same weight; where it
does not, `note` says what is rounded, and a weight that would lose more than that is refused. The converted weight is what
the other kernels are timed with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from quantpub.qtensor import QTensor, dequantize
from quantpub.scheme import preset


@dataclass(frozen=True)
class Cure:
    """layout, scheme: what the weight becomes. format: as engines call the layout.

    refuses(q): why the weight would lose more than `note` says, or None.
    """

    layout: str
    scheme: str
    format: str
    lossless: bool
    note: str
    convert: Callable[[QTensor], QTensor]
    refuses: Callable[[QTensor], str | None]

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("layout", "scheme", "format", "lossless", "note")}


def whole_zero(q: QTensor) -> QTensor:
    """codes·scale + zero with a 16-bit zero → (codes − zero)·scale with a whole one of 4 bits.

    At most half a step away, unless `zeros_out_of_reach` says otherwise.
    """
    assert q.zero is not None
    scale = q.scale.float()
    steps = torch.where(scale == 0, torch.zeros_like(scale), -q.zero.float() / scale)
    scheme = preset("W4A16_ASYM", q.scheme.group_size)
    return replace(q, scheme=scheme, zero=steps.round().clamp(-8, 7).to(torch.int8))


def zeros_out_of_reach(q: QTensor) -> str | None:
    """Whole zeros are codes: one below −8 or above 7, of weights that are all of one sign, is cut off there.

    All weights of a group move by as much: |zero + scale · whole zero|, half a step when nothing but rounding moves them.
    """
    assert q.zero is not None
    cured = whole_zero(q)
    assert cured.zero is not None
    scale = q.scale.float()
    off = (q.zero.float() + scale * cured.zero.float()).abs()
    far = ~(off <= scale.abs() * (0.5 + ROUNDING))  # NaN is far, too
    if not far.any():
        return None
    return (
        f"no code stands for the zeros of {int(far.sum())} of {far.numel()} groups: their weights would move by more than "
        f"the half step of rounding; of the norm of all weights {100 * loss(q, cured):.2g} % would be lost"
    )


def loss(q: QTensor, cured: QTensor) -> float:
    """The norm of what a cure changes, over the norm of the weight."""
    w_NK = dequantize(q)
    return float((dequantize(cured) - w_NK).norm() / w_NK.norm().clamp_min(torch.finfo(torch.float32).tiny))


ROUNDING = 1e-5  # of a step: what float32 adds to it
CURES: dict[tuple[str, str], tuple[Cure, ...]] = {
    ("torchao-tile", "W4A16_FLOAT_ZERO"): (
        Cure(
            "ct-pack",
            "W4A16_ASYM",
            "pack-quantized",
            False,
            "its zeros are rounded to whole codes, half a step at most",
            whole_zero,
            zeros_out_of_reach,
        ),
    ),
}


def cures(layout: str, scheme: str) -> tuple[Cure, ...]:
    return CURES.get((layout, scheme), ())
