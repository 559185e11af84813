"""NVFP4: E2M1 codes in groups of 16, an E4M3 scale a group, a power-of-two float32 scale a tensor.

Legend: R rows of a block, G groups of a row, g = 16 columns of a group. x = w / global_scale, a = |x|.

    w ≈ e2m1(code) * scale * global_scale

Plain rule (as in TensorRT Model Optimizer): scale = E4M3(amax / 6), so that the largest magnitude lands on 6. The search
takes, group by group, the E4M3 scale of least squared error. E2M1 has nothing between 4 and 6, so a third of the groups
are better off with their largest magnitude at 4 or just above 3: the window of candidates reaches from 0.8 to 1.7 of the
plain scale. E4M3 bytes are ordered as their values are, so a candidate is a byte plus an offset.

Where activations are FP4 too, engines scale their groups at run time, E4M3(amax / 6) under a calibrated global scale: the
least power of two under which the largest group that calibration saw still fits.

The global scale is the least power of two under which the largest scale wanted, amax / 4, still fits E4M3. Scales are
normal E4M3 numbers, 2^-6 or more: kernels without FP4 arithmetic repack them to an unsigned E5M3 and lose or overflow
what is negative, zero or subnormal (vLLM's Marlin). A group of zeros, or one 2^-15 below the largest weight, gets 2^-6.
Source: NVIDIA, "Pretraining Large Language Models with NVFP4", arXiv:2509.25149, section 3 and appendix B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from quantpub import e2m1
from quantpub.algorithms.base import Algorithm, by_row_blocks
from quantpub.qtensor import QTensor
from quantpub.scheme import Scheme
from quantpub.stats import Stats

SMALLEST_BYTE, SMALLEST = 0x08, 2.0**-6  # the smallest normal E4M3 number
LARGEST_BYTE, LARGEST = 0x7E, 448.0
OFFSETS = (0, -2, -1, 1, 2, 3, 4, 5, 6)  # bytes from the plain scale; the plain one wins ties


@dataclass(frozen=True)
class Params:
    """search: the scale of least squared error, weighted by activation moments where known; else the plain rule."""

    search: bool = True


def reject(scheme: Scheme) -> str | None:
    weight = scheme.weight
    if weight.num != "fp4_e2m1" or weight.scale_dtype != "fp8_e4m3" or not weight.global_scale:
        return f"nvfp4 makes FP4 codes with FP8 scales and a global scale, not {scheme.name}"
    if weight.block[0] != 1 or weight.block[1] < 1:
        return f"nvfp4 scales groups of a row, not blocks of {weight.block}"
    return None


def global_scale(amax: float) -> float:
    """Of weights: the least power of two s with amax / (4 s) <= 448; its reciprocal is a normal float32."""
    return _power_of_two(amax / 4 / LARGEST)


def input_scale(amax: float) -> float:
    """Of activations: the least power of two s with amax / (6 s) <= 448; its reciprocal is a normal float32."""
    return _power_of_two(amax / e2m1.MAX / LARGEST)


def _power_of_two(least: float) -> float:
    """The least one from `least` on, 2^-126 or more; of nothing but zeros 1."""
    if least == 0:
        return 1.0
    mantissa, exponent = math.frexp(least)
    return math.ldexp(1.0, max(exponent - (mantissa == 0.5), -126))


def _plain(a_RGg: torch.Tensor) -> torch.Tensor:
    """Bytes of the scale that maps the largest magnitude of a group to 6."""
    scale_RG = (a_RGg.amax(-1) / e2m1.MAX).clamp_(SMALLEST, LARGEST)
    return scale_RG.to(torch.float8_e4m3fn).view(torch.uint8)


def _value(byte_RG: torch.Tensor) -> torch.Tensor:
    return byte_RG.view(torch.float8_e4m3fn).float()


def _error(a_RGg: torch.Tensor, scale_RG: torch.Tensor, importance_Gg: torch.Tensor | None) -> torch.Tensor:
    scaled_RGg = a_RGg / scale_RG[..., None]
    off_RGg = e2m1.round_magnitude(scaled_RGg).sub_(scaled_RGg).square_()
    if importance_Gg is not None:
        off_RGg = off_RGg.mul_(importance_Gg)
    return off_RGg.sum(-1).mul_(scale_RG.square())


def _search(a_RGg: torch.Tensor, plain_RG: torch.Tensor, importance_Gg: torch.Tensor | None) -> torch.Tensor:
    """Bytes of the scale of least error near the plain one."""
    best_RG, least_RG = plain_RG, torch.full(plain_RG.shape, torch.inf, device=plain_RG.device)
    for offset in OFFSETS:
        byte_RG = (plain_RG.short() + offset).clamp_(SMALLEST_BYTE, LARGEST_BYTE).to(torch.uint8)
        error_RG = _error(a_RGg, _value(byte_RG), importance_Gg)
        best_RG = torch.where(error_RG < least_RG, byte_RG, best_RG)
        least_RG = torch.minimum(error_RG, least_RG)
    return best_RG


def quantize(w_NK: torch.Tensor, stats: Stats | None, scheme: Scheme, params: Params) -> QTensor:
    """w_NK: float [N, K], K a multiple of the group size. Codes uint8 [N, K], scale float8_e4m3fn [N, G] above zero."""
    shared = None if stats is None else stats.group_amax
    low, high = (float(end) for end in torch.aminmax(w_NK))
    scale = global_scale(max(-low, high) if shared is None else shared)
    moment_K = None if stats is None else stats.second_moment_K
    importance_Gg = None if moment_K is None else _importance(moment_K.to(w_NK.device), scheme.group_size)

    def rows(w_RK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_RGg = w_RK.float().mul(1 / scale).view(len(w_RK), -1, scheme.group_size)
        a_RGg = x_RGg.abs()
        byte_RG = _plain(a_RGg)
        if params.search:
            byte_RG = _search(a_RGg, byte_RG, importance_Gg)
        codes_RGg = e2m1.codes(x_RGg / _value(byte_RG)[..., None])
        return codes_RGg.view(w_RK.shape), byte_RG.view(torch.float8_e4m3fn)

    def stored(value: float) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.float32, device=w_NK.device)

    q = replace(by_row_blocks(rows, w_NK, scheme), global_scale=stored(scale))
    if scheme.act is None:
        return q
    assert stats is not None and stats.input_amax is not None, f"no input was observed, and {scheme.name} scales it"
    return replace(q, input_scale=stored(input_scale(stats.input_amax)))


def _importance(moment_K: torch.Tensor, group: int) -> torch.Tensor:
    """Moments as groups, float32 [G, g]; all columns alike in a group that no activation reached."""
    moment_Gg = moment_K.float().view(-1, group)
    return torch.where(moment_Gg.sum(-1, keepdim=True) > 0, moment_Gg, 1.0)


ALGORITHM = Algorithm("nvfp4", Params, reject, quantize, uses_moments=True)
