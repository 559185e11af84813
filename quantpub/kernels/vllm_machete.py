"""Machete: vLLM's int4 and int8 weights by bf16 activations on Hopper's wgmma. Legend: M, N, K; G groups; W codes a word.

Operands, made by vLLM's own prepacking as it does when it loads ct-pack, gptq or awq:
    b_q      int32 [K/W, N]   codes in the order in which wgmma's threads hold them
    scales   bf16 [G, N]
    zeros    bf16 [G, N]      −scale · zero, rounded once, where there are zeros: the kernel adds it to code · scale
That product may be several times larger than the weight, and so its rounding: see `check.ZEROS`.
Source: vLLM's MacheteLinearKernel and csrc/quantization/machete.
"""

from __future__ import annotations

import torch

from quantpub.kernels.base import Kernel, Operands, Weight
from quantpub.kernels.vllm_common import ops, refuse_integers, scales_GN, words_KN, wtype, zeros_GN
from quantpub.kernels.vllm_common import unavailable as unavailable_op
from quantpub.scheme import WHOLE, Scheme

ROW = "Machete"
KINDS = {(num, zero) for num in ("int4", "int8") for zero in ("none", "int")}


def unavailable() -> str | None:
    return unavailable_op("machete_mm", (9, 0), (10, 0))


def reject(scheme: Scheme, n: int, k: int) -> str | None:
    return refuse_integers(ROW, KINDS, scheme, n, k)


def prepare(weight: Weight) -> Operands:
    bits, scale_GN, zero_GN = weight.q.scheme.weight.number.bits, scales_GN(weight), zeros_GN(weight)
    dtype, columns_KN = scale_GN.dtype, words_KN(weight).t().contiguous().t()  # column-major
    b_q = ops().machete_prepack_B(
        columns_KN, a_type=dtype, b_type=wtype(bits, zero_GN is not None), group_scales_type=dtype
    )
    if zero_GN is None:
        return b_q, scale_GN
    return b_q, scale_GN, (-1.0 * scale_GN * zero_GN.to(dtype)).contiguous()


def run(x_MK: torch.Tensor, operands: Operands) -> torch.Tensor:
    (b_q, scale_GN), zeros = operands[:2], operands[2:]
    k, groups = x_MK.shape[1], len(scale_GN)
    y_MN: torch.Tensor = ops().machete_mm(
        a=x_MK,
        b_q=b_q,
        b_type=wtype(32 * b_q.shape[0] // k, bool(zeros)),
        b_group_scales=scale_GN,
        b_group_zeros=zeros[0] if zeros else None,
        b_group_size=WHOLE if groups == 1 else k // groups,
    )
    return y_MN


KERNEL = Kernel(
    "machete",
    "machete",
    ("cuda",),
    unavailable,
    reject,
    prepare,
    run,
    reads=("ct-pack", "gptq", "awq"),
    package="vllm",
    row=ROW,
    symbol="machete",
)
