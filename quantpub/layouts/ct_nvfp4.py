"""compressed-tensors `nvfp4-pack-quantized`: FP4 E2M1 in groups of 16, E4M3 scales, a global scale a tensor.

Per module:
    weight_packed         uint8 [N, K/2]            column 2j in the low half of byte j, column 2j+1 in the high half
    weight_scale          float8_e4m3fn [N, K/16]   rows in order, not swizzled
    weight_global_scale   float32 [1], a divisor    w ≈ E2M1(code) · weight_scale / weight_global_scale
    input_global_scale    float32 [1], a divisor    only where activations are FP4
ModelOpt stores the same bytes and the global scales as multipliers; a `QTensor` holds multipliers. Engines take one global
scale for all of q/k/v and of gate/up, and rescale nothing: weights that they fuse share one. Where vLLM runs Marlin (up to
Hopper) a weight_scale is positive, and one below 2^−6, after the largest was brought to 224 … 448, counts as 0.
Source: compressed-tensors' nvfp4 compressor, NVFP4 and NVFP4A16 presets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from quantpub.layouts.base import (
    CT,
    CT_KV_CACHE,
    Config,
    Cut,
    InputScale,
    Layout,
    Spec,
    Tensors,
    ct_arguments,
    ct_config,
    ct_group,
)
from quantpub.layouts.words import pack_nibbles, unpack_nibbles
from quantpub.qtensor import QTensor
from quantpub.scheme import WHOLE, ActFormat, Scheme, WeightFormat

FORMAT = "nvfp4-pack-quantized"
GROUP = 16
WEIGHT = WeightFormat("fp4_e2m1", (1, GROUP), "fp8_e4m3", global_scale=True)
ACT = ActFormat("fp4_e2m1", "group", True, GROUP, global_scale=True)


def reject(scheme: Scheme, n: int, k: int, dtype: str) -> str | None:
    if replace(scheme.weight, block=(scheme.weight.block[0], GROUP)) != WEIGHT or scheme.act not in (None, ACT):
        return f"ct-nvfp4 holds NVFP4 weights with NVFP4 or 16-bit activations, not {scheme.name}"
    if scheme.weight != WEIGHT:
        given = "whole rows" if scheme.group_size == WHOLE else scheme.group_size
        return f"ct-nvfp4 holds NVFP4 weights in groups of {GROUP} columns, not of {given}"
    if k % GROUP:
        return f"in_features {k} is not a multiple of {GROUP}, the columns that share a scale"
    return None


def spec(scheme: Scheme, n: int, k: int, dtype: str) -> Spec:
    found: Spec = {
        "weight_packed": ("U8", (n, k // 2)),
        "weight_scale": ("F8_E4M3", (n, k // GROUP)),
        "weight_global_scale": ("F32", (1,)),
    }
    return found | {"input_global_scale": ("F32", (1,))} if scheme.act == ACT else found


def pack(q: QTensor) -> Tensors:
    assert q.global_scale is not None
    tensors = {
        "weight_packed": pack_nibbles(q.codes_NK),
        "weight_scale": q.scale,
        "weight_global_scale": _divisor(q.global_scale),
    }
    if q.scheme.act == ACT:
        assert q.input_scale is not None, "the scale of activations is calibrated before a weight is packed"
        tensors["input_global_scale"] = _divisor(q.input_scale)
    return tensors


def unpack(tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    codes_NK = unpack_nibbles(tensors["weight_packed"])
    input_scale = _multiplier(tensors["input_global_scale"]) if scheme.act == ACT else None
    global_scale = _multiplier(tensors["weight_global_scale"])
    return QTensor(scheme, codes_NK, tensors["weight_scale"], None, global_scale, input_scale)


def _divisor(multiplier: torch.Tensor) -> torch.Tensor:
    """A float32 [1] from which the multiplier comes back: 1/x or a neighbour of it; `representable` says when there is none."""
    found = _divisors(multiplier)
    fitting = found[_multiplier(found) == multiplier.reshape(())]
    assert len(fitting), f"no float32 has the reciprocal {multiplier.item()}"
    return fitting[:1]


def _divisors(multiplier: torch.Tensor) -> torch.Tensor:
    """1/x and its neighbours, float32 [3]."""
    near = multiplier.reshape(1).reciprocal()
    return torch.cat(
        (near, torch.nextafter(near, torch.zeros_like(near)), torch.nextafter(near, torch.full_like(near, torch.inf)))
    )


def representable(q: QTensor) -> QTensor:
    """The nearest weight whose global scales are reciprocals of float32 numbers: at most 2^-23 away, and mostly itself.

    Of powers of two, which quantpub makes, all are. Other tools state any multiplier.
    """
    assert q.global_scale is not None
    inputs = None if q.input_scale is None else _nearest(q.input_scale)
    return replace(q, global_scale=_nearest(q.global_scale), input_scale=inputs)


def _nearest(multiplier: torch.Tensor) -> torch.Tensor:
    reached = _multiplier(_divisors(multiplier))
    return reached[(reached.double() - multiplier.double()).abs().argmin()].reshape(())


def _multiplier(divisor: torch.Tensor) -> torch.Tensor:
    return divisor.reciprocal() if divisor.numel() > 1 else divisor.reshape(()).reciprocal()


def group(scheme: Scheme) -> Config:
    def arguments(dynamic: bool | str) -> Config:
        return ct_arguments(4, "float", "tensor_group", dynamic, GROUP, scale_dtype="torch.float8_e4m3fn")

    return ct_group(FORMAT, arguments(False), arguments("local") if scheme.act == ACT else None)


def config(scheme: Scheme, ignore: Sequence[str]) -> Config:
    return ct_config([group(scheme)], ignore)


def tp_multiple(scheme: Scheme) -> tuple[int, int]:
    return 1, GROUP


def cut(scheme: Scheme) -> Cut:
    return Cut(1, {"weight_packed": (0, 1), "weight_scale": (0, 1)})


INPUT_SCALE = InputScale("input_global_scale", _multiplier)
LAYOUT = Layout(
    "ct-nvfp4",
    "checkpoint",
    CT,
    reject,
    spec,
    pack,
    unpack,
    config,
    tp_multiple,
    group,
    input_scale=INPUT_SCALE,
    kv_cache=CT_KV_CACHE,
    nearest=representable,
    cut=cut,
)
