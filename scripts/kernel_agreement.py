"""Multiplies with the serving engines' own kernels and compares with `dequantize`: does the kernel see the weight we mean?

usage: python scripts/kernel_agreement.py OUT.json ARTIFACT ...        (a CUDA host with vLLM on the path)

For every merged GEMM of an artifact, one of each shape, the layout's own bytes go to every kernel that could eat them. Two
products: the identity, which returns the kernel's weight itself, and random activations. Reported: the part of the weights
that equals dequantize(q) rounded to bf16 bit for bit, the largest difference in units of the last bf16 place of the
row's largest weight, and the relative error of the random product (8-bit activations have an error of their own).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from provenance import made_by, write

from quantpub.artifact import Artifact
from quantpub.decode import Decoder
from quantpub.gemms import engine_gemms, weight
from quantpub.layouts.base import Tensors
from quantpub.qtensor import QTensor, dequantize

Product = Callable[[torch.Tensor], torch.Tensor]  # x_MK in bf16 → y_MN
EMPTY = torch.empty(0, dtype=torch.int32)
M = 64


def wtype(q: QTensor) -> Any:
    from vllm.scalar_type import scalar_types

    names = {("int4", "none"): "uint4b8", ("int4", "int"): "uint4", ("int8", "none"): "uint8b128"}
    return getattr(scalar_types, names[q.scheme.weight.num, q.scheme.weight.zero_domain])


def unsigned_zeros(q: QTensor) -> torch.Tensor:
    assert q.zero is not None
    return (q.zero.t() + 8).to(torch.int32).contiguous()


def marlin(q: QTensor, packed: Tensors) -> Product:
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils as utils

    (n, k), group, empty = q.shape, q.scheme.group_size, EMPTY.cuda()
    bits = q.scheme.weight.number.bits
    b = ops.gptq_marlin_repack(packed["weight_packed"].t().contiguous(), empty, k, n, bits)
    s_GN = utils.marlin_permute_scales(packed["weight_scale"].t().contiguous(), k, n, group)
    z = empty if q.zero is None else utils.marlin_zero_points(unsigned_zeros(q), len(s_GN), n, bits)
    space = utils.marlin_make_workspace_new(b.device)
    return lambda x_MK: utils.apply_gptq_marlin_linear(
        x_MK, b, s_GN, z, empty, empty, space, wtype(q), n, k, is_k_full=True
    )


def machete(q: QTensor, packed: Tensors) -> Product:
    from vllm import _custom_ops as ops

    words = packed["weight_packed"].t()  # [K/8, N], column-major as it stands
    dtype = torch.bfloat16
    b = ops.machete_prepack_B(words, a_type=dtype, b_type=wtype(q), group_scales_type=dtype)
    s_GN = packed["weight_scale"].t().contiguous()
    z_GN = None if q.zero is None else (-1.0 * s_GN * unsigned_zeros(q).to(dtype)).contiguous()
    return lambda x_MK: ops.machete_mm(
        a=x_MK, b_q=b, b_type=wtype(q), b_group_scales=s_GN, b_group_zeros=z_GN, b_group_size=q.scheme.group_size
    )


def tinygemm(q: QTensor, packed: Tensors) -> Product:
    n, k = q.shape
    tiles, pairs = packed["_weight_qdata"], packed["_weight_scale_and_zero"]
    padded = tiles.shape[1] * 128

    def product(x_MK: torch.Tensor) -> torch.Tensor:
        x_MK = torch.nn.functional.pad(x_MK, (0, padded - k)).contiguous()
        return torch.ops.aten._weight_int4pack_mm(x_MK, tiles, q.scheme.group_size, pairs)[:, :n]

    return product


def cutlass_int8(q: QTensor, packed: Tensors) -> Product:
    from vllm import _custom_ops as ops

    b_KN, s_N1 = packed["weight"].t(), packed["weight_scale"].float()

    def product(x_MK: torch.Tensor) -> torch.Tensor:
        x_q, s_M1, _ = ops.scaled_int8_quant(x_MK.contiguous())
        return ops.cutlass_scaled_mm(x_q, b_KN, s_M1, s_N1, torch.bfloat16)

    return product


def cutlass_fp8(q: QTensor, packed: Tensors) -> Product:
    from vllm import _custom_ops as ops

    b_KN, s_N1 = packed["weight"].t(), packed["weight_scale"].float()

    def product(x_MK: torch.Tensor) -> torch.Tensor:
        x_q, s_M1 = ops.scaled_fp8_quant(x_MK.contiguous(), use_per_token_if_dynamic=True)
        return ops.cutlass_scaled_mm(x_q, b_KN, s_M1, s_N1, torch.bfloat16)

    return product


def torch_fp8(q: QTensor, packed: Tensors) -> Product:
    from vllm import _custom_ops as ops

    b_KN, s_1N = packed["weight"].t(), packed["weight_scale"].float().t()

    def product(x_MK: torch.Tensor) -> torch.Tensor:
        x_q, s_M1 = ops.scaled_fp8_quant(x_MK.contiguous(), use_per_token_if_dynamic=True)
        return torch._scaled_mm(x_q, b_KN, s_M1, s_1N, out_dtype=torch.bfloat16)

    return product


def block_scale(packed: Tensors) -> torch.Tensor:
    return packed["weight_scale"] if "weight_scale" in packed else packed["weight_scale_inv"]


def cutlass_fp8_block(q: QTensor, packed: Tensors) -> Product:
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils.fp8_utils import per_token_group_quant_fp8

    b_KN, s_KN = packed["weight"].t(), block_scale(packed).t()

    def product(x_MK: torch.Tensor) -> torch.Tensor:
        x_q, s_MG = per_token_group_quant_fp8(x_MK.contiguous(), 128, column_major_scales=True)
        return ops.cutlass_scaled_mm(x_q, b_KN, s_MG, s_KN, torch.bfloat16)

    return product


def triton_fp8_block(q: QTensor, packed: Tensors) -> Product:
    from vllm.model_executor.layers.quantization.utils import fp8_utils

    def product(x_MK: torch.Tensor) -> torch.Tensor:
        x_q, s_MG = fp8_utils.per_token_group_quant_fp8(x_MK.contiguous(), 128)
        return fp8_utils.w8a8_triton_block_scaled_mm(
            x_q, packed["weight"], s_MG, block_scale(packed), [128, 128], output_dtype=torch.bfloat16
        )

    return product


def fp4_marlin(q: QTensor, packed: Tensors) -> Product:
    """NVFP4 and MXFP4 as vLLM runs them where there is no FP4 arithmetic."""
    from vllm.model_executor.layers.quantization.utils import marlin_utils_fp4 as fp4

    layer = torch.nn.Module()
    layer.output_size_per_partition, layer.input_size_per_partition = n, k = q.shape
    layer.params_dtype = torch.bfloat16
    for name, tensor in (("weight", packed["weight_packed"]), ("weight_scale", packed["weight_scale"])):
        setattr(layer, name, torch.nn.Parameter(tensor, requires_grad=False))
    if q.global_scale is not None:
        layer.weight_global_scale = torch.nn.Parameter(1 / packed["weight_global_scale"].max(), requires_grad=False)
    fp4.prepare_fp4_layer_for_marlin(layer)
    shared = getattr(layer, "weight_global_scale", None)
    return lambda x_MK: fp4.apply_fp4_marlin_linear(
        x_MK, layer.weight, layer.weight_scale, shared, layer.workspace, n, k
    )


KERNELS: dict[tuple[str, str], dict[str, Callable[[QTensor, Tensors], Product]]] = {
    ("ct-pack", "W4A16"): {"marlin": marlin, "machete": machete},
    ("ct-pack", "W4A16_ASYM"): {"marlin": marlin, "machete": machete},
    ("ct-pack", "W8A16"): {"marlin": marlin, "machete": machete},
    ("ct-int", "W8A8"): {"cutlass-int8": cutlass_int8},
    ("ct-float", "FP8_DYNAMIC"): {"cutlass-fp8": cutlass_fp8, "torch-scaled-mm": torch_fp8},
    ("ct-float", "FP8_BLOCK"): {"cutlass-fp8-block": cutlass_fp8_block, "triton-fp8-block": triton_fp8_block},
    ("hf-fp8", "FP8_BLOCK"): {"cutlass-fp8-block": cutlass_fp8_block, "triton-fp8-block": triton_fp8_block},
    ("ct-nvfp4", "NVFP4A16"): {"fp4-marlin": fp4_marlin},
    ("ct-mxfp4", "MXFP4A16"): {"fp4-marlin": fp4_marlin},
    ("torchao-tile", "W4A16_FLOAT_ZERO"): {"tinygemm": tinygemm},
}


# A unit of this size makes the kernel's own activation scale exactly 1, so that only the weight is seen. Not for blocks:
# there 448 · code · scale lies on ties of bf16, which the last bit of a float32 product decides.
UNIT = {"cutlass-int8": 127.0, "cutlass-fp8": 448.0, "torch-scaled-mm": 448.0}


def on_gpu(q: QTensor) -> QTensor:
    from dataclasses import replace

    fields = ("codes_NK", "scale", "zero", "global_scale", "input_scale")
    moved = {name: value.cuda() for name in fields if (value := getattr(q, name)) is not None}
    return replace(q, **moved)


def rows(folder: str) -> Iterator[dict[str, Any]]:
    decoder = Decoder(Artifact.open(Path(folder)))
    for gemm in engine_gemms(decoder.artifact, decoder):
        treatment = decoder.treated(gemm.members[0])
        q = on_gpu(weight(decoder, gemm))
        packed = {name: tensor.cuda() for name, tensor in treatment.layout.pack(q).items()}
        row = {"artifact": Path(folder).name, "scheme": treatment.scheme.name, "layout": treatment.layout.name}
        row |= {"gemm": gemm.name, "n": q.shape[0], "k": q.shape[1]}
        row |= {"negative_scales": int((q.scale.float() < 0).sum()), "scales": q.scale.numel()}
        for name, make in KERNELS.get((treatment.layout.name, treatment.scheme.name), {}).items():
            try:
                yield row | {"kernel": name, **compared(q, make(q, packed), UNIT.get(name, 1.0))}
            except Exception as error:  # said in the evidence, not hidden
                yield row | {"kernel": name, "failed": f"{type(error).__name__}: {error!s:.300}"}


def compared(q: QTensor, product: Product, unit: float) -> dict[str, Any]:
    w_NK = dequantize(q)
    seen_NK = product(torch.eye(q.shape[1], dtype=torch.bfloat16, device="cuda").mul_(unit)).t()
    due_NK = (w_NK * unit).bfloat16()
    off_NK = (seen_NK.float() - due_NK.float()).abs()
    last = torch.exp2(torch.floor(torch.log2(due_NK.float().abs().amax(1, keepdim=True).clamp_min(1e-30))) - 7)
    x_MK = torch.randn(M, q.shape[1], device="cuda", generator=torch.Generator("cuda").manual_seed(0)).bfloat16()
    y_MN, expected = product(x_MK).float(), x_MK.float() @ w_NK.t()
    return {
        "equal_bits": round(float((seen_NK == due_NK).float().mean()), 6),
        "largest_difference_bf16_ulp": round(float((off_NK / last).max()), 4),
        "product_relative_error": round(float((y_MN - expected).norm() / expected.norm()), 6),
    }


def main(out: str, *folders: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    found = [row for folder in folders for row in rows(folder)]
    for row in found:
        print(json.dumps(row))
    made = made_by("scripts/kernel_agreement.py", ("torch", "vllm"), cuda=torch.version.cuda, seed=0, m=M)
    write(out, made, rows=found)


if __name__ == "__main__":
    main(*sys.argv[1:])
