"""Schemes: what a quantized weight and its activations are, as data. Preset names are compressed-tensors' own.

A scheme says number format, block shape, scale dtype and zero domain; it says nothing of bytes on disk (layouts) or of
how scales are found (algorithms). It is carried beside every tensor and never inferred from one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from quantpub.errors import UsageError, closest

WHOLE = -1  # a block side that spans the whole dimension


@dataclass(frozen=True)
class Number:
    """A number format: `bits` on disk, smallest and largest representable code."""

    bits: int
    low: float
    high: float
    kind: str  # int or float


NUMBERS = {
    "int4": Number(4, -8, 7, "int"),
    "fp8_e4m3": Number(8, -448, 448, "float"),
}


@dataclass(frozen=True)
class WeightFormat:
    """num: a key of NUMBERS. block: rows × columns that share one scale, -1 for the whole side.

    scale_dtype: `model` stores the scale in the dtype of the weight it replaces. zero_domain: torchao's word; `none`
    is symmetric, so that w ≈ codes * scale.
    """

    num: str
    block: tuple[int, int]
    scale_dtype: str = "model"
    zero_domain: str = "none"

    @property
    def number(self) -> Number:
        return NUMBERS[self.num]

    def scale_shape(self, n: int, k: int) -> tuple[int, int]:
        """Shape of the scale of an [n, k] weight whose sides the block divides."""
        bn, bk = (side if side != WHOLE else full for side, full in zip(self.block, (n, k), strict=True))
        return n // bn, k // bk


@dataclass(frozen=True)
class ActFormat:
    """Activations: `granularity` token (one scale a row), computed at run time when `dynamic`."""

    num: str
    granularity: str
    dynamic: bool


@dataclass(frozen=True)
class Scheme:
    name: str
    weight: WeightFormat
    act: ActFormat | None = None

    @property
    def group_size(self) -> int:
        """Columns that share a scale; -1 when a whole row does."""
        return self.weight.block[1]

    def as_json(self) -> dict[str, Any]:
        weight, act = self.weight, self.act
        return {
            "name": self.name,
            "weight": {
                "num": weight.num,
                "block": list(weight.block),
                "scale_dtype": weight.scale_dtype,
                "zero_domain": weight.zero_domain,
            },
            "act": act and {"num": act.num, "granularity": act.granularity, "dynamic": act.dynamic},
        }


PRESETS = {
    "W4A16": Scheme("W4A16", WeightFormat("int4", (1, 128))),
    "FP8_DYNAMIC": Scheme("FP8_DYNAMIC", WeightFormat("fp8_e4m3", (1, WHOLE)), ActFormat("fp8_e4m3", "token", True)),
}
SUMMARIES = {
    "W4A16": "int4 weights in groups of 128, symmetric; 16-bit activations",
    "FP8_DYNAMIC": "FP8 E4M3 weights, one scale a row; FP8 activations, one scale a token, at run time",
}


def preset(name: str, group_size: int | None = None) -> Scheme:
    """The preset called `name`, with another group size where given. Errors: UsageError with the closest names."""
    if name not in PRESETS:
        raise UsageError(f"unknown scheme {name!r}", next=closest(name, PRESETS))
    scheme = PRESETS[name]
    if group_size is None:
        return scheme
    return replace(scheme, weight=replace(scheme.weight, block=(scheme.weight.block[0], group_size)))
