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
    "torch-fp8": Entry(
        "quantpub.kernels.torch_fp8:KERNEL", "torch._scaled_mm: FP8 weights by FP8 activations, a scale a row of each"
    ),
}
