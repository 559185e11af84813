"""Timing two or more calls against each other. Times in microseconds, budgets in seconds, sizes in bytes.

The calls alternate, in rounds whose order is reversed every second time, so that drift of the clock frequency or of the
machine's load falls on all of them alike. Speedups are taken round by round. Inputs rotate through enough copies that
none is still in the last-level cache when its turn comes again: a served model streams its weights from memory.

A round in which a thread of this process stood in line for a core is thrown away: an op of several threads waits for
the last of them, and 8 ms of the scheduler's making hide 20 µs of work. On a busy machine that can be most rounds, and
no median survives it. What is left measures the kernel; how many rounds were thrown away is kept beside it.

The 95 % interval of a median is that of order statistics: it assumes nothing about the distribution, which is skewed
here. For n samples it runs from the j-th smallest to the j-th largest, with the largest j for which
2·P(Binomial(n, ½) < j) ≤ 5 %.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

MINIMUM = 6  # rounds: with fewer, no interval of order statistics reaches 95 %
MAXIMUM = 300  # rounds (and the rest of a block): the interval narrows with the root of their number only
BLOCK = 1e-3  # seconds: a quarter of the scheduler's shortest slice, and much longer than asking it what it did
PATIENCE = 3
DISTURBED = 0.1  # part of a block that was spent waiting for a core
NO_ROOM = f"{MINIMUM} rounds did not fit into its share of the budget"
BUSY = "other work on this machine disturbed it"
CONFIDENCE = 0.95

Clock = Callable[[], int]  # nanoseconds
Stopwatch = Callable[[Callable[[], object]], float]  # the microseconds that one call took


def wall(clock: Clock = time.perf_counter_ns) -> Stopwatch:
    """A stopwatch for calls that are finished when they return. On a GPU they are not: it needs one of events."""

    def stopwatch(call: Callable[[], object]) -> float:
        started = clock()
        result = call()  # held until the clock is read, so that freeing it is not timed
        stopped = clock()
        del result
        return (stopped - started) / 1e3

    return stopwatch


@dataclass(frozen=True)
class Median:
    """The median of `repeats` values and its 95 % interval."""

    value: float
    low: float
    high: float
    repeats: int

    def interval(self, digits: int) -> list[float]:
        return [round(self.low, digits), round(self.high, digits)]


def median(values: Sequence[float]) -> Median:
    """Needs at least MINIMUM values."""
    assert len(values) >= MINIMUM, len(values)
    ordered, n = sorted(values), len(values)
    rank = interval_rank(n)
    return Median((ordered[(n - 1) // 2] + ordered[n // 2]) / 2, ordered[rank - 1], ordered[n - rank], n)


def interval_rank(n: int) -> int:
    """j, from 1: the interval runs from the j-th smallest to the j-th largest of n values. 0 when none reaches 95 %."""
    outside, rank = 0, 0
    for j in range(n // 2 + 1):
        outside += math.comb(n, j)  # 2ⁿ · P(Binomial(n, ½) ≤ j)
        if 2 * outside > (1 - CONFIDENCE) * 2**n:
            break
        rank = j + 1
    return rank


def run_queue_wait(tasks: Path = Path("/proc/self/task")) -> int:
    """Nanoseconds that the threads of this process have waited for a core so far; 0 where Linux does not say."""
    waited = 0
    for task in tasks.glob("*/schedstat"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            waited += int(task.read_text().split()[1])
    return waited


@dataclass(frozen=True)
class Bench:
    """How time is taken: `stopwatch` for a call, `clock` for budgets, `waited` for what other work took from it."""

    stopwatch: Stopwatch
    clock: Clock = time.perf_counter_ns
    waited: Clock = run_queue_wait

    def since(self, started: int) -> float:
        return (self.clock() - started) / 1e9


@dataclass
class Rounds:
    """times: name → µs, one for each round kept. disturbed: rounds thrown away. reason: why there are too few."""

    times: dict[str, list[float]]
    kept: int = 0
    disturbed: int = 0
    reason: str | None = None

    def add(self, block: list[dict[str, float]], undisturbed: bool) -> None:
        """The first of several is not kept: threads fell asleep in the pause, and code left the nearest caches."""
        if not undisturbed:
            self.disturbed += len(block)
            return
        for took in block[1:] or block:
            self.kept += 1
            for name, each in took.items():
                self.times[name].append(each)

    def why(self) -> str:
        return f"{BUSY}: {self.disturbed} of {self.disturbed + self.kept} rounds" if self.disturbed else NO_ROOM


def interleave(
    runs: Mapping[str, Callable[[int], object]], copies: int, bench: Bench, share: float, limit: float
) -> Rounds:
    """Time `runs` in rounds; each run is given the place of the copy it should use. The first block only warms up.

    Stops after `share` seconds, but not before MINIMUM undisturbed rounds. Gives up when those will not fit into
    `limit` seconds, and on a busy machine after PATIENCE shares: a later try may find it quiet.
    """
    started, number, cost = bench.clock(), 0, 0.0
    found = Rounds({name: [] for name in runs})
    while found.kept < MINIMUM or (found.kept < MAXIMUM and bench.since(started) < share):
        left = (min(limit, PATIENCE * share) if found.disturbed else limit) - bench.since(started)
        if left <= 0 or cost * (MINIMUM - found.kept) > left:
            return replace(found, reason=found.why())
        block, undisturbed = _block(runs, number, copies, bench)
        if number:
            found.add(block, undisturbed)
        number += len(block)
        cost = min(sum(took.values()) for took in block) / 1e6
    return found


def _block(
    runs: Mapping[str, Callable[[int], object]], number: int, copies: int, bench: Bench
) -> tuple[list[dict[str, float]], bool]:
    """Rounds without a pause, for BLOCK seconds or one round; and whether no other work disturbed them."""
    block: list[dict[str, float]] = []
    waited, started = bench.waited(), bench.clock()
    while not block or bench.since(started) < BLOCK:
        block.append(_round(runs, number + len(block), copies, bench))
    took = sum(sum(each.values()) for each in block)
    return block, bench.waited() - waited <= DISTURBED * 1e3 * took


def _round(runs: Mapping[str, Callable[[int], object]], number: int, copies: int, bench: Bench) -> dict[str, float]:
    """Every run once. They stand apart in the rotation, so that none finds a shared input warm from another."""
    places = {name: (number + index * copies // len(runs)) % copies for index, name in enumerate(runs)}
    order = list(runs) if number % 2 == 0 else list(runs)[::-1]
    return {name: bench.stopwatch(_bind(runs[name], places[name])) for name in order}


def _bind(run: Callable[[int], object], place: int) -> Callable[[], object]:
    return lambda: run(place)


MAX_COPIES = 4096
MAX_ROTATION = 256 << 20


@dataclass(frozen=True)
class Rotation:
    """cold: whether the copies together are larger than the cache; small inputs may reach a bound before."""

    copies: int
    cold: bool


def rotation(nbytes: int, runs: int, cache: int) -> Rotation:
    """For `runs` calls that touch `nbytes` in a round. They share the rotation, so it spans the cache once for each."""
    wanted = math.ceil(runs * cache / nbytes) + 1
    copies = max(1, min(wanted, MAX_COPIES, MAX_ROTATION // nbytes))
    return Rotation(copies, copies * nbytes > cache)


def last_level_cache(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Bytes of last-level cache that this process can reach, all slices; 32 MiB where the system does not say."""
    slices: dict[int, dict[str, int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        for index in (root / f"cpu{cpu}" / "cache").glob("index*"):
            level, size, shared = ((index / name).read_text().strip() for name in ("level", "size", "shared_cpu_list"))
            slices.setdefault(int(level), {})[shared] = _bytes(size)
    return sum(slices[max(slices)].values()) if slices else 32 << 20


def _bytes(size: str) -> int:
    units = {"K": 10, "M": 20, "G": 30}
    return int(size[:-1]) << units[size[-1]] if size[-1] in units else int(size)
