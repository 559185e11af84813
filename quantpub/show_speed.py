"""Profiles, comparisons and advice as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpub.output import Output
from quantpub.profile_table import times

MANY = 4  # kernels of another machine are named in one line beyond so many


def show_profile(out: Output, evidence: Mapping[str, Any]) -> None:
    from quantpub.profile_table import tables

    for title, columns, rows in tables(evidence):
        out.table(title, columns, rows)
    for line in unavailable(evidence["kernels"]):
        out.line(f"  not measured     {line}")
    for cell in evidence["not_measured"]:
        sizes = ", ".join(map(str, cell["m"]))
        out.line(f"  not measured     {cell['kernel']} on {cell['gemm']}, M = {sizes}: {cell['reason']}")
    for line in engine_lines(evidence):
        out.line(f"  {line}")
    out.line(f"gate: {evidence['verdict']['gate']}: {evidence['verdict']['reason']}")
    if advice := evidence["verdict"].get("next"):
        out.line(f"  {advice}")


def engine_lines(evidence: Mapping[str, Any]) -> list[str]:
    """Of a GPU's profile: what the engine runs and why not others, what was seen to run, and what the figures say beside."""
    return [*_choices(evidence.get("engine")), *_symbols(evidence.get("symbols", [])), *_costs(evidence)]


def _choices(engine: Mapping[str, Any] | None) -> list[str]:
    found: dict[str, list[str]] = {}
    for choice in (engine or {}).get("choices", []):
        rejected = "; ".join(f"{name}: {reason}" for name, reason in choice["rejected"].items())
        said = f"{choice['kernel'] or 'no kernel'} ({choice['source']})" + (f", not {rejected}" if rejected else "")
        found.setdefault(said + (f"; {choice['error']}" if choice["error"] else ""), []).append(choice["gemm"])
    return [f"the engine runs  {said}; for {', '.join(gemms)}" for said, gemms in found.items()]


def _symbols(symbols: list[dict[str, Any]]) -> list[str]:
    odd = [f"not confirmed    {one['unconfirmed']}" for one in symbols if one["unconfirmed"]]
    names = dict.fromkeys(one["kernel"] for one in symbols if not one["unconfirmed"])
    return [*([f"seen on the GPU  {', '.join(names)}"] if names else []), *dict.fromkeys(odd)]


def _costs(evidence: Mapping[str, Any]) -> list[str]:
    lines = [
        f"not chosen       {one['kernel']}, {times(one['speedup'])} in {one['workload']}: {one['why']}"
        + (f"; {one['disable']} would make it the choice" if "disable" in one else "")
        for one in evidence.get("faster", [])
    ]
    if cross := evidence.get("crossover"):
        end = cross["all"]
        said = "at every M that was measured" if end is None else f"up to M ≈ {end:g}" if end else "nowhere"
        lines.append(f"faster than bf16 {said}")
    if parts := evidence.get("roofline"):
        first, last = (at(part["m"] for part in parts) for at in (min, max))
        reach = ", ".join(f"{_range([p['part'] for p in parts if p['m'] == m])} at M = {m}" for m in (first, last))
        lines.append(f"of the roofline  {reach}")
    if dense := evidence.get("dense_path"):
        found = ((name, value) for name, value in dense["workloads"].items() if isinstance(value, float))
        best = ", ".join(f"{name} {times(value)}" for name, value in found)
        lines.append(f"with a bf16 copy for large batches, {dense['copy_bytes'] / 1e9:.1f} GB more: {best}")
    return lines


def _range(parts: list[float]) -> str:
    low, high = (f"{100 * end:.0f}" for end in (min(parts), max(parts)))
    return f"{low} %" if low == high else f"{low}–{high} %"


def unavailable(kernels: list[dict[str, Any]]) -> list[str]:
    """One line for each reason; many kernels with the same one are named together."""
    found: dict[str, list[str]] = {}
    for kernel in kernels:
        if kernel["unavailable"]:
            found.setdefault(kernel["unavailable"], []).append(kernel["name"])
    return [f"{', '.join(names)}: {reason}" for reason, names in found.items()]


def show_comparison(out: Output, facts: Mapping[str, Mapping[str, Any]]) -> None:
    from quantpub.compare import tables

    for title, columns, rows in tables(facts):
        out.table(title, columns, rows)


def show_advice(out: Output, advice: Mapping[str, Any]) -> None:
    """Narrow columns, for terminals of 80: what a word of `times` means stands below, with its error."""
    crowded = not all(choice["fits"] for choice in advice["choices"])
    columns = [
        "recipe",
        "layout",
        "kernel",
        "speed",
        "tokens/s",
        "GB",
        "KL",
        "times",
        *(["at once"] if crowded else []),
    ]
    title = (
        f"{advice['model']} on {advice['gpu']}, {advice['memory_gb']:.0f} GB, {advice['workload']}, {advice['engine']}"
    )
    out.line(f"advice: {advice['reason']}")
    if advice["choices"]:
        out.table(title, columns, [_choice_row(choice, crowded) for choice in advice["choices"]])
    reasons: dict[str, list[str]] = {}
    for refused in advice["refused"]:
        reasons.setdefault(refused["reason"], []).append(refused["recipe"])
    for reason, recipes in reasons.items():
        out.line(f"  not {', '.join(recipes)}: {reason}")
    for note in advice["notes"]:
        out.line(f"  {note}")


def _choice_row(choice: Mapping[str, Any], crowded: bool) -> list[str]:
    return [
        choice["recipe"],
        choice["layout"] or "–",
        choice["kernel"],
        times(choice["speedup"]),
        f"{choice['tokens_per_s']:,.0f}",
        f"{choice['weights_gb']:.1f}",
        "–" if choice["kl_28m"] is None else f"{choice['kl_28m']:.4f}",
        next(word for word in ("other shapes", "measured", "roofline") if word in choice["confidence"]).split()[0],
        *([f"{choice['at_once']}/{choice['wanted']}"] if crowded else []),
    ]
