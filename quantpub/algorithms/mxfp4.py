"""MXFP4: E2M1 codes in groups of 32, a power of two (E8M0) as the scale of each group.

Legend: R rows of a block, G groups of a row, g = 32 columns of a group. a = |w|.

    w ≈ e2m1(code) * 2^(byte − 127)

Plain rule of the specification: 2^(floor(log2 amax) − 2), which maps the largest magnitude into [4, 8) and saturates it
at 6. The search also tries the next exponent, which never saturates but has half the resolution, and takes the one of
least squared error. Smaller exponents than the plain one saturate at three quarters of amax or less, and are not tried.
A group of zeros has scale 1; byte 255 is NaN and never written.
Source: Open Compute Project, Microscaling Formats (MX) Specification v1.0, sections 5.3.3, 5.4.1 and 6.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantpub import e2m1
from quantpub.algorithms.base import Algorithm, by_row_blocks
from quantpub.qtensor import QTensor
from quantpub.scheme import Scheme
from quantpub.stats import Stats

ONE = 127  # byte of the scale 1
E2M1_EXPONENT = 2  # of its largest binade, 4…6


@dataclass(frozen=True)
class Params:
    """search: the exponent of least squared error, weighted by activation moments where known; else the plain rule."""

    search: bool = True


def reject(scheme: Scheme) -> str | None:
    weight = scheme.weight
    if weight.num != "fp4_e2m1" or weight.scale_dtype != "e8m0" or weight.global_scale:
        return f"mxfp4 makes FP4 codes with power-of-two scales, not {scheme.name}"
    if weight.block[0] != 1 or weight.block[1] < 1:
        return f"mxfp4 scales groups of a row, not blocks of {weight.block}"
    return None


def _plain(a_RGg: torch.Tensor) -> torch.Tensor:
    """Bytes of 2^(floor(log2 amax) − 2), as int32; 127 for a group of zeros."""
    amax_RG = a_RGg.amax(-1)
    byte_RG = ((amax_RG.view(torch.int32) >> 23) - E2M1_EXPONENT).clamp_(min=0)
    return torch.where(amax_RG == 0, ONE, byte_RG)


def _stored(byte_RG: torch.Tensor) -> torch.Tensor:
    return byte_RG.to(torch.uint8).view(torch.float8_e8m0fnu)


def _error(a_RGg: torch.Tensor, scale: float, importance_Gg: torch.Tensor | None) -> torch.Tensor:
    off_RGg = e2m1.round_magnitude(a_RGg / scale).mul_(scale).sub_(a_RGg).square_()
    return (off_RGg if importance_Gg is None else off_RGg.mul_(importance_Gg)).sum(-1)


def _search(a_RGg: torch.Tensor, plain_RG: torch.Tensor, importance_Gg: torch.Tensor | None) -> torch.Tensor:
    """The better of the plain byte and the next, in units of the plain scale: squares of tiny weights would vanish."""
    scaled_RGg = a_RGg / _stored(plain_RG).float()[..., None]
    return plain_RG + (_error(scaled_RGg, 2.0, importance_Gg) < _error(scaled_RGg, 1.0, importance_Gg)).int()


def quantize(w_NK: torch.Tensor, stats: Stats | None, scheme: Scheme, params: Params) -> QTensor:
    """w_NK: float [N, K], K a multiple of the group size. Codes uint8 [N, K], scale float8_e8m0fnu [N, G]."""
    moment_K = None if stats is None else stats.second_moment_K
    importance_Gg = None if moment_K is None else moment_K.to(w_NK.device, torch.float32).view(-1, scheme.group_size)

    def rows(w_RK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        w_RGg = w_RK.float().view(len(w_RK), -1, scheme.group_size)
        a_RGg = w_RGg.abs()
        byte_RG = _plain(a_RGg)
        if params.search:
            byte_RG = _search(a_RGg, byte_RG, importance_Gg)
        scale_RG = _stored(byte_RG)
        return e2m1.codes(w_RGg / scale_RG.float()[..., None]).view(w_RK.shape), scale_RG

    return by_row_blocks(rows, w_NK, scheme)


ALGORITHM = Algorithm("mxfp4", Params, reject, quantize, uses_moments=True)
