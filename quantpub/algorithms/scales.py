"""What search and gptq share: the scale of a group by least squares, and codes for fixed scales by coordinate descent.

Legend: R rows of a block, G groups of a row, g columns of a group (or of a block of columns), T sampled tokens.

With codes u less their zero, the best scale for fixed u is the projection s = <w,u>/<u,u>, and the error left is
<w,w> − <w,u>²/<u,u>. So each candidate is judged by the codes it gives, not by itself: take codes from a grid of
candidates, keep the one whose projection explains most, alternate codes and projection a few times (each step can only
lower the error), and end with the best of the three neighbouring values in the stored dtype and plain rounding's own
scale, judged by the true error with recomputed codes.

Where inputs are correlated, the nearest code is not the best one: what one column errs, another can make good. With the
moments h = E[x xᵀ] the error of a row is eᵀ h e, e = w − s·u, and with all other codes held the best of column i is the
nearest to u_i + (h e)_i / (h_ii s_i). Going through the columns so never raises the error.
"""

from __future__ import annotations

import torch

from quantpub.algorithms.base import Groups, Pair, candidates, neighbours, nonzero, plain, stored
from quantpub.scheme import Scheme
from quantpub.stats import Stats

# Moments of g columns from T tokens: correlations count T / (T + 3g) of what the sample says. Measured on a trained model
# with g = 128: of 128 tokens a quarter is best, of 512 a half, and a sample believed outright is worse than none.
DOUBT = 3
WIDEST = 512  # columns of a group whose moments are taken together: they cost a matrix of as many rows


def best_scale(
    groups: Groups, scheme: Scheme, grid: int, shrink: float, refine: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale, stored for a weight of `dtype`, and integer zero (float32; None: the scheme has none) of every group."""
    found = _search(groups, candidates(groups, scheme, shrink, grid), refine)
    return _store(groups, found, scheme, dtype)


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
        zero_RG = choose(better, with_RG, zero_RG)
    for _ in range(refine):
        scale_RG, _ = _project(groups, scale_RG, zero_RG)
    return scale_RG, zero_RG


def choose(better: torch.Tensor, one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    """`one` where it is better, else `other`; None where there are none."""
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
        zero_RG = choose(better, with_RG, zero_RG)
    return best, zero_RG


def joint_moments(stats: Stats | None, group: int, device: torch.device) -> torch.Tensor | None:
    """E[x_i x_j] within every group, float32 [g, g, G], from a sample and the second moments; None without a sample."""
    if stats is None or stats.sample_RK is None or stats.second_moment_K is None:
        return None
    if not (1 < group <= WIDEST and len(stats.sample_RK)):
        return None
    x_GgT = stats.sample_RK.to(device, torch.float64).T.reshape(-1, group, len(stats.sample_RK))
    h_Ggg = x_GgT @ x_GgT.transpose(1, 2)
    seen_Gg, moment_Gg = h_Ggg.diagonal(0, 1, 2), stats.second_moment_K.to(device, torch.float64).view(-1, group)
    trust = x_GgT.shape[2] / (x_GgT.shape[2] + DOUBT * group)
    size_Gg = torch.where(seen_Gg > 0, moment_Gg / seen_Gg, 0.0).sqrt()
    h_Ggg = h_Ggg * (size_Gg[:, :, None] * size_Gg[:, None, :] * trust)
    h_Ggg.diagonal(0, 1, 2).copy_(nonzero(moment_Gg))  # a channel that is always zero: the nearest code will do
    return h_Ggg.permute(1, 2, 0).float().contiguous()


def settle(
    groups: Groups, h_ggG: torch.Tensor, scale_RG: torch.Tensor, zero_RG: torch.Tensor | None, sweeps: int
) -> torch.Tensor:
    """Codes less their zero [R, G, g] for the moments of each group, from the nearest by `sweeps` of descent."""
    u_gGR = groups.codes(scale_RG, zero_RG).permute(2, 1, 0).contiguous()
    scale_gGR = scale_RG.T.expand_as(u_gGR)
    low_gGR, high_gGR = (limit.expand_as(u_gGR) for limit in limits(groups.low, groups.high, scale_RG.T, zero_RG))
    off_gGR = groups.w_RGg.permute(2, 1, 0) - u_gGR * scale_gGR
    for _ in range(sweeps):
        pull_gGR = torch.einsum("ijG,jGR->iGR", h_ggG, off_gGR).contiguous()
        off_gGR += descend(u_gGR, pull_gGR, h_ggG[..., None], scale_gGR, low_gGR, high_gGR)
    return u_gGR.permute(2, 1, 0).contiguous()


def limits(
    low: float, high: float, like_GR: torch.Tensor, zero_RG: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The range of codes less their zero, float32 [G, R]."""
    zero_GR = torch.zeros_like(like_GR, dtype=torch.float32) if zero_RG is None else zero_RG.T.float()
    return low - zero_GR, high - zero_GR


def descend(
    u: torch.Tensor, pull: torch.Tensor, h: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> torch.Tensor:
    """One sweep over the first axis, the columns: `u` is brought up to date, and the change of w − scale·u returned.

    u, scale, low, high: [g, …]. pull: h (w − scale·u), kept up to date as well. h: [g, g, …], broadcastable.
    """
    moved = torch.empty_like(pull)
    for i in range(len(u)):
        new = (pull[i] / (h[i, i] * scale[i])).add_(u[i]).round_()
        new = torch.minimum(torch.maximum(new, low[i]), high[i])
        moved[i] = (u[i] - new) * scale[i]
        u[i] = new
        pull.addcmul_(h[i], moved[i])
    return moved
