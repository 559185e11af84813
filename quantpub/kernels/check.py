"""Whether a kernel computes what its weight means, checked before it is timed. A fast wrong answer is not a speedup.

Legend: M tokens, P probe rows, N out_features, K in_features.

The reference is x @ dequantize(q).T in float32 (law 1), for activations drawn from a normal distribution. The error is
relative: of the whole output, and of its worst column where there are enough rows to judge one, so that a single wrong
scale among thousands of rows is seen.

Tolerance, from unit roundoffs u (half a step, relative: bf16 u = 2⁻⁸, FP8 E4M3 u = 2⁻⁴). Each rounding moves every term
of a dot product by at most u of itself, in a direction of its own; for independent activations the mean square error is
then at most u² of the mean square output. A kernel may round the weight (code times scale is longer than bf16), the
output, and, when it quantizes activations, those: the tolerance is the sum of their u. The float32 sums add under 2⁻¹⁶.
Measured errors are 0.3 to 0.6 of it, since roundings are rarely half a step. Swapped nibbles give errors near 1, a
scale of the neighbouring group 0.1 and more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantpub.errors import GateError
from quantpub.kernels.base import Kernel, Operands
from quantpub.qtensor import QTensor, dequantize

ROUNDOFF = {"bf16": 2.0**-8, "fp8_e4m3": 2.0**-4}
GEMM_TOLERANCE = 2 * ROUNDOFF["bf16"]  # the weight and the output, each rounded to bf16 once
PROBE_ROWS = 61  # a prime: a kernel that mixes up tiles of 16 or 64 rows does not meet the same row again
ENOUGH_ROWS = 32
SEED = 0


@dataclass(frozen=True, eq=False)
class Probe:
    """x_PK: bf16 activations. y_PN: what they must give, float32."""

    x_PK: torch.Tensor
    y_PN: torch.Tensor

    def rows(self, m: int) -> torch.Tensor:
        """x_MK for any M: the probe's rows, over and over."""
        return self.x_PK[self._cycle(m)]

    def expected(self, m: int) -> torch.Tensor:
        return self.y_PN[self._cycle(m)]

    def _cycle(self, m: int) -> torch.Tensor:
        return torch.arange(m, device=self.x_PK.device) % len(self.x_PK)


def make_probe(q: QTensor) -> Probe:
    generator = torch.Generator().manual_seed(SEED)
    x_PK = torch.randn(PROBE_ROWS, q.shape[1], generator=generator).to(q.codes_NK.device, torch.bfloat16)
    return Probe(x_PK, x_PK.float() @ dequantize(q).t())


def tolerance(kernel: Kernel) -> float:
    return GEMM_TOLERANCE + (ROUNDOFF[kernel.split.num] if kernel.split else 0.0)


def relative_error(y_MN: torch.Tensor, expected_MN: torch.Tensor) -> float:
    """The larger of the whole output's relative error and, from ENOUGH_ROWS rows on, the worst column's. May be NaN."""
    off_MN = y_MN.float() - expected_MN
    least = torch.finfo(torch.float32).tiny  # a column that must be zero tolerates nothing
    worst = off_MN.norm() / expected_MN.norm().clamp_min(least)
    if len(expected_MN) >= ENOUGH_ROWS:
        worst = torch.maximum(worst, (off_MN.norm(dim=0) / expected_MN.norm(dim=0).clamp_min(least)).amax())
    return float(worst)


def check(kernel: Kernel, gemm: str, operands: Operands, probe: Probe, m: int) -> float:
    """The relative error of `kernel` at M = m. Errors: GateError when its number formats do not explain it."""
    error = relative_error(kernel.run(probe.rows(m), operands), probe.expected(m))
    _require(error, tolerance(kernel), kernel, gemm, m)
    return error


def check_split(kernel: Kernel, gemm: str, operands: Operands, probe: Probe, q: QTensor) -> None:
    """The GEMM alone, where a kernel quantizes activations: what they lose in rounding must not hide its faults."""
    if kernel.split is None:
        return
    activations = kernel.split.quantize(probe.x_PK)
    expected_PN = kernel.split.dequantize(activations) @ dequantize(q).t()
    error = relative_error(kernel.split.gemm(activations, operands), expected_PN)
    _require(error, GEMM_TOLERANCE, kernel, gemm, PROBE_ROWS)


def _require(error: float, allowed: float, kernel: Kernel, gemm: str, m: int) -> None:
    if not error <= allowed:  # also when it is NaN
        raise GateError(
            f"kernel {kernel.name} computes {gemm} wrong at M = {m}: relative error {error:.3g}, its number formats "
            f"explain {allowed:.3g}",
            where=f"{kernel.name} on {gemm}",
            next="nothing was timed on it; run `quantpub verify` to see whether the artifact or the kernel is at fault",
        )
