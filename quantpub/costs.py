"""What a profile says beside its verdict: crossovers, the distance to the roofline, what a dense copy costs, FP4's own costs.

Everything is computed from a profile's rows. Legend: M tokens of a step, N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpub.errors import InputError
from quantpub.findings import crossover
from quantpub.forecast import APART, Forecast
from quantpub.gpus import BF16, FP4
from quantpub.roofline import gemm as work_of
from quantpub.schedule import UTILIZATION
from quantpub.scheme import Scheme
from quantpub.served import Linear
from quantpub.workloads import Workload

Evidence = Mapping[str, Any]
Found = dict[str, Any]
TILE = 64  # tokens an expert at which its GEMM fills the rows of a tile


def crossovers(evidence: Evidence, forecast: Forecast, runs: Mapping[str, str]) -> Found:
    """The M at which bf16 first catches up; GEMM by GEMM, and of all together. None: at no M that was measured."""
    base, own = forecast.points(None), forecast.points(runs)
    found: Found = {"all": crossover([(m, base[m] / us) for m, us in own.items()])}
    for gemm in evidence["gemms"]:
        rows = [
            (row["m"], row["speedup"])
            for row in evidence["rows"]
            if (row["gemm"], row["kernel"]) == (gemm["name"], runs[gemm["name"]])
        ]
        found[gemm["name"]] = crossover(rows)
    return found


def roofline(forecast: Forecast, runs: Mapping[str, str]) -> list[Found]:
    """Of every row of the engine's kernels: the floor of its time, and the part of the roofline that it reaches.

    The floor is the larger of the bytes over the measured bandwidth and the operations over the measured peak, the quantizing
    of activations included; of bf16 likewise.
    """
    entries = {entry["name"]: entry for entry in forecast.evidence["gemms"]}
    found = []
    for row in forecast.evidence["rows"]:
        if runs.get(row["gemm"]) == row["kernel"]:
            entry, m = entries[row["gemm"]], row["m"]
            scheme = forecast.scheme(row["gemm"], row["kernel"])
            own, base = floor_us(forecast, entry, m, scheme), floor_us(forecast, entry, m)
            one = {"gemm": row["gemm"], "kernel": row["kernel"], "m": m, "floor_us": round(own, 3)}
            one |= {"part": round(own / row["median_us"], 4), "baseline_part": round(base / row["baseline_us"], 4)}
            found.append(one)
    return found


def floor_us(forecast: Forecast, entry: Mapping[str, Any], m: int, scheme: Scheme | None = None) -> float:
    """One occurrence; of grouped experts both of their GEMMs. scheme: None for bf16."""
    n, k, experts, top_k = entry["n"], entry["k"], entry.get("experts", 0), entry.get("top_k", 0)
    linears = [Linear(entry["name"], n, k, max(1, top_k), 1, experts)]
    if experts:
        linears.append(Linear(entry["name"], k, n // 2, top_k, 1, experts))
    return sum(work_of(linear, m, scheme, top_k).us(forecast.machine) for linear in linears)


def dense_path(forecast: Forecast, runs: Mapping[str, str], workloads: Mapping[str, Workload]) -> Found:
    """For weight-only formats: keep a bf16 copy for large batches. What it gains, and the memory that it takes."""
    if forecast.num(runs) != BF16:
        return {}
    assert forecast.gpu is not None
    base, own = forecast.points(None), forecast.points(runs)
    copy, packed = forecast.copy_bytes, forecast.weight_bytes
    budget = int(UTILIZATION * forecast.gpu.memory)
    found: Found = {
        "from_m": crossover([(m, base[m] / us) for m, us in own.items()]),
        "copy_bytes": copy,
        "packed_bytes": round(packed),
        "gpu_memory_utilization": UTILIZATION,
        "budget_bytes": budget,
        "kv_tokens": forecast.limits(packed).kv_tokens,
        "kv_tokens_beside_the_copy": forecast.limits(packed + copy).kv_tokens,
        "workloads": {},
    }
    for name, workload in workloads.items():
        try:
            both = forecast.artifact(workload, runs, dense_path=True).seconds
            found["workloads"][name] = round(forecast.baseline(workload).seconds / both, 4)
        except InputError as error:
            found["workloads"][name] = error.what
    return {"dense_path": found}


def fp4(forecast: Forecast, workloads: Mapping[str, Found]) -> Found:
    """For FP4 activations: the share of the kernels' time that quantizing them takes, by M, and of experts what that favours.

    A backend for throughput quantizes and sorts all tokens and then fills its tiles; with fewer than TILE tokens an expert
    it mostly waits, and one for latency is the better choice.
    """
    runs = forecast.evidence["engine"]["runs"]
    if forecast.num(runs) != FP4:
        return {}
    whole, apart = forecast.points(runs), forecast.points(runs, APART)
    found: Found = {"quantize_share": {str(m): round(apart[m] / whole[m], 4) for m in whole if whole[m]}}
    if forecast.served.experts:
        found["moe_backend"] = {name: moe_backend(forecast, one) for name, one in workloads.items()}
    return {"fp4": found}


def moe_backend(forecast: Forecast, workload: Mapping[str, Any]) -> Found:
    """Tokens that an expert meets in a step, the mean over the time of the workload, and what that favours."""
    seconds = sum(took for _, _, _, took in workload["by_m"])
    part = forecast.served.top_k / forecast.served.experts
    tokens = sum(m * part * took for m, _, _, took in workload["by_m"]) / seconds
    return {"tokens_an_expert": round(tokens, 1), "favours": "throughput" if tokens >= TILE else "latency"}
