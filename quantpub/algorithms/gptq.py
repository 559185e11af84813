"""GPTQ: the error of every column is made good, as far as it can be, by the columns that are not yet rounded.

Legend: K columns of the weight, R rows of a block, G groups of a row, B columns of a block.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022
(arXiv:2210.17323). With the Hessian H = E[x xᵀ] of a linear's inputs, a row w that is stored as ŵ errs by
(w − ŵ)ᵀ H (w − ŵ). Columns are rounded one after another. When column i takes the value ŵ_i, the best that the columns
after it can do is to move by −(w_i − ŵ_i) / U_ii · U_i,j, with U the upper Cholesky factor of H⁻¹ = Uᵀ U; what then
remains of the error is the sum of ((w_i − ŵ_i) / U_ii)². Columns beyond a block of 128 get the errors of the whole block
at once, in one GEMM. Rows do not know of one another.

    damping   the mean of the diagonal, times `damp`, is added to it; ten times as much as long as H is not positive definite
    order     by falling diagonal: columns of large inputs are rounded while many others can still answer for them. Only
              the order of work changes: groups keep their columns and scales are fixed beforehand, so a file says nothing
    scales    searched with their sign as `search` does, weighted by 1 / U_ii², what column i counts once those after it
              have answered. That search sees the weights before anything moved, so it is repeated on the weights as they
              were when their turn came; each row keeps the scales that leave it the smaller error
    sweeps    at the end each code in turn takes its best value, all others held: what came first was rounded before the
              rest was known
    dead      a channel that is always zero is rounded to nearest, and neither takes nor gives errors

U comes from the Cholesky factor of H with its columns reversed, in float64, without an inverse of H; all else is float32.
Cost: 2/3·K³ for U, N·K²/2 multiply-adds for each pass and 3/2·N·K² for each sweep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from quantpub.algorithms.base import FLOAT_ZERO, Algorithm, Groups, by_row_blocks, coded, in_blocks, int_reject
from quantpub.algorithms.scales import best_scale, choose, descend, limits
from quantpub.qtensor import QTensor
from quantpub.scheme import WHOLE, Scheme
from quantpub.stats import Stats

BLOCK = 128
ELEMENTS = 1 << 24  # of a block of rows on the CPU: long enough for GEMMs, and 128 columns of it stay in cache
ATTEMPTS = 8  # at damping


@dataclass(frozen=True)
class Params:
    """damp: part of the mean of the Hessian's diagonal that is added to it. order: of columns, by `falling` diagonal or not.

    grid, shrink, refine: of the search for scales. passes: times that the scales are searched and the columns solved.
    sweeps: of descent over the codes at the end.
    """

    damp: float = 0.05
    order: Literal["falling", "original"] = "falling"
    grid: int = 8
    shrink: float = 0.8
    refine: int = 1
    passes: int = 2
    sweeps: int = 1

    def __post_init__(self) -> None:
        if not (self.grid >= 1 and 0 < self.shrink <= 1 and self.refine >= 0):
            raise ValueError("grid is at least 1, shrink lies in (0, 1], refine is at least 0")
        if not (self.damp >= 0 and self.passes >= 1 and self.sweeps >= 0):
            raise ValueError("damp and sweeps are at least 0, passes at least 1")


def reject(scheme: Scheme) -> str | None:
    if scheme.weight.zero_domain == FLOAT_ZERO:
        return "gptq finds integer zeros; for a float zero take hqq"
    return int_reject("gptq", scheme)


@dataclass(frozen=True, eq=False)
class Solver:
    """What all rows share. hessian_KK: damped, float32, in the file's order; factor_KK: U, float32, in order of work.

    order_K: the columns as they are worked on, int64. weight_K: 1 / U_ii² in the file's order, 0 for a dead channel.
    group: columns that share a scale. low, high: range of the codes.
    """

    hessian_KK: torch.Tensor
    factor_KK: torch.Tensor
    order_K: torch.Tensor
    weight_K: torch.Tensor
    group: int
    low: float
    high: float

    @staticmethod
    def of(hessian_KK: torch.Tensor, scheme: Scheme, params: Params) -> Solver:
        """hessian_KK: symmetric, finite, its diagonal not negative."""
        diagonal_K = hessian_KK.diagonal()
        assert bool(torch.isfinite(hessian_KK).all()), "gptq: the Hessian holds values that are not finite"
        assert bool((diagonal_K >= 0).all()), "gptq: the Hessian is no mean of x xᵀ, its diagonal is negative"
        order_K = torch.argsort(diagonal_K, descending=True, stable=True)
        if params.order == "original":
            order_K = torch.arange(len(diagonal_K), device=hessian_KK.device)
        damped_KK, factor_KK = _factor(hessian_KK, order_K, params.damp)
        weight_K = torch.empty_like(diagonal_K, dtype=torch.float32)
        weight_K[order_K] = factor_KK.diagonal() ** -2
        weight_K[diagonal_K == 0] = 0
        number, group = scheme.weight.number, scheme.group_size if scheme.group_size != WHOLE else len(diagonal_K)
        return Solver(damped_KK, factor_KK, order_K, weight_K, group, number.low, number.high)

    def solve(
        self, w_RK: torch.Tensor, scale_RG: torch.Tensor, zero_RG: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes less their zero, the weights as they were when their turn came (both float32 [R, K]), and the error [R]."""
        w_KR = w_RK.float().T[self.order_K].contiguous()
        u_KR, error_R = torch.empty_like(w_KR), w_KR.new_zeros(w_KR.shape[1])
        scale_GR = scale_RG.float().T.contiguous()
        steps = (scale_GR, *limits(self.low, self.high, scale_GR, zero_RG))
        groups, columns = (self.order_K // self.group).tolist(), len(w_KR)
        for start in range(0, columns, BLOCK):
            end = min(start + BLOCK, columns)
            factor_BK, block = self.factor_KK[start:end], slice(start, end)
            off_BR = _round(w_KR[block], u_KR[block], factor_BK[:, block], groups[block], steps)
            w_KR[end:].addmm_(factor_BK[:, end:].T, off_BR, alpha=-1)
            error_R += off_BR.square_().sum(0)
        back_K = torch.argsort(self.order_K)
        return u_KR[back_K].T.contiguous(), w_KR[back_K].T.contiguous(), error_R

    def sweep(
        self, w_RK: torch.Tensor, u_RK: torch.Tensor, scale_RG: torch.Tensor, zero_RG: torch.Tensor | None
    ) -> torch.Tensor:
        """`u_RK` after each code in turn took its best value: the damped error of no row grows. New, float32 [R, K]."""
        scale_GR = scale_RG.float().T.contiguous()
        low_GR, high_GR = limits(self.low, self.high, scale_GR, zero_RG)
        of_K = torch.arange(w_RK.shape[1], device=w_RK.device) // self.group
        u_KR = u_RK.T.contiguous()
        pull_KR = self.hessian_KK @ (w_RK.float().T - u_KR * scale_GR[of_K])
        for start in range(0, len(u_KR), BLOCK):
            end = min(start + BLOCK, len(u_KR))
            block, of_B = slice(start, end), of_K[start:end]
            h_BB1, steps = self.hessian_KK[block, block, None], (scale_GR[of_B], low_GR[of_B], high_GR[of_B])
            moved_BR = descend(u_KR[block], pull_KR[block], h_BB1, *steps)
            pull_KR[end:].addmm_(self.hessian_KK[end:, block], moved_BR)
        return u_KR.T.contiguous()


def _round(
    w_BR: torch.Tensor,
    u_BR: torch.Tensor,
    factor_BB: torch.Tensor,
    groups: list[int],
    steps: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Round the columns of a block one by one: fills `u_BR`, moves `w_BR`, returns every error over its U_ii, [B, R]."""
    scale_GR, low_GR, high_GR = steps
    off_BR, diagonal = torch.empty_like(w_BR), factor_BB.diagonal().tolist()
    for i, group in enumerate(groups):
        scale_R = scale_GR[group]
        nearest_R = torch.maximum((w_BR[i] / scale_R).round_(), low_GR[group])
        u_BR[i] = torch.minimum(nearest_R, high_GR[group])
        off_BR[i] = (w_BR[i] - u_BR[i] * scale_R) / diagonal[i]
        w_BR[i + 1 :].addr_(factor_BB[i, i + 1 :], off_BR[i], alpha=-1)
    return off_BR


def _factor(hessian_KK: torch.Tensor, order_K: torch.Tensor, damp: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The damped Hessian in the file's order, and U of it in order of work: H⁻¹ = Uᵀ U. Both float32."""
    last_K, damped_KK = order_K.flip(0), hessian_KK.to(torch.float32, copy=True)
    lower_KK, diagonal_K = _cholesky(hessian_KK[last_K][:, last_K].double(), damp)
    damped_KK.diagonal()[last_K] = diagonal_K.float()
    upper_KK = lower_KK.flip(0, 1)  # H = upper · upperᵀ, so U is its inverse
    del lower_KK
    one_KK = torch.eye(len(order_K), dtype=torch.float64, device=hessian_KK.device)
    return damped_KK, torch.linalg.solve_triangular(upper_KK, one_KK, upper=True).float()


def _cholesky(h_KK: torch.Tensor, damp: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower factor of `h_KK`, float64, with the first damping that makes it positive definite, and the diagonal it had."""
    mean = h_KK.diagonal().mean().item() or 1.0
    diagonal_K = torch.where(h_KK.diagonal() == 0, mean, h_KK.diagonal())
    for attempt in range(ATTEMPTS):
        h_KK.diagonal().copy_(diagonal_K + mean * (damp if attempt == 0 else max(damp, 1e-4) * 10**attempt))
        lower_KK, failed = torch.linalg.cholesky_ex(h_KK)
        if not failed.item():
            return lower_KK, h_KK.diagonal()
    raise AssertionError("gptq: the Hessian is not positive definite, whatever its damping")


def quantize(w_NK: torch.Tensor, stats: Stats | None, scheme: Scheme, params: Params) -> QTensor:
    """w_NK: float [N, K] with K a multiple of the group size; stats.hessian_KK: float32 [K, K], on any device.

    Scale in its stored dtype, possibly negative where there is no zero; zero int8, where there is one. Linears that share
    an input may be given as one weight, rows under rows: their Hessian is then factored once.
    """
    assert stats is not None and stats.hessian_KK is not None, "gptq needs the Hessian of the linear's inputs"
    k = w_NK.shape[1]
    assert stats.hessian_KK.shape == (k, k), f"gptq: a Hessian of {tuple(stats.hessian_KK.shape)} for {k} columns"
    solver = Solver.of(stats.hessian_KK.to(w_NK.device), scheme, params)
    weights = Stats(second_moment_K=solver.weight_K)

    def search(w_RK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        groups = Groups.of(w_RK, weights, scheme)
        pair = best_scale(groups, scheme, params.grid, params.shrink, params.refine, w_NK.dtype)
        return tuple(part for part in pair if part is not None)

    def scales(w_RK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        scale_RG, *zero_RG = in_blocks(search, w_RK)
        return scale_RG, zero_RG[0] if zero_RG else None

    def rows(w_RK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scale_RG, zero_RG = scales(w_RK)
        u_RK, moved_RK, error_R = solver.solve(w_RK, scale_RG, zero_RG)
        for _ in range(params.passes - 1):
            again_RG, with_RG = scales(moved_RK)
            again_RK, moved_RK, error = solver.solve(w_RK, again_RG, with_RG)
            better_R1 = (error < error_R)[:, None]
            u_RK, scale_RG = torch.where(better_R1, again_RK, u_RK), torch.where(better_R1, again_RG, scale_RG)
            zero_RG, error_R = choose(better_R1, with_RG, zero_RG), torch.minimum(error, error_R)
        for _ in range(params.sweeps):
            u_RK = solver.sweep(w_RK, u_RK, scale_RG, zero_RG)
        return coded(u_RK.view(*scale_RG.shape, -1), w_RK, scale_RG, zero_RG)

    return by_row_blocks(rows, w_NK, scheme, ELEMENTS)


ALGORITHM = Algorithm("gptq", Params, reject, quantize, needs=("hessian",))
