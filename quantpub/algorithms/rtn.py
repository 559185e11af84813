"""Round to nearest, integers: the scale spans each group's whole range. The baseline that everything is measured against.

Legend: R rows of a block, G groups of a row, g columns of a group.

    zero none   scale = amax / ((high − low) / 2), codes = round(w / scale)
    zero int    scale = (max − min) / (high − low) with 0 between min and max, zero = round(low − min / scale),
                codes = round(w / scale) + zero
    absmax127   scale = absmax / 127, codes = round(w · (127 / absmax)): LLM.int8(), codes −127…127

For int4 the divisor is 7.5, as compressed-tensors computes it: the range −8…7 is used on both sides, and the largest
positive value may clip by half a step. Zeros are integers in the range of the codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantpub.algorithms.base import FLOAT_ZERO, Algorithm, Groups, by_row_blocks, finish, int_reject, nonzero, plain
from quantpub.qtensor import QTensor
from quantpub.scheme import Scheme
from quantpub.stats import Stats


@dataclass(frozen=True)
class Params:
    """Nothing to choose."""


def reject(scheme: Scheme) -> str | None:
    if scheme.weight.zero_domain == FLOAT_ZERO:
        return "rtn rounds its zero to an integer; for a float zero take hqq"
    return int_reject("rtn", scheme)


def quantize(w_NK: torch.Tensor, stats: Stats | None, scheme: Scheme, params: Params) -> QTensor:
    """w_NK: float [N, K] with K a multiple of the group size. Scale in its stored dtype; zero int8, where there is one."""

    def rows(w_RK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        groups = Groups.of(w_RK, None, scheme)
        scale_RG, zero_RG = plain(groups, scheme, w_RK.dtype)
        if scheme.weight.scale_dtype == "absmax127":
            return _llm_int8(groups).view(w_RK.shape), scale_RG
        return finish(groups, w_RK, scale_RG, zero_RG)

    return by_row_blocks(rows, w_NK, scheme)


def _llm_int8(groups: Groups) -> torch.Tensor:
    """One multiplication by 127 / absmax, as its kernels do it: a tie may fall otherwise than in a division by the scale."""
    return (groups.w_RGg * (127 / nonzero(groups.amax_RG))[..., None]).round_().to(torch.int8)


ALGORITHM = Algorithm("rtn", Params, reject, quantize)
