"""ModelOpt's W4A16_AWQ: symmetric int4 in groups, two rows a byte; another tool's, read and never written.

Per module:
    weight            uint8 [N/2, K]     row 2i in the low half of byte [i, k], row 2i + 1 in the high half, both two's
                                         complement: nothing is added to a code
    weight_scale      float32 [N, K/g]   a multiplier
    pre_quant_scale   [K]                only where AWQ was run: what the activations are multiplied by before this weight
The last one changes what the layer computes, and no other layout has a place for it: a weight that has one is not read.
Source: ModelOpt's export/quant_utils.py, pack_int4_in_uint8.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from quantpub.layouts.base import Spec, Tensors, peer, reject_rest
from quantpub.qtensor import QTensor
from quantpub.scheme import Scheme, WeightFormat


def reject(scheme: Scheme, n: int, k: int, dtype: str) -> str | None:
    plain = WeightFormat("int4", (1, scheme.group_size), scheme.weight.scale_dtype)
    if scheme.weight != plain or scheme.weight.scale_dtype not in ("model", "float32") or scheme.act is not None:
        return f"modelopt-int4 holds symmetric int4 weights with 16-bit activations, not {scheme.name}"
    if n % 2:
        return f"out_features of [{n}, {k}] is odd, and a byte holds two rows"
    return reject_rest(k, scheme.group_size)


def ambiguous(tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> str | None:
    if "pre_quant_scale" in tensors:
        return "its activations are multiplied by a pre_quant_scale first, which no other layout holds"
    return None


def spec(scheme: Scheme, n: int, k: int, dtype: str) -> Spec:
    stored = dtype if scheme.weight.scale_dtype == "model" else "F32"
    return {"weight": ("U8", (n // 2, k)), "weight_scale": (stored, scheme.weight.scale_shape(n, k))}


def pack(q: QTensor) -> Tensors:
    nibbles = q.codes_NK.view(torch.uint8) & 0xF
    return {"weight": nibbles[::2] | (nibbles[1::2] << 4), "weight_scale": q.scale}


def unpack(tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    packed = tensors["weight"]
    nibbles = torch.stack((packed & 0xF, packed >> 4), 1).view(shape).view(torch.int8)
    return QTensor(scheme, (nibbles ^ 8) - 8, tensors["weight_scale"])


LAYOUT = peer("modelopt-int4", "modelopt", reject, spec, pack, unpack, ambiguous)
