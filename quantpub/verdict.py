"""The gate: does an artifact, on the kernel that its engine would run, pay in the workload it is declared for?

Three answers. `passed` and `failed` need the engine's own kernel, timed on a GPU over every M that the workload meets.
Whatever is missing makes it `not proven`, with what is missing; so does a recipe that asks for no figure. What failed is
given its cure where one was measured: the layout that the same codes can be repacked to, or what else would help.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantpub.costs import crossovers, dense_path, fp4, roofline
from quantpub.errors import InputError
from quantpub.findings import hole
from quantpub.forecast import Forecast, Runs
from quantpub.recipe import Gate
from quantpub.rivals import cured, faster
from quantpub.workloads import WORKLOADS, Workload, parse

NOT_PROVEN, PASSED, FAILED = "not proven", "passed", "failed"
SURE = 0.1  # how far forecasts of served figures were off at most (docs/evidence/h200-qwen3-8b)
Evidence = Mapping[str, Any]
Found = dict[str, Any]


def on_cpu(gate: Gate, engines: Sequence[str], workload: str | None) -> Found:
    """What a CPU can show of a gate about a serving engine on a GPU: nothing."""
    named = " or ".join(engines) or "a serving engine"
    asked = f"{gate.min_speedup}x in workload {workload or gate.workload!r} there" if gate.min_speedup else "no figure"
    reason = (
        f"torch's own kernels were timed on this CPU, not the kernels that {named} would run on a GPU; "
        f"the recipe's gate asks for {asked}, and CPU times prove nothing about it"
    )
    return _verdict(NOT_PROVEN, reason, gate, workload)


def _verdict(outcome: str, reason: str, gate: Gate, workload: str | None, **more: Any) -> Found:
    asked = {"workload": workload or gate.workload, "min_speedup": gate.min_speedup}
    return {"gate": outcome, "reason": reason, **asked, **{key: value for key, value in more.items() if value}}


def judged(
    evidence: Evidence, config: Mapping[str, Any], gate: Gate, workload: str | None, engines: Sequence[str] = ("vllm",)
) -> Found:
    """What is added to a GPU's profile: `workloads`, `crossover`, `roofline`, `dense_path`, `fp4`, `faster`, `verdict`.

    engines: those that the artifact was made for.
    """
    runs, forecast = evidence["engine"]["runs"], Forecast(evidence, config)
    if missing := unproven(evidence, forecast, runs, engines):
        return {"workloads": {}, "verdict": _verdict(NOT_PROVEN, missing, gate, workload)}
    name = workload or gate.workload
    wanted = dict(WORKLOADS) | ({name: parse(name)} if name else {})
    workloads, refused = forecasts(forecast, runs, wanted)
    possible = {each: wanted[each] for each in workloads}
    found: Found = {"workloads": workloads, "crossover": crossovers(evidence, forecast, runs)}
    found |= {"roofline": roofline(forecast, runs)} | dense_path(forecast, runs, wanted) | fp4(forecast, workloads)
    found["faster"] = faster(evidence, forecast, possible, workloads)
    if name is None or gate.min_speedup is None:
        verdict = _verdict(NOT_PROVEN, "the recipe's gate asks for no speed", gate, workload)
    elif name in refused:
        verdict = _verdict(NOT_PROVEN, refused[name], gate, workload)
    else:
        verdict = compared(evidence, forecast, gate, wanted[name], workloads[name])
    return found | {"verdict": verdict}


def forecasts(
    forecast: Forecast, runs: Runs, wanted: Mapping[str, Workload]
) -> tuple[dict[str, Found], dict[str, str]]:
    """(workload → its forecast, workload → why there is none)."""
    found, refused = dict[str, Found](), dict[str, str]()
    for name, workload in wanted.items():
        try:
            own = forecast.artifact(workload, runs)
        except InputError as error:
            refused[name] = error.what
            continue
        try:
            found[name] = forecast.workload(workload, runs)
        except InputError as error:
            served = f"{own.total_per_s:,.0f} tokens/s are forecast for the artifact"
            refused[name] = (
                f"bf16 does not fit on this GPU, so there is nothing to compare with ({error.what}); {served}"
            )
    return found, refused


def unproven(evidence: Evidence, forecast: Forecast, runs: Runs, engines: Sequence[str]) -> str | None:
    """The first thing that is missing for a verdict, or None."""
    asked = evidence["engine"]["engine"]
    if asked not in engines:
        return f"it was made for {' and '.join(engines) or 'no engine'}, and the kernels timed here are those that {asked} runs"
    if evidence["made_by"]["settings"]["tensor_parallel"] > 1:
        return "the shapes of several GPUs were timed; what their exchange costs is not predicted"
    if not evidence["gemms"]:
        return "the artifact has no quantized linear"
    for gemm in evidence["gemms"]:
        if gemm["name"] not in runs:
            return str(evidence["engine"]["unknown"].get(gemm["name"], f"no kernel is known for {gemm['name']}"))
    try:
        _ = forecast.served
    except InputError as error:
        return error.what
    if odd := unconfirmed(evidence, runs):
        return f"what ran was not the kernel that was meant: {odd}"
    if forecast.gpu is None:
        return f"{evidence['made_by']['device']['gpu']['name']} is not in the table of GPUs"
    if not forecast.points(runs):
        kernels = ", ".join(sorted(set(runs.values())))
        return f"{kernels}, which the engine would run, was not timed for every GEMM: see what was not measured"
    return None


def unconfirmed(evidence: Evidence, runs: Runs) -> str | None:
    """The first thing that the profiler saw run in place of a kernel that the engine is said to run."""
    seen = (one for one in evidence.get("symbols", []) if runs.get(one["gemm"]) == one["kernel"])
    return next((one["unconfirmed"] for one in seen if one["seen"] and one["unconfirmed"]), None)


def compared(evidence: Evidence, forecast: Forecast, gate: Gate, workload: Workload, found: Found) -> Found:
    """The gate's figure against the forecast's."""
    runs, least = evidence["engine"]["runs"], gate.min_speedup
    assert least is not None
    if missing := hole(forecast.points(runs), found):
        advice = "profile again without --m, and with a larger --budget-seconds"
        return _verdict(NOT_PROVEN, f"in {workload.name} {missing}", gate, workload.name, next=advice)
    reached = f"{shown(found['speedup'], least)}x in {workload.name}"
    said = f"{reached} on {kernels_of(evidence)}, linears {found['linear_speedup']:.2f}x"
    close = "; forecasts are not surer than that" if abs(found["speedup"] / least - 1) < SURE else ""
    if found["speedup"] >= least:
        return _verdict(PASSED, f"{said}; the gate asks for {least}x{close}", gate, workload.name)
    cure = cured(evidence, forecast, workload, least)
    reason = f"{said}, where the gate asks for {least}x{close}{cure.pop('why', '')}"
    return _verdict(FAILED, reason, gate, workload.name, **cure)


def shown(speedup: float, least: float) -> str:
    """With as many digits as tell it from the gate's figure."""
    digits = next((d for d in (2, 3) if round(speedup, d) != least or speedup == least), 4)
    return f"{speedup:.{digits}f}"


def kernels_of(evidence: Evidence) -> str:
    """The engine's kernels by name, and whether the engine itself said so."""
    engine = evidence["engine"]
    names = " and ".join(sorted(set(engine["runs"].values())))
    tables = any(choice["source"].startswith("table") for choice in engine["choices"])
    return names if not tables else f"{names} (by the kernel tables: {engine['engine']} was not asked)"
