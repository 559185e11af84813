"""compressed-tensors `int-quantized`: int8 weights with a scale a row, int8 activations scaled at run time.

Per module:
    weight         int8 [N, K], two's complement
    weight_scale   [N, 1], multiplicative: the model's dtype as compressed-tensors writes it, or float32
What SmoothQuant takes out of the activations is folded into other weights before this one is quantized: it leaves no
tensor here. vLLM runs it up to Hopper; on Blackwell its CUTLASS kernel has no int8.
Source: compressed-tensors' naive_quantized compressor and W8A8 preset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from quantpub.layouts.base import CT, CT_KV_CACHE, Config, Layout, Spec, Tensors, ct_arguments, ct_config, ct_group
from quantpub.qtensor import QTensor
from quantpub.scheme import WHOLE, ActFormat, Scheme, WeightFormat

FORMAT = "int-quantized"
WEIGHT, TOKEN = WeightFormat("int8", (1, WHOLE)), ActFormat("int8", "token", True)
SCALE = {"model", "float32"}


def reject(scheme: Scheme, n: int, k: int, dtype: str) -> str | None:
    plain = replace(scheme.weight, scale_dtype="model", block=(scheme.weight.block[0], WHOLE))
    if plain != WEIGHT or scheme.weight.scale_dtype not in SCALE:
        return f"ct-int holds symmetric int8 weights with a scale a row, not {scheme.name}"
    if scheme.group_size != WHOLE:
        return f"ct-int holds int8 weights with a scale a row, not one for every {scheme.group_size} columns"
    if scheme.act != TOKEN:
        return f"ct-int is written for int8 activations with a dynamic scale a token, not {scheme.name}"
    return None


def spec(scheme: Scheme, n: int, k: int, dtype: str) -> Spec:
    scale = dtype if scheme.weight.scale_dtype == "model" else "F32"
    return {"weight": ("I8", (n, k)), "weight_scale": (scale, (n, 1))}


def pack(q: QTensor) -> Tensors:
    return {"weight": q.codes_NK, "weight_scale": q.scale}


def unpack(tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    return QTensor(scheme, tensors["weight"], tensors["weight_scale"])


def group(scheme: Scheme) -> Config:
    weights, inputs = ct_arguments(8, "int", "channel", False), ct_arguments(8, "int", "token", True)
    return ct_group(FORMAT, weights, inputs)


def config(scheme: Scheme, ignore: Sequence[str]) -> Config:
    return ct_config([group(scheme)], ignore)


def tp_multiple(scheme: Scheme) -> tuple[int, int]:
    return 1, 1


LAYOUT = Layout(
    "ct-int", "checkpoint", CT, reject, spec, pack, unpack, config, tp_multiple, group, kv_cache=CT_KV_CACHE
)
