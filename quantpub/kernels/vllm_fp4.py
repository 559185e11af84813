"""vLLM's kernels of 4-bit floats: Marlin by bf16 activations, and CUTLASS by FP4 activations on Blackwell. Legend: M, N, K.

    fp4-marlin     NVFP4 weights by bf16: what vLLM runs for NVFP4 too, where there is no FP4 arithmetic
    mxfp4-marlin   MXFP4 weights by bf16
    cutlass-fp4    NVFP4 weights by NVFP4 activations under a calibrated global scale; compute capability 10.0 and later
Operands of Marlin: codes int32 [K/16, 2N], scales [K/group, N] in the bits that its decoder wants, workspace, and for NVFP4
the global scale; vLLM's own preparation of a layer makes them. Operands of CUTLASS: see `fp4.operands`.
Source: vLLM's marlin_utils_fp4.py, kernels/linear/nvfp4.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from quantpub.kernels import fp4
from quantpub.kernels.base import Kernel, Operands, Split, Weight
from quantpub.kernels.vllm_common import misfits, ops, unavailable, utils
from quantpub.scheme import Scheme

NVFP4_ROW, MXFP4_ROW = "Marlin NVFP4 W4A16", "Marlin MXFP4 W4A16"


def reject_nvfp4(scheme: Scheme, n: int, k: int) -> str | None:
    weight = scheme.weight
    if weight.num != fp4.NUM or not weight.global_scale or scheme.group_size != fp4.GROUP:
        return f"it multiplies NVFP4 weights, not {scheme.name}"
    return misfits(NVFP4_ROW, scheme, n, k)


def reject_mxfp4(scheme: Scheme, n: int, k: int) -> str | None:
    weight = scheme.weight
    if weight.num != fp4.NUM or weight.scale_dtype != "e8m0" or scheme.act is not None or scheme.group_size != 32:
        return f"it multiplies MXFP4 weights by 16-bit activations, not {scheme.name}"
    return misfits(MXFP4_ROW, scheme, n, k)


def prepare_nvfp4(weight: Weight) -> Operands:
    found = fp4.parts(weight)
    return _marlin(weight.q.shape, found.codes_NB, found.scale_NG, found.weight)


def prepare_mxfp4(weight: Weight) -> Operands:
    return _marlin(weight.q.shape, weight.packed["weight_packed"], weight.packed["weight_scale"], None)


def _marlin(
    shape: tuple[int, int], codes_NB: torch.Tensor, scale_NG: torch.Tensor, shared: torch.Tensor | None
) -> Operands:
    """By what vLLM does to a layer when it has been loaded. shared: the global scale, a multiplier."""
    layer: Any = torch.nn.Module()
    layer.output_size_per_partition, layer.input_size_per_partition = shape
    layer.params_dtype = torch.bfloat16
    given = {"weight": codes_NB.contiguous(), "weight_scale": scale_NG, "weight_global_scale": shared}
    for name, tensor in given.items():
        if tensor is not None:
            setattr(layer, name, torch.nn.Parameter(tensor, requires_grad=False))
    utils("marlin_utils_fp4").prepare_fp4_layer_for_marlin(layer)
    space = utils("marlin_utils").marlin_make_workspace_new(codes_NB.device)
    made = [layer.weight.data, layer.weight_scale.data, space]
    return (*made, layer.weight_global_scale.data) if shared is not None else tuple(made)


def run_marlin(x_MK: torch.Tensor, operands: Operands) -> torch.Tensor:
    (codes, scale_GN, space), shared = operands[:3], operands[3:]
    y_MN: torch.Tensor = utils("marlin_utils_fp4").apply_fp4_marlin_linear(
        input=x_MK,
        weight=codes,
        weight_scale=scale_GN,
        weight_global_scale=shared[0] if shared else None,
        workspace=space,
        size_n=scale_GN.shape[1],
        size_k=x_MK.shape[1],
    )
    return y_MN


def reject_cutlass(scheme: Scheme, n: int, k: int) -> str | None:
    return fp4.reject(scheme, n, k, "FlashInfer CUTLASS NVFP4")  # vLLM pads both to the same tiles


def _quantize(x_MK: torch.Tensor, divisor_1: torch.Tensor, act_1: torch.Tensor) -> Operands:
    codes_MB, tiles = ops().scaled_fp4_quant(x_MK, divisor_1, is_sf_swizzled_layout=True)
    return codes_MB, tiles, act_1


def quantize(x_MK: torch.Tensor) -> Operands:
    return _quantize(x_MK, *fp4.nominal(x_MK.device))


def calibrated(x_MK: torch.Tensor, operands: Operands) -> Operands:
    return _quantize(x_MK, operands[3], operands[4])


def gemm(activations: Operands, operands: Operands) -> torch.Tensor:
    (codes_MB, tiles_a, _), (codes_NB, tiles_b, alpha_1) = activations, operands[:3]
    y_MN: torch.Tensor = ops().cutlass_scaled_fp4_mm(codes_MB, codes_NB, tiles_a, tiles_b, alpha_1, torch.bfloat16)
    return y_MN


MARLIN = Kernel(
    "fp4-marlin",
    "marlin",
    ("cuda",),
    lambda: unavailable("marlin_gemm", (8, 0)),
    reject_nvfp4,
    prepare_nvfp4,
    run_marlin,
    reads=fp4.LAYOUTS,
    package="vllm",
    row=NVFP4_ROW,
    symbol="marlin",
)
MXFP4 = replace(
    MARLIN,
    name="mxfp4-marlin",
    reject=reject_mxfp4,
    prepare=prepare_mxfp4,
    reads=("ct-mxfp4",),
    row=MXFP4_ROW,
)
CUTLASS = Kernel(
    "cutlass-fp4",
    "nvfp4-swizzled",
    ("cuda",),
    lambda: unavailable("cutlass_scaled_fp4_mm", (10, 0)),
    reject_cutlass,
    fp4.operands,
    lambda x_MK, operands: gemm(calibrated(x_MK, operands), operands),
    Split(fp4.NUM, quantize, fp4.dequantize, gemm, calibrated),
    reads=fp4.LAYOUTS,
    package="vllm",
    symbol="cutlass",
)
