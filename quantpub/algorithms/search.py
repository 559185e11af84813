"""Scale search: for every group, the signed scale of least squared error under rounding and clipping.

Legend: R rows of a block, G groups of a row, g columns of a group.

For fixed codes q the best scale is the projection s = <w,q>/<q,q>, and the error left is <w,w> − <w,q>²/<q,q>. So each
candidate scale is judged by the codes it gives, not by itself: take codes from a grid of candidates, keep the scale whose
projection explains most, alternate codes and projection a few times (each step can only lower the error), and end with
the best of the three neighbouring values in the stored dtype, judged by the true error with recomputed codes.

The int4 range is −8…7, one step longer below. The sign of the scale is free, so the grid holds both signs: a negative
scale lets code −8 serve the larger side of the weights. With activation second moments the same holds for the weighted
norm, sum over k of E[x_k²]·(w_k − s·q_k)².
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
    """grid: candidates of each sign. shrink: the smallest candidate, as a part of the largest. refine: alternations."""

    grid: int = 12
    shrink: float = 0.65
    refine: int = 3

    def __post_init__(self) -> None:
        if not (self.grid >= 1 and 0 < self.shrink <= 1 and self.refine >= 0):
            raise ValueError("grid is at least 1, shrink lies in (0, 1], refine is at least 0")


def reject(scheme: Scheme) -> str | None:
    if scheme.weight.number.kind != "int":
        return f"search finds scales of integer codes, not of {scheme.weight.num}"
    return None


@dataclass(frozen=True, eq=False)
class _Groups:
    """One block of rows as groups, with the importance of each column (None: all alike)."""

    w_RGg: torch.Tensor
    importance_Gg: torch.Tensor | None
    low: float
    high: float

    def codes(self, scale_RG: torch.Tensor) -> torch.Tensor:
        return (self.w_RGg / scale_RG[..., None]).round_().clamp_(self.low, self.high)

    def dot(self, a_RGg: torch.Tensor, b_RGg: torch.Tensor) -> torch.Tensor:
        product = a_RGg * b_RGg
        return (product if self.importance_Gg is None else product.mul_(self.importance_Gg)).sum(-1)

    def project(self, scale_RG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The best scale for the codes that `scale_RG` gives, and how much of <w,w> it explains."""
        q_RGg = self.codes(scale_RG)
        wq, qq = self.dot(self.w_RGg, q_RGg), self.dot(q_RGg, q_RGg)
        best = torch.where(qq > 0, wq / qq, scale_RG)
        return nonzero(best), wq * best

    def error(self, scale_RG: torch.Tensor) -> torch.Tensor:
        off_RGg = self.codes(scale_RG).mul_(scale_RG[..., None]).sub_(self.w_RGg)
        return self.dot(off_RGg, off_RGg)


def _largest(groups: _Groups) -> torch.Tensor:
    """The entry of largest magnitude of every group, with its sign."""
    low_RG, high_RG = groups.w_RGg.amin(-1), groups.w_RGg.amax(-1)
    return nonzero(torch.where(-low_RG > high_RG, low_RG, high_RG))


def _candidates(groups: _Groups, params: Params) -> list[torch.Tensor]:
    """Scales that map the largest magnitude to `low` (opposite sign) or `high` (same sign), and shrunken ones."""
    largest_RG = _largest(groups)
    steps = torch.linspace(params.shrink, 1.0, params.grid).tolist()
    return [largest_RG * (step / end) for end in (groups.low, groups.high) for step in steps]


def _search(groups: _Groups, params: Params) -> torch.Tensor:
    """The scale in float32 [R, G], before it is rounded to its stored dtype."""
    best_RG, gain_RG = None, None
    for candidate in _candidates(groups, params):
        scale, gain = groups.project(candidate)
        if best_RG is None or gain_RG is None:
            best_RG, gain_RG = scale, gain
        else:
            better = gain > gain_RG
            best_RG, gain_RG = torch.where(better, scale, best_RG), torch.where(better, gain, gain_RG)
    assert best_RG is not None
    for _ in range(params.refine):
        best_RG, _ = groups.project(best_RG)
    return best_RG


def _stored(groups: _Groups, scale_RG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The best of the nearest value in `dtype`, its two neighbours, and plain rounding's scale: never worse than that."""
    nearest = nonzero(scale_RG.to(dtype))
    neighbours = [torch.nextafter(nearest, torch.full_like(nearest, end)) for end in (torch.inf, -torch.inf)]
    plain = (_largest(groups).abs() / ((groups.high - groups.low) / 2)).to(dtype)
    best, least = nearest, groups.error(nearest.float())
    for other in map(nonzero, (*neighbours, plain)):
        error = groups.error(other.float())
        best, least = torch.where(error < least, other, best), torch.minimum(error, least)
    return best


def quantize(w_NK: torch.Tensor, stats: Stats | None, scheme: Scheme, params: Params) -> QTensor:
    """w_NK: float [N, K] with K a multiple of the group size. Scale in w's dtype, possibly negative."""
    number, group = scheme.weight.number, scheme.group_size if scheme.group_size != WHOLE else w_NK.shape[1]
    moment_K = None if stats is None else stats.second_moment_K
    importance_Gg = None if moment_K is None else moment_K.to(w_NK.device, torch.float32).view(-1, group)

    def rows(w_RK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        groups = _Groups(w_RK.float().view(len(w_RK), -1, group), importance_Gg, number.low, number.high)
        scale_RG = _stored(groups, _search(groups, params), w_RK.dtype)
        return groups.codes(scale_RG.float()).to(torch.int8).view(w_RK.shape), scale_RG

    return by_row_blocks(rows, w_NK, scheme)


ALGORITHM = Algorithm("search", Params, reject, quantize)
