"""Whether a kernel computes what its weight means, checked before it is timed. A fast wrong answer is not a speedup.

Legend: M tokens, P probe rows, N out_features, K in_features.

The reference is x @ dequantize(q).T in float32 (law 1), for activations drawn from a normal distribution. The error is
relative: of the whole output, of its worst column and of its worst row where there are enough numbers to judge one, so that
a single wrong scale among thousands of rows is seen, and a single wrong token among thousands of tokens.

What a kernel loses by rounding activations would hide its faults. Where it shows them rounded, its output must also be that
of the rounded ones, within the tolerance of the product alone. They are rounded token by token, or under one calibrated
scale, so that the results of the probe's rows are due again wherever those rows are repeated.

Enough numbers: of d independent ones the root mean square is, once in four million, 1.67 times what is usual (χ²), and
measured errors are up to 0.6 of what is tolerated: d = 32. A column has as many as there are tokens. A row's are as many as
the results have directions, (Σλ)² / Σλ² of their covariance's eigenvalues λ: fewer than columns where some of these are
large or all are alike. A row is compared with its own size or the usual one, whichever is larger.

Activations that a checkpoint gives a calibrated scale are drawn to fill it: beyond it they would saturate.

Tolerance, from unit roundoffs u (half a step). Each rounding moves every term of a dot product by at most u, in a direction
of its own; for independent activations the mean square error is then at most u² of the mean square output. A kernel may
round the weight (code times scale is longer than bf16), the output, and, when it quantizes activations, those: the
tolerance is the sum of their u. The float32 sums add under 2⁻¹⁶. Measured errors are 0.3 to 0.6 of it, since roundings are
rarely half a step. Swapped nibbles give errors near 1, a scale of the neighbouring group 0.1 and more.

    bf16, FP8 E4M3   2⁻⁸ and 2⁻⁴ of each value, whatever shares a scale: a token, 128 columns or the tensor. Values that
                     the scale puts below the normal ones lose more of themselves, but of a row next to nothing.
    int8             the step is 1/127 of the token's largest, so half of one is amax/254 for every value. The amax of K
                     normal values is about √(2 ln 2K) standard deviations, 5.4 for a million: 5.4/254.
    FP4 E2M1         2⁻² of each normal value; below the smallest of those half a step is 1/24 of the block's amax, 2.1
                     standard deviations in 16 normal values: √(2⁻⁴ + (2.1/24)²) = 0.265. That the block's scale is itself
                     rounded to E4M3 costs no more: the codes are found under the rounded one.
    Machete's zeros  −scale·zero is rounded to bf16, and so is scale·code, before they are added. Either may be larger
                     than the weight, a zero of 8 some three times its standard deviation: 2u each on top. Measured: 0.4 %
                     in place of 0.2 %. Weights without whole zeros get nothing on top, and Marlin gets nothing with them.

A kernel that answers from an earlier call is found by giving it other activations first, of the same shape and at the same
address: their results are twice as far from the right ones as 0 is. One that keeps an earlier weight gives that one's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from quantpub.errors import GateError
from quantpub.kernels.base import Kernel, Operands
from quantpub.qtensor import QTensor, dequantize
from quantpub.scheme import NUMBERS, Scheme

ROUNDOFF = {"bf16": 2.0**-8, "fp8_e4m3": 2.0**-4, "int8": 5.4 / 254, "fp4_e2m1": 0.265}
GEMM_TOLERANCE = 2 * ROUNDOFF["bf16"]  # the weight and the output, each rounded to bf16 once
ZEROS = {"machete": 4 * ROUNDOFF["bf16"]}  # kernel → what it loses on top where the weight has whole zeros
PROBE_ROWS = 61  # a prime: a kernel that mixes up tiles of 16 or 64 rows does not meet the same row again
ENOUGH = 32  # independent numbers that a row or a column is judged by
SEED = 0
FIND_OUT = "nothing was timed on it; run `quantpub verify` to see whether the artifact or the kernel is at fault"


@dataclass(frozen=True, eq=False)
class Probe:
    """x_PK: bf16 activations. y_PN: what they must give, float32. scheme: the weight's.

    rounded_PN: what they must give as one kernel rounds them, float32; None for one that does not.
    """

    x_PK: torch.Tensor
    y_PN: torch.Tensor
    scheme: Scheme | None = None
    rounded_PN: torch.Tensor | None = None

    def rows(self, m: int) -> torch.Tensor:
        """x_MK for any M: the probe's rows, over and over."""
        return self.x_PK[self._cycle(m)]

    def others(self, m: int) -> torch.Tensor:
        """Activations of the same shape and size whose results lie on the other side of 0: `rows` negated, a new tensor."""
        return -self.rows(m)

    def expected(self, m: int) -> torch.Tensor:
        return self.y_PN[self._cycle(m)]

    def rounded(self, m: int) -> torch.Tensor | None:
        return None if self.rounded_PN is None else self.rounded_PN[self._cycle(m)]

    def _cycle(self, m: int) -> torch.Tensor:
        return torch.arange(m, device=self.x_PK.device) % len(self.x_PK)


def make_probe(q: QTensor) -> Probe:
    generator = torch.Generator().manual_seed(SEED)
    x_PK = torch.randn(PROBE_ROWS, q.shape[1], generator=generator).to(q.codes_NK.device)
    if (high := limit(q)) is not None:
        x_PK *= high / x_PK.abs().amax()
    x_PK = x_PK.to(torch.bfloat16)
    return Probe(x_PK, x_PK.float() @ dequantize(q).t(), q.scheme)


def limit(q: QTensor) -> torch.Tensor | None:
    """The largest activation that a calibrated scale can hold, or None."""
    if q.input_scale is None or q.scheme.act is None:
        return None
    act = q.scheme.act
    return q.input_scale * NUMBERS[act.num].high * (NUMBERS["fp8_e4m3"].high if act.global_scale else 1.0)


def tolerance(kernel: Kernel, scheme: Scheme | None = None) -> float:
    """Without a scheme: the largest that any gives."""
    zeros = scheme is None or scheme.weight.zero_domain == "int"
    extra = ZEROS.get(kernel.name, 0.0) if zeros else 0.0
    return GEMM_TOLERANCE + extra + (ROUNDOFF[kernel.split.num] if kernel.split else 0.0)


def relative_error(y_MN: torch.Tensor, expected_MN: torch.Tensor) -> float:
    """The largest relative error: of the whole output and, from ENOUGH rows on, of a column and of a row. May be NaN."""
    off_MN = y_MN.float() - expected_MN
    worst = _ratio(off_MN.norm(), expected_MN.norm())
    if len(expected_MN) >= ENOUGH:
        worst = torch.maximum(worst, _ratio(off_MN.norm(dim=0), expected_MN.norm(dim=0)).amax())
        if directions(expected_MN) >= ENOUGH:
            size_M = expected_MN.norm(dim=1)
            usual = size_M.square().mean().sqrt()
            worst = torch.maximum(worst, _ratio(off_MN.norm(dim=1), torch.maximum(size_M, usual)).amax())
    return float(worst)


def _ratio(off: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    return off / size.clamp_min(torch.finfo(torch.float32).tiny)  # what must be zero tolerates nothing


def directions(y_MN: torch.Tensor) -> float:
    """(Σλ)² / Σλ² of the covariance of rows, from their products: the mean square of two different ones' is Σλ²."""
    y_PN = y_MN[:PROBE_ROWS]
    y_PN = _ratio(y_PN, y_PN.norm())
    products_PP = y_PN @ y_PN.t()
    own_P = products_PP.diagonal()
    others = (products_PP.square().sum() - own_P.square().sum()) / (len(own_P) * (len(own_P) - 1))
    return float(_ratio(own_P.mean().square(), others))


def check(kernel: Kernel, gemm: str, operands: Operands, probe: Probe, m: int) -> float:
    """The relative error of `kernel` at M = m. Errors: GateError when its number formats do not explain it."""
    x_MK = probe.others(m)
    kernel.run(x_MK, operands)
    return judge(kernel, gemm, kernel.run(x_MK.neg_(), operands), probe, m)


def judge(
    kernel: Kernel, gemm: str, y_MN: torch.Tensor, probe: Probe, m: int, when: str = "", advice: str = FIND_OUT
) -> float:
    """The relative error of what `kernel` made of `probe.rows(m)`. Errors: GateError as of `check`."""
    error, at = relative_error(y_MN, probe.expected(m)), f"M = {m}{when}"
    require(error, tolerance(kernel, probe.scheme), kernel.name, gemm, at, advice)
    if (rounded_MN := probe.rounded(m)) is not None:
        require(relative_error(y_MN, rounded_MN), GEMM_TOLERANCE, kernel.name, gemm, at, advice)
    return error


def check_split(kernel: Kernel, gemm: str, operands: Operands, probe: Probe, q: QTensor) -> Probe:
    """The GEMM alone, where a kernel rounds activations. Returns the probe with what is due of them when rounded.

    Errors: GateError when that is not what the GEMM makes of them.
    """
    if kernel.split is None:
        return probe
    x_PK = probe.others(PROBE_ROWS)
    kernel.split.gemm(kernel.split.activations(x_PK, operands), operands)
    activations = kernel.split.activations(x_PK.neg_(), operands)
    rounded_PN = kernel.split.dequantize(activations) @ dequantize(q).t()
    error = relative_error(kernel.split.gemm(activations, operands), rounded_PN)
    require(error, GEMM_TOLERANCE, kernel.name, gemm, f"M = {PROBE_ROWS}")
    return replace(probe, rounded_PN=rounded_PN)


def require(error: float, allowed: float, kernel: str, what: str, at: str, advice: str = FIND_OUT) -> None:
    """what: the GEMM or layer. at: where it was seen. Errors: GateError when the error is more than is allowed, or NaN."""
    if not error <= allowed:
        raise GateError(
            f"kernel {kernel} computes {what} wrong at {at}: relative error {error:.3g}, its number formats explain "
            f"{allowed:.3g}",
            where=f"{kernel} on {what}",
            next=advice,
        )
