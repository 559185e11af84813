"""Marlin: vLLM's int4 and int8 weights by bf16 activations, on mma of Ampere and later. Legend: M, N, K; G groups; b bits.

Operands, made by vLLM's own repacking as it does when it loads ct-pack, gptq or awq:
    qweight     int32 [K/16, N·b/2]   codes in the order of tensor-core fragments
    scales      bf16 [G, N]           permuted
    workspace   int32 [SMs]           locks, which the kernel leaves at zero
    zeros       int32 [G, N·b/32]     permuted, where there are any
N, K and b follow from their shapes. AWQ has zeros even for a symmetric scheme.
Source: vLLM's marlin_utils.py and MarlinLinearKernel.
"""

from __future__ import annotations

from typing import Any

import torch

from quantpub.kernels.base import Kernel, Operands, Weight
from quantpub.kernels.vllm_common import (
    ops,
    refuse_integers,
    scales_GN,
    takes,
    utils,
    words_KN,
    wtype,
    zeros_GN,
)
from quantpub.kernels.vllm_common import unavailable as unavailable_op
from quantpub.scheme import Scheme

ROW = "Marlin"
TILE = 16  # rows of K in a fragment
KINDS = {("int4", "none"), ("int4", "int"), ("int8", "none")}


def unavailable() -> str | None:
    return unavailable_op("marlin_gemm", (8, 0))


def reject(scheme: Scheme, n: int, k: int) -> str | None:
    return refuse_integers(ROW, KINDS, scheme, n, k)


def repack(words_KN: torch.Tensor, k: int, n: int, bits: int) -> torch.Tensor:
    """vLLM up to 0.29 asks for a permutation of K: an empty one."""
    gptq = ops().gptq_marlin_repack
    order = {"perm": torch.empty(0, dtype=torch.int32, device=words_KN.device)} if takes(gptq, "perm") else {}
    packed: torch.Tensor = gptq(words_KN.contiguous(), size_k=k, size_n=n, num_bits=bits, **order)
    return packed


def prepare(weight: Weight) -> Operands:
    (n, k), scheme, marlin = weight.q.shape, weight.q.scheme, utils("marlin_utils")
    bits, scale_GN, zero_GN = scheme.weight.number.bits, scales_GN(weight), zeros_GN(weight)
    operands = (
        repack(words_KN(weight), k, n, bits),
        marlin.marlin_permute_scales(scale_GN, size_k=k, size_n=n, group_size=scheme.group_size),
        marlin.marlin_make_workspace_new(scale_GN.device),
    )
    if zero_GN is None:
        return operands
    return (*operands, marlin.marlin_zero_points(zero_GN, len(scale_GN), n, bits))


def run(x_MK: torch.Tensor, operands: Operands) -> torch.Tensor:
    (qweight, scale_GN, space), zeros = operands[:3], operands[3:]
    n, k = scale_GN.shape[1], qweight.shape[0] * TILE
    apply = utils("marlin_utils").apply_gptq_marlin_linear
    order: dict[str, Any] = {}
    if takes(apply, "g_idx"):  # up to 0.29
        order = {"g_idx": None, "g_idx_sort_indices": None, "is_k_full": True}
    y_MN: torch.Tensor = apply(
        input=x_MK,
        weight=qweight,
        weight_scale=scale_GN,
        weight_zp=zeros[0] if zeros else None,
        workspace=space,
        wtype=wtype(2 * qweight.shape[1] // n, bool(zeros)),
        output_size_per_partition=n,
        input_size_per_partition=k,
        **order,
    )
    return y_MN


KERNEL = Kernel(
    "marlin",
    "marlin",
    ("cuda",),
    unavailable,
    reject,
    prepare,
    run,
    reads=("ct-pack", "gptq", "awq"),
    package="vllm",
    row=ROW,
    symbol="marlin",
)
