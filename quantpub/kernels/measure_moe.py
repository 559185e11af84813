"""A layer's experts on a CUDA device: every grouped kernel checked, then all of them timed together at each M.

Legend: M tokens. What rotates is the routing: each call of a graph sends the same tokens to other experts, so that a few
tokens do not find their experts' weights in the cache. The baseline is the fastest bf16 kernel for experts that is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from quantpub.decode import Decoder
from quantpub.engines.symbols import looked_at
from quantpub.experts import ExpertLayer, ExpertWeights, load
from quantpub.kernels import moe
from quantpub.kernels.base import OP_ERRORS, Operands
from quantpub.kernels.check import relative_error, require
from quantpub.kernels.cuda import Captured, cache_bytes, capture, tidy, together
from quantpub.kernels.measure import Budget, Measured, failure, figures
from quantpub.kernels.measure_cuda import (
    BASE,
    KEEPS,
    NO_BASELINE,
    OTHERS,
    crowded,
    measure_cuda,
    unprepared,
    without,
)
from quantpub.kernels.moe_base import MoeKernel
from quantpub.kernels.moe_check import check_moe, make_probes, tolerance, traffic
from quantpub.registry import load as find
from quantpub.timing import NO_ROOM, Bench

ROUTINGS = 16  # a graph's calls go through so many


@dataclass(frozen=True)
class MoeChoice:
    """A kernel, and why no layer runs on it here or why one does not."""

    kernel: MoeKernel
    unavailable: str | None
    refused: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        kernel = self.kernel
        facts: dict[str, Any] = {"name": kernel.name, "layout": kernel.layout, "package": kernel.package}
        facts |= {"row": kernel.row, "experts": True, "acts": list(kernel.acts)}
        return {**facts, "unavailable": self.unavailable}


def choose_moe(layers: Sequence[ExpertLayer], device: str, kernels: Sequence[str] | None) -> list[MoeChoice]:
    """Those asked for, or all but the baselines. Empty where the model has no experts."""
    baselines = {name for names in moe.MOE_BASELINES.values() for name in names}
    names = [name for name in moe.MOE_KERNELS if name not in baselines and (kernels is None or name in kernels)]
    return [_choice(find(moe.MOE_KERNELS, "MoE kernel", name), layers, device) for name in names] if layers else []


def _choice(kernel: MoeKernel, layers: Sequence[ExpertLayer], device: str) -> MoeChoice:
    refused = {layer.name: reason for layer in layers if (reason := kernel.refuses(layer))}
    if device not in kernel.devices:
        where = " and ".join(kernel.devices)
        return MoeChoice(kernel, f"it runs on {where}; this was measured on {device}", refused)
    reason = next(iter(refused.values())) if len(refused) == len(layers) else kernel.unavailable()
    return MoeChoice(kernel, reason, refused)


class CudaExperts:
    """failed: kernel → what it said when it was prepared.

    Errors: GateError for a wrong kernel; torch.OutOfMemoryError where not even the baseline has room.
    """

    def __init__(self, weights: ExpertWeights, baseline: MoeKernel, kernels: Sequence[MoeKernel], bench: Bench) -> None:
        torch.cuda.empty_cache()
        self.layer, self.bench, self.cache = weights.layer, bench, cache_bytes()
        self.probes = make_probes(weights)
        self.used: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        self.operands: dict[str, Operands] = {}
        self.kernels = {kernel.name: kernel for kernel in kernels}
        self._prepare(BASE, baseline, weights)
        for name, kernel in self.kernels.items():
            try:
                self._prepare(name, kernel, weights)
            except OP_ERRORS as error:
                self.failed[name] = failure(error)
        self.kernels = {BASE: baseline} | {n: k for n, k in self.kernels.items() if n not in self.failed}

    def _prepare(self, name: str, kernel: MoeKernel, weights: ExpertWeights) -> None:
        self.operands[name] = kernel.prepare(weights)
        self._check(name, kernel, None)

    def _check(self, name: str, kernel: MoeKernel, m: int | None) -> None:
        used = check_moe(kernel, self.layer.name, self.operands[name], self.probes, m)
        self.used[name] = max(used, self.used.get(name, 0.0))

    @property
    def names(self) -> list[str]:
        return [name for name in self.kernels if name != BASE]

    def numerics(self) -> list[dict[str, Any]]:
        """The largest part of its tolerance that each kernel used, as an error on the first probe."""
        return [
            {
                "kernel": kernel.name,
                "gemm": self.layer.name,
                "relative_error": round(self.used[name] * tolerance(kernel, self.probes[0]), 6),
                "tolerance": round(tolerance(kernel, self.probes[0]), 6),
            }
            for name, kernel in self.kernels.items()
        ]

    def symbols(self, m: int) -> list[dict[str, Any]]:
        """What each kernel launched on the device at M = m, and why it is not what its name says, where it is not."""
        (routing,) = traffic(self.layer, m, 1, torch.device("cuda"))
        return [
            looked_at(kernel, self.layer.name, m, partial(_call, kernel, self.operands[name], routing))
            for name, kernel in self.kernels.items()
        ]

    def cell(self, m: int, share: float, limit: float) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """(the rows of every kernel at one M, kernel → why it has none)."""
        tidy()
        routings: list[Operands] = list(traffic(self.layer, m, ROUTINGS, torch.device("cuda")))
        graphs, missing = dict[str, Captured](), dict[str, str]()
        for name, kernel in self.kernels.items():
            try:
                self._check(name, kernel, m)
                graphs[name] = capture(partial(_call, kernel, self.operands[name]), routings, self.bench.stopwatch)
            except OP_ERRORS as error:
                missing[name] = failure(error)
        if BASE in missing:
            return [], dict.fromkeys(self.names, f"{NO_BASELINE}: {missing[BASE]}")
        missing |= dict.fromkeys(crowded(graphs, limit), NO_ROOM)
        timed = [name for name in self.names if name not in missing]
        rounds = together(without(graphs, missing), self.bench, share, limit if timed else 0.0)
        self._check_graphs(graphs, routings, m)
        if rounds.reason:
            return [], missing | dict.fromkeys(timed, rounds.reason)
        return [self._row(name, m, rounds.times) for name in timed], missing

    def _check_graphs(self, graphs: Mapping[str, Captured], routings: Sequence[Operands], m: int) -> None:
        """Errors: GateError when a graph does not follow its activations. A call outside of it says what is due."""
        for x_MK, *_ in routings:
            x_MK.neg_()
        for name, graph in graphs.items():
            graph.replay()
            last = routings[(graph.calls - 1) % len(routings)]
            due = _call(self.kernels[name], self.operands[name], last).float()
            assert isinstance(graph.result, torch.Tensor)
            kernel, error = self.kernels[name], relative_error(graph.result, due)
            allowed = tolerance(kernel, self.probes[0])
            require(error, allowed, kernel.name, self.layer.name, f"M = {m} {OTHERS}", KEEPS)

    def _row(self, name: str, m: int, times: dict[str, list[float]]) -> dict[str, Any]:
        own = {"baseline": times[BASE], "kernel": times[name]}
        met = sum(tensor.nbytes for tensor in self.operands[name])
        return {"gemm": self.layer.name, "kernel": name, "m": m, **figures(own, 0), "cold": met > self.cache}


def _call(kernel: MoeKernel, operands: Operands, routing: Operands) -> torch.Tensor:
    x_MK, weights_MT, ids_MT = routing
    return kernel.run(x_MK, weights_MT, ids_MT, operands)


def measure_experts(
    decoder: Decoder,
    layer: ExpertLayer,
    choices: Sequence[MoeChoice],
    batch: Sequence[int],
    bench: Bench,
    budget: Budget,
    step: Callable[[], None],
) -> tuple[Measured, list[dict[str, Any]]]:
    """One kind of layer over every M: its rows, and what the checks found."""
    baseline, why = moe.baseline("cuda")
    kernels = [choice.kernel for choice in choices if choice.unavailable is None and layer.name not in choice.refused]
    names = [kernel.name for kernel in kernels]
    if baseline is None or not kernels:
        return unprepared(names, batch, why, budget, step), []
    try:
        experts = CudaExperts(load(decoder, layer, "cuda"), baseline, kernels, bench)
    except torch.OutOfMemoryError as error:
        return unprepared(names, batch, failure(error), budget, step), []
    measured = measure_cuda(experts, batch, budget, step)
    measured.symbols = experts.symbols(batch[0])
    return measured, experts.numerics()
