"""Profiling: is the quantized artifact faster than bf16, on which kernels, at which batch sizes?

Every GEMM of the model as an engine runs it, with the artifact's own packed weights, on every kernel that eats them:
the result is checked against `x @ dequantize(q).T`, then timed against a bf16 matmul over M, the tokens in a batch. On a
CUDA device the kernels are the serving engine's own, and what they take is carried on to workloads (`verdict`). On a CPU
only torch's own kernels run: the gate then is "not proven", whatever the numbers; it says so rather than pass.

In a row, `speedup` is the median of the paired ratios, `repeats` the rounds kept and `disturbed` those thrown away, and
`cold` says whether the weights came from memory. What has no row is in `not_measured` or an `unavailable` kernel.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quantpub.artifact import META, Artifact
from quantpub.errors import UsageError
from quantpub.evidence import installed, made_by
from quantpub.files import sha256_json
from quantpub.findings import merged, totals
from quantpub.kernels.check import SEED
from quantpub.kernels.choices import baseline
from quantpub.kernels.cuda import cache_bytes
from quantpub.kernels.work import MEASURE, Outcome, Progress, Work, make_work
from quantpub.plots import plots
from quantpub.timing import last_level_cache
from quantpub.verdict import judged, on_cpu
from quantpub.workloads import parse

BATCH = {
    "cpu": tuple(2**i for i in range(10)),
    "cuda": (*(2**i for i in range(7)), 96, 128, 192, *(2**i for i in range(8, 14))),
}
BUDGET = {"cpu": 10.0, "cuda": 40.0}  # seconds of measuring
LARGEST = 1 << 17  # tokens of a step
EVIDENCE = "profile.json"
LABEL = "measured on this CPU with torch's own kernels; it says nothing about the serving engine's GPU kernels"
PACKAGES = {"cpu": ("torch",), "cuda": ("torch", "vllm", "flashinfer-python")}


def profile(
    artifact: Artifact,
    *,
    m: list[int] | None = None,
    kernels: list[str] | None = None,
    budget_seconds: float | None = None,
    device: str = "auto",
    tp: int = 1,
    workload: str | None = None,
    progress: Progress = lambda n, total: None,
) -> dict[str, Any]:
    """Measure, write `.quantpub/profile.json`, return it. The budget is for measuring; preparing weights comes on top.

    tp: GPUs that share the model; the shapes are those of one. workload: judged in place of the recipe's.
    Errors: UsageError (m, kernels, budget, device, workload), InputError (the artifact), GateError (a kernel computes
    something else).
    """
    device = require_device(device)
    seconds = BUDGET[device] if budget_seconds is None else budget_seconds
    if not 0 < seconds < math.inf:
        raise UsageError(f"a budget of {seconds} seconds measures nothing", next="give a positive number of seconds")
    if workload is not None:
        parse(workload)  # a wrong name is said before anything is measured
    gate, engines = artifact.recipe().gate, artifact.run().get("engines", [])
    batch = _batch(m, device)
    work = make_work(artifact, kernels, device, tp)
    settings = _settings(batch, work, seconds)
    machine = {"load_1min": round(os.getloadavg()[0], 2), "cores": len(os.sched_getaffinity(0))}
    with torch.inference_mode():
        measured = MEASURE[device](work, settings, progress)
    evidence = {
        "made_by": made_by("profile", settings, installed(PACKAGES[device])),
        "device_class": device,
        "label": LABEL if device == "cpu" else "",
        "weights_sha256": sha256_json(artifact.journal()),
        "machine_load": machine,  # before it began: other work widens every interval
        **_findings(work, measured, batch),
        **measured.more,
    }
    if device == "cpu":
        evidence["verdict"] = on_cpu(gate, engines, workload)
    else:
        evidence |= judged(evidence, artifact.config(), gate, workload, engines)
    artifact.write_evidence(EVIDENCE, evidence)
    for plot in plots(evidence, None):
        for name, data in plot.files().items():
            artifact.write(f"{META}/plots/{name}", data)
    artifact.record("profile", summary(evidence))
    return evidence


def require_device(name: str) -> str:
    """`auto` is cuda where torch sees one. Errors: UsageError."""
    present = torch.cuda.is_available()
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"unknown device {name!r}", next="auto, cpu or cuda")
    if name == "cuda" and not present:
        raise UsageError("torch sees no CUDA device here", next="profile on the CPU, or on a machine with a GPU")
    return ("cuda" if present else "cpu") if name == "auto" else name


def _batch(m: Sequence[int] | None, device: str) -> list[int]:
    batch = sorted(set(BATCH[device] if m is None else m))
    if not batch or batch[0] < 1 or batch[-1] > LARGEST:
        raise UsageError(f"M counts tokens: whole numbers from 1 to {LARGEST}", next="for example --m 1,16,256")
    return batch


def _settings(batch: list[int], work: Work, seconds: float) -> dict[str, Any]:
    return {
        "m": batch,
        "kernels": [choice.kernel.name for choice in work.asked()],
        "budget_seconds": seconds,
        "device": work.device,
        "tensor_parallel": work.tp,
        "activations": "bf16",
        "seed": SEED,
        "cache_bytes": cache_bytes() if work.device == "cuda" else last_level_cache(),
    }


def _findings(work: Work, measured: Outcome, batch: Sequence[int]) -> dict[str, Any]:
    base, entries = baseline(), work.entries()
    runs = measured.more.get("engine", {}).get("runs")
    rows = [
        row
        for result in measured.results.values()
        for row in sorted(result.rows, key=lambda row: (row["kernel"], row["m"]))
    ]
    refused = [
        (gemm, choice.kernel.name, m, reason)
        for choice in work.asked()
        if choice.unavailable is None
        for gemm, reason in choice.refused.items()
        for m in batch
    ]
    missing = [
        (gemm, kernel, m, reason) for gemm, result in measured.results.items() for kernel, m, reason in result.missing
    ]
    return {
        "baseline": {"name": base.name, "layout": base.layout, "weights": "the artifact's own, dequantized"},
        "weights": work.facts(),
        "gemms": entries,
        "kernels": [choice.as_json() for choice in work.asked()],
        "rows": rows,
        "totals": totals({entry["name"]: entry["count"] for entry in entries}, rows, runs),
        "not_measured": merged(refused + missing),
        "numerics": measured.numerics,
    }


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
