"""compressed-tensors `float-quantized`: FP8 weights with a scale a row, a tensor or a block; FP8 activations.

Per module:
    weight         float8_e4m3fn [N, K]
    weight_scale   multiplicative, in the model's dtype or float32: [N, 1], [1], or [N/128, K/128]
    input_scale    float32 [1], multiplicative: only where the scale of activations is calibrated
Always E4M3FN on disk, also for ROCm. Source: compressed-tensors' FP8_DYNAMIC, FP8 and FP8_BLOCK presets.

Blocks are whole ones. Of a weight with a part of a block, compressed-tensors 0.17 takes the block's height as N divided
by the rows of scales, and so decompresses it wrongly without a word; vLLM's kernels quantize activations in whole groups of
128 columns, and it refuses a part of a block inside merged modules (q/k/v, gate/up).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from quantpub.layouts.base import (
    CT,
    CT_KV_CACHE,
    Config,
    InputScale,
    Layout,
    Spec,
    Tensors,
    ct_arguments,
    ct_config,
    ct_group,
)
from quantpub.qtensor import QTensor
from quantpub.scheme import WHOLE, ActFormat, Scheme, WeightFormat

FORMAT = "float-quantized"
SIDE = 128  # of a block, and of a group of activations
STRATEGY = {(1, WHOLE): "channel", (WHOLE, WHOLE): "tensor", (SIDE, SIDE): "block"}
TOKEN = ActFormat("fp8_e4m3", "token", True)
STATIC = ActFormat("fp8_e4m3", "tensor", False)
GROUPS = ActFormat("fp8_e4m3", "group", True, SIDE)
ACTIVATIONS = {"channel": (TOKEN,), "tensor": (TOKEN, STATIC), "block": (GROUPS,)}


def _strategy(scheme: Scheme) -> str:
    return STRATEGY[scheme.weight.block]


def reject(scheme: Scheme, n: int, k: int, dtype: str) -> str | None:
    weight, act = scheme.weight, scheme.act
    held = WeightFormat("fp8_e4m3", weight.block, weight.scale_dtype)
    if weight != held or weight.block not in STRATEGY or weight.scale_dtype not in ("model", "float32"):
        return f"ct-float holds FP8 weights with a scale a row, tensor or block of {SIDE}×{SIDE}, not {scheme.name}"
    if act not in ACTIVATIONS[_strategy(scheme)]:
        return f"ct-float is not written for weights and activations as in {scheme.name}"
    if _strategy(scheme) == "block":
        return _reject_parts(n, k)
    return None


def _reject_parts(n: int, k: int) -> str | None:
    for side, length in (("out_features", n), ("in_features", k)):
        if length % SIDE:
            return f"{side} {length} is not a multiple of {SIDE}: compressed-tensors 0.17 misreads a part of a block"
    if k == SIDE and n > SIDE:
        return f"in_features {k} is one block: compressed-tensors 0.17 takes its column of scales for a scale a row"
    return None


def spec(scheme: Scheme, n: int, k: int, dtype: str) -> Spec:
    stored = dtype if scheme.weight.scale_dtype == "model" else "F32"
    shape = (1,) if _strategy(scheme) == "tensor" else scheme.weight.scale_shape(n, k)
    found: Spec = {"weight": ("F8_E4M3", (n, k)), "weight_scale": (stored, shape)}
    return found | {"input_scale": ("F32", (1,))} if scheme.act == STATIC else found


def pack(q: QTensor) -> Tensors:
    scale = q.scale.reshape(1) if _strategy(q.scheme) == "tensor" else q.scale
    tensors = {"weight": q.codes_NK, "weight_scale": scale}
    if q.scheme.act == STATIC:
        assert q.input_scale is not None, "the scale of activations is calibrated before a weight is packed"
        tensors["input_scale"] = q.input_scale.reshape(1)
    return tensors


def unpack(tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    scale = tensors["weight_scale"].reshape(scheme.weight.scale_shape(*shape))
    input_scale = tensors["input_scale"].reshape(()) if scheme.act == STATIC else None
    return QTensor(scheme, tensors["weight"], scale, input_scale=input_scale)


def group(scheme: Scheme) -> Config:
    act, strategy = scheme.act, _strategy(scheme)
    assert act is not None
    block = scheme.weight.block if strategy == "block" else None
    weights = ct_arguments(8, "float", strategy, False, block=block)
    return ct_group(FORMAT, weights, ct_arguments(8, "float", act.granularity, act.dynamic, act.group_size))


def config(scheme: Scheme, ignore: Sequence[str]) -> Config:
    return ct_config([group(scheme)], ignore)


def tp_multiple(scheme: Scheme) -> tuple[int, int]:
    return (SIDE, SIDE) if _strategy(scheme) == "block" else (1, 1)


INPUT_SCALE = InputScale("input_scale", lambda scale: scale.reshape(()))
LAYOUT = Layout(
    "ct-float",
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
)
