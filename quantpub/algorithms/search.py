"""Scale search: for every group, the scale (and integer zero) of least squared error under rounding and clipping.

Legend: R rows of a block, G groups of a row, g columns of a group.

With codes u less their zero, the best scale for fixed u is the projection s = <w,u>/<u,u>, and the error left is
<w,w> − <w,u>²/<u,u>. So each candidate is judged by the codes it gives, not by itself: take codes from a grid of
candidates, keep the one whose projection explains most, alternate codes and projection a few times (each step can only
lower the error), and end with the best of the three neighbouring values in the stored dtype and plain rounding's own
scale, judged by the true error with recomputed codes.

Without a zero, int4 codes are −8…7, one step longer below. The sign of the scale is free, so the grid holds both signs:
a negative scale lets code −8 serve the larger side of the weights. With an integer zero the grid is joint: for every
scale the zero that centres the range on the weights, and those next to it. With activation second moments the same holds
for the weighted norm, sum over k of E[x_k²]·(w_k − s·u_k)².
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantpub.algorithms.base import (
    FLOAT_ZERO,
    Algorithm,
    Groups,
    Pair,
    by_row_blocks,
    candidates,
    finish,
    int_reject,
    neighbours,
    nonzero,
    plain,
    stored,
)
from quantpub.qtensor import QTensor
from quantpub.scheme import Scheme
from quantpub.stats import Stats


@dataclass(frozen=True)
class Params:
    """grid: candidate scales, of each sign or with each zero. shrink: the smallest, as a part of the largest.

    refine: alternations of codes and projection.
    """

    grid: int = 8
    shrink: float = 0.8
    refine: int = 1

    def __post_init__(self) -> None:
        if not (self.grid >= 1 and 0 < self.shrink <= 1 and self.refine >= 0):
            raise ValueError("grid is at least 1, shrink lies in (0, 1], refine is at least 0")


def reject(scheme: Scheme) -> str | None:
    if scheme.weight.zero_domain == FLOAT_ZERO:
        return "search finds integer zeros; for a float zero take hqq"
    return int_reject("search", scheme)


def _project(groups: Groups, scale_RG: torch.Tensor, zero_RG: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The best scale for the codes that scale and zero give, and how much of <w,w> it explains."""
    u_RGg = groups.codes(scale_RG, zero_RG)
    wu, uu = groups.dot(groups.w_RGg, u_RGg), groups.dot(u_RGg, u_RGg)
    best = torch.where(uu > 0, wu / uu, scale_RG)
    return nonzero(best), wu * best


def _search(groups: Groups, starts: list[Pair], refine: int) -> Pair:
    """The best pair, its scale not yet rounded to its stored dtype."""
    (scale_RG, zero_RG), *others = starts
    scale_RG, gain_RG = _project(groups, scale_RG, zero_RG)
    for start_RG, with_RG in others:
        other_RG, gain = _project(groups, start_RG, with_RG)
        better = gain > gain_RG
        scale_RG, gain_RG = torch.where(better, other_RG, scale_RG), torch.where(better, gain, gain_RG)
        zero_RG = _choose(better, with_RG, zero_RG)
    for _ in range(refine):
        scale_RG, _ = _project(groups, scale_RG, zero_RG)
    return scale_RG, zero_RG


def _choose(better: torch.Tensor, one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    return None if one is None or other is None else torch.where(better, one, other)


def _store(groups: Groups, found: Pair, scheme: Scheme, dtype: torch.dtype) -> Pair:
    """The best of the nearest stored scale, its two neighbours, and plain rounding's pair: never worse than that."""
    scale_RG, zero_RG = found
    best = stored(scale_RG, scheme, dtype)
    others = [(near, zero_RG) for near in neighbours(best, scheme, dtype)] + [plain(groups, scheme, dtype)]
    least = groups.error(best.float(), zero_RG)
    for other, with_RG in others:
        error = groups.error(other.float(), with_RG)
        better = error < least
        best, least = torch.where(better, other, best), torch.minimum(error, least)
        zero_RG = _choose(better, with_RG, zero_RG)
    return best, zero_RG


def quantize(w_NK: torch.Tensor, stats: Stats | None, scheme: Scheme, params: Params) -> QTensor:
    """w_NK: float [N, K] with K a multiple of the group size.

    Scale in its stored dtype, possibly negative where there is no zero; zero int8, where there is one.
    """

    def rows(w_RK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        groups = Groups.of(w_RK, stats, scheme)
        found = _search(groups, candidates(groups, scheme, params.shrink, params.grid), params.refine)
        return finish(groups, w_RK, *_store(groups, found, scheme, w_RK.dtype))

    return by_row_blocks(rows, w_NK, scheme)


ALGORITHM = Algorithm("search", Params, reject, quantize)
