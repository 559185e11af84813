"""The same weights under another scheme: what `pairs.CONVERSIONS` names, done to one tensor, and what it costs.

Legend: N out_features, K in_features, G groups, g columns a group; c codes, s scale, z zero.

The cost is |dequantize(after) − dequantize(before)| / |dequantize(before)|, Frobenius norms. Codes stay as they are, so that
of a group two numbers move, its scale and its offset (-z·s, or a float zero), and the norm follows from sums of its codes:
float32 weights are not made.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import torch

from quantpub.cures import whole_zero
from quantpub.pairs import CONVERSIONS, Conversion
from quantpub.qtensor import QTensor, same_bits
from quantpub.scheme import Scheme, preset
from quantpub.shards import DTYPES


def routes(scheme: Scheme) -> list[tuple[Conversion, Scheme]]:
    """The conversions that begin at a scheme, each with the scheme that it ends at."""
    found = [each for each in CONVERSIONS if each.source == scheme.name]
    return [(each, preset(each.target, scheme.group_size)) for each in found]


def convert(q: QTensor, conversion: Conversion, scheme: Scheme, dtype: str) -> QTensor:
    """dtype: what scales are rounded to, in safetensors' words, where the conversion rounds them.

    Errors: ValueError with a sentence where these weights have no place in the other scheme.
    """
    scale = _rounded(q, dtype) if conversion.dtype else q.scale
    if conversion.name == "whole-zero":
        return replace(whole_zero(q), scheme=scheme)
    if conversion.name == "no-zero":
        assert q.zero is not None
        if bool(q.zero.any()):
            raise ValueError(f"{int((q.zero != 0).sum())} of its {q.zero.numel()} zeros are not in the middle")
        return replace(q, scheme=scheme, zero=None)
    if conversion.name in ("float-zero", "bf16-zero"):
        return replace(q, scheme=scheme, scale=scale, zero=_float_zero(q, scale))
    if conversion.name == "no-input-scale":
        return replace(q, scheme=scheme, input_scale=None)
    assert conversion.name in ("bf16-scale", "model-scale") and q.zero is None
    return replace(q, scheme=scheme, scale=scale)


def _float_zero(q: QTensor, scale: torch.Tensor) -> torch.Tensor:
    """-z·s in the dtype of s; a zero of 0 is +0."""
    assert q.zero is not None
    return (-q.zero.float() * scale.float() + 0.0).to(scale.dtype)


def _rounded(q: QTensor, dtype: str) -> torch.Tensor:
    """Scales in another float. Errors: ValueError where one is beyond it, or would become 0."""
    scale = q.scale.to(DTYPES[dtype])
    if lost := int((~scale.isfinite() | ((scale == 0) != (q.scale == 0))).sum()):
        raise ValueError(f"{lost} of its {scale.numel()} scales are not numbers of {dtype.lower()}")
    return scale


def loss(before: QTensor, after: QTensor) -> float:
    """Of two of the same codes: the relative norm of what other scales and zeros move."""
    return relative(*cost(before, after))


def relative(change: float, whole: float) -> float:
    """The norm of a change to that of the whole, from their squares."""
    return math.sqrt(max(0.0, change) / max(whole, sys.float_info.min))


def cost(before: QTensor, after: QTensor) -> tuple[float, float]:
    """Of two of the same codes: the square of the norm of what moves, and that of the whole; of blocks of rows they add up."""
    if before.scheme.weight.number.kind != "int":
        assert _alike(before, after), "no conversion moves floats"
        return 0.0, 0.0
    s_NG, old_NG = before.scale.double(), offset(before)
    scaled_NG, moved_NG = after.scale.double() - s_NG, offset(after) - old_NG
    sums_NG, squares_NG = _sums(before)
    change = _square(scaled_NG, moved_NG, sums_NG, squares_NG, _columns(before))
    whole = _square(s_NG, old_NG, sums_NG, squares_NG, _columns(before))
    return float(change), float(whole)


def _alike(a: QTensor, b: QTensor) -> bool:
    fields = ("scale", "zero", "global_scale")
    return all(same_bits(getattr(a, name), getattr(b, name)) for name in fields)


def _square(
    factor_NG: torch.Tensor, offset_NG: torch.Tensor, sums_NG: torch.Tensor, squares_NG: torch.Tensor, columns: int
) -> torch.Tensor:
    """Σ (c·factor + offset)² over all weights, from the sums of a group's codes and of their squares."""
    return (factor_NG.square() * squares_NG + 2 * factor_NG * offset_NG * sums_NG + columns * offset_NG.square()).sum()


def offset(q: QTensor) -> torch.Tensor:
    """What every weight of a group has beside codes·scale, float64 [N, G]."""
    if q.zero is None:
        return torch.zeros_like(q.scale, dtype=torch.float64)
    return q.zero.double() if q.scheme.weight.zero_domain == "float" else -q.zero.double() * q.scale.double()


def _columns(q: QTensor) -> int:
    return q.shape[1] // q.scale.shape[1]


def _sums(q: QTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the codes of every group: their sum and the sum of their squares, float64 [N, G]."""
    n, groups = q.scale.shape
    codes = q.codes_NK.view(n, groups, -1)
    sums = codes.sum(-1, dtype=torch.int32)
    squares = (
        (codes.to(torch.int16) ** 2).sum(-1, dtype=torch.int32)
        if q.scheme.weight.num == "int8"
        else (codes * codes).sum(-1, dtype=torch.int32)
    )
    return sums.double(), squares.double()
