"""FP8 by FP8: `torch._scaled_mm`. Legend: M, N, K.

    torch-fp8          a scale a row of the weight, or one of all; a scale a token, found at run time
    torch-fp8-tensor   one scale of the weight; one of the activations, calibrated
    quantize   scale = amax / 448, float32 [M, 1] or the calibrated [1]; codes_MK = x / scale, saturating, in float8_e4m3fn
    gemm       y_MN = (codes_MK @ w_KN) · scale of activations · scale of the weight in bf16
Operands: w_KN, the weight seen column-major, never moved; its scale [1, N] or [1]; the calibrated scale [1]. The two steps
are timed apart as well as together: an engine may fuse the first into the norm before it, and in eager mode it is several
calls, so that what is measured of it is an upper bound. CUDA wants sides in 16s, and compute capability 8.9. On CPUs torch
2.11 knows only one scale a tensor; 2.13 was seen to take rows. No layout holds a scale a tensor that is found at run time.
Source: aten/src/ATen/native/cuda/Blas.cpp of PyTorch (scales in float32, output in bf16).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from quantpub.kernels.base import Kernel, Operands, Split, Weight, attempt
from quantpub.scheme import NUMBERS, WHOLE, Scheme

NUM = "fp8_e4m3"
HIGH = NUMBERS[NUM].high
SMALLEST = 1e-12  # of a scale: a token of zeros is divided by it
SIDE = 16
ROWS, ALL = (1, WHOLE), (WHOLE, WHOLE)


def _tiny(kernel: Kernel, *scales: tuple[int, ...]) -> str | None:
    def tiny() -> torch.Tensor:
        on = "cuda" if torch.cuda.is_available() else "cpu"
        w_KN = torch.zeros(SIDE, SIDE).to(torch.float8_e4m3fn).t().to(on)
        x_MK = torch.zeros(1, SIDE, dtype=torch.bfloat16, device=on)
        return kernel.run(x_MK, (w_KN, *(torch.ones(shape, device=on) for shape in scales)))

    return attempt(tiny)


def unavailable() -> str | None:
    return _tiny(KERNEL, (1, SIDE))


def unavailable_tensor() -> str | None:
    return _tiny(TENSOR, (1,), (1,))


def reject(scheme: Scheme, n: int, k: int) -> str | None:
    weight, act = scheme.weight, scheme.act
    if weight.num != NUM or weight.block not in (ROWS, ALL):
        return f"it multiplies FP8 weights with a scale a row or one of all, not {scheme.name}"
    if act is None or (act.num, act.granularity, act.dynamic) != (NUM, "token", True):
        return f"it multiplies FP8 activations with a dynamic scale a token, not {scheme.name}"
    return _refuse_shape(n, k)


def reject_tensor(scheme: Scheme, n: int, k: int) -> str | None:
    weight, act = scheme.weight, scheme.act
    if weight.num != NUM or weight.block != ALL:
        return f"it multiplies FP8 weights with one scale of all, not {scheme.name}"
    if act is None or (act.num, act.granularity, act.dynamic) != (NUM, "tensor", False):
        return f"it multiplies FP8 activations with one calibrated scale, not {scheme.name}"
    return _refuse_shape(n, k)


def _refuse_shape(n: int, k: int) -> str | None:
    return f"shape [{n}, {k}] is not made of multiples of {SIDE}" if n % SIDE or k % SIDE else None


def prepare(weight: Weight) -> Operands:
    q = weight.q
    return q.codes_NK.t(), q.scale.float().expand(q.shape[0], 1).t().contiguous()


def prepare_tensor(weight: Weight) -> Operands:
    q = weight.q
    assert q.input_scale is not None, "the scale of static activations is calibrated"
    return q.codes_NK.t(), q.scale.float().reshape(1), q.input_scale.float().reshape(1)


def quantize(x_MK: torch.Tensor) -> Operands:
    x = x_MK.float()
    return _cast(x, (x.abs().amax(-1, keepdim=True) / HIGH).clamp_min_(SMALLEST))


def calibrated(x_MK: torch.Tensor, operands: Operands) -> Operands:
    return _cast(x_MK.float(), operands[2])


def quantize_static(x_MK: torch.Tensor) -> Operands:
    return _cast(x_MK.float(), nominal(x_MK.device))


@cache
def nominal(device: torch.device) -> torch.Tensor:
    """A static scale that takes activations up to 6."""
    return torch.full((1,), 6 / HIGH, device=device)


def _cast(x_MK: torch.Tensor, scale: torch.Tensor) -> Operands:
    return x_MK.div_(scale).clamp_(-HIGH, HIGH).to(torch.float8_e4m3fn), scale


def dequantize(activations: Operands) -> torch.Tensor:
    codes_MK, scale = activations
    return codes_MK.float() * scale


def gemm(activations: Operands, operands: Operands) -> torch.Tensor:
    (codes_MK, scale_a), (w_KN, scale_b) = activations, operands[:2]
    y_MN: torch.Tensor = torch._scaled_mm(codes_MK, w_KN, scale_a, scale_b, out_dtype=torch.bfloat16)
    return y_MN


KERNEL = Kernel(
    "torch-fp8",
    "fp8-column-major",
    ("cpu", "cuda"),
    unavailable,
    reject,
    prepare,
    lambda x_MK, operands: gemm(quantize(x_MK), operands),
    Split(NUM, quantize, dequantize, gemm),
    row="torch channel-wise FP8",
    symbol="gemm|nvjet|cutlass|xmma",
)
TENSOR = replace(
    KERNEL,
    name="torch-fp8-tensor",
    unavailable=unavailable_tensor,
    reject=reject_tensor,
    prepare=prepare_tensor,
    run=lambda x_MK, operands: gemm(calibrated(x_MK, operands), operands),
    split=Split(NUM, quantize_static, dequantize, gemm, calibrated),
    row="cuBLAS scaled_mm",
)
