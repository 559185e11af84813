"""Activations as the serving kernels round them: float32 in, the values that the kernel multiplies out.

Legend: M tokens, K in_features, G groups of a row, g columns of a group.

FP8 per token follows vLLM's dynamic kernel: scale = max(amax / 448, 1 / (448 * 512)), x / scale saturating; FP8 in groups its
kernel for those: scale = max(amax, 1e-10) / 448. INT8 per token: scale = amax / 127, x / scale rounded to even. LLM.int8
keeps the columns that hold an outlier in 16 bits, and takes each row's scale from what is no outlier (Dettmers et al.
2022, section 3; bitsandbytes' int8_vectorwise_quant).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from quantpub.scheme import ActFormat

Rounding = Callable[[torch.Tensor], torch.Tensor]
FP8_MAX, INT8_MAX = 448.0, 127.0
MIN_SCALE = 1 / (FP8_MAX * 512)
MIN_AMAX = 1e-10


def fp8_per_token(x_MK: torch.Tensor, least: float = MIN_SCALE) -> torch.Tensor:
    """x rounded to FP8 E4M3 with one scale a row (of the last dimension), at least `least`, as float32 values."""
    scale_M1 = (x_MK.abs().amax(-1, keepdim=True).float() / FP8_MAX).clamp_(min=least)
    codes_MK = (x_MK.float() / scale_M1).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return (codes_MK.float() * scale_M1).to(x_MK.dtype)


def fp8_per_group(x_MK: torch.Tensor, group: int) -> torch.Tensor:
    """x rounded to FP8 E4M3 with a scale for every `group` columns of a row; the last group may be shorter."""
    k = x_MK.shape[-1]
    padded = torch.nn.functional.pad(x_MK, (0, -k % group)).unflatten(-1, (-1, group))
    return fp8_per_token(padded, MIN_AMAX / FP8_MAX).flatten(-2)[..., :k]


def int8_per_token(x_MK: torch.Tensor, outlier: float | None = None) -> torch.Tensor:
    """x rounded to int8 with one scale a row; columns with a magnitude of `outlier` or more anywhere are left alone."""
    size_MK = x_MK.abs()
    large_MK = size_MK >= outlier if outlier is not None else torch.zeros_like(size_MK[..., :1]) > 0
    wide_K = large_MK.flatten(0, -2).any(0)
    amax_M1 = size_MK.masked_fill(large_MK, 0).amax(-1, keepdim=True).float()
    scale_M1 = (amax_M1 / INT8_MAX).clamp_(min=torch.finfo(torch.float32).tiny)
    rounded_MK = (x_MK.float() / scale_M1).round_().clamp_(-INT8_MAX - 1, INT8_MAX) * scale_M1
    return torch.where(wide_K, x_MK, rounded_MK.to(x_MK.dtype))


def rounding_of(act: ActFormat) -> Rounding | None:
    """How activations of this format are rounded, or None where it takes a calibrated scale."""
    if not act.dynamic or act.global_scale:
        return None
    if (act.num, act.granularity) == ("fp8_e4m3", "token"):
        return fp8_per_token
    if (act.num, act.granularity) == ("fp8_e4m3", "group"):
        return lambda x_MK: fp8_per_group(x_MK, act.group_size)
    if (act.num, act.granularity) == ("int8", "token"):
        return lambda x_MK: int8_per_token(x_MK, act.outlier)
    return None
