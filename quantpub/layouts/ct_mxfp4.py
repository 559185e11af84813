"""compressed-tensors `mxfp4-pack-quantized`: FP4 E2M1 in groups of 32 with power-of-two scales (OCP MXFP4).

Per module:
    weight_packed   uint8 [N, K/2]    column 2j in the low half of byte j, column 2j+1 in the high half
    weight_scale    uint8 [N, K/32]   E8M0: byte e stands for 2^(e − 127), e in 0 … 254
The scales are bytes, not float8_e8m0fnu, on disk: engines copy them into uint8 and would convert anything else.
vLLM 0.25.1 multiplies by bf16 activations (Marlin) up to Hopper, and has no such kernel for fp16; on Blackwell it takes
this format for MXFP4 on both sides, and quantizes activations at run time whatever the configuration says.
Source: compressed-tensors' mxfp4 compressor and MXFP4A16 preset; OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from quantpub.layouts.base import CT, CT_KV_CACHE, Config, Layout, Spec, Tensors, ct_arguments, ct_config, ct_group
from quantpub.layouts.words import pack_nibbles, unpack_nibbles
from quantpub.qtensor import QTensor
from quantpub.scheme import WHOLE, Scheme, WeightFormat

FORMAT = "mxfp4-pack-quantized"
GROUP = 32
WEIGHT = WeightFormat("fp4_e2m1", (1, GROUP), "e8m0")


def reject(scheme: Scheme, n: int, k: int, dtype: str) -> str | None:
    if replace(scheme.weight, block=(scheme.weight.block[0], GROUP)) != WEIGHT or scheme.act is not None:
        return f"ct-mxfp4 holds MXFP4 weights with 16-bit activations, not {scheme.name}"
    if scheme.weight != WEIGHT:
        given = "whole rows" if scheme.group_size == WHOLE else scheme.group_size
        return f"ct-mxfp4 holds MXFP4 weights in groups of {GROUP} columns, not of {given}"
    if dtype == "F16":
        return "ct-mxfp4 is for bf16 models: vLLM has no kernel of MXFP4 weights for F16 activations"
    if k % GROUP:
        return f"in_features {k} is not a multiple of {GROUP}, the columns that share a scale"
    return None


def spec(scheme: Scheme, n: int, k: int, dtype: str) -> Spec:
    return {"weight_packed": ("U8", (n, k // 2)), "weight_scale": ("U8", (n, k // GROUP))}


def pack(q: QTensor) -> Tensors:
    return {"weight_packed": pack_nibbles(q.codes_NK), "weight_scale": q.scale.view(torch.uint8)}


def unpack(tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    scale = tensors["weight_scale"].view(torch.float8_e8m0fnu)
    return QTensor(scheme, unpack_nibbles(tensors["weight_packed"]), scale)


def group(scheme: Scheme) -> Config:
    return ct_group(FORMAT, ct_arguments(4, "float", "group", False, GROUP, scale_dtype="torch.uint8"), None)


def config(scheme: Scheme, ignore: Sequence[str]) -> Config:
    return ct_config([group(scheme)], ignore)


def tp_multiple(scheme: Scheme) -> tuple[int, int]:
    return 1, GROUP


LAYOUT = Layout(
    "ct-mxfp4", "checkpoint", CT, reject, spec, pack, unpack, config, tp_multiple, group, kv_cache=CT_KV_CACHE
)
