"""Half-quadratic quantization: scale and zero of an error that forgives the outliers.

Legend: R rows of a block, G groups of a row, g columns of a group.

Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023. The error is split off as a
variable of its own, E ≈ w − dequantize(codes), and easy problems alternate:

    codes    the nearest to w
    E        shrink(x) = sign(x)·max(0, |x| − |x|^(p−1) / beta) of the errors x: nothing but what is far off
    scale, zero    the least-squares fit of w − E on the codes; then beta grows by kappa

With beta fixed each step lowers the sum of a loss whose derivative is x − shrink(x): x²/2 up to the turn,
beta^(−1/(2−p)), and beyond it a growth like |x|^p. A large beta makes it an l_p norm all over, a small one least squares.

Three things differ from the solver as it is commonly implemented. There x is a raw weight error, about 1e-3, and the turn
at beta 10 and p 0.7 lies at 0.17: E is always zero, and p without effect. Here the unit of x is the step of plain
rounding, and only what is clipped by more than a step is forgiven. There only the zero moves, and rounding it gives plain
rounding back; here the scale is solved for as well. There the codes span the whole range of a group; here the
alternation begins at the best, by least squares, of a grid of shrunken ranges.

    zero float  w ≈ codes·scale + zero: scale and zero by linear regression on the codes
    zero int    w ≈ (codes − zero)·scale: the zero from the grid, the scale by projection
    zero none   w ≈ codes·scale: a scale of either sign, by projection

The result, rounded as it is stored, is never worse than plain rounding by its own loss, group by group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from quantpub.algorithms.base import (
    FLOAT_ZERO,
    Algorithm,
    Groups,
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
    """iters: alternations. lp_norm: p, below 2. beta: the errors that count in full, see above; kappa: its growth.

    grid, shrink: how many ranges to begin from, and the smallest as a part of the whole. phases: with a float zero, how
    many places of the codes between one weight and the next step; a fit seldom moves from one to another.
    """

    iters: int = 2
    lp_norm: float = 0.7
    beta: float = 1.0
    kappa: float = 1.01
    grid: int = 4
    shrink: float = 0.85
    phases: int = 5

    def __post_init__(self) -> None:
        if not (self.iters >= 0 and 0 < self.lp_norm < 2):
            raise ValueError("iters is at least 0, lp_norm lies between 0 and 2")
        if not (self.beta > 0 and self.kappa >= 1):
            raise ValueError("beta is positive, kappa at least 1")
        if not (self.grid >= 1 and 0 < self.shrink <= 1 and self.phases >= 1):
            raise ValueError("grid and phases are at least 1, shrink lies in (0, 1]")


def reject(scheme: Scheme) -> str | None:
    if scheme.weight.zero_domain == FLOAT_ZERO and scheme.weight.scale_dtype != "model":
        return (
            f"hqq stores float zeros in the weight's own dtype, not scales of {scheme.weight.scale_dtype} beside them"
        )
    return int_reject("hqq", scheme)


@dataclass(frozen=True, eq=False)
class _Fit:
    """scale_RG with an integer zero_RG (int), an offset_RG in units of the weight (float), or neither; all float32."""

    scale_RG: torch.Tensor
    zero_RG: torch.Tensor | None = None
    offset_RG: torch.Tensor | None = None

    def codes(self, groups: Groups) -> torch.Tensor:
        """The nearest codes, less an integer zero."""
        if self.offset_RG is None:
            return groups.codes(self.scale_RG, self.zero_RG)
        u_RGg = (groups.w_RGg - self.offset_RG[..., None]).div_(self.scale_RG[..., None])
        return u_RGg.round_().clamp_(groups.low, groups.high)

    def values(self, u_RGg: torch.Tensor) -> torch.Tensor:
        d_RGg = u_RGg * self.scale_RG[..., None]
        return d_RGg if self.offset_RG is None else d_RGg.add_(self.offset_RG[..., None])

    def refit(self, groups: Groups, target_RGg: torch.Tensor, u_RGg: torch.Tensor) -> tuple[_Fit, torch.Tensor]:
        """The least-squares fit of `target_RGg` on the codes, a line or one through zero, and how much it explains."""
        tu, uu = groups.dot(target_RGg, u_RGg), groups.dot(u_RGg, u_RGg)
        if self.offset_RG is None:
            scale_RG = torch.where(uu > 0, tu / uu, self.scale_RG)
            return replace(self, scale_RG=nonzero(scale_RG)), tu * scale_RG
        mean_t, mean_u = groups.mean(target_RGg), groups.mean(u_RGg)
        covariance, variance = tu - groups.weight * mean_t * mean_u, uu - groups.weight * mean_u.square()
        scale_RG = torch.where(variance > 1e-3 * uu, covariance / variance, self.scale_RG)
        return _Fit(nonzero(scale_RG), offset_RG=mean_t - scale_RG * mean_u), covariance * scale_RG

    def better(self, other: _Fit, mask_RG: torch.Tensor) -> _Fit:
        """`other` where `mask_RG`, else self."""

        def choose(one: torch.Tensor | None, two: torch.Tensor | None) -> torch.Tensor | None:
            return None if one is None or two is None else torch.where(mask_RG, two, one)

        scale_RG = torch.where(mask_RG, other.scale_RG, self.scale_RG)
        return _Fit(scale_RG, choose(self.zero_RG, other.zero_RG), choose(self.offset_RG, other.offset_RG))


def _centred(groups: Groups, step: float = 1.0, phase: float = 0.0) -> _Fit:
    """Float zero: `step` of the range of each group, in its middle, moved by `phase` steps of the codes."""
    scale_RG = (groups.most_RG - groups.least_RG) * (step / (groups.high - groups.low))
    offset_RG = (groups.most_RG + groups.least_RG) / 2 - scale_RG * ((groups.high + groups.low) / 2 - phase)
    return _Fit(nonzero(scale_RG), offset_RG=offset_RG)  # equal weights: code 0, and the offset says it all


def _starts(groups: Groups, scheme: Scheme, params: Params) -> list[_Fit]:
    if scheme.weight.zero_domain != FLOAT_ZERO:
        return [_Fit(*pair) for pair in candidates(groups, scheme, params.shrink, params.grid)]
    steps = torch.linspace(params.shrink, 1.0, params.grid).tolist()
    phases = [i / params.phases - 0.5 for i in range(params.phases)]
    return [_centred(groups, step, phase) for step in steps for phase in phases]


def _begin(groups: Groups, starts: list[_Fit]) -> _Fit:
    """Of the fits to the codes of each start, the one of least squared error."""
    best, most = starts[0].refit(groups, groups.w_RGg, starts[0].codes(groups))
    for start in starts[1:]:
        fit, gain = start.refit(groups, groups.w_RGg, start.codes(groups))
        best, most = best.better(fit, gain > most), torch.maximum(gain, most)
    return best


@dataclass(frozen=True, eq=False)
class _Loss:
    """The loss that the alternation descends, of errors in units of `unit_RG`: x²/2 up to `turn`, ~ |x|^p beyond."""

    unit_RG: torch.Tensor
    p: float
    beta: float

    @property
    def turn(self) -> float:
        return float(self.beta ** (-1 / (2 - self.p)))

    def pull(self, off_RGg: torch.Tensor) -> torch.Tensor:
        """The part of each error that the fit answers for: the loss's derivative, in the errors' own unit."""
        x_RGg = off_RGg / self.unit_RG[..., None]
        far, x = self._far(x_RGg.abs())
        x_RGg.view(-1)[far] = _power(x, self.p - 1).div_(self.beta).copysign_(x_RGg.view(-1)[far])
        return x_RGg.mul_(self.unit_RG[..., None])

    def total(self, groups: Groups, off_RGg: torch.Tensor) -> torch.Tensor:
        """The loss of every group, [R, G]."""
        x_RGg = (off_RGg / self.unit_RG[..., None]).abs_()
        far, x = self._far(x_RGg)
        loss_RGg = x_RGg.square_()
        slope = 2 / (self.p * self.beta)
        loss_RGg.view(-1)[far] = _power(x, self.p).sub_(self.turn**self.p).mul_(slope).add_(self.turn**2)
        return groups.sum(loss_RGg)

    def _far(self, x_RGg: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Places and values beyond the turn. Few: a power of every element would cost more than all the rest."""
        far = (x_RGg.view(-1) > self.turn).nonzero().view(-1)
        return far, x_RGg.view(-1)[far]


def _power(x: torch.Tensor, p: float) -> torch.Tensor:
    """In float64: float32's differs in the last place between the lanes of a vector and its tail."""
    return x.double().pow(p).float()


def _alternate(groups: Groups, fit: _Fit, unit_RG: torch.Tensor, params: Params) -> _Fit:
    """Half-quadratic iterations from `fit`."""
    beta = params.beta
    for _ in range(params.iters):
        loss = _Loss(unit_RG, params.lp_norm, beta)
        u_RGg = fit.codes(groups)
        d_RGg = fit.values(u_RGg)
        off_RGg = groups.w_RGg - d_RGg
        fit, _ = fit.refit(groups, d_RGg.add_(loss.pull(off_RGg)), u_RGg)
        beta *= params.kappa
    return fit


def _error(groups: Groups, fit: _Fit, loss: _Loss) -> torch.Tensor:
    return loss.total(groups, fit.values(fit.codes(groups)).sub_(groups.w_RGg))


def _rounded(groups: Groups, fit: _Fit, scheme: Scheme, dtype: torch.dtype) -> list[_Fit]:
    """`fit` as it can be stored: the nearest scale and its neighbours, a float zero fitted to each; and plain rounding."""
    nearest = stored(fit.scale_RG, scheme, dtype)
    scales = [scale.float() for scale in (nearest, *neighbours(nearest, scheme, dtype))]
    if fit.offset_RG is None:
        scale_RG, zero_RG = plain(groups, scheme, dtype)
        return [*(_Fit(scale, fit.zero_RG) for scale in scales), _Fit(scale_RG.float(), zero_RG)]
    mean_u = groups.mean(fit.codes(groups))
    offsets = [fit.offset_RG + (fit.scale_RG - scale) * mean_u for scale in scales]
    whole = _centred(groups)
    assert whole.offset_RG is not None
    pairs = zip([*scales, stored(whole.scale_RG, scheme, dtype).float()], [*offsets, whole.offset_RG], strict=True)
    return [_Fit(scale, offset_RG=offset.to(dtype).float()) for scale, offset in pairs]


def _best(groups: Groups, fits: list[_Fit], loss: _Loss) -> _Fit:
    best, least = fits[0], _error(groups, fits[0], loss)
    for other in fits[1:]:
        error = _error(groups, other, loss)
        best, least = best.better(other, error < least), torch.minimum(error, least)
    return best


def quantize(w_NK: torch.Tensor, stats: Stats | None, scheme: Scheme, params: Params) -> QTensor:
    """w_NK: float [N, K] with K a multiple of the group size.

    Scale in its stored dtype, possibly negative where there is no zero; zero int8, or of w's dtype in the float domain.
    """

    def rows(w_RK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        groups = Groups.of(w_RK, stats, scheme)
        unit_RG = _centred(groups).scale_RG
        fit = _alternate(groups, _begin(groups, _starts(groups, scheme, params)), unit_RG, params)
        loss = _Loss(unit_RG, params.lp_norm, params.beta * params.kappa**params.iters)
        best = _best(groups, _rounded(groups, fit, scheme, w_RK.dtype), loss)
        scale_RG = stored(best.scale_RG, scheme, w_RK.dtype)
        if best.offset_RG is None:
            return finish(groups, w_RK, scale_RG, best.zero_RG)
        return best.codes(groups).to(torch.int8).view(w_RK.shape), scale_RG, best.offset_RG.to(w_RK.dtype)

    return by_row_blocks(rows, w_NK, scheme)


ALGORITHM = Algorithm("hqq", Params, reject, quantize, uses_moments=True)
