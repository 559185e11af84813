"""Kernels: what multiplies by a quantized weight. Each says where it runs, what it refuses, and how it eats a QTensor.

A kernel that this machine cannot run is listed with the reason, never skipped. The baseline is `bf16`.
"""

from __future__ import annotations

from quantpub.registry import Entry

BASELINE = "bf16"
KERNELS = {
    BASELINE: Entry("quantpub.kernels.dense:BF16", "torch's own bf16 matmul: what every other kernel is timed against"),
    "dequantized": Entry(
        "quantpub.kernels.dense:DEQUANTIZED", "decompressed once when loaded, multiplied in bf16: the control"
    ),
    "torch-int4": Entry("quantpub.kernels.torch_int4:KERNEL", "torch's int4 weight-only matmul on CPUs"),
    "torch-int8-weight": Entry("quantpub.kernels.torch_int8:WEIGHT", "torch's int8 weight-only matmul on CPUs"),
    "torch-int8": Entry(
        "quantpub.kernels.torch_int8:KERNEL", "torch._int_mm: int8 weights by int8 activations, a scale a row of each"
    ),
    "torch-fp8": Entry(
        "quantpub.kernels.torch_fp8:KERNEL", "torch._scaled_mm: FP8 weights by FP8 activations, a scale a row of each"
    ),
    "torch-fp8-tensor": Entry(
        "quantpub.kernels.torch_fp8:TENSOR",
        "torch._scaled_mm: FP8 by FP8, one scale a tensor, that of activations static",
    ),
    "tinygemm": Entry(
        "quantpub.kernels.torch_tinygemm:KERNEL", "torch's int4 weight-only matmul on CUDA, torchao's tiles"
    ),
    "marlin": Entry("quantpub.kernels.vllm_marlin:KERNEL", "vLLM's Marlin: int4 or int8 weights by bf16 activations"),
    "machete": Entry("quantpub.kernels.vllm_machete:KERNEL", "vLLM's Machete: the same on Hopper"),
    "cutlass-int8": Entry("quantpub.kernels.vllm_cutlass:INT8_KERNEL", "vLLM's CUTLASS: int8 by int8, up to Hopper"),
    "cutlass-fp8": Entry("quantpub.kernels.vllm_cutlass:FP8_KERNEL", "vLLM's CUTLASS: FP8 by FP8, a scale a token"),
    "cutlass-fp8-static": Entry(
        "quantpub.kernels.vllm_cutlass:STATIC_KERNEL", "vLLM's CUTLASS: FP8 by FP8, one scale a tensor"
    ),
    "cutlass-fp8-block": Entry(
        "quantpub.kernels.vllm_cutlass:BLOCK_KERNEL", "vLLM's CUTLASS: FP8 by FP8 in blocks of 128"
    ),
    "triton-fp8-block": Entry(
        "quantpub.kernels.vllm_cutlass:TRITON_KERNEL", "vLLM's Triton: FP8 by FP8 in blocks of 128"
    ),
    "fp4-marlin": Entry("quantpub.kernels.vllm_fp4:MARLIN", "vLLM's Marlin: NVFP4 weights by bf16 activations"),
    "mxfp4-marlin": Entry("quantpub.kernels.vllm_fp4:MXFP4", "vLLM's Marlin: MXFP4 weights by bf16 activations"),
    "cutlass-fp4": Entry("quantpub.kernels.vllm_fp4:CUTLASS", "vLLM's CUTLASS: NVFP4 by NVFP4, on Blackwell"),
    "flashinfer-fp4": Entry(
        "quantpub.kernels.flashinfer_fp4:KERNEL", "FlashInfer's CUTLASS: NVFP4 by NVFP4, on Blackwell"
    ),
    "flashinfer-fp4-linear": Entry(
        "quantpub.kernels.flashinfer_fp4:LINEAR", "the same, with activations' scales written row by row first"
    ),
    "flashinfer-fp4-cute-dsl": Entry(
        "quantpub.kernels.flashinfer_fp4:CUTE_DSL",
        "FlashInfer's CuTe DSL: NVFP4 by NVFP4, on Blackwell for data centres",
    ),
}
