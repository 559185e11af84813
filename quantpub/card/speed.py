"""The card's speed section: speedup by M and kernel, the rows behind it, and what was not run. Of a GPU's own: `gpu`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpub.card.gpu import on_gpu as of_gpu
from quantpub.card.words import made_by
from quantpub.plots import engines, labels, layers, on_gpu, speedups
from quantpub.profile_table import times

CPU = "Timed on a CPU: it says nothing of the serving engine's kernels."
Facts = dict[str, Any]


def speed(evidence: Mapping[str, Any] | None) -> Facts | None:
    if evidence is None:
        return None
    columns, rows = _rows(evidence)
    by_kernel, gpu, verdict = speedups(evidence), on_gpu(evidence), evidence.get("verdict", {})
    totals = {(kernel, m): value for kernel, points in by_kernel.items() for m, value in points}
    return {
        "kernels": list(labels(evidence, by_kernel).values()),
        "on_cpu": not gpu,
        "label": evidence.get("label") or ("" if gpu else CPU),
        "totals": [
            [str(m), *(times(totals.get((kernel, m))) for kernel in by_kernel)] for m in sorted({m for _, m in totals})
        ],
        "columns": columns,
        "rows": rows,
        "gemms": evidence.get("gemms", []),
        "baseline": evidence.get("baseline", {}).get("name", "the baseline"),
        "unavailable": unavailable(evidence),
        "not_measured": evidence.get("not_measured", []),
        "verdict": verdict,
        "gate": f"{verdict['gate']}: {verdict['reason']}" if gpu and "reason" in verdict else verdict.get("gate"),
        "made_by": made_by(evidence),
        "layers": bool(layers(evidence)),
        "gpu": of_gpu(evidence) if gpu else None,
    }


def unavailable(evidence: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(why, the kernels of which that is said), in their order."""
    found: dict[str, list[str]] = {}
    for kernel in evidence.get("kernels", []):
        if kernel.get("unavailable"):
            found.setdefault(kernel["unavailable"], []).append(kernel["name"])
    return list(found.items())


def _rows(evidence: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows). Of a GPU's hundreds those of the engine's kernels, where it is known which they are."""
    gpu, baseline = on_gpu(evidence), evidence.get("baseline", {}).get("name", "the baseline")
    mine = engines(evidence) if gpu else []
    rows = [row for row in evidence.get("rows", []) if not mine or row["kernel"] in mine]
    columns = ["GEMM", "Kernel", "M", "Median", "Confidence interval", baseline, "Speedup"]
    if gpu and any("quantize_us" in row for row in rows):
        return [*columns, "Quantizing activations alone"], [
            [*_timing(row), _us(row.get("quantize_us"))] for row in rows
        ]
    return columns, [_timing(row) for row in rows]


def _timing(row: Mapping[str, Any]) -> list[str]:
    low, high = row.get("ci95_us") or (None, None)
    spread = "–" if low is None else f"{_us(low)} – {_us(high)}"
    figures = [_us(row["median_us"]), spread, _us(row["baseline_us"]), times(row.get("speedup"))]
    return [row["gemm"], row["kernel"], str(row["m"]), *figures]


def _us(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
