"""Profiling: is the quantized artifact faster than bf16, on which kernels, at which batch sizes?

Every GEMM of the model as an engine runs it, with the artifact's own packed weights, on every kernel that eats them:
the result is checked against `x @ dequantize(q).T`, then timed against a bf16 matmul at M = 1 … 512 tokens.

What this machine can time is its processor and torch's own kernels. The gate of a recipe asks about the kernels of a
serving engine on a GPU, so here the verdict is "not proven", whatever the numbers; it says so rather than pass.

In a row, `speedup` is the median of the paired ratios, `repeats` the rounds kept and `disturbed` those thrown away, and
`cold` says whether the weights came from memory. What has no row is in `not_measured` or an `unavailable` kernel.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantpub.artifact import META, Artifact
from quantpub.decode import Decoder
from quantpub.errors import UsageError
from quantpub.evidence import made_by
from quantpub.gemms import Gemm, engine_gemms, weight
from quantpub.kernels import BASELINE, KERNELS
from quantpub.kernels.base import Kernel
from quantpub.kernels.check import SEED
from quantpub.kernels.measure import Budget, GemmBench, Measured, measure
from quantpub.recipe import load_recipe
from quantpub.registry import load
from quantpub.timing import Bench, last_level_cache, wall

BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
DEVICE = "cpu"
EVIDENCE = "profile.json"
LABEL = "measured on this CPU with torch's own kernels; it says nothing about the serving engine's GPU kernels"
NOT_PROVEN = "not proven"
Progress = Callable[[int, int], None]  # (done, total) of (GEMM, kernel, M)


@dataclass(frozen=True)
class Choice:
    """A kernel asked for. unavailable: why no GEMM runs on it, or None. refused: GEMM → why that one does not."""

    kernel: Kernel
    unavailable: str | None
    refused: dict[str, str]

    def takes(self, gemm: Gemm) -> bool:
        return self.unavailable is None and gemm.name not in self.refused


def profile(
    artifact: Artifact,
    *,
    m: list[int] | None = None,
    kernels: list[str] | None = None,
    budget_seconds: float = 10.0,
    progress: Progress = lambda n, total: None,
) -> dict[str, Any]:
    """Measure, write `.quantpub/profile.json`, return it. The budget is for measuring; preparing weights comes on top.

    Errors: UsageError (m, kernels, budget), InputError (the artifact), GateError (a kernel computes something else).
    """
    batch = _batch(m)
    if not budget_seconds > 0:
        raise UsageError(
            f"a budget of {budget_seconds} seconds measures nothing", next="give a positive number of seconds"
        )
    decoder = Decoder(artifact)
    gemms = engine_gemms(artifact, decoder)
    choices = [_choose(name, decoder, gemms) for name in _names(kernels)]
    settings = _settings(batch, choices, budget_seconds)
    machine = {"load_1min": round(os.getloadavg()[0], 2), "cores": len(os.sched_getaffinity(0))}
    with torch.inference_mode():
        results, numerics = _measure_all(decoder, gemms, choices, settings, progress)
    evidence = {
        "made_by": made_by("profile", settings),
        "device_class": DEVICE,
        "label": LABEL,
        "machine_load": machine,  # before it began: other work widens every interval
        **_findings(gemms, choices, results, batch),
        "numerics": numerics,
        "verdict": _verdict(artifact),
    }
    artifact.write_evidence(EVIDENCE, evidence)
    artifact.record("profile", summary(evidence))
    return evidence


def _batch(m: Sequence[int] | None) -> list[int]:
    batch = sorted(set(BATCH if m is None else m))
    if not batch or batch[0] < 1:
        raise UsageError("M counts tokens: whole numbers from 1", next="for example --m 1,16,256")
    return batch


def _names(kernels: Sequence[str] | None) -> list[str]:
    return [name for name in dict.fromkeys(KERNELS if kernels is None else kernels) if name != BASELINE]


def _settings(batch: list[int], choices: Sequence[Choice], budget_seconds: float) -> dict[str, Any]:
    names = [choice.kernel.name for choice in choices]
    return {
        "m": batch,
        "kernels": names,
        "budget_seconds": budget_seconds,
        "activations": "bf16",
        "seed": SEED,
        "cache_bytes": last_level_cache(),
    }


def _choose(name: str, decoder: Decoder, gemms: Sequence[Gemm]) -> Choice:
    kernel: Kernel = load(KERNELS, "kernel", name)
    refused = {
        gemm.name: reason
        for gemm in gemms
        if (reason := kernel.reject(decoder.treated(gemm.members[0]).scheme, gemm.n, gemm.k))
    }
    unavailable = None
    if DEVICE not in kernel.devices:
        unavailable = f"it runs on {', '.join(kernel.devices)}; this was measured on {DEVICE}"
    elif len(refused) == len(gemms):
        unavailable = next(iter(refused.values()), "the artifact has no quantized linear")
    return Choice(kernel, unavailable or kernel.unavailable(), refused)


def _measure_all(
    decoder: Decoder,
    gemms: Sequence[Gemm],
    choices: Sequence[Choice],
    settings: Mapping[str, Any],
    progress: Progress,
) -> tuple[dict[str, Measured], list[dict[str, Any]]]:
    """GEMM after GEMM, so that memory holds one of them: results by GEMM, and what the checks found."""
    batch, bench = settings["m"], Bench(wall())
    baseline: Kernel = load(KERNELS, "kernel", BASELINE)
    series = sum(choice.takes(gemm) for choice in choices for gemm in gemms)
    budget, total, done = Budget(settings["budget_seconds"], series), series * len(batch), 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    results, numerics = {}, []
    for gemm in gemms:
        taken = [choice.kernel for choice in choices if choice.takes(gemm)]
        prepared = GemmBench(gemm.name, weight(decoder, gemm), baseline, taken, bench, settings["cache_bytes"])
        results[gemm.name] = measure(prepared, batch, budget, step)
        numerics += prepared.numerics()
    return results, numerics


def _findings(
    gemms: Sequence[Gemm],
    choices: Sequence[Choice],
    results: Mapping[str, Measured],
    batch: Sequence[int],
) -> dict[str, Any]:
    baseline: Kernel = load(KERNELS, "kernel", BASELINE)
    rows = [
        row for result in results.values() for row in sorted(result.rows, key=lambda row: (row["kernel"], row["m"]))
    ]
    refused = [
        (gemm, choice.kernel.name, m, reason)
        for choice in choices
        if choice.unavailable is None
        for gemm, reason in choice.refused.items()
        for m in batch
    ]
    missing = [(gemm, kernel, m, reason) for gemm, result in results.items() for kernel, m, reason in result.missing]
    return {
        "baseline": {"name": baseline.name, "layout": baseline.layout, "weights": "the artifact's own, dequantized"},
        "gemms": [gemm.as_json() for gemm in gemms],
        "kernels": [{"name": c.kernel.name, "layout": c.kernel.layout, "unavailable": c.unavailable} for c in choices],
        "rows": rows,
        "totals": totals(gemms, rows),
        "not_measured": _merged(refused + missing),
    }


def _merged(cells: Sequence[tuple[str, str, int, str]]) -> list[dict[str, Any]]:
    """One entry per (GEMM, kernel, reason), with every M that it concerns."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for gemm, kernel, m, reason in cells:
        found.setdefault((gemm, kernel, reason), []).append(m)
    return [{"gemm": gemm, "kernel": kernel, "m": ms, "reason": reason} for (gemm, kernel, reason), ms in found.items()]


def totals(gemms: Sequence[Gemm], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Σ count · baseline / Σ count · kernel, for each (kernel, M) at which every GEMM was measured."""
    counts = {gemm.name: gemm.count for gemm in gemms}
    cells: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["kernel"], row["m"]), []).append(row)
    sums = {
        key: [sum(counts[row["gemm"]] * row[side] for row in cell) for side in ("baseline_us", "median_us")]
        for key, cell in cells.items()
        if len(cell) == len(counts)
    }
    return [
        {
            "kernel": kernel,
            "m": m,
            "speedup": round(base / own, 4),
            "baseline_us": round(base, 3),
            "median_us": round(own, 3),
        }
        for (kernel, m), (base, own) in sums.items()
    ]


def _verdict(artifact: Artifact) -> dict[str, Any]:
    """The gate of the artifact's own recipe, against what a CPU can show of it: nothing."""
    gate = load_recipe(str(artifact.meta / "recipe.yaml")).gate
    engines = " or ".join(artifact.run().get("engines", [])) or "a serving engine"
    asked = f"{gate.min_speedup}x in workload {gate.workload!r} there" if gate.min_speedup else "no figure"
    reason = (
        f"torch's own kernels were timed on this CPU, not the kernels that {engines} would run on a GPU; "
        f"the recipe's gate asks for {asked}, and CPU times prove nothing about it"
    )
    return {"gate": NOT_PROVEN, "reason": reason, "workload": gate.workload, "min_speedup": gate.min_speedup}


def summary(evidence: Mapping[str, Any]) -> dict[str, Any]:
    """What run.json keeps: the verdict, and how much was measured."""
    return {
        "evidence": f"{META}/{EVIDENCE}",
        "gate": evidence["verdict"]["gate"],
        "device_class": evidence["device_class"],
        "gemms": len(evidence["gemms"]),
        "rows": len(evidence["rows"]),
        "not_measured": sum(len(entry["m"]) for entry in evidence["not_measured"]),
        "unavailable": [kernel["name"] for kernel in evidence["kernels"] if kernel["unavailable"]],
    }


def table(evidence: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """(title, columns, rows): the speedup over bf16 by kernel and M, – where not measured. `all` is the total."""
    gemms = [gemm["name"] for gemm in evidence["gemms"]]
    leaves = [name.rpartition(".")[2] for name in gemms]
    cells = {(row["kernel"], row["m"], row["gemm"]): row["speedup"] for row in evidence["rows"]}
    sums = {(total["kernel"], total["m"]): total["speedup"] for total in evidence["totals"]}
    usable = [kernel["name"] for kernel in evidence["kernels"] if not kernel["unavailable"]]

    def shown(speedup: float | None) -> str:
        return "–" if speedup is None else f"{speedup:.2f}×"

    rows = [
        [name, str(m), *(shown(cells.get((name, m, gemm))) for gemm in gemms), shown(sums.get((name, m)))]
        for name in usable
        for m in evidence["made_by"]["settings"]["m"]
    ]
    columns = leaves if len(set(leaves)) == len(leaves) else gemms
    return f"speedup over {evidence['baseline']['name']}", ["kernel", "M", *columns, "all"], rows
