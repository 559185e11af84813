"""What adopting a checkpoint means: its quantized modules named, each with a scheme and a layout of ours that reads it.

A scheme is taken from what the checkpoint declares, never from its tensors; the tensors must then be those that the layout
states for it. Only two things are let pass: a number that another tool keeps in a narrower float, or in another shape of
the same elements (`fitted`).

Legend: N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from quantpub.held import Held
from quantpub.scheme import PRESETS, WHOLE, ActFormat, Scheme, WeightFormat
from quantpub.shards import DTYPES, TensorInfo
from quantpub.sources import LocalSource

FLOATS = ("BF16", "F16", "F32")
CODES = ("F8_E4M3", "U8", "I8", "I32")
# The tensor that holds a module's codes, and in which order to look for it
MAINS = ("weight_packed", "qweight", "_weight_qdata", "weight")
SCALES = ("weight_scale", "scales", "_weight_scale_and_zero", "_weight_scale", "weight_scale_inv", "SCB")
# What only a quantized module has
MARKS = frozenset(
    {
        *MAINS[:3],
        *SCALES,
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
        "weight_global_scale",
        "weight_scale_2",
        "input_scale",
        "input_global_scale",
        "input_zero_point",
        "pre_quant_scale",
        "qzeros",
        "g_idx",
        "weight_format",
        "_weight_zero_point",
        "_weight_per_tensor_scale",
        "_weight_act_per_tensor_scale",
    }
)


class Unreadable(Exception):
    """Why a module, or a checkpoint, cannot be adopted: one sentence. rule: of `verify`, which says it."""

    rule = "readable"


class Undeclared(Unreadable):
    """A module is quantized, and the config does not say how: engines take its codes for a weight, or for nothing."""

    rule = "bits"


class Headless(Unreadable):
    """A shard's header lacks the entries by which loaders put the parts of a weight together."""

    rule = "tensors"


class Uncalibrated(Unreadable):
    """The config states a scale of activations that calibration finds, and there is none."""

    rule = "tensors"


@dataclass(frozen=True)
class Module:
    """One quantized linear as found. tensors: suffix → info, without its bias."""

    name: str
    tensors: Mapping[str, TensorInfo]

    @property
    def main(self) -> str:
        return next(suffix for suffix in MAINS if suffix in self.tensors)

    def scale_dtype(self, otherwise: str) -> str:
        """The float in which its scales stand, which is the `model` dtype of its scheme."""
        found = (self.tensors[suffix].dtype for suffix in SCALES if suffix in self.tensors)
        return next((dtype for dtype in found if dtype in FLOATS), otherwise)


@dataclass(frozen=True)
class Read:
    """How a module is read: our layout's name, the scheme, (n, k). idle: suffixes of tensors that were seen to say nothing."""

    layout: str
    scheme: Scheme
    shape: tuple[int, int]
    idle: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """read(module) → Read. Errors: Unreadable. tool: who made the checkpoint, as far as it says."""

    name: str
    tool: str
    read: Callable[[Module], Read]


Reader = Callable[[Held], Method]


def modules_of(held: Held) -> tuple[list[Module], list[str]]:
    """The quantized modules in file order, and every other tensor."""
    parts: dict[str, dict[str, TensorInfo]] = {}
    for name in held.place:
        module, _, suffix = name.rpartition(".")
        parts.setdefault(module, {})[suffix] = held.info(name)
    quantized = [
        Module(name, {s: i for s, i in found.items() if s != "bias"})
        for name, found in parts.items()
        if _quantized(found)
    ]
    taken = {f"{module.name}.{suffix}" for module in quantized for suffix in module.tensors}
    return quantized, [name for name in held.place if name not in taken]


def _quantized(found: Mapping[str, TensorInfo]) -> bool:
    if any(suffix in found for suffix in MAINS[:3]):
        return True
    return "weight" in found and found["weight"].dtype in CODES


def named(weight: WeightFormat, act: ActFormat | None) -> Scheme:
    """The preset of this content whatever its group size, or a scheme that is called by its parts."""
    for preset in PRESETS.values():
        if (replace(preset.weight, block=weight.block), preset.act) == (weight, act) and _alike(preset.weight, weight):
            return Scheme(preset.name, weight, act)
    return Scheme(f"{weight.num}-{act.num if act else '16-bit'}".upper(), weight, act)


def _alike(a: WeightFormat, b: WeightFormat) -> bool:
    """Integers are one preset in groups of any size, and in whole rows; floats have the block of their preset."""
    groups = (
        a.num.startswith("int") and a.block[0] == b.block[0] and (a.num == "int4" or WHOLE in (a.block[1], b.block[1]))
    )
    return a.block == b.block or groups


def shape_of(layout: str, scheme: Scheme, module: Module, metadata: Mapping[str, Any]) -> tuple[int, int]:
    """(n, k), from the shape of the tensor that holds the codes. metadata: the header's entry of the weight, if any."""
    info = module.tensors[module.main]
    if "shape" in metadata:
        n, k = metadata["shape"]
        return int(n), int(k)
    if len(info.shape) != 2:
        raise Unreadable(f"{module.main} has shape {list(info.shape)}, not that of a matrix")
    (a, b), words = info.shape, 32 // scheme.weight.number.bits
    if layout in ("gptq", "gptq-v2", "gptq-zeros", "auto-gptq", "auto-round"):
        return b, a * words
    if layout == "awq":
        return b * words, a
    if layout == "modelopt-int4":
        return 2 * a, b
    if info.dtype == "I32":
        return a, b * words
    return (a, 2 * b) if info.dtype == "U8" else (a, b)


def in_order(held: Held, module: Module, suffix: str, size: int) -> bool:
    """Whether its groups are columns that lie side by side, whatever the config says. Only of files that may be read."""
    info, source = module.tensors[suffix], held.source
    if len(info.shape) != 1 or not (isinstance(source, LocalSource) or getattr(source, "whole", False)):
        return False
    due_K = torch.arange(info.shape[0]) // (size if size > 0 else info.shape[0])
    return torch.equal(held.tensor(f"{module.name}.{suffix}").long(), due_K)


def fitted(tensor: torch.Tensor, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The same numbers as a layout wants them: a float widened, a shape of as many elements. `misfit` says when not."""
    return tensor.to(DTYPES[dtype]).reshape(shape)


def misfit(info: TensorInfo, dtype: str, shape: tuple[int, ...]) -> str | None:
    """Why a tensor cannot be taken for one of this dtype and shape without changing a number, or None."""
    widened = dtype == "F32" and info.dtype in ("BF16", "F16")
    if (info.dtype == dtype or widened) and _cut(info.shape) == _cut(shape):
        return None
    return f"is {info.dtype} {list(info.shape)}, expected {dtype} {list(shape)}"


def _cut(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the ones at its end: one scale a row may stand in a column or not, a single number in a list or not."""
    last = max((place for place, side in enumerate(shape, 1) if side != 1), default=0)
    return shape[:last]
