"""Which layouts hold which schemes, and so from which to which a checkpoint can be repacked: data, no torch.

A layout holds a scheme exactly or refuses it (law 2). Two layouts that both hold a scheme are therefore a lossless pair for
it, in both directions: codes, scales and zeros come through bit for bit. Where a layout holds another scheme of the same
weights, a conversion leads there; what that costs is measured tensor by tensor, and accepted by the user or not done.
Source: the formats' specifications; a test asks every layout's own `reject`.
"""

from __future__ import annotations

from dataclasses import dataclass

# layout → schemes
HOLDS: dict[str, tuple[str, ...]] = {
    "ct-pack": ("W4A16", "W4A16_ASYM", "W8A16"),
    "ct-int": ("W8A8",),
    "ct-float": ("FP8", "FP8_DYNAMIC", "FP8_BLOCK"),
    "ct-nvfp4": ("NVFP4", "NVFP4A16"),
    "ct-mxfp4": ("MXFP4A16",),
    "hf-fp8": ("FP8_BLOCK",),
    "modelopt-fp8": ("FP8",),
    "modelopt-fp8-channel": ("FP8_DYNAMIC",),
    "modelopt-fp8-block": ("FP8_BLOCK",),
    "modelopt-nvfp4": ("NVFP4", "NVFP4A16"),
    "gptq": ("W4A16", "W8A16"),
    "gptq-v2": ("W4A16", "W4A16_ASYM", "W8A16"),
    "awq": ("W4A16", "W4A16_ASYM"),
    "torchao-tile": ("W4A16", "W4A16_FLOAT_ZERO"),
    "torchao-nvfp4": ("NVFP4A16",),
    "bnb-int8": ("LLM_INT8",),
}


@dataclass(frozen=True)
class Conversion:
    """From one scheme to another of the same codes. note: what is lost, or on what it depends.

    exact: nothing is lost. partial: of some weights alone, the others are refused. dtype: what scales are rounded to, in
    safetensors' words, or `model`, the model's own; empty: they stay as they are.
    """

    name: str
    source: str
    target: str
    note: str
    exact: bool = False
    partial: bool = False
    dtype: str = ""


MIDDLE = "zeros in the middle are left out; others have no place, and their weights are refused"
# Of those that begin at one scheme the first that leads to the layout is taken: partial ones come last
CONVERSIONS = (
    Conversion(
        "whole-zero",
        "W4A16_FLOAT_ZERO",
        "W4A16_ASYM",
        "float zeros are rounded to whole codes from -8 to 7, half a step at most where they lie among these",
    ),
    Conversion("float-zero", "W4A16_ASYM", "W4A16_FLOAT_ZERO", "zero times scale is rounded to the scale's dtype"),
    Conversion(
        "bf16-zero",
        "W4A16_ASYM",
        "W4A16_FLOAT_ZERO",
        "scales, and zero times scale, are rounded to bf16",
        dtype="BF16",
    ),
    Conversion("bf16-scale", "W4A16", "W4A16", "scales are rounded to bf16", dtype="BF16"),
    Conversion(
        "model-scale",
        "LLM_INT8",
        "W8A16",
        "float32 scales are rounded to the model's dtype; all activations stay in 16 bits",
        dtype="model",
    ),
    Conversion(
        "no-input-scale",
        "NVFP4",
        "NVFP4A16",
        "activations stay in 16 bits: the calibrated scale that they had is left out",
        exact=True,
    ),
    Conversion("no-zero", "W4A16_ASYM", "W4A16", MIDDLE, exact=True, partial=True),
    Conversion("no-zero", "W4A16_FLOAT_ZERO", "W4A16", MIDDLE, exact=True, partial=True),
)


def lossless(layout: str) -> dict[str, tuple[str, ...]]:
    """Layout → the schemes that both hold."""
    own = HOLDS[layout]
    pairs = {
        other: tuple(scheme for scheme in held if scheme in own) for other, held in HOLDS.items() if other != layout
    }
    return {other: schemes for other, schemes in pairs.items() if schemes}


def converted(layout: str) -> dict[str, tuple[Conversion, ...]]:
    """Layout → the conversions that lead there from the schemes of this one which it does not hold, one for each."""
    found = {other: _into(HOLDS[layout], held) for other, held in HOLDS.items() if other != layout}
    return {other: conversions for other, conversions in found.items() if conversions}


def _into(own: tuple[str, ...], held: tuple[str, ...]) -> tuple[Conversion, ...]:
    first: dict[str, Conversion] = {}
    for each in CONVERSIONS:
        if each.source in own and each.source not in held and each.target in held:
            first.setdefault(each.source, each)
    return tuple(first.values())


def clause(layout: str) -> str:
    """Where a checkpoint of this layout can go, in words."""
    kinds: dict[str, dict[str, list[str]]] = {"bit for bit": {}, "with a loss": {}, "bit for bit or not at all": {}}
    for other, schemes in lossless(layout).items():
        kinds["bit for bit"][other] = list(schemes)
    for other, conversions in converted(layout).items():
        for each in conversions:
            kind = "bit for bit or not at all" if each.partial else "bit for bit" if each.exact else "with a loss"
            kinds[kind].setdefault(other, []).append(each.source)
    said = [f"{kind} as {_listed(found)}" for kind, found in kinds.items() if found]
    return f"repacked {'; '.join(said)}" if said else "repacked as nothing else"


def _listed(found: dict[str, list[str]]) -> str:
    return ", ".join(f"{layout} ({', '.join(schemes)})" for layout, schemes in found.items())


def table() -> str:
    """The pairs as docs/repack.md shows them."""
    lines = ["| from | to | bit for bit | by a conversion |", "| --- | --- | --- | --- |"]
    for layout in HOLDS:
        same, changed = lossless(layout), converted(layout)
        for other in (name for name in HOLDS if name in same or name in changed):
            into = ", ".join(f"{each.source} → {each.target}: {each.name}" for each in changed.get(other, ()))
            lines.append(f"| {layout} | {other} | {', '.join(same.get(other, ())) or '–'} | {into or '–'} |")
    return "\n".join(lines)


def conversions_table() -> str:
    """The conversions as docs/repack.md shows them."""
    lines = ["| conversion | from → to | what it does |", "| --- | --- | --- |"]
    return "\n".join(lines + [f"| {each.name} | {each.source} → {each.target} | {each.note} |" for each in CONVERSIONS])
