"""What the measured rows of a profile add up to: totals over the model's GEMMs, crossovers, and what has no row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

Row = Mapping[str, Any]


def merged(cells: Sequence[tuple[str, str, int, str]]) -> list[dict[str, Any]]:
    """One entry per (GEMM, kernel, reason), with every M that it concerns."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for gemm, kernel, m, reason in cells:
        found.setdefault((gemm, kernel, reason), []).append(m)
    return [{"gemm": gemm, "kernel": kernel, "m": ms, "reason": reason} for (gemm, kernel, reason), ms in found.items()]


ENGINE = "engine's choice"
SPARSE = 4  # neighbouring M may be so many times apart: kernels change between
MARGIN = 0.02  # the control, the same call as the baseline, is within it in 95 % of cells


def totals(
    counts: Mapping[str, int], rows: Sequence[Row], runs: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Σ count · baseline / Σ count · kernel, for each (kernel, M) at which every GEMM of `counts` was measured.

    runs: GEMM → the engine's kernel; where it runs several, they have a total of their own under ENGINE.
    """
    cells: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["kernel"], row["m"]), []).append(row)
        if runs and len(set(runs.values())) > 1 and runs.get(row["gemm"]) == row["kernel"]:
            cells.setdefault((ENGINE, row["m"]), []).append(row)
    return [
        total(kernel, m, [(counts[row["gemm"]], row) for row in cell])
        for (kernel, m), cell in cells.items()
        if len(cell) == len(counts)
    ]


def total(kernel: str, m: int, cell: Sequence[tuple[int, Row]]) -> dict[str, Any]:
    """cell: (count, row) of every GEMM. The quantizing of activations is a part of the kernel's time."""
    base, own, quantize = (
        sum(count * row.get(side, 0.0) for count, row in cell) for side in ("baseline_us", "median_us", "quantize_us")
    )
    found = {"kernel": kernel, "m": m, "speedup": round(base / own, 4)}
    found |= {"baseline_us": round(base, 3), "median_us": round(own, 3)}
    return found | ({"quantize_us": round(quantize, 3)} if quantize else {})


def crossover(points: Sequence[tuple[int, float]]) -> float | None:
    """The M at which the speedup first falls to 1, between two measured M on a logarithmic scale.

    Only what is above 1 by more than MARGIN counts as faster. None: it is so at every M. 0: not even at the smallest.
    """
    ordered = sorted(points)
    below = next((place for place, (_, speedup) in enumerate(ordered) if speedup <= 1 + MARGIN), None)
    if below is None:
        return None
    if below == 0:
        return 0.0
    last = below - 1
    (m, high), (after, low) = ordered[last], ordered[last + 1]
    part = min(1.0, (high - 1) / (high - low))
    return round(math.exp(math.log(m) + part * (math.log(after) - math.log(m))), 1)


def hole(points: Mapping[int, float], found: Mapping[str, Any]) -> str | None:
    """Why the measured M do not stand for those that a workload meets, or None."""
    measured, met = sorted(points), [m for m, _, _, _ in found["by_m"]]
    if max(met) > 2 * measured[-1] or measured[0] > 2 * min(met):
        return f"M of {min(met)} to {max(met)} are met; {measured[0]} to {measured[-1]} was measured"
    for low, high in pairwise(measured):
        if high > SPARSE * low and any(low < m < high for m in met):
            return f"M between {low} and {high} are met, and none of them was measured"
    return None
