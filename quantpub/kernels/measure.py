"""One GEMM on its kernels: each checked, then timed against the baseline at every M, within a share of the budget.

Legend: M tokens. A series is one (GEMM, kernel) over all M. The seconds that are left are shared evenly over the series
that are left, and within a series over its M, smallest first. What is not used goes to the next; what does not fit is
listed with the reason, so a slow kernel costs the others nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantpub.kernels.base import Kernel, Operands, Weight
from quantpub.kernels.check import Probe, check, check_split, make_probe, tolerance
from quantpub.timing import BUSY, DISTURBED, NO_ROOM, Bench, interleave, median, rotation


@dataclass
class Budget:
    """Seconds and series that are left. Preparing and checking a weight is not counted, measuring is."""

    seconds: float
    series: int

    def share(self) -> float:
        return max(self.seconds, 0.0) / max(self.series, 1)

    def spend(self, seconds: float) -> None:
        self.seconds, self.series = self.seconds - seconds, self.series - 1


@dataclass
class Measured:
    """As they stand in the evidence; missing: (kernel, M, reason). symbols: of grouped experts, what ran on the device."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    missing: list[tuple[str, int, str]] = field(default_factory=list)
    symbols: list[dict[str, Any]] = field(default_factory=list)


class GemmBench:
    """One GEMM's weight, prepared for the baseline and for every kernel, and the copies of it that rotate."""

    def __init__(
        self, gemm: str, weight: Weight, baseline: Kernel, kernels: Sequence[Kernel], bench: Bench, cache: int
    ) -> None:
        """Checks every kernel. `failed`: kernel → what its op said. Errors: GateError for a wrong kernel."""
        self.gemm, self.baseline, self.bench, self.cache = gemm, baseline, bench, cache
        self.probe = make_probe(weight.q)
        self.errors: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        self._pools: dict[str, list[Operands]] = {}
        self._probes: dict[str, Probe] = {}
        self._checked: set[tuple[str, int]] = set()
        self._prepare(baseline, weight)
        for kernel in kernels:
            try:
                self._prepare(kernel, weight)
            except RuntimeError as error:
                self.failed[kernel.name] = failure(error)
        self.kernels = [kernel for kernel in kernels if kernel.name not in self.failed]

    def _prepare(self, kernel: Kernel, weight: Weight) -> None:
        operands = kernel.prepare(weight)
        self._pools[kernel.name] = [operands]
        self._probes[kernel.name] = check_split(kernel, self.gemm, operands, self.probe, weight.q)
        for m in (1, len(self.probe.x_PK)):
            self._check(kernel, m)

    def _check(self, kernel: Kernel, m: int) -> None:
        if (kernel.name, m) not in self._checked:
            error = check(kernel, self.gemm, self._pools[kernel.name][0], self._probes[kernel.name], m)
            self.errors[kernel.name] = max(error, self.errors.get(kernel.name, 0.0))
            self._checked.add((kernel.name, m))

    def numerics(self) -> list[dict[str, Any]]:
        """The largest error that each kernel showed at any M."""
        return [
            {
                "kernel": kernel.name,
                "gemm": self.gemm,
                "relative_error": round(self.errors[kernel.name], 6),
                "tolerance": tolerance(kernel, self.probe.scheme),
            }
            for kernel in (self.baseline, *self.kernels)
        ]

    def cell(self, kernel: Kernel, m: int, share: float, limit: float) -> dict[str, Any] | str:
        """The row of one kernel at one M, or why there is none."""
        started = self.bench.clock()
        for each in (self.baseline, kernel):
            self._check(each, m)
        runs, copies, cold = self._runs(kernel, m)
        used = self.bench.since(started)
        rounds = interleave(runs, copies, self.bench, share - used, limit - used)
        if rounds.reason:
            return rounds.reason
        return {
            "gemm": self.gemm,
            "kernel": kernel.name,
            "m": m,
            **figures(rounds.times, rounds.disturbed),
            "cold": cold,
        }

    def _runs(self, kernel: Kernel, m: int) -> tuple[dict[str, Callable[[int], object]], int, bool]:
        x_MK, split = self.probe.rows(m), kernel.split
        activations = split.quantize(x_MK) if split else ()
        touched = (x_MK, *activations, *self._pools[self.baseline.name][0], *self._pools[kernel.name][0])
        plan = rotation(sum(tensor.nbytes for tensor in touched), 4 if split else 2, self.cache)
        dense, packed = (self._rotated(each.name, plan.copies) for each in (self.baseline, kernel))
        x = _copies((x_MK,), plan.copies)
        runs: dict[str, Callable[[int], object]] = {
            "baseline": lambda i: self.baseline.run(x[i][0], dense[i]),
            "kernel": lambda i: kernel.run(x[i][0], packed[i]),
        }
        if split:
            a = _copies(activations, plan.copies)
            runs |= {"quantize": lambda i: split.quantize(x[i][0]), "gemm": lambda i: split.gemm(a[i], packed[i])}
        return runs, plan.copies, plan.cold

    def _rotated(self, name: str, copies: int) -> list[Operands]:
        pool = self._pools[name]
        pool += _copies(pool[0], copies - len(pool))
        return pool


def _copies(operands: Operands, copies: int) -> list[Operands]:
    """Clones keep their strides: what is column-major stays so."""
    return [tuple(tensor.clone() for tensor in operands) for _ in range(copies)]


def figures(times: Mapping[str, Sequence[float]], disturbed: int) -> dict[str, Any]:
    """What a row says of its rounds: `kernel` and `baseline`, and apart `quantize` and `gemm`, in microseconds."""
    kernel, baseline = median(times["kernel"]), median(times["baseline"])
    speedup = median([base / own for base, own in zip(times["baseline"], times["kernel"], strict=True)])
    figures: dict[str, Any] = {
        "median_us": round(kernel.value, 3),
        "ci95_us": kernel.interval(3),
        "baseline_us": round(baseline.value, 3),
        "speedup": round(speedup.value, 4),
        "speedup_ci95": speedup.interval(4),
        "repeats": kernel.repeats,
        "disturbed": disturbed,
    }
    apart = {f"{part}_us": round(median(times[part]).value, 3) for part in ("quantize", "gemm") if part in times}
    return figures | apart


def measure(gemm: GemmBench, batch: Sequence[int], budget: Budget, step: Callable[[], None]) -> Measured:
    """Every kernel at every M of one GEMM, ascending. `step` is called once for each (kernel, M)."""
    result = Measured()
    for kernel in gemm.kernels:
        budget.spend(_series(gemm, kernel, batch, budget.share(), result, step))
    for name, reason in gemm.failed.items():
        budget.spend(0.0)
        for m in batch:
            result.missing.append((name, m, reason))
            step()
    return result


def _series(
    gemm: GemmBench, kernel: Kernel, batch: Sequence[int], purse: float, result: Measured, step: Callable[[], None]
) -> float:
    """One kernel, smallest M first, then those again that other work disturbed. Returns the seconds spent.

    After the first M that has no room, none is tried: a larger one would take longer.
    """
    started, full, spent = gemm.bench.clock(), False, NO_ROOM
    tries = [(m, False) for m in batch]
    for place, (m, again) in enumerate(tries):
        left = purse - gemm.bench.since(started)
        outcome = spent if full or left <= 0 else _attempt(gemm, kernel, m, left / (len(tries) - place), left)
        if isinstance(outcome, dict):
            result.rows.append(outcome)
        elif outcome.startswith(BUSY) and not again:
            tries.append((m, True))
            spent = BUSY  # what is missing from here on, other work took
            continue
        else:
            result.missing.append((kernel.name, m, outcome))
            full = full or outcome == NO_ROOM
        step()
    return gemm.bench.since(started)


def _attempt(gemm: GemmBench, kernel: Kernel, m: int, share: float, limit: float) -> dict[str, Any] | str:
    started, waited = gemm.bench.clock(), gemm.bench.waited()
    try:
        outcome = gemm.cell(kernel, m, share, limit)
    except RuntimeError as error:
        return failure(error)
    stolen = gemm.bench.waited() - waited
    return BUSY if outcome == NO_ROOM and stolen > DISTURBED * (gemm.bench.clock() - started) else outcome


def failure(error: Exception) -> str:
    said = str(error).strip() or type(error).__name__
    return f"the op failed: {said.splitlines()[0]:.160}"
