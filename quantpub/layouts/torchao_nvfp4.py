"""torchao's `NVFP4Tensor`, weights only: FP4 E2M1 in groups of 16, E4M3 scales in cuBLAS' tiles, a scale a tensor.

Legend: R = N / 128 and C = K / 64, both rounded up: tiles of 128 rows × 4 scales. Per module:
    _weight_qdata              uint8 [N, K/2]              column 2j in the low half of byte j, column 2j+1 in the high half
    _weight_scale              float8_e4m3fn [32·R, 16·C]  tile after tile, those along K first; of a tile the scale of row
                               32a + b and column c at 16b + 4a + c, 0 where there is no row or column
    _weight_per_tensor_scale   float32 (), a multiplier    w ≈ E2M1(code) · scale · per_tensor_scale
The codes and scales are those of ModelOpt and compressed-tensors, only the order of the scales is another.
torchao and what loads it (transformers, vLLM) dequantize such a weight to 16 bits in every forward: it saves memory, not time.
torchao cuts it between tiles only. The entry in the header says the dtype of the model, bf16 here.
Source: torchao's NVFP4Tensor and to_blocked; NVIDIA cuBLAS, block scaling factors layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch.nn.functional import pad

from quantpub.layouts import torchao_parts
from quantpub.layouts.base import Config, Layout, Modules, Spec, Tensors
from quantpub.layouts.words import pack_nibbles, unpack_nibbles
from quantpub.qtensor import QTensor
from quantpub.scheme import PRESETS, WHOLE, Scheme

GROUP = 16
ROWS, SCALES = 128, 4  # of a tile
WEIGHT = PRESETS["NVFP4A16"].weight
ENTRY = (
    '{"_type": "NVFP4Tensor", "_data": {"is_swizzled_scales": true, "use_triton_kernel": false, "act_quant_kwargs": null,'
    ' "block_size": 16, "orig_dtype": {"_type": "torch.dtype", "_data": "bfloat16"}},'
    ' "_tensor_data_names": ["qdata", "scale", "per_tensor_scale"]}'
)


def reject(scheme: Scheme, n: int, k: int, dtype: str) -> str | None:
    if replace(scheme.weight, block=(scheme.weight.block[0], GROUP)) != WEIGHT or scheme.act is not None:
        return f"torchao-nvfp4 holds NVFP4 weights with 16-bit activations, not {scheme.name}"
    if scheme.weight != WEIGHT:
        given = "whole rows" if scheme.group_size == WHOLE else scheme.group_size
        return f"torchao-nvfp4 holds NVFP4 weights in groups of {GROUP} columns, not of {given}"
    if dtype != "BF16":
        return f"torchao-nvfp4 is written for bf16 models only, not {dtype} as the weight of {scheme.name}"
    for side, length in (("out_features", n), ("in_features", k)):
        if length % GROUP:
            return f"{side} {length} is not a multiple of {GROUP}: torchao makes no such tensor"
    return None


def _tiles(n: int, k: int) -> tuple[int, int]:
    return -(-n // ROWS), -(-k // (SCALES * GROUP))


def spec(scheme: Scheme, n: int, k: int, dtype: str) -> Spec:
    rows, columns = _tiles(n, k)
    return {
        "_weight_qdata": ("U8", (n, k // 2)),
        "_weight_scale": ("F8_E4M3", (32 * rows, 16 * columns)),
        "_weight_per_tensor_scale": ("F32", ()),
    }


def pack_tiles(scale_NG: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn [N, K/16] → [32·R, 16·C], the bytes tile after tile."""
    n, groups = scale_NG.shape
    rows, columns = _tiles(n, groups * GROUP)
    whole = pad(scale_NG.contiguous().view(torch.uint8), (0, columns * SCALES - groups, 0, rows * ROWS - n))
    tiles = whole.view(rows, 4, 32, columns, SCALES).permute(0, 3, 2, 1, 4).contiguous()
    return tiles.view(32 * rows, 16 * columns).view(scale_NG.dtype)


def unpack_tiles(tiles: torch.Tensor, n: int, groups: int) -> torch.Tensor:
    """The inverse of `pack_tiles`: float8_e4m3fn [32·R, 16·C] → [N, K/16]."""
    rows, columns = tiles.shape[0] // 32, tiles.shape[1] // 16
    x = tiles.contiguous().view(torch.uint8).view(rows, columns, 32, 4, SCALES).permute(0, 3, 2, 1, 4)
    return x.reshape(rows * ROWS, columns * SCALES)[:n, :groups].contiguous().view(tiles.dtype)


def pack(q: QTensor) -> Tensors:
    assert q.global_scale is not None
    return {
        "_weight_qdata": pack_nibbles(q.codes_NK),
        "_weight_scale": pack_tiles(q.scale),
        "_weight_per_tensor_scale": q.global_scale,
    }


def unpack(tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    n, k = shape
    return QTensor(
        scheme,
        unpack_nibbles(tensors["_weight_qdata"]),
        unpack_tiles(tensors["_weight_scale"], n, k // GROUP),
        global_scale=tensors["_weight_per_tensor_scale"],
    )


def config(scheme: Scheme, ignore: Sequence[str]) -> Config:
    return torchao_parts.config("NVFP4WeightOnlyConfig", 1, {"use_dynamic_per_tensor_scale": True}, ignore)


def header(modules: Modules, copied: Sequence[str]) -> dict[str, str]:
    return torchao_parts.header(dict.fromkeys(modules, ENTRY), copied)


def tp_multiple(scheme: Scheme) -> tuple[int, int]:
    """Whole tiles of scales."""
    return ROWS, SCALES * GROUP


LAYOUT = Layout(
    "torchao-nvfp4",
    "checkpoint",
    torchao_parts.METHOD,
    reject,
    spec,
    pack,
    unpack,
    config,
    tp_multiple,
    metadata=header,
)
