"""The same weights under another scheme: what `pairs.CONVERSIONS` names, done to one tensor, and what it costs.

Legend: N out_features, K in_features, G groups, g columns a group; c codes, s scale, z zero.

The cost is |dequantize(after) − dequantize(before)| / |dequantize(before)|, Frobenius norms. Codes stay as they are, so that a
whole group moves by one number, z·(its factor), and the norm follows from sums of its codes: float32 weights are not made.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from quantpub.cures import whole_zero
from quantpub.pairs import CONVERSIONS, Conversion
from quantpub.qtensor import QTensor
from quantpub.scheme import Scheme, preset


def routes(scheme: Scheme) -> list[tuple[Conversion, Scheme]]:
    """The conversions that begin at a scheme, each with the scheme that it ends at."""
    found = [each for each in CONVERSIONS if each.source == scheme.name]
    return [(each, preset(each.target, scheme.group_size)) for each in found]


def convert(q: QTensor, conversion: Conversion, scheme: Scheme) -> QTensor:
    """Errors: ValueError with a sentence where these weights have no place in the other scheme."""
    if conversion.name == "whole-zero":
        return replace(whole_zero(q), scheme=scheme)
    assert q.zero is not None
    if conversion.name == "no-zero":
        if bool(q.zero.any()):
            raise ValueError(f"{int((q.zero != 0).sum())} of its {q.zero.numel()} zeros are not in the middle")
        return replace(q, scheme=scheme, zero=None)
    assert conversion.name == "float-zero"
    return replace(q, scheme=scheme, zero=(-q.zero.float() * q.scale.float()).to(q.scale.dtype))


def loss(before: QTensor, after: QTensor) -> float:
    """Of two of the same codes and scales: the relative norm of what the other zeros move."""
    s_NG = before.scale.double()
    old_NG, new_NG = offset(before), offset(after)
    moved = (new_NG - old_NG).square().sum() * _columns(before)
    sums_NG, squares_NG = _sums(before)
    whole = (s_NG.square() * squares_NG + 2 * s_NG * old_NG * sums_NG + _columns(before) * old_NG.square()).sum()
    return float((moved / whole.clamp_min(torch.finfo(torch.float64).tiny)).sqrt())


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
