"""Timing on a clock of our own: what is measured is known exactly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import pytest

from quantpub import timing
from quantpub.timing import BUSY, MAXIMUM, MINIMUM, NO_ROOM, Bench, interleave, median, rotation, wall


@dataclass
class World:
    """A clock in ns that stands still but for the work done, and the wait that other processes cause."""

    now: int = 0
    waited: int = 0
    places: dict[str, list[int]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)

    def bench(self) -> Bench:
        return Bench(wall(lambda: self.now), lambda: self.now, lambda: self.waited)

    def run(self, name: str, microseconds: Callable[[], float]) -> Callable[[int], None]:
        def call(place: int) -> None:
            self.now += round(1000 * microseconds())
            self.places.setdefault(name, []).append(place)
            self.order.append(name)

        return call

    def pair(self, a: float, b: float) -> dict[str, Callable[[int], None]]:
        return {"a": self.run("a", lambda: a), "b": self.run("b", lambda: b)}


@pytest.mark.parametrize(("n", "rank"), [(5, 0), (6, 1), (8, 1), (9, 2), (10, 2), (20, 6), (50, 18), (100, 40)])
def test_interval_ranks_are_those_of_the_tables(n: int, rank: int) -> None:
    assert timing.interval_rank(n) == rank


@pytest.mark.parametrize("n", [6, 7, 13, 40, 101, 300])
def test_the_interval_covers_95_percent_and_no_narrower_one_does(n: int) -> None:
    def coverage(rank: int) -> Fraction:
        return sum((Fraction(math.comb(n, k), 2**n) for k in range(rank, n - rank + 1)), Fraction(0))

    rank = timing.interval_rank(n)
    assert coverage(rank) >= Fraction(95, 100) > coverage(rank + 1)


def test_median_of_known_values() -> None:
    found = median([9.0, 1.0, 5.0, 3.0, 7.0, 11.0, 1000.0, 4.0, 6.0, 2.0])  # sorted: 1 2 3 4 5 6 7 9 11 1000
    assert (found.value, found.low, found.high, found.repeats) == (5.5, 2.0, 11.0, 10)
    assert median([3.0, 1.0, 2.0, 5.0, 4.0, 6.0, 7.0]).value == 4.0


def test_times_are_those_of_the_calls_alone() -> None:
    world = World()
    found = interleave(world.pair(20, 50), 3, world.bench(), share=0.02, limit=1)
    assert set(found.times["a"]) == {20.0} and set(found.times["b"]) == {50.0}
    assert found.reason is None and len(found.times["a"]) == len(found.times["b"]) == found.kept


def test_calls_alternate_and_the_order_turns_round() -> None:
    world = World()
    interleave(world.pair(20, 50), 3, world.bench(), share=0.01, limit=1)
    assert "".join(world.order[:8]) == "abbaabba"


def test_drift_cancels_in_paired_ratios() -> None:
    """Everything becomes slower, at the end by more than half: timed one after the other they would be off by it."""
    world = World()

    def slowing(base: float) -> Callable[[], float]:
        return lambda: base * (1 + world.now / 1e9 * 20)

    runs = {"a": world.run("a", slowing(100)), "b": world.run("b", slowing(25))}
    times = interleave(runs, 1, world.bench(), share=0.1, limit=10).times
    assert times["a"][-1] > 1.4 * times["a"][0]
    ratio = median([a / b for a, b in zip(times["a"], times["b"], strict=True)])
    assert ratio.value == pytest.approx(4, rel=3e-3) and ratio.high - ratio.low < 0.03


def test_every_copy_has_its_turn_and_no_two_runs_share_one() -> None:
    world = World()
    interleave(world.pair(20, 20), 5, world.bench(), share=0.01, limit=1)
    assert world.places["a"][:6] == [0, 1, 2, 3, 4, 0]
    assert all(a != b for a, b in zip(world.places["a"], world.places["b"], strict=True))


def test_the_share_ends_it_but_not_before_the_minimum() -> None:
    world = World()
    found = interleave(world.pair(2e4, 3e4), 1, world.bench(), share=0.01, limit=1)  # one round is 50 ms
    assert found.kept == MINIMUM and world.now / 1e9 == pytest.approx(0.05 * (MINIMUM + 1))
    world = World()
    found = interleave(world.pair(2e3, 3e3), 1, world.bench(), share=0.5, limit=1)  # one round is 5 ms
    assert found.kept == 99 and world.now / 1e9 == pytest.approx(0.5)


def test_short_calls_stop_at_the_maximum() -> None:
    world = World()
    found = interleave(world.pair(4, 6), 1, world.bench(), share=60, limit=60)
    assert MAXIMUM <= found.kept < MAXIMUM + 100 and world.now < 60e9 / 1000


def test_what_does_not_fit_is_given_up_after_one_round() -> None:
    world = World()
    found = interleave(world.pair(1e5, 1e5), 1, world.bench(), share=0.1, limit=1)  # seven rounds would be 1.4 s
    assert found.reason == NO_ROOM and world.now / 1e9 == pytest.approx(0.2)


def test_disturbed_rounds_are_thrown_away() -> None:
    """Every other block stands in line for 8 ms: the median must not show it, and the count must."""
    world = World()
    blocks = itertools.count()

    def busy() -> float:
        if len(world.order) % 40 == 7 and next(blocks) % 2:
            world.waited += 8_000_000
            return 8020.0
        return 20.0

    runs = {"a": world.run("a", busy), "b": world.run("b", lambda: 50)}
    found = interleave(runs, 1, world.bench(), share=0.5, limit=1)
    assert max(found.times["a"]) == 20.0 and found.disturbed > 10 and found.kept >= MINIMUM


def test_the_first_round_after_a_pause_is_not_kept() -> None:
    """Between blocks threads fall asleep: whatever comes first then is slow, and must not show."""
    world, asleep = World(), [True]

    def waking() -> float:
        return 35.0 if asleep and asleep.pop() else 20.0

    def waited() -> int:
        asleep.append(True)
        return 0

    bench = replace(world.bench(), waited=waited)
    runs = {"a": world.run("a", waking), "b": world.run("b", waking)}
    found = interleave(runs, 1, bench, share=0.02, limit=1)
    assert found.kept > 50 and {*found.times["a"], *found.times["b"]} == {20.0}


def test_a_machine_that_is_never_quiet_is_given_up_and_says_so() -> None:
    world = World()

    def busy() -> float:
        world.waited += 8_000_000
        return 8020.0

    found = interleave({"a": world.run("a", busy)}, 1, world.bench(), share=0.1, limit=10)
    assert found.reason is not None and found.reason.startswith(BUSY) and found.kept == 0
    assert world.now / 1e9 < 0.5


def test_a_first_call_that_is_slow_does_not_count_nor_end_it() -> None:
    world = World()
    first = iter([5e4])
    runs = {"a": world.run("a", lambda: next(first, 20)), "b": world.run("b", lambda: 20)}
    found = interleave(runs, 1, world.bench(), share=0.1, limit=1)
    assert found.reason is None and max(found.times["a"]) == 20.0


@pytest.mark.parametrize(
    ("nbytes", "runs", "copies", "cold"),
    [
        (81_920, 2, 821, True),  # 2 · 32 MiB / 80 KiB, rounded up, and one
        (512 << 20, 2, 1, True),  # larger than the bound by itself
        (64 << 20, 4, 3, True),
        (1000, 2, 4096, False),  # so small that the number of copies is bounded
    ],
)
def test_rotation_spans_the_cache(nbytes: int, runs: int, copies: int, cold: bool) -> None:
    found = rotation(nbytes, runs, 32 << 20)
    assert (found.copies, found.cold) == (copies, cold)


def test_cache_slices_are_added_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cores, two slices of 32 MiB, and a level 2 that is not the last."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    for cpu, shared in enumerate(("0-1", "0-1", "2-3", "2-3")):
        for index, (level, size, of) in enumerate((("2", "1024K", str(cpu)), ("3", "32768K", shared))):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, value in (("level", level), ("size", size), ("shared_cpu_list", of)):
                (folder / name).write_text(value + "\n")
    assert timing.last_level_cache(tmp_path) == 64 << 20
    assert timing.last_level_cache(tmp_path / "nothing") == 32 << 20


def test_run_queue_wait_adds_the_threads(tmp_path: Path) -> None:
    for task, line in (("1", "5000 700 3"), ("2", "100 50 1")):
        (tmp_path / task).mkdir()
        (tmp_path / task / "schedstat").write_text(line + "\n")
    assert timing.run_queue_wait(tmp_path) == 750
    assert timing.run_queue_wait(tmp_path / "nothing") == 0
    assert timing.run_queue_wait() >= 0
