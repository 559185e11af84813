"""torchao's `Int8Tensor` and `IntxUnpackedToInt8Tensor`: a code a byte; another tool's, read and never written.

Legend: G = K / g groups. Per module:
    _weight_qdata        int8 [N, K], two's complement, int4's codes −8 … 7 too
    _weight_scale        [N, G]: float32 in Int8Tensor, the model's dtype in the other; a multiplier
    _weight_zero_point   int8 [N, G], 0 everywhere where the scheme has no zeros
Int8Tensor has a scale a row, and int8 activations scaled at run time, a token at once, or 16-bit ones; the other has
groups of any size, and 16-bit activations.
Source: torchao's Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig and IntxWeightOnlyConfig.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from quantpub.layouts.base import Spec, Tensors, peer, reject_rest
from quantpub.qtensor import QTensor
from quantpub.scheme import WHOLE, ActFormat, Scheme, WeightFormat

TOKEN = ActFormat("int8", "token", True)


def _reject(
    holder: str, scheme: Scheme, nums: tuple[str, ...], activations: tuple[ActFormat | None, ...]
) -> str | None:
    weight = scheme.weight
    plain = WeightFormat(weight.num, (1, scheme.group_size), weight.scale_dtype, weight.zero_domain)
    if weight != plain or weight.num not in nums or weight.zero_domain == "float" or scheme.act not in activations:
        return f"{holder} holds {' and '.join(nums)} weights, symmetric or with integer zeros, not {scheme.name}"
    if weight.scale_dtype not in ("model", "float32"):
        return f"{holder} holds float scales, not {weight.scale_dtype} ones: not {scheme.name}"
    return None


def reject_int8(scheme: Scheme, n: int, k: int, dtype: str) -> str | None:
    if reason := _reject("torchao-int8", scheme, ("int8",), (None, TOKEN)):
        return reason
    if scheme.group_size != WHOLE:
        return f"torchao-int8 holds a scale a row, not one for every {scheme.group_size} columns"
    return None


def reject_intx(scheme: Scheme, n: int, k: int, dtype: str) -> str | None:
    return _reject("torchao-intx", scheme, ("int4", "int8"), (None,)) or reject_rest(k, scheme.group_size)


def ambiguous(tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> str | None:
    zero, number = tensors["_weight_zero_point"], scheme.weight.number
    if scheme.weight.zero_domain == "none" and bool(zero.any()):
        return "it has zero points that are not 0, and its configuration calls it symmetric"
    for what, codes in (("codes", tensors["_weight_qdata"]), ("zero points", zero)):
        if bool((codes < number.low).any()) or bool((codes > number.high).any()):
            return f"its {what} are not all {scheme.weight.num}"
    return None


def spec(scheme: Scheme, n: int, k: int, dtype: str) -> Spec:
    shape = scheme.weight.scale_shape(n, k)
    return {
        "_weight_qdata": ("I8", (n, k)),
        "_weight_scale": (dtype if scheme.weight.scale_dtype == "model" else "F32", shape),
        "_weight_zero_point": ("I8", shape),
    }


def pack(q: QTensor) -> Tensors:
    zero = torch.zeros(q.scale.shape, dtype=torch.int8, device=q.scale.device) if q.zero is None else q.zero
    return {"_weight_qdata": q.codes_NK, "_weight_scale": q.scale, "_weight_zero_point": zero}


def unpack(tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    zero = tensors["_weight_zero_point"] if scheme.weight.zero_domain == "int" else None
    return QTensor(scheme, tensors["_weight_qdata"], tensors["_weight_scale"], zero)


INT8 = peer("torchao-int8", "torchao", reject_int8, spec, pack, unpack, ambiguous)
INTX = peer("torchao-intx", "torchao", reject_intx, spec, pack, unpack, ambiguous)
