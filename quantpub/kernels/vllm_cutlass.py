"""vLLM's CUTLASS kernels of 8-bit weights by 8-bit activations, and its Triton kernel of FP8 blocks. Legend: M, N, K.

    cutlass-int8        int8, a scale a row; activations int8, a scale a token at run time
    cutlass-fp8         FP8, a scale a row or one of all; activations FP8, a scale a token at run time
    cutlass-fp8-static  FP8, one scale of all; activations FP8, one calibrated scale
    cutlass-fp8-block   FP8, a scale a block of 128×128; activations FP8, a scale for 128 columns of a token at run time
    triton-fp8-block    the same weights and activations
Operands: the codes [N, K] as they lie on disk, and their scales in float32; with static activations that scale too. The
ops want the weight column-major [K, N]: it is seen so, never moved. Activations are quantized by vLLM's own ops.
Source: vLLM's kernels/linear/scaled_mm, _custom_ops.py and fp8_utils.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from quantpub.kernels.base import Kernel, Operands, Split, Weight
from quantpub.kernels.vllm_common import misfits, ops, unavailable, utils
from quantpub.scheme import WHOLE, ActFormat, Scheme

SIDE = 128  # of a block
ROWS, ALL, BLOCKS = (1, WHOLE), (WHOLE, WHOLE), (SIDE, SIDE)
INT8, FP8 = "int8", "fp8_e4m3"
NOMINAL = 6 / 448  # a static scale that takes activations up to 6


def _refuse(
    row: str, num: str, blocks: tuple[tuple[int, int], ...], act: ActFormat, scheme: Scheme, n: int, k: int
) -> str | None:
    weight = scheme.weight
    if weight.num != num or weight.block not in blocks or weight.zero_domain != "none" or scheme.act != act:
        scale = "static" if not act.dynamic else "dynamic"
        return f"it multiplies {num} weights by activations with a {scale} scale a {act.granularity}, not {scheme.name}"
    return misfits(row, scheme, n, k)


def reject_int8(scheme: Scheme, n: int, k: int) -> str | None:
    return _refuse("CUTLASS INT8", INT8, (ROWS,), ActFormat(INT8, "token", True), scheme, n, k)


def reject_fp8(scheme: Scheme, n: int, k: int) -> str | None:
    return _refuse("CUTLASS FP8", FP8, (ROWS, ALL), ActFormat(FP8, "token", True), scheme, n, k)


def reject_static(scheme: Scheme, n: int, k: int) -> str | None:
    return _refuse("CUTLASS FP8", FP8, (ALL,), ActFormat(FP8, "tensor", False), scheme, n, k)


def reject_block(scheme: Scheme, n: int, k: int) -> str | None:
    groups = ActFormat(FP8, "group", True, group_size=SIDE)
    if reason := _refuse("CUTLASS FP8 blocks", FP8, (BLOCKS,), groups, scheme, n, k):
        return reason
    return f"shape [{n}, {k}] is not made of whole blocks of {SIDE}×{SIDE}" if n % SIDE or k % SIDE else None


def prepare(weight: Weight) -> Operands:
    """codes [N, K], scale float32 [N, 1] or [1]."""
    scale = weight.packed["weight_scale"].float()
    whole = weight.q.scheme.weight.block == ALL
    return weight.packed["weight"].contiguous(), scale.max().reshape(1) if whole else scale.reshape(-1, 1).contiguous()


def prepare_static(weight: Weight) -> Operands:
    return (*prepare(weight), weight.packed["input_scale"].float().max().reshape(1))


def prepare_block(weight: Weight) -> Operands:
    scale = weight.packed["weight_scale_inv" if weight.layout == "hf-fp8" else "weight_scale"]
    return weight.packed["weight"].contiguous(), scale.float().contiguous()


def quantize_int8(x_MK: torch.Tensor) -> Operands:
    codes_MK, scale_M1, _ = ops().scaled_int8_quant(x_MK.contiguous())
    return codes_MK, scale_M1


def quantize_fp8(x_MK: torch.Tensor) -> Operands:
    codes_MK, scale_M1 = ops().scaled_fp8_quant(x_MK.contiguous(), use_per_token_if_dynamic=True)
    return codes_MK, scale_M1


def calibrated(x_MK: torch.Tensor, operands: Operands) -> Operands:
    return _static(x_MK, operands[2])


def quantize_static(x_MK: torch.Tensor) -> Operands:
    return _static(x_MK, nominal(x_MK.device))


def _static(x_MK: torch.Tensor, scale_1: torch.Tensor) -> Operands:
    codes_MK, scale_1 = ops().scaled_fp8_quant(x_MK.contiguous(), scale_1)
    return codes_MK, scale_1


@cache
def nominal(device: torch.device) -> torch.Tensor:
    return torch.full((1,), NOMINAL, device=device)


def quantize_block(x_MK: torch.Tensor) -> Operands:
    """Scales column-major, as CUTLASS wants them, and not rounded to powers of two."""
    group = utils("fp8_utils").per_token_group_quant_fp8
    codes_MK, scale_MG = group(x_MK.contiguous(), SIDE, column_major_scales=True, use_ue8m0=False)
    return codes_MK, scale_MG


def quantize_triton(x_MK: torch.Tensor) -> Operands:
    group = utils("fp8_utils").per_token_group_quant_fp8
    codes_MK, scale_MG = group(x_MK.contiguous(), SIDE, use_ue8m0=False)
    return codes_MK, scale_MG


def dequantize(activations: Operands) -> torch.Tensor:
    codes_MK, scale = activations
    return codes_MK.float() * scale


def dequantize_block(activations: Operands) -> torch.Tensor:
    codes_MK, scale_MG = activations
    x_MK: torch.Tensor = (codes_MK.float().unflatten(1, (-1, SIDE)) * scale_MG.unsqueeze(-1)).flatten(1)
    return x_MK


def gemm(activations: Operands, operands: Operands) -> torch.Tensor:
    (codes_MK, scale_a), (w_NK, scale_b) = activations, operands[:2]
    y_MN: torch.Tensor = ops().cutlass_scaled_mm(codes_MK, w_NK.t(), scale_a, scale_b, torch.bfloat16)
    return y_MN


def gemm_block(activations: Operands, operands: Operands) -> torch.Tensor:
    (codes_MK, scale_MG), (w_NK, scale_NK) = activations, operands
    y_MN: torch.Tensor = ops().cutlass_scaled_mm(codes_MK, w_NK.t(), scale_MG, scale_NK.t(), torch.bfloat16)
    return y_MN


def gemm_triton(activations: Operands, operands: Operands) -> torch.Tensor:
    (codes_MK, scale_MG), (w_NK, scale_NK) = activations, operands
    y_MN: torch.Tensor = utils("fp8_utils").w8a8_triton_block_scaled_mm(
        codes_MK, w_NK, scale_MG, scale_NK, [SIDE, SIDE], output_dtype=torch.bfloat16
    )
    return y_MN


INT8_KERNEL = Kernel(
    "cutlass-int8",
    "int8-column-major",
    ("cuda",),
    lambda: unavailable("cutlass_scaled_mm", (7, 5), (10, 0)),
    reject_int8,
    prepare,
    lambda x_MK, operands: gemm(quantize_int8(x_MK), operands),
    Split(INT8, quantize_int8, dequantize, gemm),
    reads=("ct-int",),
    package="vllm",
    row="CUTLASS INT8",
    symbol="cutlass",
)
FP8_KERNEL = replace(
    INT8_KERNEL,
    name="cutlass-fp8",
    layout="fp8-column-major",
    unavailable=lambda: unavailable("cutlass_scaled_mm", (8, 9)),
    reject=reject_fp8,
    run=lambda x_MK, operands: gemm(quantize_fp8(x_MK), operands),
    split=Split(FP8, quantize_fp8, dequantize, gemm),
    reads=("ct-float",),
    row="CUTLASS FP8",
)
STATIC_KERNEL = replace(
    FP8_KERNEL,
    name="cutlass-fp8-static",
    reject=reject_static,
    prepare=prepare_static,
    run=lambda x_MK, operands: gemm(calibrated(x_MK, operands), operands),
    split=Split(FP8, quantize_static, dequantize, gemm, calibrated),
    reads=("ct-float", "modelopt-fp8"),
)
BLOCK_KERNEL = replace(
    FP8_KERNEL,
    name="cutlass-fp8-block",
    unavailable=lambda: unavailable("cutlass_scaled_mm", (9, 0)),
    reject=reject_block,
    prepare=prepare_block,
    run=lambda x_MK, operands: gemm_block(quantize_block(x_MK), operands),
    split=Split(FP8, quantize_block, dequantize_block, gemm_block),
    reads=("ct-float", "hf-fp8"),
    row="CUTLASS FP8 blocks",
)
TRITON_KERNEL = replace(
    BLOCK_KERNEL,
    name="triton-fp8-block",
    layout="fp8-row-major",
    unavailable=lambda: unavailable("per_token_group_fp8_quant", (8, 9)),
    run=lambda x_MK, operands: gemm_triton(quantize_triton(x_MK), operands),
    split=Split(FP8, quantize_triton, dequantize_block, gemm_triton),
    row="Triton FP8 blocks",
    symbol="w8a8_triton_block_scaled_mm",
)
