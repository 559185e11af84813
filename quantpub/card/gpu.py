"""What a profile made on a GPU says beside its times: the engine's kernels, the forecast of workloads, what it stands on.

M is the tokens of a step. A forecast is made of measured kernels; no figure here was taken from a served model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantpub.card.words import size, together
from quantpub.plots import engines, speedups
from quantpub.profile_table import percent, times
from quantpub.targets import TARGETS

Evidence = Mapping[str, Any]
Facts = dict[str, Any]


def on_gpu(evidence: Evidence) -> Facts:
    """Each entry is empty where the evidence says nothing of it."""
    return {
        "tensor_parallel": evidence.get("made_by", {}).get("settings", {}).get("tensor_parallel", 1),
        "asked": asked(evidence.get("engine") or {}),
        "choices": choices(evidence.get("engine") or {}),
        "seen": seen(evidence),
        "checked": checked(evidence),
        "repacked": repacked(evidence),
        "crossover": crossover(evidence),
        "workloads": [_workload(name, found) for name, found in (evidence.get("workloads") or {}).items()],
        "forecast": forecast(evidence),
        "roofline": roofline(evidence),
        "dense_path": dense_path(evidence),
        "fp4": fp4(evidence),
        "device": ((evidence.get("made_by", {}).get("device") or {}).get("gpu") or {}).get("name", "one GPU"),
    }


def asked(engine: Evidence) -> str:
    """The engine, and what of its environment changes its choice."""
    if not engine:
        return ""
    target = TARGETS.get(engine.get("engine", ""))
    named = " ".join(filter(None, (target.summary if target else engine.get("engine"), engine.get("version"))))
    on = f" on {engine['generation']}" if engine.get("generation") else ""
    set_to = ", ".join(f"`{name}={value}`" for name, value in (engine.get("environment") or {}).items())
    failed = f"; it could not be asked: {engine['error']}" if engine.get("error") else ""
    return f"{named}{on}{f', with {set_to}' if set_to else ''}{failed}"


def choices(engine: Evidence) -> list[list[str]]:
    """GEMMs that were answered alike, the engine's kernel, what was timed for it, who said so, and what it rejected."""
    found: dict[tuple[str, ...], list[str]] = {}
    for choice in engine.get("choices", []):
        found.setdefault(_answer(choice, engine.get("runs", {})), []).append(choice["gemm"])
    return [[", ".join(gemms), *answer] for answer, gemms in found.items()]


def _answer(choice: Evidence, runs: Mapping[str, str]) -> tuple[str, ...]:
    name, class_name = choice.get("kernel") or "none", choice.get("class_name")
    gemm, _, made = choice["gemm"].partition(" ")  # what is made of it follows, where layers differ
    whole = f"{gemm.rpartition('.')[0]} {made}".strip()  # both GEMMs of grouped experts are timed as one operation
    timed = runs.get(choice["gemm"]) or runs.get(whole)
    source = "; ".join(filter(None, (choice.get("source"), choice.get("error"))))
    rejected = "; ".join(f"{kernel}: {why}" for kernel, why in (choice.get("rejected") or {}).items())
    known = f"{name} (`{class_name}`)" if class_name else name
    return known, f"`{timed}`" if timed else "not timed", source, rejected or "–"


def seen(evidence: Evidence) -> str:
    """Whether the profiler saw the engine's kernels run, or why not."""
    mine = [entry for entry in evidence.get("symbols", []) if entry["kernel"] in engines(evidence)]
    if reasons := list(dict.fromkeys(entry["unconfirmed"] for entry in mine if entry.get("unconfirmed"))):
        return f"Not confirmed by torch.profiler: {'; '.join(reasons)}."
    sizes = together([str(m) for m in dict.fromkeys(entry["m"] for entry in mine)])
    names = list(dict.fromkeys(name for entry in mine for name in entry["seen"]))
    return f"torch.profiler saw these run at M = {sizes}: {', '.join(f'`{name}`' for name in names)}." if names else ""


def checked(evidence: Evidence) -> str:
    """The largest error of the engine's kernels, and what their number formats explain."""
    worst: dict[str, Evidence] = {}
    for entry in evidence.get("numerics", []):
        if entry["kernel"] in engines(evidence):
            worst[entry["kernel"]] = max(
                worst.get(entry["kernel"], entry), entry, key=lambda one: one["relative_error"] / one["tolerance"]
            )
    said = [f"{name} {one['relative_error']:.4f} of {one['tolerance']:.4f}" for name, one in worst.items()]
    first = "Every kernel was first checked against the dequantized weights"
    return f"{first}; largest relative error, of what is tolerated: {', '.join(said)}." if said else ""


def repacked(evidence: Evidence) -> list[str]:
    """What the repacked kernels were given, a line a layout."""
    found: dict[str, list[str]] = {}
    for kernel in evidence.get("kernels", []):
        if (to := kernel.get("repacked")) and not kernel.get("unavailable"):
            loss = "without loss" if to["lossless"] else to["note"]
            layout = f"the same codes repacked as {to['format']} (layout `{to['layout']}`, scheme {to['scheme']})"
            found.setdefault(f"{layout}: {loss}", []).append(kernel["name"])
    return [f"{together(names)}: {what}" for what, names in found.items()]


def crossover(evidence: Evidence) -> str:
    """At which M bf16 first catches up, with all GEMMs together and with each; and where it falls behind again."""
    found = evidence.get("crossover") or {}
    if "all" not in found:
        return ""
    line, first = next(iter(speedups(evidence).values()), []), found["all"]
    slow = [m for m, speedup in line if speedup <= 1]
    again = [m for m, _ in line if slow and m > slow[-1]]
    more = f", and again from M = {again[0]}" if again and first is not None else ""
    ends: dict[str, list[str]] = {}
    for gemm, m in found.items():
        if gemm != "all":
            ends.setdefault(_end(m), []).append(gemm)
    each = [f"{', '.join(gemms)} {end}" for end, gemms in ends.items()]
    return f"On the engine's kernels all GEMMs together pay {_end(first)}{more}. One by one: {'; '.join(each)}."


def _end(m: float | None) -> str:
    return "at every M that was measured" if m is None else f"up to M = {m:.0f}" if m else "not even at the smallest M"


def _workload(name: str, found: Evidence) -> list[str]:
    m, *_ = max(found["by_m"], key=lambda row: row[3], default=("–",))
    return [
        name if name == found["written"] else f"{name}, {found['written']}",
        str(m),
        times(found["linear_speedup"]),
        times(found["speedup"]),
        percent(found["shares"].get("attention")),
        f"{found['baseline_tokens_per_s']:,.0f}",
        f"{found['tokens_per_s']:,.0f}",
    ]


def forecast(evidence: Evidence) -> list[str]:
    """What the forecast stands on: measured, estimated."""
    around = evidence.get("around") or {}
    ran, rest = around.get("ran", {}), around.get("rest", {})
    named = {
        "attention": [part for part in ("decode", "prefill", "mixed") if rest.get(part)],
        "elementwise": rest.get("elementwise"),
        "head": rest.get("head"),
    }
    measured = [f"{part} ({ran[part]})" for part, found in named.items() if found and ran.get(part)]
    more = {
        "prompts": "whole layers of prompts",
        "decodes": "whole layers of decodes",
        "sustained": "the lasting clock",
    }
    measured += [words for part, words in more.items() if rest.get(part)]
    if around.get("machine"):
        measured.append("memory bandwidth and the rates of large GEMMs")
    said = [f"Measured beside the GEMMs: {', '.join(measured)}."] if measured else []
    if why := around.get("not_measured"):
        said.append(f"Nothing was measured beside the GEMMs: {why}.")
    estimated = dict.fromkeys(part for one in (evidence.get("workloads") or {}).values() for part in one["estimated"])
    return [*said, f"Estimated: {', '.join(estimated)}."] if estimated else said


def roofline(evidence: Evidence) -> str:
    """What is reached of the roofline at the smallest and the largest M, from one GEMM to another."""
    found = evidence.get("roofline") or []
    sizes = sorted({row["m"] for row in found})
    if not sizes:
        return ""
    said = []
    for m in dict.fromkeys((sizes[0], sizes[-1])):
        own, base = ([row[side] for row in found if row["m"] == m] for side in ("part", "baseline_part"))
        said.append(f"{_range(own)} at M = {m} (bf16 {_range(base)})")
    above = any(max(row["part"], row["baseline_part"]) > 1 for row in found if row["m"] in (sizes[0], sizes[-1]))
    over = ". What exceeds the whole is faster than the GEMM that the peak was measured with" if above else ""
    return f"Of the roofline's speed the engine's kernels reach, by GEMM, {' and '.join(said)}{over}."


def _range(parts: Sequence[float]) -> str:
    low, high = (percent(one(parts)) for one in (min, max))
    return low if low == high else f"{low} to {high}"


def dense_path(evidence: Evidence) -> str:
    """What a bf16 copy beside the packed weights costs and gains."""
    found = evidence.get("dense_path")
    if not found:
        return ""
    start = found["from_m"]
    use = "would be of no use at any M that was measured" if start is None else f"would serve M from {start:.0f} on"
    takes = f"It takes {size(found['copy_bytes'])} more, and leaves the KV cache {found['kv_tokens_beside_the_copy']:,}"
    room = f" tokens in place of {found['kv_tokens']:,}"
    part = f" (gpu_memory_utilization {found['gpu_memory_utilization']}, {size(found['budget_bytes'])})"
    gains = [f"{name} {one if isinstance(one, str) else times(one)}" for name, one in found["workloads"].items()]
    return f"A bf16 copy kept beside the packed weights {use}. {takes}{room}{part}; end to end: {', '.join(gains)}."


def fp4(evidence: Evidence) -> list[str]:
    """What quantizing the activations takes of FP4 kernels, and which kind of MoE backend the workloads favour."""
    found = evidence.get("fp4") or {}
    shares: Sequence[tuple[str, float]] = sorted(found.get("quantize_share", {}).items(), key=lambda one: int(one[0]))
    ends = dict.fromkeys((shares[0], shares[-1])) if shares else {}
    said = [f"{percent(share)} at M = {m}" for m, share in ends]
    lines = [f"Quantizing activations takes {' and '.join(said)} of the kernels' time."] if said else []
    backends = [
        f"{name} meets {one['tokens_an_expert']} tokens an expert, which favours a backend for {one['favours']}"
        for name, one in found.get("moe_backend", {}).items()
    ]
    return lines + ([f"{'; '.join(backends)}."] if backends else [])
