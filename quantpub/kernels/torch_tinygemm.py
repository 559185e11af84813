"""torch's int4 weight-only matmul on CUDA, tinygemm: `_weight_int4pack_mm`. Legend: M, N, K; g columns a group.

Operands: torchao's tiles and pairs as they lie on disk, K' = K up to 1024 columns.
    tiles   int32 [N/8, K'/128, 32, 4]   codes c = code + 8
    pairs   bf16 [K'/g, N, 2]            (s, z): w = (c − 8)·s + z, rounded to bf16 once
K is padded on disk, so that activations are padded in every call, as torchao does; N is taken as multiples of 8 only.
Source: aten/src/ATen/native/cuda/int4mm.cu of PyTorch; torchao's Int4TilePackedTo4dTensor.
"""

from __future__ import annotations

import torch

from quantpub.kernels.base import Kernel, Operands, Weight, attempt
from quantpub.kernels.vllm_common import incapable
from quantpub.scheme import Scheme

TILE = 128  # columns of a tile
ROWS, GROUPS = 8, (32, 64, 128, 256)


def unavailable() -> str | None:
    def tiny() -> torch.Tensor:
        tiles = torch.zeros(1, 8, 32, 4, dtype=torch.int32, device="cuda")
        pairs = torch.zeros(8, ROWS, 2, dtype=torch.bfloat16, device="cuda")
        return run(torch.zeros(1, 8 * TILE, dtype=torch.bfloat16, device="cuda"), (tiles, pairs))

    return incapable((8, 0)) or attempt(tiny)


def reject(scheme: Scheme, n: int, k: int) -> str | None:
    weight = scheme.weight
    if weight.num != "int4" or weight.block[0] != 1 or weight.zero_domain == "int" or scheme.act is not None:
        return f"it multiplies int4 weights with bf16 zeros or none by 16-bit activations, not {scheme.name}"
    if scheme.group_size not in GROUPS:
        return f"tinygemm has code for groups of {', '.join(map(str, GROUPS))} columns, not {scheme.group_size}"
    if n % ROWS:
        return f"out_features {n} is not a multiple of {ROWS}: the artifact holds rows of padding"
    return f"in_features {k} is not a multiple of {scheme.group_size}" if k % scheme.group_size else None


def prepare(weight: Weight) -> Operands:
    return weight.packed["_weight_qdata"], weight.packed["_weight_scale_and_zero"]


def run(x_MK: torch.Tensor, operands: Operands) -> torch.Tensor:
    tiles, pairs = operands
    padded = tiles.shape[1] * TILE
    if missing := padded - x_MK.shape[1]:
        x_MK = torch.nn.functional.pad(x_MK, (0, missing))
    y_MN: torch.Tensor = torch.ops.aten._weight_int4pack_mm(x_MK.contiguous(), tiles, padded // len(pairs), pairs)
    return y_MN


KERNEL = Kernel(
    "tinygemm",
    "torchao-tile",
    ("cuda",),
    unavailable,
    reject,
    prepare,
    run,
    reads=("torchao-tile",),
    row="tinygemm",
    symbol="tinygemm",
)
