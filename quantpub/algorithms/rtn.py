"""Round to nearest, symmetric integers: scale = amax / ((high − low) / 2), codes = round(w / scale).

For int4 the divisor is 7.5, as compressed-tensors computes it: the range −8…7 is used on both sides, and the largest
positive value may clip by half a step. The baseline that everything else is measured against.
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
    if scheme.weight.number.kind != "int":
        return f"rtn makes integer codes, not {scheme.weight.num}"
    return None


def quantize(w_NK: torch.Tensor, stats: Stats | None, scheme: Scheme, params: Params) -> QTensor:
    """w_NK: float [N, K] with K a multiple of the group size. Scale in w's dtype."""
    number, group = scheme.weight.number, scheme.group_size if scheme.group_size != WHOLE else w_NK.shape[1]

    def rows(w_RK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        w_RGg = w_RK.float().view(len(w_RK), -1, group)
        scale_RG = nonzero((w_RGg.abs().amax(-1) / ((number.high - number.low) / 2)).to(w_RK.dtype))
        codes = (w_RGg / scale_RG.float()[..., None]).round_().clamp_(number.low, number.high)
        return codes.to(torch.int8).view(w_RK.shape), scale_RG

    return by_row_blocks(rows, w_NK, scheme)


ALGORITHM = Algorithm("rtn", Params, reject, quantize)
