"""compressed-tensors `float-quantized`, channel + token: FP8 weights with a scale a row, activations scaled at run time.

Per module:
    weight         float8_e4m3fn [N, K]
    weight_scale   model dtype [N, 1], multiplicative
Always E4M3FN on disk, also for ROCm. Source: compressed-tensors' FP8_DYNAMIC preset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quantpub.layouts.base import Layout, Spec, Tensors, ct_arguments, ct_config
from quantpub.qtensor import QTensor
from quantpub.scheme import WHOLE, Scheme

FORMAT = "float-quantized"


def reject(scheme: Scheme, n: int, k: int) -> str | None:
    weight, act = scheme.weight, scheme.act
    if weight.num != "fp8_e4m3" or weight.block != (1, WHOLE):
        return f"ct-float holds FP8 weights with a scale a row, not {scheme.name}"
    if act is None or (act.num, act.granularity, act.dynamic) != ("fp8_e4m3", "token", True):
        return f"ct-float is written for FP8 activations with a dynamic scale a token, not {scheme.name}"
    return None


def spec(scheme: Scheme, n: int, k: int, dtype: str) -> Spec:
    return {"weight": ("F8_E4M3", (n, k)), "weight_scale": (dtype, (n, 1))}


def pack(q: QTensor) -> Tensors:
    return {"weight": q.codes_NK, "weight_scale": q.scale}


def unpack(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QTensor:
    return QTensor(scheme, tensors["weight"], tensors["weight_scale"])


def config(scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
    weights, inputs = ct_arguments(8, "float", "channel", False), ct_arguments(8, "float", "token", True)
    return ct_config(FORMAT, weights, inputs, ignore)


def tp_multiple(scheme: Scheme) -> tuple[int, int]:
    return 1, 1


LAYOUT = Layout("ct-float", "checkpoint", reject, spec, pack, unpack, config, tp_multiple, {})
