"""torchao's `Float8Tensor`: FP8 E4M3 with a float32 scale a row or a tensor; another tool's, read and never written.

Per module:
    _weight_qdata   float8_e4m3fn [N, K]
    _weight_scale   float32 [N, 1] or [1, 1], a multiplier
Weights only, or with FP8 activations scaled at run time, a token or a tensor at once: the tensors are the same, and the entry
in the header says which. Source: torchao's Float8Tensor, Float8WeightOnlyConfig, Float8DynamicActivationFloat8WeightConfig.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from quantpub.layouts.base import Spec, Tensors, peer
from quantpub.qtensor import QTensor
from quantpub.scheme import WHOLE, ActFormat, Scheme, WeightFormat

BLOCKS = ((1, WHOLE), (WHOLE, WHOLE))
ACTIVATIONS = (None, ActFormat("fp8_e4m3", "token", True), ActFormat("fp8_e4m3", "tensor", True))


def reject(scheme: Scheme, n: int, k: int, dtype: str) -> str | None:
    weight = scheme.weight
    plain = WeightFormat("fp8_e4m3", weight.block, weight.scale_dtype)
    if weight != plain or weight.scale_dtype not in ("model", "float32") or scheme.act not in ACTIVATIONS:
        return f"torchao-float8 holds FP8 weights, activations in 16 bits or in dynamic FP8, not {scheme.name}"
    if weight.block not in BLOCKS:
        given = f"{scheme.group_size} columns" if scheme.group_size != WHOLE else f"{weight.block[0]} rows"
        return f"torchao-float8 holds a scale a row or a tensor, not one for every {given}"
    return None


def spec(scheme: Scheme, n: int, k: int, dtype: str) -> Spec:
    stored = dtype if scheme.weight.scale_dtype == "model" else "F32"
    return {"_weight_qdata": ("F8_E4M3", (n, k)), "_weight_scale": (stored, scheme.weight.scale_shape(n, k))}


def pack(q: QTensor) -> Tensors:
    return {"_weight_qdata": q.codes_NK, "_weight_scale": q.scale}


def unpack(tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    return QTensor(scheme, tensors["_weight_qdata"], tensors["_weight_scale"])


LAYOUT = peer("torchao-float8", "torchao", reject, spec, pack, unpack)
