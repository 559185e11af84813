"""Experts in vLLM: its Triton kernel in bf16, FP8 and INT8, and its CUTLASS kernel in FP8. Legend as in moe_base.

    triton   `fused_experts`: one kernel for w13 and w2, a block of tokens by expert; its tuned tiles are looked up by E, I
             and GPU. bf16 experts run on it up to Hopper: the engine puts FlashInfer's kernels behind it there.
    cutlass  grouped FP8 GEMMs; tokens are permuted by expert before, and back after. The engine's choice for FP8 with a
             scale a row and a token on Hopper.
Weights lie as they do in the checkpoint: w13 [E, 2I, K] and w2 [E, K, I], scales float32 [E, 2I, 1] and [E, K, 1]. The
activations' scales, one a token, are found at run time, before w13 and again before w2.

INT8: vLLM 0.25.1 leaves the activations of experts in bf16, though the scheme says int8, since it asks for scales that a
dynamic scheme never has (`make_int8_moe_quant_config`); 0.33.0 quantizes them. Both are here; `engine_int8` says which of
the two the installed vLLM runs, `int8_experts` which one a version does.
Source: fused_moe/fused_moe.py, fused_moe/experts/cutlass_moe.py and fused_moe/oracle of vLLM 0.25.1 and 0.33.0.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from quantpub.experts import ExpertWeights
from quantpub.kernels.base import Operands
from quantpub.kernels.moe_base import MoeKernel, Reject, Run, any_experts, dense, rows
from quantpub.scheme import WHOLE, Scheme

FUSED = "model_executor.layers.fused_moe"
ALIGN = 16  # FP8 numbers in 16 bytes, which CUTLASS loads at a time
SCRATCH_ROWS = 8192
INT8_SINCE = (0, 33)  # the version that quantizes the activations of INT8 experts
TRITON = r"fused_moe_kernel"


def vllm(name: str) -> Any:
    """A module of vLLM, imported when it is first asked for."""
    return importlib.import_module(f"vllm.{name}")


def unavailable() -> str | None:
    if not torch.cuda.is_available():
        return "it needs a CUDA device"
    try:
        vllm(f"{FUSED}.fused_moe")
        vllm("_custom_ops")
        missing = [name for name in ("moe_sum", "moe_align_block_size") if not hasattr(torch.ops._moe_C, name)]
    except Exception as error:  # an import of vLLM fails in many ways; each is a reason
        said = str(error).strip().partition("\n")[0]
        return f"vLLM cannot be imported here: {type(error).__name__}: {said:.200}"
    return f"this vLLM has no {', '.join(missing)}" if missing else None


def triton(**how: bool) -> Run:
    """`fused_experts` for operands (w13, w2), or (w13, w13_scale, w2, w2_scale). how: its switches."""

    def run(x_MK: torch.Tensor, weights_MT: torch.Tensor, ids_MT: torch.Tensor, operands: Operands) -> torch.Tensor:
        vllm(f"{FUSED}.fused_moe")  # it registers the op
        scales = dict(zip(("w1_scale", "w2_scale"), operands[1::2], strict=True)) if len(operands) == 4 else {}
        w13, w2 = (operands[0], operands[2]) if scales else operands
        y_MK: torch.Tensor = torch.ops.vllm.fused_experts(
            hidden_states=x_MK, w1=w13, w2=w2, topk_weights=weights_MT, topk_ids=ids_MT, **scales, **how
        )
        return y_MK

    return run


def by_rows(num: str) -> Reject:
    """Refuses all but `num` weights with a scale a row and `num` activations with a dynamic scale a token."""

    def reject(scheme: Scheme, experts: int, hidden: int, intermediate: int) -> str | None:
        weight, act = scheme.weight, scheme.act
        if weight.num != num or weight.block != (1, WHOLE):
            return f"it multiplies {num} weights with a scale a row, not {scheme.name}"
        if act is None or (act.num, act.granularity, act.dynamic, act.outlier) != (num, "token", True, None):
            return f"it multiplies {num} activations with a dynamic scale a token, not {scheme.name}"
        return None

    return reject


def prepare_rows(weights: ExpertWeights) -> Operands:
    """(w13, w13_scale, w2, w2_scale) for weights with a scale a row, as they lie on disk."""
    w13, w2 = weights.packed13, weights.packed2
    return (
        rows(w13["weight"]).contiguous(),
        rows(w13["weight_scale"]).float().contiguous(),
        w2["weight"].contiguous(),
        w2["weight_scale"].float().contiguous(),
    )


def engine_int8() -> str:
    """The name of the kernel here that is what the installed vLLM does with INT8 experts."""
    oracle, one = vllm(f"{FUSED}.oracle.int8"), torch.ones(1, 1, 1)
    config = oracle.make_int8_moe_quant_config(
        oracle.Int8MoeBackend.TRITON, w1_scale=one, w2_scale=one, per_act_token_quant=True
    )
    return TRITON_INT8.name if config.use_int8_w8a8 else TRITON_INT8_A16.name


def int8_experts(version: str) -> str | None:
    """The same of a vLLM that may be installed here or not: what the one here says, else by `version`; None: not known."""
    try:
        return engine_int8()
    except Exception:  # an import of vLLM fails in many ways
        number = re.match(r"(\d+)\.(\d+)", version)
    if number is None:
        return None
    return (TRITON_INT8 if (int(number[1]), int(number[2])) >= INT8_SINCE else TRITON_INT8_A16).name


def no_cutlass() -> str | None:
    if reason := unavailable():
        return reason
    if not vllm("model_executor.layers.quantization.utils.w8a8_utils").cutlass_group_gemm_supported():
        return "vLLM's grouped CUTLASS kernels are not built for this GPU"
    return None


def reject_cutlass(scheme: Scheme, experts: int, hidden: int, intermediate: int) -> str | None:
    for name, size in (("hidden", hidden), ("intermediate", intermediate)):
        if size % ALIGN:
            return f"{name} size {size} is not a multiple of {ALIGN}"
    return by_rows("fp8_e4m3")(scheme, experts, hidden, intermediate)


def prepare_cutlass(weights: ExpertWeights) -> Operands:
    """`prepare_rows`, and for every expert the row lengths of x, h and both GEMMs' outputs: int64 [E]."""
    operands = prepare_rows(weights)
    e, k, i = operands[2].shape
    lengths = (torch.full((e,), size, dtype=torch.int64, device=weights.device) for size in (k, i, 2 * i))
    return (*operands, *lengths)


def run_cutlass(x_MK: torch.Tensor, weights_MT: torch.Tensor, ids_MT: torch.Tensor, operands: Operands) -> torch.Tensor:
    w13, scale13, w2, scale2, k_E, i_E, both_E = operands
    (m, k), (e, both, _), t = x_MK.shape, w13.shape, ids_MT.shape[1]
    codes_MK, scale_M1 = vllm("_custom_ops").scaled_fp8_quant(x_MK, use_per_token_if_dynamic=True)
    y_MK = torch.empty_like(x_MK)
    vllm(f"{FUSED}.experts.cutlass_moe").run_cutlass_moe_fp8(
        output=y_MK,
        hidden_states=codes_MK,
        w1=w13,
        w2=w2,
        topk_ids=ids_MT,
        activation=vllm(f"{FUSED}.activation").MoEActivation.SILU,
        global_num_experts=e,
        expert_map=None,
        w1_scale=scale13,
        w2_scale=scale2,
        a1q_scale=scale_M1,
        a2_scale=None,
        ab_strides1=k_E,
        ab_strides2=i_E,
        c_strides1=both_E,
        c_strides2=k_E,
        workspace13=x_MK.new_empty(m * t, max(both, k)),
        workspace2=x_MK.new_empty(m * t, max(both // 2, k)),
        expert_num_tokens=None,
        out_dtype=x_MK.dtype,
        per_act_token=True,
        per_out_ch=True,
        use_batched_format=False,
        topk_weights=weights_MT,
        permute_scratch=_scratch(max(m, SCRATCH_ROWS), t, e, x_MK.device),
    )
    return y_MK


@cache
def _scratch(tokens: int, top_k: int, experts: int, device: torch.device) -> Any:
    """What the engine keeps from call to call to sort tokens by expert; first made outside of a CUDA graph."""
    scratch = vllm(f"{FUSED}.experts.cutlass_moe").MoEPermuteScratch
    with torch.inference_mode(False):  # what is made in that mode cannot be written to outside of it
        return scratch(max_num_tokens=tokens, topk=top_k, num_experts=experts, num_local_experts=experts, device=device)


TRITON_BF16 = MoeKernel(
    "vllm-triton-moe",
    "dense",
    ("cuda",),
    unavailable,
    any_experts,
    dense,
    triton(),
    package="vllm",
    row="Triton MoE",
    symbol=TRITON,
)
TRITON_FP8 = MoeKernel(
    "vllm-triton-moe-fp8",
    "fp8-rows",
    ("cuda",),
    unavailable,
    by_rows("fp8_e4m3"),
    prepare_rows,
    triton(use_fp8_w8a8=True, per_channel_quant=True),
    ("fp8_e4m3", "fp8_e4m3"),
    ("ct-float",),
    "vllm",
    "Triton FP8 MoE",
    TRITON,
)
CUTLASS_FP8 = replace(
    TRITON_FP8,
    name="vllm-cutlass-moe-fp8",
    unavailable=no_cutlass,
    reject=reject_cutlass,
    prepare=prepare_cutlass,
    run=run_cutlass,
    row="CUTLASS FP8 MoE",
    symbol=r"cutlass",
)
TRITON_INT8 = MoeKernel(
    "vllm-triton-moe-int8",
    "int8-rows",
    ("cuda",),
    unavailable,
    by_rows("int8"),
    prepare_rows,
    triton(use_int8_w8a8=True, per_channel_quant=True),
    ("int8", "int8"),
    ("ct-int",),
    "vllm",
    "Triton INT8 MoE",
    TRITON,
)
TRITON_INT8_A16 = replace(
    TRITON_INT8, name="vllm-triton-moe-int8-a16", run=triton(use_int8_w8a16=True), acts=("bf16", "bf16")
)
