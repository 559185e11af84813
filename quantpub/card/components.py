"""What is quantized, and how: read from config.json's quantization_config and the plan, never from a template.

config.json is what an engine obeys, the plan is what was done. A linear on which the two disagree cannot be described.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantpub.artifact import Artifact
from quantpub.decode import plan_lines
from quantpub.errors import InputError
from quantpub.families import HEAD, LINEAR, ROUTER

QUANTIZABLE = (LINEAR, ROUTER, HEAD)  # what an engine builds as a Linear, and would quantize unless told not to


@dataclass
class Component:
    """Tensors of one name but for layer and expert numbers. weights and activations: their precision in words."""

    name: str
    weights: str
    activations: str
    count: int = 0
    parameters: int = 0
    shapes: set[tuple[int, ...]] = field(default_factory=set)


def components(artifact: Artifact) -> list[Component]:
    """Every component, quantized ones first. Errors: InputError where config.json and the plan disagree."""
    config = artifact.config()
    found: dict[tuple[str, str], Component] = {}
    for line in plan_lines(artifact):
        module, shape = line["as"].removesuffix(".weight"), tuple(line["shape"])
        group = declared(config, module) if line["role"] in QUANTIZABLE else None
        if (group is not None) != (line["action"] == "quantize"):
            state = "quantized" if group else "unquantized"
            raise InputError(
                f"config.json declares {module} {state}, the plan says {line['action']}",
                where=str(artifact.path / "config.json"),
                next="quantize again into another folder",
            )
        weights, activations = precision(group) if group else (line["dtype"], "–")
        key = (re.sub(r"\.\d+(?=\.|$)", ".*", module), weights)
        part = found.setdefault(key, Component(key[0], weights, activations))
        part.count, part.parameters = part.count + 1, part.parameters + _elements(shape)
        part.shapes.add(shape)
    return sorted(found.values(), key=lambda part: part.activations == "–")


def _elements(shape: Sequence[int]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


def declared(config: Mapping[str, Any], module: str) -> Mapping[str, Any] | None:
    """The group of quantization_config that applies to a Linear of this name, or None."""
    quantization = config.get("quantization_config") or {}
    if any(_matches(entry, module) for entry in quantization.get("ignore", [])):
        return None
    groups: Sequence[Mapping[str, Any]] = list((quantization.get("config_groups") or {}).values())
    return next((group for group in groups if any(_targets(entry, module) for entry in group.get("targets", []))), None)


def _targets(entry: str, module: str) -> bool:
    return entry == "Linear" or _matches(entry, module)


def _matches(entry: str, module: str) -> bool:
    return bool(re.match(entry[3:], module)) if entry.startswith("re:") else entry == module


def precision(group: Mapping[str, Any]) -> tuple[str, str]:
    """(weights, activations) of one group in words."""
    inputs = group.get("input_activations")
    return _words(group["weights"]), _words(inputs) if inputs else "not quantized"


def _words(arguments: Mapping[str, Any]) -> str:
    """compressed-tensors' QuantizationArgs as a reader says them."""
    number = {"int": "int", "float": "fp"}.get(arguments["type"], arguments["type"]) + str(arguments["num_bits"])
    per = {"group": f"{arguments.get('group_size')} columns", "channel": "row"}
    scale = f"one scale per {per.get(arguments['strategy'], arguments['strategy'])}"
    symmetry = "" if arguments.get("symmetric", True) else ", asymmetric"
    return f"{number}, {scale}{symmetry}" + (", at run time" if arguments.get("dynamic") else "")
