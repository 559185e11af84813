"""One GEMM on a CUDA device: every kernel checked, then all of them and the baseline timed together at each M.

Legend: M tokens. All kernels of a GEMM take part in the same rounds, so each is compared with the baseline of its own
moment. A kernel whose op fails at an M is left out there, with what the op said; so is one so slow that the rounds of all
would not fit into the time that is left. Where the device has no memory for a GEMM, its kernels are listed with that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from quantpub.engines.symbols import looked_at
from quantpub.kernels.base import OP_ERRORS, Kernel, Operands, Weight
from quantpub.kernels.check import Probe, check, check_split, judge, make_probe, tolerance
from quantpub.kernels.cuda import Captured, cache_bytes, capture, rotated, tidy, together
from quantpub.kernels.measure import Budget, Measured, failure, figures
from quantpub.timing import MINIMUM, NO_ROOM, Bench

BASE = "baseline"
NO_BASELINE = "the baseline has no time"
MOST = 0.12  # seconds of rounds for one GEMM at one M: beyond, the interval hardly narrows
OTHERS = "when its captured call is given other activations"
KEEPS = "the call keeps something from earlier; nothing was recorded of it"


@dataclass(frozen=True)
class Taken:
    """A kernel and the weight that it is given."""

    kernel: Kernel
    weight: Weight


@dataclass
class Prepared:
    """A kernel's weight in its own form, the copies that rotate, and what it must compute."""

    kernel: Kernel
    probe: Probe
    copies: list[Operands]
    error: float = 0.0

    def check(self, gemm: str, m: int) -> None:
        self.error = max(self.error, check(self.kernel, gemm, self.copies[0], self.probe, m))


class CudaGemm:
    """failed: kernel → what its op said when it was prepared.

    Errors: GateError for a wrong kernel; torch.OutOfMemoryError where not even the baseline has room.
    """

    def __init__(self, gemm: str, baseline: Taken, taken: Sequence[Taken], bench: Bench) -> None:
        torch.cuda.empty_cache()
        self.gemm, self.bench, self.cache = gemm, bench, cache_bytes()
        self.failed: dict[str, str] = {}
        self.baseline = self._prepare(baseline)
        self.kernels: list[Prepared] = []
        for each in taken:
            try:
                self.kernels.append(self._prepare(each))
            except OP_ERRORS as error:
                self.failed[each.kernel.name] = failure(error)

    def _prepare(self, taken: Taken) -> Prepared:
        kernel, q = taken.kernel, taken.weight.q
        operands = kernel.prepare(taken.weight)
        probe = check_split(kernel, self.gemm, operands, make_probe(q), q)
        found = Prepared(kernel, probe, rotated(operands, self.cache))
        for m in (1, len(probe.x_PK)):
            found.check(self.gemm, m)
        return found

    @property
    def names(self) -> list[str]:
        return [each.kernel.name for each in self.kernels]

    def numerics(self) -> list[dict[str, Any]]:
        """The largest error that each kernel showed at any M."""
        return [
            {
                "kernel": each.kernel.name,
                "gemm": self.gemm,
                "relative_error": round(each.error, 6),
                "tolerance": tolerance(each.kernel, each.probe.scheme),
            }
            for each in (self.baseline, *self.kernels)
        ]

    def symbols(self, m: int, only: Collection[str]) -> list[dict[str, Any]]:
        """What the kernels launched on the device at M = m, and why it is not what its name says, where it is not."""
        x_MK = self.baseline.probe.rows(m)
        return [
            looked_at(each.kernel, self.gemm, m, partial(each.kernel.run, x_MK, each.copies[0]))
            for each in (self.baseline, *self.kernels)
            if each.kernel.name in only
        ]

    def cell(self, m: int, share: float, limit: float) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """(the rows of every kernel at one M, kernel → why it has none)."""
        tidy()
        x_MK = self.baseline.probe.rows(m).contiguous()
        missing: dict[str, str] = {}
        try:
            graphs = {BASE: self._captured(self.baseline, m, x_MK)[BASE]}
        except OP_ERRORS as error:  # a small GPU has no room for the largest M
            return [], dict.fromkeys(self.names, f"{NO_BASELINE}: {failure(error)}")
        for each in self.kernels:
            try:
                graphs |= self._captured(each, m, x_MK)
            except OP_ERRORS as error:
                missing[each.kernel.name] = failure(error)
        missing |= dict.fromkeys(crowded(graphs, limit), NO_ROOM)
        present = [each for each in self.kernels if each.kernel.name not in missing]
        rounds = together(without(graphs, missing), self.bench, share, limit if present else 0.0)
        self._check_graphs(graphs, x_MK, m)
        if rounds.reason:
            return [], missing | {each.kernel.name: rounds.reason for each in present}
        rows = [self._row(each, m, rounds.times, graphs) for each in present]
        return rows, missing

    def _captured(self, each: Prepared, m: int, x_MK: torch.Tensor) -> dict[str, Captured]:
        """The kernel as a whole and, where it quantizes activations, its two steps. The whole comes last."""
        kernel, watch = each.kernel, self.bench.stopwatch
        each.check(self.gemm, m)
        name = BASE if each is self.baseline else kernel.name
        parts: dict[str, Captured] = {}
        if split := kernel.split:
            activations = split.quantize(x_MK)
            parts[f"{name}/quantize"] = capture(lambda w: split.quantize(x_MK), each.copies[:1], watch)
            parts[f"{name}/gemm"] = capture(partial(split.gemm, activations), each.copies, watch)
        return parts | {name: capture(partial(kernel.run, x_MK), each.copies, watch)}

    def _check_graphs(self, graphs: dict[str, Captured], x_MK: torch.Tensor, m: int) -> None:
        """Errors: GateError when a graph does not follow its activations."""
        x_MK.copy_(-x_MK.roll(1, 0))
        for each in (self.baseline, *self.kernels):
            name = BASE if each is self.baseline else each.kernel.name
            if name not in graphs:
                continue
            graphs[name].replay()
            result = graphs[name].result
            assert isinstance(result, torch.Tensor)
            judge(each.kernel, self.gemm, -result.roll(-1, 0), each.probe, m, f" {OTHERS}", KEEPS)

    def _row(
        self, each: Prepared, m: int, times: dict[str, list[float]], graphs: dict[str, Captured]
    ) -> dict[str, Any]:
        name = each.kernel.name
        own = {"baseline": times[BASE], "kernel": times[name]}
        own |= {part: times[f"{name}/{part}"] for part in ("quantize", "gemm") if f"{name}/{part}" in times}
        touched = len(each.copies) * sum(tensor.nbytes for tensor in each.copies[0])
        cold = graphs[name].calls == 1 or touched > self.cache
        return {"gemm": self.gemm, "kernel": name, "m": m, **figures(own, 0), "cold": cold}


def crowded(graphs: Mapping[str, Captured], limit: float) -> list[str]:
    """Kernels to leave out, the slowest first, until MINIMUM rounds and the first, which does not count, fit into `limit` s."""
    took: dict[str, float] = {}
    for name, graph in graphs.items():
        took[_kernel(name)] = took.get(_kernel(name), 0.0) + graph.took
    found: list[str] = []
    for name in sorted((name for name in took if name != BASE), key=lambda name: took[name], reverse=True):
        if (MINIMUM + 1) * sum(took.values()) <= 1e6 * limit:
            break
        del took[name]
        found.append(name)
    return found


def without(graphs: Mapping[str, Captured], missing: Mapping[str, str]) -> dict[str, Captured]:
    return {name: graph for name, graph in graphs.items() if _kernel(name) not in missing}


def _kernel(name: str) -> str:
    """Of a graph of one of its steps, too."""
    return name.partition("/")[0]


class Timed(Protocol):
    """What one M after another is timed of: a GEMM, or a layer's experts.

    names: the kernels that are ready. failed: kernels that no M is tried of → why.
    """

    bench: Bench
    failed: dict[str, str]

    @property
    def names(self) -> list[str]: ...

    def cell(self, m: int, share: float, limit: float) -> tuple[list[dict[str, Any]], dict[str, str]]: ...


def measure_cuda(gemm: Timed, batch: Sequence[int], budget: Budget, step: Callable[[], None]) -> Measured:
    """Every M, ascending. `step` is called once for each (kernel, M)."""
    result, started = Measured(), gemm.bench.clock()
    purse = budget.share()
    for place, m in enumerate(batch):
        left = max(0.0, purse - gemm.bench.since(started))
        rows, missing = _cell(gemm, m, min(MOST, left / (len(batch) - place)), left)
        missing = missing | gemm.failed
        result.rows += rows
        result.missing += [(kernel, m, reason) for kernel, reason in missing.items()]
        for _ in range(len(rows) + len(missing)):
            step()
    budget.spend(gemm.bench.since(started))
    return result


def _cell(gemm: Timed, m: int, share: float, limit: float) -> tuple[list[dict[str, Any]], dict[str, str]]:
    try:
        return gemm.cell(m, share, limit)
    except torch.OutOfMemoryError as error:
        return [], dict.fromkeys(gemm.names, failure(error))


def unprepared(
    kernels: Sequence[str], batch: Sequence[int], reason: str, budget: Budget, step: Callable[[], None]
) -> Measured:
    """All of a GEMM that is not measured at all."""
    budget.spend(0.0)
    for _ in range(len(kernels) * len(batch)):
        step()
    return Measured([], [(kernel, m, reason) for kernel in kernels for m in batch])
