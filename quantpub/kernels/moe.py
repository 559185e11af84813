"""The kernels for a layer's experts, and what each is timed against: the fastest bf16 kernel that is there, first named."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantpub.registry import Entry, load

if TYPE_CHECKING:
    from quantpub.kernels.moe_base import MoeKernel

MOE_KERNELS = {
    "bf16-loop": Entry("quantpub.kernels.moe_torch:LOOP", "bf16, expert after expert in torch: the baseline on CPUs"),
    "torch-grouped": Entry("quantpub.kernels.moe_torch:GROUPED", "bf16, torch._grouped_mm on tokens sorted by expert"),
    "vllm-triton-moe": Entry(
        "quantpub.kernels.moe_vllm:TRITON_BF16", "bf16, vLLM's fused_experts: its choice on Hopper"
    ),
    "vllm-triton-moe-fp8": Entry("quantpub.kernels.moe_vllm:TRITON_FP8", "FP8 by FP8, vLLM's fused_experts"),
    "vllm-cutlass-moe-fp8": Entry("quantpub.kernels.moe_vllm:CUTLASS_FP8", "FP8 by FP8, vLLM's grouped CUTLASS GEMMs"),
    "vllm-triton-moe-int8": Entry("quantpub.kernels.moe_vllm:TRITON_INT8", "int8 by int8, vLLM's fused_experts"),
    "vllm-triton-moe-int8-a16": Entry(
        "quantpub.kernels.moe_vllm:TRITON_INT8_A16", "int8 weights by bf16: what vLLM 0.25.1 makes of W8A8 experts"
    ),
    "vllm-marlin-moe": Entry("quantpub.kernels.moe_vllm_marlin:MARLIN", "int4 or int8 weights by bf16, vLLM's Marlin"),
    "vllm-marlin-moe-fp4": Entry("quantpub.kernels.moe_vllm_marlin:MARLIN_FP4", "NVFP4 weights by bf16, vLLM's Marlin"),
}
MOE_BASELINES = {"cuda": ("vllm-triton-moe", "torch-grouped"), "cpu": ("bf16-loop",)}


def baseline(device: str) -> tuple[MoeKernel | None, str]:
    """(the bf16 kernel that others are timed against on `device`, or None; why those named before it are not it)."""
    reasons: list[str] = []
    for name in MOE_BASELINES[device]:
        kernel: MoeKernel = load(MOE_KERNELS, "MoE kernel", name)
        reason = kernel.unavailable()
        if reason is None:
            return kernel, "; ".join(reasons)
        reasons.append(f"{name}: {reason}")
    return None, "; ".join(reasons)
