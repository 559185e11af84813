"""Where repacked weights come from, as the card tells it: who quantized them, each step since, and what a step changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpub.card.words import size

Facts = dict[str, Any]


def lineage(run: Mapping[str, Any]) -> Facts | None:
    """How weights that were quantized before came to this layout, step by step; None where they were not repacked.

    by: the tool that quantized them, where that was not quantpub. base_bytes: None where the base is not known.
    """
    step, to, steps = run["stages"].get("repack"), run["layout"], list[Facts]()
    while step is not None:
        origin = step["from"]
        steps.insert(0, {"origin": origin, "to": to, **_changes(step)})
        step, to = origin.get("repack"), origin["layouts"][0]
    if not steps:
        return None
    first = steps[0]["origin"]
    return {
        "steps": [step | {"reference": _reference(step["origin"])} for step in steps],
        "by": first.get("quantized_by"),
        "layout": to,
        "origin": _reference(first),
        "base_bytes": first.get("base_bytes"),
        "first": first,
    }


def base_name(source: Mapping[str, Any]) -> str:
    return str(source.get("repo") or source.get("name"))


def _reference(origin: Mapping[str, Any]) -> str:
    return str(origin["repo"]) if origin["kind"] == "hub" else f"./{origin['name']}"


def _changes(step: Mapping[str, Any]) -> Facts:
    """What one repacking kept and what it changed, in words and figures of its record."""
    said = [f"{step['equal']} of {step['modules']} quantized linears have the very same weights"]
    if step["rounded"]:
        said.append(f"global scales moved by {step['rounded']:.1g} of themselves at most, float32's last place")
    notes = list(dict.fromkeys(conversion["note"] for conversion in step["conversions"]))
    lost = step["lost"]["max"] if step["lost"] else 0
    if lost:
        notes.append(f"of a weight's norm {100 * lost:.2g} % is lost at most (`{step['lost']['worst']}`)")
    return {"said": "; ".join(said + notes), "lossy": bool(lost)}


def base_bytes(made: Mapping[str, Any], repacked: Facts | None) -> int | None:
    """Of the base's weights. What a repacked checkpoint was read from is not its base."""
    found: int | None = repacked["base_bytes"] if repacked else made["source_bytes"]
    return found


def size_of_weights(made: Mapping[str, Any], repacked: Facts | None) -> str:
    own, base = size(made["output_bytes"]), base_bytes(made, repacked)
    return own if base is None else f"{own}, {made['output_bytes'] / base:.3f} of the base's {size(base)}"


def lineage_rows(repacked: Facts | None) -> list[tuple[str, str]]:
    """One for each step; of the first also who quantized the weights."""
    rows = []
    for step in repacked["steps"] if repacked else []:
        origin = step["origin"]
        layouts = " and ".join(f"`{layout}`" for layout in origin["layouts"])
        tool = origin.get("quantized_by")
        whose = f"`{_reference(origin)}`, {layouts}, quantized by {tool}" if tool else layouts
        rows.append(("Repacked from", f"{whose}; {step['said']}"))
    return rows
