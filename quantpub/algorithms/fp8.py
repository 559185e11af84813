"""FP8 E4M3: scale = amax / 448 of a row, a block or the whole tensor, codes = cast(w / scale), saturating.

Legend: P bands of rows, B blocks of a band, b columns of a block.

A row's scale is stored in the weight's own dtype and rounded to it first. A bf16 scale may round down by 0.2 %, so that
the largest value of the row saturates at 448: far below the 6 % step of the format there. The scale of a block or of a
tensor is a float32; blocks at the edge may be a part of one. A tensor that engines merge with others takes the largest
magnitude of them all, so that the merged weight has one scale.

E4M3 repeats itself every octave, so a scale is as good as amax / 448 says only by chance: `row_search` tries eight over
one octave for each row. It takes 10 % of the squared error off rows of 512 columns, 4 % off 4096, 2 % off 14336. A block
or a tensor averages over too many weights to gain from it.

Activations with a calibrated scale take the same: the largest magnitude that calibration saw, / 448, in float32.
Source: the OCP 8-bit floating point specification, E4M3 (no infinity, largest finite value 448).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from quantpub.algorithms.base import BLOCK_ELEMENTS, Algorithm, by_row_blocks, join, nonzero
from quantpub.qtensor import QTensor
from quantpub.scheme import WHOLE, Scheme
from quantpub.stats import Stats

HIGH = 448.0
OCTAVE = tuple(2 ** (i / 8) for i in range(1, 9))


@dataclass(frozen=True)
class Params:
    """row_search: scales of rows by least squared error; blocks and whole tensors keep amax / 448."""

    row_search: bool = False


def reject(scheme: Scheme) -> str | None:
    weight = scheme.weight
    if weight.num != "fp8_e4m3":
        return f"fp8 makes FP8 codes, not {weight.num}"
    rows = weight.block == (1, WHOLE) and weight.scale_dtype == "model"
    whole = weight.block == (WHOLE, WHOLE)
    if rows or ((whole or min(weight.block) > 1) and weight.scale_dtype == "float32"):
        return None
    return f"fp8 scales rows in the weight's dtype, blocks and tensors in float32, not {weight.block} in {weight.scale_dtype}"


def quantize(w_NK: torch.Tensor, stats: Stats | None, scheme: Scheme, params: Params) -> QTensor:
    """w_NK: float [N, K]. Codes float8_e4m3fn [N, K]; scale [N, 1] in w's dtype, or float32 [ceil(N/bn), ceil(K/bk)]."""
    if scheme.weight.block == (1, WHOLE):
        q = _by_rows(w_NK, scheme, params.row_search)
    else:
        q = _by_bands(w_NK, None if stats is None else stats.group_amax, scheme)
    if scheme.act is None or scheme.act.dynamic:
        return q
    assert stats is not None and stats.input_amax is not None, f"no input was observed, and {scheme.name} scales it"
    return replace(q, input_scale=amax_scale(stats.input_amax).to(w_NK.device))


def amax_scale(amax: float) -> torch.Tensor:
    """The scale that maps `amax` to 448: a float32 scalar, normal and so with a finite reciprocal; of zeros alone 1."""
    scale = amax / HIGH if amax else 1.0
    return torch.tensor(scale, dtype=torch.float32).clamp_(min=torch.finfo(torch.float32).tiny)


def _cast(w: torch.Tensor, scale: torch.Tensor, high: float) -> torch.Tensor:
    return (w / scale).clamp_(-high, high).to(torch.float8_e4m3fn)


def _by_rows(w_NK: torch.Tensor, scheme: Scheme, search: bool) -> QTensor:
    high = scheme.weight.number.high

    def rows(w_RK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        w = w_RK.float()
        scale_R1 = nonzero((w.abs().amax(-1, keepdim=True) / high).to(w_RK.dtype))
        if search:
            scale_R1 = _search(w, scale_R1, high)
        return _cast(w, scale_R1.float(), high), scale_R1

    return by_row_blocks(rows, w_NK, scheme)


def _search(w_RK: torch.Tensor, plain_R1: torch.Tensor, high: float) -> torch.Tensor:
    """The scale of least squared error of `plain_R1` and its multiples, in its dtype."""
    best_R1, least_R1 = plain_R1, _error(w_RK, plain_R1.float(), high)
    for factor in OCTAVE:
        scale_R1 = (plain_R1.float() * factor).to(plain_R1.dtype)
        error_R1 = _error(w_RK, scale_R1.float(), high)
        best_R1 = torch.where(error_R1 < least_R1, scale_R1, best_R1)
        least_R1 = torch.minimum(error_R1, least_R1)
    return best_R1


def _error(w_RK: torch.Tensor, scale_R1: torch.Tensor, high: float) -> torch.Tensor:
    return _cast(w_RK, scale_R1, high).float().mul_(scale_R1).sub_(w_RK).square_().sum(-1, keepdim=True)


def _by_bands(w_NK: torch.Tensor, group_amax: float | None, scheme: Scheme) -> QTensor:
    """Bands as high as a block, or, under one scale for all, as fit the cache."""
    (bn, bk), k, high = scheme.weight.block, w_NK.shape[1], scheme.weight.number.high
    whole, width = bn == WHOLE, k if bk == WHOLE else bk
    bands = w_NK.split(max(1, BLOCK_ELEMENTS // k) if whole else bn)
    if whole and group_amax is not None:
        amax_PB = torch.full((1, 1), group_amax, dtype=torch.float32, device=w_NK.device)
    else:
        amax_PB = torch.stack([_amax(band, width) for band in bands])
    if whole:
        amax_PB = amax_PB.amax(0, keepdim=True)
    scale_PB = nonzero(amax_PB / high)
    spread_PK = scale_PB.repeat_interleave(width, 1)[:, :k].expand(len(bands), k)
    codes = [_cast(band.float(), scale_K, high) for band, scale_K in zip(bands, spread_PK, strict=True)]
    return QTensor(scheme, join(codes), scale_PB)


def _amax(w_RK: torch.Tensor, width: int) -> torch.Tensor:
    """Largest magnitude in every `width` columns of a band of rows: float32 [B]."""
    amax_K = w_RK.abs().amax(0).float()
    return torch.nn.functional.pad(amax_K, (0, -len(amax_K) % width)).view(-1, width).amax(-1)


ALGORITHM = Algorithm("fp8", Params, reject, quantize)
