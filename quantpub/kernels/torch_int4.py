"""torch's int4 weight-only matmul on CPUs: `_weight_int4pack_mm_for_cpu`. Legend: M, N, K; G groups of a row.

The op stores codes 0…15 and computes w = (code − 8)·scale + zero, so a symmetric weight has code = q + 8 and zero = 0.
Operands: uint8 [N, K/2] in the op's own order (never written to disk), and scale and zero side by side, bf16 [G, N, 2].
A negative scale is only a factor to it. It wants N % 16 = 0 and groups of 32, 64, 128 or 256 columns.
Source: aten/src/ATen/native/cpu/int4mm_kernel.cpp of PyTorch.
"""

from __future__ import annotations

import torch

from quantpub.kernels.base import Kernel, Operands, Weight, attempt
from quantpub.scheme import WHOLE, Scheme

GROUPS = (256, 128, 64, 32)
TILE = 16


def unavailable() -> str | None:
    def tiny() -> torch.Tensor:
        return run(
            torch.zeros(1, 32, dtype=torch.bfloat16),
            _operands(torch.zeros(TILE, 32, dtype=torch.int8), torch.ones(TILE, 1), 32),
        )

    return attempt(tiny)


def reject(scheme: Scheme, n: int, k: int) -> str | None:
    weight = scheme.weight
    if weight.num != "int4" or weight.block[0] != 1 or weight.zero_domain != "none" or scheme.act is not None:
        return f"it multiplies symmetric int4 weights by 16-bit activations, not {scheme.name}"
    if n % TILE:
        return f"out_features {n} is not a multiple of {TILE}"
    if _group(scheme, k) is None:
        group = k if scheme.group_size == WHOLE else scheme.group_size
        return f"groups of {group} columns are none of {', '.join(map(str, sorted(GROUPS)))}"
    return None


def _group(scheme: Scheme, k: int) -> int | None:
    """The op's group size. A scale of a whole row is given again for each of the largest groups that fit."""
    if scheme.group_size == WHOLE:
        return next((group for group in GROUPS if k % group == 0), None)
    return scheme.group_size if scheme.group_size in GROUPS and k % scheme.group_size == 0 else None


def prepare(weight: Weight) -> Operands:
    q = weight.q
    k = q.shape[1]
    group = _group(q.scheme, k)
    assert group is not None, q.scheme
    scale_NG = q.scale.expand(-1, k // group) if q.scheme.group_size == WHOLE else q.scale
    return _operands(q.codes_NK, scale_NG, group)


def _operands(codes_NK: torch.Tensor, scale_NG: torch.Tensor, group: int) -> Operands:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_NK.to(torch.int32) + 8, 1)
    scale_GN = scale_NG.to(torch.bfloat16).t()
    return packed, torch.stack([scale_GN, torch.zeros_like(scale_GN)], dim=-1).contiguous()


def run(x_MK: torch.Tensor, operands: Operands) -> torch.Tensor:
    packed, scale_and_zero_GN2 = operands
    group = x_MK.shape[1] // scale_and_zero_GN2.shape[0]
    y_MN: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x_MK, packed, group, scale_and_zero_GN2)
    return y_MN


KERNEL = Kernel("torch-int4", "aten-int4-cpu", ("cpu",), unavailable, reject, prepare, run)
