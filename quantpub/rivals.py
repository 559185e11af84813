"""What was measured beside the engine's own choice: kernels that it passes over, and the same codes in another layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantpub.findings import MARGIN, hole
from quantpub.forecast import Forecast, Runs
from quantpub.workloads import Workload

Evidence = Mapping[str, Any]
Found = dict[str, Any]


def in_place(evidence: Evidence, forecast: Forecast, kernel: str, runs: Runs) -> dict[str, str] | None:
    """The engine's choices with this kernel wherever it was timed at as many M; None where that changes nothing."""
    taken = {
        name: kernel
        for name, own in runs.items()
        if kernel != own and set(forecast.measured(name, own)) <= set(forecast.measured(name, kernel))
    }
    return {**runs, **taken} if taken else None


def faster(
    evidence: Evidence, forecast: Forecast, wanted: Mapping[str, Workload], workloads: Mapping[str, Found]
) -> list[Found]:
    """Kernels of the engine that read this very layout and would serve a workload faster than the one that it chooses.

    why: what the engine said of it, or that it asks another first. disable: what makes the engine pass over its choice.
    """
    engine, found = evidence["engine"], []
    for kernel in evidence["kernels"]:
        if kernel["unavailable"] or kernel.get("repacked") or kernel["package"] != engine["engine"]:
            continue
        runs = in_place(evidence, forecast, kernel["name"], engine["runs"])
        if runs is None:
            continue
        passed = _passed_over(engine, kernel, runs)
        for name, workload in wanted.items():
            speedup = forecast.speedup(workload, runs)
            if speedup > (1 + MARGIN) * workloads[name]["speedup"]:
                found.append({"workload": name, "kernel": kernel["name"], "speedup": round(speedup, 4), **passed})
    return found


def _passed_over(engine: Mapping[str, Any], kernel: Mapping[str, Any], runs: Runs) -> Found:
    """Of the first GEMM that it would take over."""
    mine = [name for name, run in runs.items() if run == kernel["name"] != engine["runs"][name]]
    choice = next((one for one in engine["choices"] if one["gemm"] in mine), engine["choices"][0])
    row = (kernel.get("row") or kernel["name"]).lower()
    if rejected := next((why for name, why in choice["rejected"].items() if name.lower() == row), None):
        return {"why": rejected}
    found = {"why": f"the engine asks {choice['kernel']} first, which accepts"}
    disabled = f"VLLM_DISABLED_KERNELS={choice['class_name']}"
    return found | ({"disable": disabled} if engine["engine"] == "vllm" and choice["class_name"] else {})


def everywhere(forecast: Forecast, kernels: Sequence[str]) -> dict[str, str] | None:
    """GEMM → the first of the kernels that was timed on it, over as many M as any; None where a GEMM has none."""
    runs = {name: next((one for one in kernels if forecast.measured(name, one)), "") for name in forecast.entries}
    return runs if kernels and all(runs.values()) and forecast.points(runs) else None


def cured(evidence: Evidence, forecast: Forecast, workload: Workload, least: float) -> Found:
    """What to do about a failed gate: the repack that was measured, where it is faster than what the engine runs.

    why: what is added to the reason. next: the advice. cure: the repack's facts.
    """
    own, best = forecast.speedup(workload, evidence["engine"]["runs"]), Found()
    known = {kernel["name"]: kernel for kernel in evidence["kernels"] if kernel.get("repacked")}
    repacked = [name for name in evidence["engine"].get("repacked", []) if name in known]
    for kernels in (*([name] for name in repacked), repacked):  # one for all GEMMs, or each where it fits
        runs = everywhere(forecast, kernels)
        if runs is None or hole(forecast.points(runs), forecast.workload(workload, runs)):
            continue
        speedup = forecast.speedup(workload, runs)
        if speedup > max(best.get("speedup", 0.0), (1 + MARGIN) * own):
            names = " and ".join(sorted(set(runs.values())))
            best = {"kernel": names, "speedup": round(speedup, 4), **known[kernels[0]]["repacked"]}
    if not best:
        elsewhere = f"ask `quantpub advise` for a recipe that pays in {workload.name}"
        return {"next": f"no layout of these codes was measured to be faster; {elsewhere}"}
    passes = "passes" if best["speedup"] >= least else f"comes nearest, though the gate asks for {least}x"
    loss = "without loss" if best["lossless"] else f"({best['note']})"
    reached = f"on {best['kernel']} it {passes}, with {best['speedup']:.2f}x"
    advice = f"repack it as {best['format']} ({best['layout']}) {loss}: {reached}"
    slow = f"; the same codes repacked as {best['format']} reach {best['speedup']:.2f}x on {best['kernel']}"
    return {"why": slow, "next": advice, "cure": best}
