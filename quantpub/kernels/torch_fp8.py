"""FP8 by FP8: `torch._scaled_mm` with a scale a row of the weight and, found at run time, a scale a token.

    quantize   scale_M1 = amax / 448 of each token, float32; codes_MK = x / scale in float8_e4m3fn
    gemm       y_MN = (codes_MK @ w_KN)·scale_M1·scale_1N in bf16; w_KN is the weight seen column-major, never moved
The two are timed apart as well as together: an engine may fuse the first into the norm before it. On CPUs torch 2.11
knows only one scale a tensor; 2.13 was seen to take rows.
Source: the row-wise scaling of torch._scaled_mm (scales in float32, output in bf16).
"""

from __future__ import annotations

import torch

from quantpub.kernels.base import Kernel, Operands, Split, attempt
from quantpub.qtensor import QTensor
from quantpub.scheme import NUMBERS, WHOLE, Scheme

NUM = "fp8_e4m3"
SMALLEST = 1e-12  # of a scale: a token of zeros is divided by it


def unavailable() -> str | None:
    def tiny() -> torch.Tensor:
        return run(
            torch.zeros(1, 16, dtype=torch.bfloat16),
            (torch.zeros(16, 16).to(torch.float8_e4m3fn).t(), torch.ones(1, 16)),
        )

    return attempt(tiny)


def reject(scheme: Scheme, n: int, k: int) -> str | None:
    weight, act = scheme.weight, scheme.act
    if weight.num != NUM or weight.block != (1, WHOLE):
        return f"it multiplies FP8 weights with a scale a row, not {scheme.name}"
    if act is None or (act.num, act.granularity, act.dynamic) != (NUM, "token", True):
        return f"it multiplies FP8 activations with a dynamic scale a token, not {scheme.name}"
    return None


def prepare(q: QTensor) -> Operands:
    return q.codes_NK.t(), q.scale.float().t().contiguous()


def quantize(x_MK: torch.Tensor) -> Operands:
    x = x_MK.float()
    scale_M1 = (x.abs().amax(-1, keepdim=True) / NUMBERS[NUM].high).clamp_min_(SMALLEST)
    return x.div_(scale_M1).to(torch.float8_e4m3fn), scale_M1


def dequantize(activations: Operands) -> torch.Tensor:
    codes_MK, scale_M1 = activations
    return codes_MK.float() * scale_M1


def gemm(activations: Operands, operands: Operands) -> torch.Tensor:
    (codes_MK, scale_M1), (w_KN, scale_1N) = activations, operands
    y_MN: torch.Tensor = torch._scaled_mm(codes_MK, w_KN, scale_M1, scale_1N, out_dtype=torch.bfloat16)
    return y_MN


def run(x_MK: torch.Tensor, operands: Operands) -> torch.Tensor:
    return gemm(quantize(x_MK), operands)


KERNEL = Kernel(
    "torch-fp8", "fp8-column-major", ("cpu",), unavailable, reject, prepare, run, Split(NUM, quantize, dequantize, gemm)
)
