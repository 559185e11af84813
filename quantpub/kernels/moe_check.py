"""Whether a kernel for experts computes what the weights mean, checked before it is timed. Legend as in moe_base.

The reference is float32 throughout, with every expert dequantized (law 1). Three routings: `routed`, softmax of random
logits, the top-k renormalised; `skewed`, where one expert has nearly every token and a quarter of them none; `each`, where
a token has one expert alone, in turn, so that one wrong expert of many is seen. Activations are drawn from a normal
distribution. A kernel is first run on other activations and ids: one that gives an old answer again is found out.

Tolerance, from unit roundoffs u (half a step, relative). As in `check`, a rounding moves each term of a dot product by at
most u of itself, in a direction of its own, so that the mean square error is at most u² of the mean square output; the
roundings are independent, and their squares add:
    w13      activations a₁, weights u, output u; felt twice, through gate and through up. Through silu an error of a
             normal gate grows by at most 1.034, relative (numerically, over all its deviations).
    silu·up  u twice
    w2       activations a₂, weights u, output u
    sum      u for each of the T − 1 additions, which vLLM makes in bf16 for small T
with u = 2⁻⁸ of bf16, and a of the activations' format: 2⁻⁴ of E4M3. A step of int8 is absolute, so its a is half a step
in units of the row's root mean square, the largest of the probe's rows. Kernels that keep more digits stay well below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantpub.experts import ExpertLayer, ExpertWeights
from quantpub.kernels.base import BF16, Operands
from quantpub.kernels.check import relative_error, require
from quantpub.kernels.moe_base import MoeKernel
from quantpub.qtensor import dequantize

U = 2.0**-8  # bf16
FLOATS = {BF16: 0.0, "fp8_e4m3": 2.0**-4}
SILU_GAIN = 1.034
PROBE_ROWS = 61
SPREAD = 2.0  # of the logits: the first of eight of 128 experts then weighs about 0.3
FAR = 12.0
SEED = 0


@dataclass(frozen=True, eq=False)
class MoeProbe:
    """x_PK bf16, weights_PT float32, ids_PT int32, and y_PK, what they must give, float32.

    peaks: the largest magnitude in units of the root mean square, over the rows before w13 and over those before w2.
    """

    routing: str
    experts: int
    x_PK: torch.Tensor
    weights_PT: torch.Tensor
    ids_PT: torch.Tensor
    y_PK: torch.Tensor
    peaks: tuple[float, float]

    def rows(self, m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x_MK, weights_MT, ids_MT) for any M: the probe's rows, over and over."""
        cycle = self._cycle(m)
        return self.x_PK[cycle], self.weights_PT[cycle], self.ids_PT[cycle]

    def others(self, m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As many tokens of other values, on other experts."""
        x_MK, weights_MT, ids_MT = self.rows(m)
        return -x_MK.flip(-1), weights_MT, (ids_MT + 1) % self.experts

    def expected(self, m: int) -> torch.Tensor:
        return self.y_PK[self._cycle(m)]

    def error(self, y_MK: torch.Tensor) -> float:
        """The relative error of what a kernel made of `rows(M)`."""
        _, weights_MT, ids_MT = self.rows(len(y_MK))
        return moe_error(y_MK, self.expected(len(y_MK)), weights_MT, ids_MT)

    def _cycle(self, m: int) -> torch.Tensor:
        return torch.arange(m, device=self.x_PK.device) % len(self.x_PK)


def route(logits_ME: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights_MT, ids_MT) of a router that renormalises its top-k."""
    weights_MT, ids_MT = logits_ME.float().softmax(-1).topk(top_k, dim=-1)
    return weights_MT / weights_MT.sum(-1, keepdim=True), ids_MT.to(torch.int32)


def make_probes(weights: ExpertWeights) -> list[MoeProbe]:
    """On the device of the weights."""
    experts, top_k = len(weights.gate), weights.layer.top_k
    generator = torch.Generator().manual_seed(SEED)
    logits = torch.randn(PROBE_ROWS, experts, generator=generator) * SPREAD
    far = torch.zeros(experts)
    far[experts // 2] = FAR
    far[experts - experts // 4 :] = -FAR
    routings = {"routed": route(logits, top_k), "skewed": route(logits + far, top_k), "each": _each(experts, top_k)}
    return [_probe(weights, name, *routing, generator) for name, routing in routings.items()]


def traffic(
    layer: ExpertLayer, m: int, batches: int, device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(x_MK, weights_MT, ids_MT) of `batches` batches for timing, each routed anew: every expert is as likely.

    A few tokens meet a few experts only. The same ones again would be found in the cache.
    """
    generator = torch.Generator(device).manual_seed(SEED)
    found = []
    for _ in range(batches):
        x_MK = torch.randn(m, layer.hidden, device=device, generator=generator).bfloat16()
        logits_ME = torch.randn(m, layer.experts, device=device, generator=generator)
        found.append((x_MK, *route(logits_ME * SPREAD, layer.top_k)))
    return found


def touched(layer: ExpertLayer, operands: Operands, m: int) -> int:
    """Bytes of weights that a batch of M such tokens reads, on average."""
    part = 1 - (1 - layer.top_k / layer.experts) ** m
    return int(part * sum(tensor.nbytes for tensor in operands))


def _each(experts: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token p has all its weight on expert p; the other ids, which a kernel may not leave out, weigh nothing."""
    ids = (torch.arange(max(experts, PROBE_ROWS))[:, None] + torch.arange(top_k)) % experts
    only = torch.zeros(ids.shape)
    only[:, 0] = 1.0
    return only, ids.to(torch.int32)


def _probe(
    weights: ExpertWeights, name: str, weights_PT: torch.Tensor, ids_PT: torch.Tensor, generator: torch.Generator
) -> MoeProbe:
    x_PK = torch.randn(len(ids_PT), weights.gate[0].shape[1], generator=generator).to(weights.device, torch.bfloat16)
    weights_PT, ids_PT = weights_PT.to(weights.device), ids_PT.to(weights.device)
    y_PK, peak = reference(weights, x_PK, weights_PT, ids_PT)
    return MoeProbe(name, len(weights.gate), x_PK, weights_PT, ids_PT, y_PK, (_peak(x_PK), peak))


def reference(
    weights: ExpertWeights, x_MK: torch.Tensor, weights_MT: torch.Tensor, ids_MT: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """(y_MK in float32, the largest peak of the rows before w2), expert by expert."""
    x, y, peak = x_MK.float(), torch.zeros_like(x_MK, dtype=torch.float32), 0.0
    for e in range(len(weights.gate)):
        row, slot = (ids_MT == e).nonzero(as_tuple=True)
        if len(row):
            gate, up = (x[row] @ dequantize(q).t() for q in (weights.gate[e], weights.up[e]))
            h = torch.nn.functional.silu(gate) * up
            peak = max(peak, _peak(h))
            y.index_add_(0, row, (h @ dequantize(weights.down[e]).t()) * weights_MT[row, slot, None])
    return y, peak


def _peak(rows: torch.Tensor) -> float:
    rms = rows.float().square().mean(-1).sqrt()
    least = torch.finfo(torch.float32).tiny  # a row of zeros has no peak
    return float((rows.float().abs().amax(-1) / rms.clamp_min(least)).amax())


def tolerance(kernel: MoeKernel, probe: MoeProbe) -> float:
    """The relative error that the number formats of `kernel` explain on `probe`."""
    first, second = (_roundoff(num, peak) for num, peak in zip(kernel.acts, probe.peaks, strict=True))
    w13 = (1 + SILU_GAIN**2) * (first**2 + 2 * U**2)
    w2 = second**2 + 2 * U**2
    return math.sqrt(w13 + 2 * U**2 + w2 + (probe.ids_PT.shape[1] - 1) * U**2)


def _roundoff(num: str, peak: float) -> float:
    return peak / (2 * 127) if num == "int8" else FLOATS[num]


def check_moe(
    kernel: MoeKernel, layer: str, operands: Operands, probes: Sequence[MoeProbe], m: int | None = None
) -> float:
    """The largest share of its tolerance that `kernel` uses at M = m; None: every probe's own rows, and so every expert.

    Errors: GateError when it uses more than all of it.
    """
    used = 0.0
    for probe in probes:
        size = len(probe.x_PK) if m is None else m
        kernel.run(*probe.others(size), operands)
        error = probe.error(kernel.run(*probe.rows(size), operands))
        allowed = tolerance(kernel, probe)
        require(error, allowed, kernel.name, layer, f"M = {size}, {probe.routing}")
        used = max(used, error / allowed)
    return used


def moe_error(y_MK: torch.Tensor, expected_MK: torch.Tensor, weights_MT: torch.Tensor, ids_MT: torch.Tensor) -> float:
    """The largest relative error: of the whole, of the worst column, and of the tokens that weigh one expert most."""
    if y_MK.shape != expected_MK.shape:
        return math.inf
    expert_M = ids_MT.gather(1, weights_MT.argmax(1, keepdim=True))[:, 0].long()
    squares = [part.float().square().sum(1) for part in (y_MK.float() - expected_MK, expected_MK)]
    off_E, whole_E = (torch.zeros(int(expert_M.max()) + 1, device=s.device).index_add_(0, expert_M, s) for s in squares)
    met = torch.bincount(expert_M) > 0
    least = torch.finfo(torch.float32).tiny
    by_expert = (off_E[met] / whole_E[met].clamp_min(least)).amax().sqrt()
    worst = float(by_expert)
    return max(relative_error(y_MK, expected_MK), worst) if not math.isnan(worst) else worst
