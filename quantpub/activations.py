"""Activations as the serving kernels round them: float32 in, the values that the kernel multiplies out.

Legend: M tokens, K in_features, G groups of a row, g columns of a group.

FP8 per token follows vLLM's dynamic kernel: scale = max(amax / 448, 1 / (448 * 512)), x / scale saturating; FP8 in groups its
kernel for those: scale = max(amax, 1e-10) / 448. FP8 under a calibrated scale follows its static kernel: x * (1 / scale)
saturating (scaled_fp8_quant_kernel); keys and values its cache kernel: x / scale saturating (reshape_and_cache_flash).
INT8 per token: scale = amax / 127, x / scale rounded to even. LLM.int8 keeps the columns that hold an outlier in 16 bits,
and takes each row's scale from what is no outlier (Dettmers et al. 2022, section 3; bitsandbytes' int8_vectorwise_quant).

NVFP4, with s the calibrated global multiplier: scale_G = E4M3(amax / 6 / s) saturating, x / (scale_G * s) rounded to E2M1,
saturating; a group whose scale rounds to zero is zeros (cvt_warp_fp16_to_fp4 of vLLM, FlashInfer and TensorRT-LLM alike, which
multiply by approximate reciprocals where this divides).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from quantpub import e2m1
from quantpub.scheme import ActFormat

Rounding = Callable[[torch.Tensor], torch.Tensor]
FP8_MAX, INT8_MAX = 448.0, 127.0
MIN_SCALE = 1 / (FP8_MAX * 512)
MIN_AMAX = 1e-10


def fp8_per_token(x_MK: torch.Tensor, least: float = MIN_SCALE) -> torch.Tensor:
    """x rounded to FP8 E4M3 with one scale a row (of the last dimension), at least `least`, as float32 values."""
    scale_M1 = (x_MK.abs().amax(-1, keepdim=True).float() / FP8_MAX).clamp_(min=least)
    return (_fp8(x_MK.float() / scale_M1) * scale_M1).to(x_MK.dtype)


def fp8_per_group(x_MK: torch.Tensor, group: int) -> torch.Tensor:
    """x rounded to FP8 E4M3 with a scale for every `group` columns of a row; the last group may be shorter."""
    k = x_MK.shape[-1]
    padded = torch.nn.functional.pad(x_MK, (0, -k % group)).unflatten(-1, (-1, group))
    return fp8_per_token(padded, MIN_AMAX / FP8_MAX).flatten(-2)[..., :k]


def fp8_static(x_MK: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x rounded to FP8 E4M3 under one calibrated scale, a float32 scalar."""
    scale = scale.to(x_MK.device)
    return (_fp8(x_MK.float() * scale.reciprocal()) * scale).to(x_MK.dtype)


def fp8_cached(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Keys or values of any shape as they come out of an FP8 cache with one scale, a float32 scalar."""
    scale = scale.to(x.device)
    return (_fp8(x.float() / scale) * scale).to(x.dtype)


def _fp8(x: torch.Tensor) -> torch.Tensor:
    return x.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()


def nvfp4(x_MK: torch.Tensor, scale: torch.Tensor, group: int) -> torch.Tensor:
    """x rounded to E2M1 with an E4M3 scale for every `group` columns, under one calibrated scale, a float32 scalar."""
    divisor = scale.to(x_MK.device).reciprocal()
    x_MGg = x_MK.float().unflatten(-1, (-1, group))
    scale_MG1 = _fp8(divisor * (x_MGg.abs().amax(-1, keepdim=True) / e2m1.MAX))
    scaled_MGg = x_MGg * divisor / torch.where(scale_MG1 == 0, 1.0, scale_MG1)
    rounded_MGg = e2m1.round_magnitude(scaled_MGg.abs()).copysign_(scaled_MGg)
    return (rounded_MGg * (scale_MG1 / divisor)).flatten(-2).to(x_MK.dtype)


def int8_per_token(x_MK: torch.Tensor, outlier: float | None = None) -> torch.Tensor:
    """x rounded to int8 with one scale a row; columns with a magnitude of `outlier` or more anywhere are left alone."""
    size_MK = x_MK.abs()
    large_MK = size_MK >= outlier if outlier is not None else torch.zeros_like(size_MK[..., :1]) > 0
    wide_K = large_MK.flatten(0, -2).any(0)
    amax_M1 = size_MK.masked_fill(large_MK, 0).amax(-1, keepdim=True).float()
    scale_M1 = (amax_M1 / INT8_MAX).clamp_(min=torch.finfo(torch.float32).tiny)
    rounded_MK = (x_MK.float() / scale_M1).round_().clamp_(-INT8_MAX - 1, INT8_MAX) * scale_M1
    return torch.where(wide_K, x_MK, rounded_MK.to(x_MK.dtype))


def rounding_of(act: ActFormat, scale: torch.Tensor | None = None) -> Rounding | None:
    """How activations of this format are rounded, or None where that is not known here.

    scale: the calibrated one, a multiplier; where the format takes one and none is given, None.
    """
    if act.calibrated:
        return None if scale is None else _under(act, scale)
    if (act.num, act.granularity) == ("fp8_e4m3", "token"):
        return fp8_per_token
    if (act.num, act.granularity) == ("fp8_e4m3", "group"):
        return lambda x_MK: fp8_per_group(x_MK, act.group_size)
    if (act.num, act.granularity) == ("int8", "token"):
        return lambda x_MK: int8_per_token(x_MK, act.outlier)
    return None


def known(act: ActFormat) -> bool:
    """Whether rounding to this format is known here."""
    return rounding_of(act, torch.ones(()) if act.calibrated else None) is not None


def _under(act: ActFormat, scale: torch.Tensor) -> Rounding | None:
    if (act.num, act.granularity) == ("fp8_e4m3", "tensor"):
        return lambda x_MK: fp8_static(x_MK, scale)
    if (act.num, act.granularity) == ("fp4_e2m1", "group"):
        return lambda x_MK: nvfp4(x_MK, scale, act.group_size)
    return None
