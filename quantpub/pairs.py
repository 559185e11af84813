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
    "modelopt-nvfp4": ("NVFP4", "NVFP4A16"),
    "gptq": ("W4A16", "W8A16"),
    "awq": ("W4A16", "W4A16_ASYM"),
    "torchao-tile": ("W4A16", "W4A16_FLOAT_ZERO"),
    "bnb-int8": ("LLM_INT8",),
}


@dataclass(frozen=True)
class Conversion:
    """From one scheme to another of the same weights. exact: whether nothing is lost, whatever the weights.

    note: what is lost where it is not exact, or on what it depends.
    """

    name: str
    source: str
    target: str
    exact: bool
    note: str


CONVERSIONS = (
    Conversion(
        "whole-zero",
        "W4A16_FLOAT_ZERO",
        "W4A16_ASYM",
        False,
        "float zeros are rounded to whole codes, half a step at most",
    ),
    Conversion(
        "float-zero",
        "W4A16_ASYM",
        "W4A16_FLOAT_ZERO",
        False,
        "zero times scale is rounded to the scale's dtype",
    ),
    Conversion(
        "no-zero",
        "W4A16_ASYM",
        "W4A16",
        False,
        "nothing is lost where every zero is in the middle; other zeros have no place, and their weights are refused",
    ),
)


def lossless(layout: str) -> dict[str, tuple[str, ...]]:
    """Layout → the schemes that both hold."""
    own = HOLDS[layout]
    pairs = {
        other: tuple(scheme for scheme in held if scheme in own) for other, held in HOLDS.items() if other != layout
    }
    return {other: schemes for other, schemes in pairs.items() if schemes}


def converted(layout: str) -> dict[str, tuple[Conversion, ...]]:
    """Layout → the conversions that lead there from a scheme of this one which it does not hold."""
    found = {
        other: tuple(
            each
            for each in CONVERSIONS
            if each.source in HOLDS[layout] and each.source not in held and each.target in held
        )
        for other, held in HOLDS.items()
        if other != layout
    }
    return {other: conversions for other, conversions in found.items() if conversions}
