"""The time of a GEMM that nobody measured, from kernels that were measured on other shapes, or on other GPUs.

The floor of a GEMM is what the roofline says of its bytes and operations. At each measured M a kernel's times over several
shapes are fitted as start + slope · floor: what every call costs, and how near the kernel comes to the roofline. With one shape
only, what it takes beyond its floor is a start where memory bounds it, a slope where arithmetic does. The very shape is not
fitted but measured. A kernel that was not measured on a GPU borrows: from itself with other weights or elsewhere, else the median
of kernels with like numbers; from another GPU at the M that was as much bound by memory there.

Legend: M tokens, x rows that one weight matrix meets: M, of experts fewer. Times in microseconds.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from quantpub.roofline import Machine, computes_in, gemm
from quantpub.scheme import Scheme
from quantpub.served import Linear
from quantpub.stored import Part, Point, Series, Stored, stored

SAME, OTHER, ESTIMATED = (
    "measured here for such shapes",
    "measured on this GPU for other shapes",
    "estimated from the roofline",
)
CONFIDENCE = (SAME, OTHER, ESTIMATED)  # the surest first
KERNEL_US = 2.5  # no kernel of a CUDA graph takes less
FLATTEST = 0.8  # slope: rates that a copy and a square GEMM reach can be surpassed by a little
ALIKE = 1.5  # floors of shapes, the largest over the smallest, that are too close to tell a start from a slope
Group = Sequence[Series]  # of one kernel


@dataclass(frozen=True)
class Asked:
    """A GEMM on a kernel of a machine. row: the kernel's name in the kernel tables. scheme: as it computes, None for bf16."""

    linear: Linear
    scheme: Scheme | None
    row: str
    on: Machine
    top_k: int = 0

    @property
    def part(self) -> Part:
        return Part(self.linear.n, self.linear.k, self.linear.experts, self.top_k if self.linear.experts else 0)


@dataclass(frozen=True)
class Law:
    """At x one GEMM takes start + slope · floor."""

    x: float
    start: float
    slope: float

    def us(self, floor: float) -> float:
        return self.start + self.slope * floor


@dataclass(frozen=True)
class Derived:
    """us(m): all occurrences of the linear in a forward pass. confidence: of CONFIDENCE.

    basis: what lent its efficiency; "" for the kernel itself with these weights on this GPU.
    """

    us: Callable[[int], float]
    confidence: str
    basis: str


def derive(asked: Asked, series: Iterable[Series] | None = None) -> Derived:
    """series: to derive from, by default all that came with quantpub."""
    known = list(series) if series is not None else [one for each in stored().values() for one in each.series]
    groups = _by_kernel(alike(known, asked))
    laws = [(group[0].machine, _laws(group, asked)) for group in groups]
    linear, scheme = asked.linear, asked.scheme
    least = KERNEL_US * (2 if scheme is not None and scheme.act is not None else 1)

    def us(m: int) -> float:
        floor = gemm(linear, m, scheme, asked.top_k).us(asked.on) / linear.layers
        one = statistics.median(_at(law, there, asked, m, floor) for there, law in laws) if laws else floor
        return linear.layers * max(least, one)

    return Derived(us, _confidence(groups, asked), _basis(groups, asked))


def alike(known: Sequence[Series], asked: Asked) -> list[Series]:
    """The series that tell most: of the kernel itself, then of like numbers, then of experts or not, then of the GPU itself."""
    ranked = [
        (one.row != asked.row, unlike, one.experts != (asked.part.experts > 0), one.gpu != asked.on.gpu.name,
         one.scheme != asked.scheme, one)
        for one in known
        if (unlike := _unlike(one.scheme, asked.scheme)) is not None
    ]  # fmt: skip
    best = min((rank[:-1] for rank in ranked), default=())
    return [one for *rank, one in ranked if tuple(rank) == best]


def _unlike(one: Scheme | None, other: Scheme | None) -> int | None:
    """0: the same numbers; 1: as many bits; 2: quantized activations in both or in neither; 3: bf16; None: says nothing."""
    if one is None or other is None:
        return 0 if one is other else 3 if one is None else None
    if (one.act is None) != (other.act is None):
        return None
    if (one.weight.num, computes_in(one)) == (other.weight.num, computes_in(other)):
        return 0
    return 1 if one.weight.number.bits == other.weight.number.bits else 2


def _by_kernel(series: Iterable[Series]) -> list[Group]:
    """Groups whose x are the same at the same M. Sums of shapes only where there is no shape by itself."""
    found: dict[tuple[object, ...], list[Series]] = {}
    for one in series:
        part = one.parts[0]
        found.setdefault((one.gpu, one.kernel, one.name, part.experts, part.top_k), []).append(one)
    return [[one for one in group if one.of_one_shape] or group for group in found.values()]


def _own(group: Group, asked: Asked) -> bool:
    """Whether it is the kernel that is asked for, with such weights, on this GPU."""
    return all(
        (one.row, one.gpu) == (asked.row, asked.on.gpu.name) and not _unlike(one.scheme, asked.scheme) for one in group
    )


def _exact(group: Group, asked: Asked) -> list[Series]:
    return [one for one in group if asked.part in one.parts] if _own(group, asked) else []


def _laws(group: Group, asked: Asked) -> list[Law]:
    """By x."""
    if exact := _exact(group, asked):
        return [Law(point.x, 0.0, point.us / point.floor) for point in exact[0].points]
    at: dict[float, list[Point]] = {}
    for point in (point for one in group for point in one.points):
        at.setdefault(point.x, []).append(point)
    return [fit(points) for _, points in sorted(at.items())]


def fit(points: Sequence[Point]) -> Law:
    """By least squares of relative errors, with start ≥ 0 and slope ≥ FLATTEST. points: shapes at one x."""
    x, floors, weights = points[0].x, [p.floor for p in points], [p.us**-2 for p in points]
    times = [p.us for p in points]
    if max(floors) < ALIKE * min(floors):
        floor, us = statistics.fmean(floors), statistics.fmean(times)
        return Law(x, max(0.0, us - floor), min(1.0, us / floor)) if points[0].by_memory else Law(x, 0.0, us / floor)
    mean_floor, mean_us = (statistics.fmean(values, weights) for values in (floors, times))
    apart = [floor - mean_floor for floor in floors]
    slope = sum(w * a * us for w, a, us in zip(weights, apart, times, strict=True))
    slope /= sum(w * a * a for w, a in zip(weights, apart, strict=True))
    slope = max(FLATTEST, slope)
    start = mean_us - slope * mean_floor
    return Law(x, start, slope) if start >= 0 else Law(x, 0.0, statistics.fmean([p.us / p.floor for p in points]))


def _at(laws: Sequence[Law], there: Machine, asked: Asked, m: int, floor: float) -> float:
    """Between two x straight in log-log, beyond the ends as at the ends."""
    num = computes_in(asked.scheme)
    ridge = (there.rate(num) / there.bandwidth) / (asked.on.rate(num) / asked.on.bandwidth)
    x = asked.part.rows(m) * ridge
    place = bisect.bisect_left(laws, x, key=lambda law: law.x)
    if place == 0 or place == len(laws):
        return laws[min(place, len(laws) - 1)].us(floor)
    before, after = laws[place - 1], laws[place]
    part = math.log(x / before.x) / math.log(after.x / before.x)
    return float(before.us(floor) * (after.us(floor) / before.us(floor)) ** part)


def _confidence(groups: Sequence[Group], asked: Asked) -> str:
    if not groups or not all(_own(group, asked) for group in groups):
        return ESTIMATED
    return SAME if all(_exact(group, asked) for group in groups) else OTHER


def _basis(groups: Sequence[Group], asked: Asked) -> str:
    mine = [one for group in groups for one in group]
    if not mine:
        return "nothing alike was measured: the bare roofline"
    if all((one.row, one.scheme, one.gpu) == (asked.row, asked.scheme, asked.on.gpu.name) for one in mine):
        return ""
    names, gpus = (sorted({getattr(one, side) for one in mine}) for side in ("name", "gpu"))
    return f"at the efficiency of {', '.join(names)} on {', '.join(gpus)}"


@dataclass(frozen=True)
class Error:
    """Of derived times against measured ones, as fractions, over every M and shape. count: of them."""

    median: float
    largest: float
    count: int

    @property
    def words(self) -> str:
        return f"{100 * self.median:.0f} % in the middle, {100 * self.largest:.0f} % at most"


@cache
def held_out(one: Stored, row: str | None = None) -> Error | None:
    """Each measured shape derived from the other shapes of the same kernel. row: of this kernel only.

    None where no such kernel was measured on several shapes.
    """
    wanted = [s for s in one.series if s.of_one_shape and row in (None, s.row)]
    pairs = []
    for series in wanted:
        same = [s for s in wanted if (s.kernel, s.scheme) == (series.kernel, series.scheme)]
        if others := [s for s in same if s.parts != series.parts]:
            pairs += _against(series, others, one.machine)
    return _error(pairs)


@cache
def held_out_kernels(one: Stored) -> Error | None:
    """Each measured kernel derived as if it had not been, from those that are alike: what an estimate is worth."""
    pairs = []
    for series in one.series:
        if series.scheme is not None:
            pairs += _against(series, [s for s in one.series if s.row != series.row], one.machine)
    return _error(pairs)


def _against(series: Series, others: Sequence[Series], on: Machine) -> list[tuple[float, float]]:
    """(derived, measured) at each M."""
    derived = [derive(Asked(part.linear, series.scheme, series.row, on, part.top_k), others) for part in series.parts]
    return [(sum(each.us(m) for each in derived), us) for m, us in series.us.items()]


def _error(pairs: Iterable[tuple[float, float]]) -> Error | None:
    found = [abs(derived / measured - 1) for derived, measured in pairs]
    return Error(statistics.median(found), max(found), len(found)) if found else None
