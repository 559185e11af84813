"""Profiles side by side: of several artifacts on one machine, or of one on several GPUs; from their evidence alone.

Speedups are over the bf16 of each profile's own machine. Where two machines differ, tokens per second say which is faster.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantpub.errors import InputError
from quantpub.findings import ENGINE
from quantpub.profile_table import CONTROL, Table, times, usable

Evidence = Mapping[str, Any]
GATES = ("passed", "failed", "not proven")
SHOWN = ("device_class", "rows", "totals", "kernels", "gemms", "verdict", "made_by")


def read(path: Path) -> dict[str, Any]:
    """A `profile.json` made here or elsewhere. Errors: InputError."""
    try:
        evidence: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise InputError(
            f"the profile cannot be read: {why}", where=str(path), next="run `quantpub profile` again"
        ) from None
    if not isinstance(evidence, dict) or not all(key in evidence for key in SHOWN):
        raise InputError("it is not a profile", where=str(path), next="name an artifact, or its .quantpub/profile.json")
    if fault := _fault(evidence):
        raise InputError(
            f"the profile is damaged: {fault}", where=str(path), next="take the file as `quantpub profile` wrote it"
        )
    return evidence


def _fault(evidence: Evidence) -> str | None:
    """Why a file that may come from anywhere cannot be shown, or None."""
    try:
        facts = comparison({"": evidence})
        json.dumps(facts, allow_nan=False)
        tables(facts)
        gate, reason = facts[""]["gate"], evidence["verdict"]["reason"]
        figures = [figure for one in facts[""]["workloads"].values() for figure in one.values()]
        figures += facts[""]["speedup"].values()
    except KeyError as error:
        return f"{error.args[0]} is missing"
    except (TypeError, ValueError, AttributeError, LookupError, RecursionError):
        return "it does not hold what quantpub wrote"
    if gate not in GATES or not isinstance(reason, str):
        return f"its verdict is {gate!r:.40}"
    return None if all(figure > 0 for figure in figures) else "a speed in it is not above 0"


def labels(paths: list[Path]) -> list[str]:
    """Short names, each once: the artifact's folder, with more of the path where two are alike."""
    folders = [_folder(path) for path in map(Path.absolute, paths)]
    for parts in range(1, max((len(folder.parts) for folder in folders), default=1) + 1):
        found = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(found)) == len(found):
            return found
    return [f"{i + 1}: {folder.name}" for i, folder in enumerate(folders)]


def _folder(path: Path) -> Path:
    """What names a profile: the artifact's folder; of a file by itself the file, without its ending, or its folder."""
    if path.suffix != ".json":
        return path
    if path.name != "profile.json":
        return path.with_suffix("")
    return path.parent.parent if path.parent.name == ".quantpub" else path.parent


def machine(evidence: Evidence) -> str:
    device = evidence["made_by"]["device"]
    gpu = device.get("gpu")
    return str(gpu["name"] if gpu and evidence["device_class"] == "cuda" else device["cpu"])


def shown_kernel(evidence: Evidence) -> str | None:
    """The kernel that stands for an artifact: the engine's where it is one and was measured, else the fastest at M = 1."""
    runs = set((evidence.get("engine") or {}).get("runs", {}).values())
    measured = {total["kernel"] for total in evidence["totals"]}
    if len(runs) == 1 and runs <= measured:
        return str(next(iter(runs)))
    if ENGINE in measured:
        return ENGINE
    others = {kernel["name"] for kernel in evidence["kernels"] if kernel.get("repacked")} | {CONTROL}
    first = [t for t in evidence["totals"] if t["kernel"] in usable(evidence) and t["kernel"] not in others]
    return max(first, key=lambda t: (-t["m"], t["speedup"]))["kernel"] if first else None


def comparison(profiles: Mapping[str, Evidence]) -> dict[str, Any]:
    """label → machine, kernel, speedup by M, workloads, gate."""
    return {label: _facts(evidence) for label, evidence in profiles.items()}


def _facts(evidence: Evidence) -> dict[str, Any]:
    kernel = shown_kernel(evidence)
    totals = {str(t["m"]): t["speedup"] for t in evidence["totals"] if t["kernel"] == kernel}
    wanted = ("speedup", "linear_speedup", "tokens_per_s")
    workloads = {name: {key: found[key] for key in wanted} for name, found in (evidence.get("workloads") or {}).items()}
    gate = evidence["verdict"].get("gate")
    return {"machine": machine(evidence), "kernel": kernel, "speedup": totals, "workloads": workloads, "gate": gate}


def tables(found: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Speedup of all GEMMs by M, and predicted for workloads; a column a profile."""
    heads = [f"{label} ({facts['kernel'] or 'no kernel'}, {facts['machine']})" for label, facts in found.items()]
    sizes = sorted({int(m) for facts in found.values() for m in facts["speedup"]})
    rows = [[str(m), *(times(facts["speedup"].get(str(m))) for facts in found.values())] for m in sizes]
    result: list[Table] = [("all GEMMs, speedup over each machine's own bf16", ["M", *heads], rows)]
    names = list(dict.fromkeys(name for facts in found.values() for name in facts["workloads"]))
    if names:
        rows = [[name, *(_workload(facts, name) for facts in found.values())] for name in names]
        result.append(("predicted for workloads", ["workload", *found], rows))
    gates = [["gate", *(str(facts["gate"]) for facts in found.values())]]
    return [*result, ("", ["", *found], gates)]


def _workload(facts: Mapping[str, Any], name: str) -> str:
    one = facts["workloads"].get(name)
    return "–" if one is None else f"{times(one['speedup'])}, {one['tokens_per_s']:,.0f} tokens/s"
