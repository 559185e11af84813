"""Measured points and what lies between them, in log-log: times of kernels over batch sizes are straight lines there."""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Mapping

Points = Mapping[int, float]
Pairs = Mapping[tuple[int, int], float]


class Curve:
    """y over x through measured points, straight between two of them in log-log: never above both nor below both.

    Below the first point it is constant (a kernel reads its weights whatever M is), beyond the last proportional to x.
    """

    def __init__(self, points: Points) -> None:
        assert points and all(x > 0 and y > 0 for x, y in points.items()), points
        self.x = tuple(sorted(points))
        self.y = tuple(points[x] for x in self.x)

    def __call__(self, x: float) -> float:
        place = bisect.bisect_left(self.x, x)
        if place == 0:
            return float(self.y[0])
        if place == len(self.x):
            return float(self.y[-1] * x / self.x[-1])
        x0, x1, y0, y1 = self.x[place - 1], self.x[place], self.y[place - 1], self.y[place]
        part = math.log(x / x0) / math.log(x1 / x0)
        return float(y0 * (y1 / y0) ** part)


class Level(Curve):
    """The same for a ratio: beyond the last point it stays what it was there."""

    def __call__(self, x: float) -> float:
        return super().__call__(min(x, self.x[-1]))


class Surface:
    """z over (x, y): a curve over y for each measured x, and a curve over x through what they say."""

    def __init__(self, points: Pairs) -> None:
        rows: dict[int, dict[int, float]] = defaultdict(dict)
        for (x, y), z in points.items():
            rows[x][y] = z
        self.rows = {x: Curve(row) for x, row in rows.items()}

    def __call__(self, x: float, y: float) -> float:
        return Curve({at: curve(y) for at, curve in self.rows.items()})(x)
