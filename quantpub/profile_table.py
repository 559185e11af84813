"""A profile as a person reads it: tables of (title, columns, rows), all from the evidence alone. – where not measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpub.findings import ENGINE

CONTROL = "dequantized"
Evidence = Mapping[str, Any]
Table = tuple[str, list[str], list[list[str]]]


def times(speedup: float | None) -> str:
    return "–" if speedup is None else f"{speedup:.2f}×"


def percent(part: float | None) -> str:
    return "–" if part is None else f"{100 * part:.0f} %"


def usable(evidence: Evidence) -> list[str]:
    return [kernel["name"] for kernel in evidence["kernels"] if not kernel["unavailable"]]


def chosen(evidence: Evidence) -> set[str]:
    """The kernels that the engine would run."""
    return set((evidence.get("engine") or {}).get("runs", {}).values())


def tables(evidence: Evidence) -> list[Table]:
    """Every table that the evidence has rows for."""
    if evidence["device_class"] == "cpu":
        return [gemm_table(evidence, usable(evidence))]
    mine = [name for name in usable(evidence) if name in chosen(evidence)]
    others = [name for name in usable(evidence) if name != CONTROL]
    found = [total_table(evidence), gemm_table(evidence, mine or others[:1])]
    return found + ([workload_table(evidence)] if evidence.get("workloads") else [])


def gemm_table(evidence: Evidence, kernels: list[str]) -> Table:
    """The speedup over bf16 by kernel and M, a column a GEMM. `all` is the total."""
    gemms = [gemm["name"] for gemm in evidence["gemms"]]
    leaves = [name.rpartition(".")[2] for name in gemms]
    cells = {(row["kernel"], row["m"], row["gemm"]): row["speedup"] for row in evidence["rows"]}
    sums = {(total["kernel"], total["m"]): total["speedup"] for total in evidence["totals"]}
    rows = [
        [name, str(m), *(times(cells.get((name, m, gemm))) for gemm in gemms), times(sums.get((name, m)))]
        for name in kernels
        for m in evidence["made_by"]["settings"]["m"]
    ]
    columns = leaves if len(set(leaves)) == len(leaves) else gemms
    return f"speedup over {evidence['baseline']['name']}", ["kernel", "M", *columns, "all"], rows


def total_table(evidence: Evidence) -> Table:
    """The speedup of all GEMMs together, a column a kernel; the engine's choice is marked with *."""
    names, mine = usable(evidence), chosen(evidence)
    if any(total["kernel"] == ENGINE for total in evidence["totals"]):
        names = [*names, ENGINE]
    sums = {(total["kernel"], total["m"]): total["speedup"] for total in evidence["totals"]}
    rows = [[str(m), *(times(sums.get((name, m))) for name in names)] for m in evidence["made_by"]["settings"]["m"]]
    repacked = {kernel["name"] for kernel in evidence["kernels"] if kernel.get("repacked")}
    marked = [f"{name}*" if name in mine else f"{name} (repacked)" if name in repacked else name for name in names]
    note = " (* the engine's choice)" if mine else ""
    return f"all GEMMs, speedup over {evidence['baseline']['name']}{note}", ["M", *marked], rows


def workload_table(evidence: Evidence) -> Table:
    """What the measured kernels come to in each workload."""
    rows = [
        [
            name,
            times(found["linear_speedup"]),
            times(found["speedup"]),
            percent(found["shares"].get("attention")),
            f"{found['baseline_tokens_per_s']:,.0f}",
            f"{found['tokens_per_s']:,.0f}",
        ]
        for name, found in evidence["workloads"].items()
    ]
    columns = ["workload", "linears", "end to end", "attention", "bf16 tokens/s", "tokens/s"]
    return "predicted for workloads", columns, rows
