"""torch's own int8: weights by int8 activations (`_int_mm`), and on CPUs by bf16 ones (`_weight_int8pack_mm`). Legend: M, N, K.

    torch-int8          quantize   scale_M1 = amax / 127 of each token, float32; codes_MK = x / scale, rounded to even
                        gemm       y_MN = (codes_MK @ w_KN in int32) · scale_1N · scale_M1, in bf16
    torch-int8-weight   w = code · scale of its row in bf16, for CPUs only
The product and its two scalings are three calls in eager mode, and quantizing is five: an engine fuses them, so what this
measures is an upper bound of what int8 costs there. On CUDA `_int_mm` takes sides that are multiples of 8 and more than
16 tokens: fewer are padded. The CPU's int8 weight kernel has no tail: K in other than 16s makes it read beyond its end.
Source: aten/src/ATen/native/cuda/Blas.cpp and native/cpu/int8mm_kernel.cpp of PyTorch.
"""

from __future__ import annotations

import torch

from quantpub.kernels.base import Kernel, Operands, Split, Weight, attempt
from quantpub.scheme import NUMBERS, WHOLE, ActFormat, Scheme, WeightFormat

NUM = "int8"
SMALLEST = 1e-12  # of a scale: a token of zeros is divided by it
SIDE, TAIL = 8, 16
FEWEST, PADDED = 17, 32  # tokens of `_int_mm` on CUDA: the fewest, and what fewer become
TOKEN, ROWS = ActFormat(NUM, "token", True), (1, WHOLE)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def unavailable() -> str | None:
    def tiny() -> torch.Tensor:
        on = device()
        x_MK, w_NK = torch.zeros(1, TAIL, dtype=torch.bfloat16), torch.zeros(TAIL, TAIL, dtype=torch.int8)
        return run(x_MK.to(on), (w_NK.to(on), torch.ones(1, TAIL, device=on)))

    return attempt(tiny)


def _weight(weight: WeightFormat) -> bool:
    return (weight.num, weight.block, weight.zero_domain) == (NUM, ROWS, "none")


def reject(scheme: Scheme, n: int, k: int) -> str | None:
    if not _weight(scheme.weight) or scheme.act != TOKEN:
        return f"it multiplies int8 weights with a scale a row by int8 activations with one a token, not {scheme.name}"
    return f"shape [{n}, {k}] is not made of multiples of {SIDE}" if n % SIDE or k % SIDE else None


def prepare(weight: Weight) -> Operands:
    q = weight.q
    return q.codes_NK, q.scale.float().t().contiguous()


def quantize(x_MK: torch.Tensor) -> Operands:
    x = x_MK.float()
    scale_M1 = (x.abs().amax(-1, keepdim=True) / NUMBERS[NUM].high).clamp_min_(SMALLEST)
    return x.div_(scale_M1).round_().to(torch.int8), scale_M1


def dequantize(activations: Operands) -> torch.Tensor:
    codes_MK, scale_M1 = activations
    return codes_MK.float() * scale_M1


def gemm(activations: Operands, operands: Operands) -> torch.Tensor:
    (codes_MK, scale_M1), (w_NK, scale_1N) = activations, operands
    m = len(codes_MK)
    if codes_MK.is_cuda and m < FEWEST:
        codes_MK = torch.nn.functional.pad(codes_MK, (0, 0, 0, PADDED - m))
    sums_MN = torch._int_mm(codes_MK, w_NK.t())[:m]
    y_MN = torch.empty(sums_MN.shape, dtype=torch.bfloat16, device=sums_MN.device)
    return torch.mul(sums_MN * scale_1N, scale_M1, out=y_MN)


def run(x_MK: torch.Tensor, operands: Operands) -> torch.Tensor:
    return gemm(quantize(x_MK), operands)


def weight_unavailable() -> str | None:
    def tiny() -> torch.Tensor:
        operands = torch.zeros(TAIL, TAIL, dtype=torch.int8), torch.ones(TAIL, dtype=torch.bfloat16)
        return weight_run(torch.zeros(1, TAIL, dtype=torch.bfloat16), operands)

    return attempt(tiny)


def weight_reject(scheme: Scheme, n: int, k: int) -> str | None:
    if not _weight(scheme.weight) or scheme.act is not None:
        return f"it multiplies int8 weights with a scale a row by 16-bit activations, not {scheme.name}"
    return f"in_features {k} is not a multiple of {TAIL}: the op would read beyond the weight" if k % TAIL else None


def weight_prepare(weight: Weight) -> Operands:
    q = weight.q
    return q.codes_NK.contiguous(), q.scale.to(torch.bfloat16).reshape(-1)


def weight_run(x_MK: torch.Tensor, operands: Operands) -> torch.Tensor:
    y_MN: torch.Tensor = torch.ops.aten._weight_int8pack_mm(x_MK, *operands)
    return y_MN


KERNEL = Kernel(
    "torch-int8",
    "int8-column-major",
    ("cpu", "cuda"),
    unavailable,
    reject,
    prepare,
    run,
    Split(NUM, quantize, dequantize, gemm),
    symbol="gemm|imma|cutlass|nvjet",
)
WEIGHT = Kernel(
    "torch-int8-weight", "int8-row-major", ("cpu",), weight_unavailable, weight_reject, weight_prepare, weight_run
)
