"""Schemes: what a quantized weight and its activations are, as data. Preset names are compressed-tensors' own.

A scheme says number format, block shape, scale dtype and zero domain; it says nothing of bytes on disk (layouts) or of
how scales are found (algorithms). It is carried beside every tensor and never inferred from one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
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
    "int8": Number(8, -128, 127, "int"),
    "fp4_e2m1": Number(4, -6, 6, "float"),
    "fp8_e4m3": Number(8, -448, 448, "float"),
}


@dataclass(frozen=True)
class WeightFormat:
    """num: a key of NUMBERS. block: rows × columns that share one scale, -1 for the whole side.

    scale_dtype: what a scale is rounded to before codes are computed from it. `model` is the dtype of the weight it
    replaces; `float32`; `fp8_e4m3`; `e8m0`, a power of two; `absmax127`, a float32 that is some float32 times 1/127.
    zero_domain: torchao's words. none: w ≈ codes * scale; int: (codes - zero) * scale; float: codes * scale + zero.
    global_scale: a second, float32 scale of the whole tensor, a power of two, multiplied on top.
    """

    num: str
    block: tuple[int, int]
    scale_dtype: str = "model"
    zero_domain: str = "none"
    global_scale: bool = False

    @property
    def number(self) -> Number:
        return NUMBERS[self.num]

    def scale_shape(self, n: int, k: int) -> tuple[int, int]:
        """Shape of the scale of an [n, k] weight; a block at the edge may be a part of one."""
        bn, bk = (side if side != WHOLE else full for side, full in zip(self.block, (n, k), strict=True))
        return -(-n // bn), -(-k // bk)


@dataclass(frozen=True)
class ActFormat:
    """Activations: `granularity` token (one scale a row), tensor, or group (one scale for `group_size` columns of a row).

    dynamic: scales are computed at run time. global_scale: a calibrated scale of the tensor on top of dynamic groups.
    outlier: columns that hold a magnitude from here on stay in 16 bits, and out of the scale.
    """

    num: str
    granularity: str
    dynamic: bool
    group_size: int = WHOLE
    global_scale: bool = False
    outlier: float | None = None

    @property
    def calibrated(self) -> bool:
        """Whether it has a scale that calibration finds."""
        return self.global_scale or not self.dynamic


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
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Scheme:
        """The scheme that `as_json` wrote."""
        weight, act = value["weight"], value["act"]
        rows, columns = weight["block"]
        return Scheme(value["name"], WeightFormat(**weight | {"block": (rows, columns)}), act and ActFormat(**act))


_TOKEN8 = ActFormat("int8", "token", True)
_FP8_TOKEN = ActFormat("fp8_e4m3", "token", True)
_FP4 = WeightFormat("fp4_e2m1", (1, 16), "fp8_e4m3", global_scale=True)
PRESETS = {
    scheme.name: scheme
    for scheme in (
        Scheme("W4A16", WeightFormat("int4", (1, 128))),
        Scheme("W4A16_ASYM", WeightFormat("int4", (1, 128), zero_domain="int")),
        Scheme("W4A16_FLOAT_ZERO", WeightFormat("int4", (1, 128), zero_domain="float")),
        Scheme("W8A16", WeightFormat("int8", (1, WHOLE))),
        Scheme("W8A8", WeightFormat("int8", (1, WHOLE)), _TOKEN8),
        Scheme("LLM_INT8", WeightFormat("int8", (1, WHOLE), "absmax127"), replace(_TOKEN8, outlier=6.0)),
        Scheme("FP8", WeightFormat("fp8_e4m3", (WHOLE, WHOLE), "float32"), ActFormat("fp8_e4m3", "tensor", False)),
        Scheme("FP8_DYNAMIC", WeightFormat("fp8_e4m3", (1, WHOLE)), _FP8_TOKEN),
        Scheme(
            "FP8_BLOCK",
            WeightFormat("fp8_e4m3", (128, 128), "float32"),
            ActFormat("fp8_e4m3", "group", True, group_size=128),
        ),
        Scheme("NVFP4A16", _FP4),
        Scheme("NVFP4", _FP4, ActFormat("fp4_e2m1", "group", True, group_size=16, global_scale=True)),
        Scheme("MXFP4A16", WeightFormat("fp4_e2m1", (1, 32), "e8m0")),
    )
}
SUMMARIES = {
    "W4A16": "int4 weights in groups of 128, symmetric; 16-bit activations",
    "W4A16_ASYM": "int4 weights in groups of 128 with an integer zero; 16-bit activations",
    "W4A16_FLOAT_ZERO": "int4 weights in groups of 128 with a bf16 zero, as HQQ makes them; bf16 activations",
    "W8A16": "int8 weights, one scale a row; 16-bit activations",
    "W8A8": "int8 weights, one scale a row; int8 activations, one scale a token, at run time",
    "LLM_INT8": "int8 weights, one float32 scale a row; int8 activations with outlier columns kept in 16 bits",
    "FP8": "FP8 E4M3 weights and activations, one scale a tensor each, that of activations calibrated",
    "FP8_DYNAMIC": "FP8 E4M3 weights, one scale a row; FP8 activations, one scale a token, at run time",
    "FP8_BLOCK": "FP8 E4M3 weights, one scale a 128×128 block; FP8 activations in groups of 128, at run time",
    "NVFP4A16": "FP4 E2M1 weights in groups of 16 with E4M3 scales and a global scale; 16-bit activations",
    "NVFP4": "FP4 E2M1 weights and activations in groups of 16 with E4M3 scales and global scales",
    "MXFP4A16": "FP4 E2M1 weights in groups of 32 with power-of-two scales; 16-bit activations",
}


def preset(name: str, group_size: int | None = None) -> Scheme:
    """The preset called `name`, with another group size where given. Errors: UsageError with the closest names."""
    if name not in PRESETS:
        raise UsageError(f"unknown scheme {name!r}", next=closest(name, PRESETS))
    scheme = PRESETS[name]
    if group_size is None:
        return scheme
    return replace(scheme, weight=replace(scheme.weight, block=(scheme.weight.block[0], group_size)))
