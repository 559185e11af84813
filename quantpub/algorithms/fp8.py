"""FP8 E4M3: scale = amax / 448 per row, codes = cast(w / scale), saturating.

The scale is stored in the weight's own dtype and rounded to it first. A bf16 scale may round down by 0.2 %, so that the
largest value of the row saturates at 448: far below the 6 % step of the format there.
Source: the OCP 8-bit floating point specification, E4M3 (no infinity, largest finite value 448).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantpub.algorithms.base import Algorithm, by_row_blocks, nonzero
from quantpub.qtensor import QTensor
from quantpub.scheme import WHOLE, Scheme
from quantpub.stats import Stats


@dataclass(frozen=True)
class Params:
    """Nothing to choose."""


def reject(scheme: Scheme) -> str | None:
    if scheme.weight.num != "fp8_e4m3":
        return f"fp8 makes FP8 codes, not {scheme.weight.num}"
    if scheme.weight.block != (1, WHOLE):
        return f"fp8 scales whole rows, not blocks of {scheme.weight.block}"
    return None


def quantize(w_NK: torch.Tensor, stats: Stats | None, scheme: Scheme, params: Params) -> QTensor:
    """w_NK: float [N, K]. Codes float8_e4m3fn [N, K], scale [N, 1] in w's dtype."""
    high = scheme.weight.number.high

    def rows(w_RK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        w = w_RK.float()
        scale_R1 = nonzero((w.abs().amax(-1, keepdim=True) / high).to(w_RK.dtype))
        return (w / scale_R1.float()).clamp_(-high, high).to(torch.float8_e4m3fn), scale_R1

    return by_row_blocks(rows, w_NK, scheme)


ALGORITHM = Algorithm("fp8", Params, reject, quantize)
