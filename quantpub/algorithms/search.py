"""Scale search: for every group, the scale (and integer zero) of least squared error under rounding and clipping.

Legend: R rows of a block.

Without a zero, int4 codes are −8…7, one step longer below. The sign of the scale is free, so the grid holds both signs:
a negative scale lets code −8 serve the larger side of the weights. With an integer zero the grid is joint: for every
scale the zero that centres the range on the weights, and those next to it.

With activation second moments the same holds for the weighted norm, sum over k of E[x_k²]·(w_k − s·u_k)². With a sample
of the inputs beside them, the codes then descend the error that the group makes in the output, correlations included:
`scales` says how far a sample is believed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantpub.algorithms.base import FLOAT_ZERO, Algorithm, Groups, by_row_blocks, coded, finish, int_reject
from quantpub.algorithms.scales import best_scale, joint_moments, settle
from quantpub.qtensor import QTensor
from quantpub.scheme import WHOLE, Scheme
from quantpub.stats import Stats


@dataclass(frozen=True)
class Params:
    """grid: candidate scales, of each sign or with each zero. shrink: the smallest, as a part of the largest.

    refine: alternations of codes and projection. sweeps: of descent over the codes, where a sample of inputs is known.
    """

    grid: int = 8
    shrink: float = 0.8
    refine: int = 1
    sweeps: int = 2

    def __post_init__(self) -> None:
        if not (self.grid >= 1 and 0 < self.shrink <= 1 and self.refine >= 0):
            raise ValueError("grid is at least 1, shrink lies in (0, 1], refine is at least 0")
        if self.sweeps < 0:
            raise ValueError("sweeps is at least 0")


def reject(scheme: Scheme) -> str | None:
    if scheme.weight.zero_domain == FLOAT_ZERO:
        return "search finds integer zeros; for a float zero take hqq"
    return int_reject("search", scheme)


def quantize(w_NK: torch.Tensor, stats: Stats | None, scheme: Scheme, params: Params) -> QTensor:
    """w_NK: float [N, K] with K a multiple of the group size.

    Scale in its stored dtype, possibly negative where there is no zero; zero int8, where there is one.
    """
    group = scheme.group_size if scheme.group_size != WHOLE else w_NK.shape[1]
    h_ggG = joint_moments(stats, group, w_NK.device) if params.sweeps else None

    def rows(w_RK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        groups = Groups.of(w_RK, stats, scheme)
        scale_RG, zero_RG = best_scale(groups, scheme, params.grid, params.shrink, params.refine, w_RK.dtype)
        if h_ggG is None:
            return finish(groups, w_RK, scale_RG, zero_RG)
        return coded(settle(groups, h_ggG, scale_RG.float(), zero_RG, params.sweeps), w_RK, scale_RG, zero_RG)

    return by_row_blocks(rows, w_NK, scheme)


ALGORITHM = Algorithm("search", Params, reject, quantize, uses_moments=True)
