"""Experts in vLLM's Marlin: weights of few bits by bf16 activations, `fused_marlin_moe`. Legend as in moe_base.

    words13   int32 [E, K/16, 2I·b/2], words2 int32 [E, I/16, K·b/2]: b bits a code, repacked when loaded
    scales    int4, int8: bf16 [E, G, N], permuted. NVFP4: their E4M3 bytes in Marlin's own S0E5M3, and a float32
              scale an expert, which takes up what was shifted
    zeros     int32 [E, G, N/8], permuted, where the weights have them
w13 and w2 are multiplied by the same kernel, tokens in blocks by expert. Groups of w13's scales are permuted as the engine
does it, which takes the intermediate size for their length: right wherever that is more than a group.
`fused_marlin_moe` wants K in 128s (NVFP4: 64s) and I in 64s; the engine pads an I that is not, which is not done here.
Source: fused_moe/oracle/int_wna16.py, fused_moe/experts/marlin_moe.py and marlin_utils_fp4.py of vLLM 0.25.1 and 0.33.0.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from quantpub.experts import ExpertWeights
from quantpub.kernels.base import Operands
from quantpub.kernels.moe_base import MoeKernel, rows
from quantpub.kernels.moe_vllm import FUSED, unavailable, vllm
from quantpub.scheme import WHOLE, Scheme

UTILS = "model_executor.layers.quantization.utils"
TILE, HIDDEN, HIDDEN_FP4 = 64, 128, 64
GROUPS = (32, 64, 128, WHOLE)
TYPES = {(4, False): "uint4b8", (4, True): "uint4", (8, False): "uint8b128"}


def reject(scheme: Scheme, experts: int, hidden: int, intermediate: int) -> str | None:
    weight = scheme.weight
    if (weight.number.bits, weight.zero_domain == "int") not in TYPES or weight.number.kind != "int":
        return f"it multiplies int4 and symmetric int8 weights, not {scheme.name}"
    if weight.block[0] != 1 or weight.zero_domain == "float" or scheme.act is not None:
        return f"it multiplies integer weights in groups of a row by 16-bit activations, not {scheme.name}"
    if scheme.group_size not in GROUPS:
        return f"groups of {scheme.group_size} columns are none of 32, 64, 128 or a whole row"
    return _sizes(hidden, HIDDEN, intermediate)


def reject_fp4(scheme: Scheme, experts: int, hidden: int, intermediate: int) -> str | None:
    if scheme.weight.num != "fp4_e2m1" or not scheme.weight.global_scale or scheme.act is not None:
        return f"it multiplies NVFP4 weights by 16-bit activations, not {scheme.name}"
    return _sizes(hidden, HIDDEN_FP4, intermediate)


def _sizes(hidden: int, tile: int, intermediate: int) -> str | None:
    for name, size, of in (("hidden", hidden, tile), ("intermediate", intermediate, TILE)):
        if size % of:
            return f"{name} size {size} is not a multiple of {of}"
    return None


def prepare(weights: ExpertWeights) -> Operands:
    """(words13, scale13, words2, scale2), and (zero13, zero2) where there are any."""
    w13, w2, scheme = weights.packed13, weights.packed2, weights.layer.scheme
    i, bits, group = weights.gate[0].shape[0], scheme.weight.number.bits, scheme.group_size
    turned = [{s: _turned(t) for s, t in part.items()} for part in ({s: rows(t) for s, t in w13.items()}, w2)]
    found = []
    for part, of_13 in zip(turned, (True, False), strict=True):
        groups, n = part["weight_scale"].shape[1:]
        k = i if of_13 else groups * (group if group != WHOLE else 32 // bits)  # as the engine has it
        scale = vllm(f"{UTILS}.marlin_utils").marlin_moe_permute_scales(
            s=part["weight_scale"].to(torch.bfloat16), size_k=k, size_n=n, group_size=group
        )
        found += [_repacked(part["weight_packed"], bits), scale]
    zeros = [_zeros(part["weight_zero_point"], bits) for part in turned if "weight_zero_point" in part]
    return (*found, *zeros)


def _turned(tensor: torch.Tensor) -> torch.Tensor:
    """[E, N, …] → [E, …, N], as the engine's loader turns what it reads. weight_shape comes to nothing."""
    return tensor.transpose(1, 2).contiguous() if tensor.ndim == 3 else tensor


def _repacked(words_EKN: torch.Tensor, bits: int) -> torch.Tensor:
    repack = vllm("_custom_ops").gptq_marlin_moe_repack
    experts, words, n = words_EKN.shape
    none = torch.empty(experts, 0, dtype=torch.int32, device=words_EKN.device)
    order = {"perm": none} if "perm" in inspect.signature(repack).parameters else {}
    packed: torch.Tensor = repack(b_q_weight=words_EKN, size_k=words * 32 // bits, size_n=n, num_bits=bits, **order)
    return packed


def _zeros(words_EGN: torch.Tensor, bits: int) -> torch.Tensor:
    _, groups, words = words_EGN.shape
    zeros: torch.Tensor = vllm(f"{UTILS}.marlin_utils").moe_packed_to_marlin_zero_points(
        words_EGN, size_k=groups, size_n=words * 32 // bits, num_bits=bits
    )
    return zeros


def run(x_MK: torch.Tensor, weights_MT: torch.Tensor, ids_MT: torch.Tensor, operands: Operands) -> torch.Tensor:
    words13, scale13, words2, scale2, *zeros = operands
    bits = 2 * words2.shape[2] // x_MK.shape[1]
    more = dict(zip(("w1_zeros", "w2_zeros"), zeros, strict=True)) if zeros else {}
    return _fused(x_MK, weights_MT, ids_MT, (words13, scale13, words2, scale2), TYPES[bits, bool(zeros)], **more)


def run_fp4(x_MK: torch.Tensor, weights_MT: torch.Tensor, ids_MT: torch.Tensor, operands: Operands) -> torch.Tensor:
    words13, scale13, global13, words2, scale2, global2 = operands
    quantized = (words13, scale13, words2, scale2)
    return _fused(x_MK, weights_MT, ids_MT, quantized, "float4_e2m1f", global_scale1=global13, global_scale2=global2)


def _fused(
    x_MK: torch.Tensor, weights_MT: torch.Tensor, ids_MT: torch.Tensor, quantized: Operands, kind: str, **more: Any
) -> torch.Tensor:
    words13, scale13, words2, scale2 = quantized
    y_MK = torch.empty_like(x_MK)
    vllm(f"{FUSED}.experts.marlin_moe").fused_marlin_moe(
        hidden_states=x_MK,
        w1=words13,
        w2=words2,
        bias1=None,
        bias2=None,
        w1_scale=scale13,
        w2_scale=scale2,
        topk_weights=weights_MT,
        topk_ids=ids_MT,
        quant_type_id=getattr(vllm("scalar_type").scalar_types, kind).id,
        global_num_experts=len(words13),
        moe_sum=_sum,
        output=y_MK,
        **more,
    )
    return y_MK


def _sum(outputs_MTK: torch.Tensor, y_MK: torch.Tensor, *experts_map: object) -> None:
    """The engine's own: torch.sum, which `fused_marlin_moe` takes by itself, is another kernel."""
    vllm("_custom_ops").moe_sum(outputs_MTK, y_MK)


def prepare_fp4(weights: ExpertWeights) -> Operands:
    """(words13, scale13, global13, words2, scale2, global2)."""
    w13, w2 = weights.packed13, weights.packed2
    i, k = weights.gate[0].shape
    layer = SimpleNamespace(
        num_experts=len(weights.gate), hidden_size=k, intermediate_size_per_partition=i, params_dtype=torch.bfloat16
    )
    name = "weight_packed" if "weight_packed" in w13 else "weight"
    made: Operands = vllm(f"{UTILS}.marlin_utils_fp4").prepare_nvfp4_moe_layer_for_marlin(
        layer=layer,
        w13=rows(w13[name]),
        w13_scale=rows(w13["weight_scale"]),
        w13_scale_2=_global({suffix: tensor[:, 0] for suffix, tensor in w13.items()}),  # gate's, which is up's too
        w2=w2[name],
        w2_scale=w2["weight_scale"],
        w2_scale_2=_global(w2),
        is_act_and_mul=True,
    )
    return tuple(tensor.contiguous() for tensor in made)


def _global(packed: dict[str, torch.Tensor]) -> torch.Tensor:
    """The multiplier of every expert, float32 [E]: compressed-tensors stores its inverse."""
    if "weight_scale_2" in packed:
        return packed["weight_scale_2"].reshape(-1)
    return packed["weight_global_scale"].reshape(-1).reciprocal()


MARLIN = MoeKernel(
    "vllm-marlin-moe",
    "marlin",
    ("cuda",),
    unavailable,
    reject,
    prepare,
    run,
    reads=("ct-pack",),
    package="vllm",
    row="Marlin MoE",
    symbol=r"Marlin",
)
MARLIN_FP4 = replace(
    MARLIN,
    name="vllm-marlin-moe-fp4",
    layout="marlin-fp4",
    reject=reject_fp4,
    prepare=prepare_fp4,
    run=run_fp4,
    reads=("ct-nvfp4", "modelopt-nvfp4"),
    row="Marlin NVFP4 MoE",
)
