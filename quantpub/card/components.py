"""What is quantized, and how: from the schemes that the plan names, held against config.json's quantization_config.

config.json is what an engine obeys, the plan is what was done. An artifact on which the two disagree is not described.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from quantpub.artifact import Artifact
from quantpub.decode import Decoder
from quantpub.errors import InputError
from quantpub.gemms import is_expert
from quantpub.scheme import WHOLE, ActFormat, Scheme, WeightFormat

NAMES = {"int4": "int4", "int8": "int8", "fp4_e2m1": "FP4 (E2M1)", "fp8_e4m3": "FP8 (E4M3)"}


@dataclass
class Component:
    """Tensors of one name but for layer and expert numbers. weights and activations: their precision in words."""

    name: str
    weights: str
    activations: str
    count: int = 0
    parameters: int = 0
    shapes: set[tuple[int, ...]] = field(default_factory=set)


@dataclass(frozen=True)
class Use:
    """Quantized weights of one scheme in one layout; experts apart, since engines have other kernels for them."""

    scheme: Scheme
    layout: str
    experts: bool

    @property
    def kind(self) -> tuple[str, str, bool]:
        return self.layout, self.scheme.name, self.experts


def uses(decoder: Decoder) -> list[Use]:
    """What the plan's treatments were really used for, in their order."""
    found = {(decoder.place(module), is_expert(module)) for module, _ in decoder.modules()}
    treated = [(decoder.treatments[place], experts) for place, experts in sorted(found)]
    return list(dict.fromkeys(Use(t.scheme, t.layout.name, experts) for t, experts in treated))


def scheme_names(found: Sequence[Use]) -> dict[Scheme, str]:
    """Scheme → its name; with the columns of a group where two schemes have one name."""
    schemes = list(dict.fromkeys(use.scheme for use in found))
    twice = {a.name for i, a in enumerate(schemes) for b in schemes[:i] if a.name == b.name}
    return {s: f"{s.name} in groups of {s.group_size}" if s.name in twice else s.name for s in schemes}


def components(artifact: Artifact, decoder: Decoder) -> list[Component]:
    """Every component, quantized ones first. Errors: InputError where config.json and the plan disagree."""
    _require_agreement(artifact, decoder)
    found: dict[tuple[str, str], Component] = {}
    for line in decoder.actions:
        module, shape = line["as"].removesuffix(".weight"), tuple(line["shape"])
        weights, activations = line["dtype"], "–"
        if line["action"] == "quantize":
            weights, activations = precision(decoder.treated(module).scheme)
        key = (re.sub(r"\.\d+(?=\.|$)", ".*", module), weights)
        part = found.setdefault(key, Component(key[0], weights, activations))
        part.count, part.parameters = part.count + 1, part.parameters + math.prod(shape)
        part.shapes.add(shape)
    return sorted(found.values(), key=lambda part: part.activations == "–")


def _require_agreement(artifact: Artifact, decoder: Decoder) -> None:
    """config.json must say what the layouts state for what the plan did, key by key."""
    stated, expected = artifact.config().get("quantization_config") or {}, decoder.declared()
    if odd := [key for key in {*stated, *expected} if stated.get(key) != expected.get(key)]:
        raise InputError(
            f"quantization_config and the plan disagree on {', '.join(sorted(odd))}",
            where=str(artifact.path / "config.json"),
            next="quantize again into another folder",
        )


def precision(scheme: Scheme) -> tuple[str, str]:
    """(weights, activations) of a scheme in words."""
    return _weights(scheme.weight), activation_words(scheme.act)


def _weights(weight: WeightFormat) -> str:
    rows, columns = weight.block
    if rows == WHOLE:
        per = "tensor"
    elif rows > 1:
        per = f"{rows}×{columns} block"
    else:
        per = "row" if columns == WHOLE else f"{columns} columns"
    kind = {"fp8_e4m3": "FP8 (E4M3) ", "e8m0": "power-of-two "}.get(weight.scale_dtype, "")
    zero = {"none": "", "int": " and an integer zero", "float": " and a floating-point zero"}[weight.zero_domain]
    shared = ", one global scale" if weight.global_scale else ""
    return f"{NAMES[weight.num]}, one {kind}scale{zero} per {per}{shared}"


def activation_words(act: ActFormat | None) -> str:
    if act is None:
        return "not quantized"
    per = f"{act.group_size} columns of a token" if act.granularity == "group" else act.granularity
    when = "at run time" if act.dynamic else "calibrated"
    kept = "" if act.outlier is None else f"; columns with magnitudes from {act.outlier:g} on stay in 16 bits"
    return f"{NAMES[act.num]}, one scale per {per}, {when}{kept}"
