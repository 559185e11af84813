"""What transforms share: their shape as an object, and rounding as a scheme rounds, to judge a choice by its error.

Legend: R sampled tokens, N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from quantpub.scheme import NUMBERS, WHOLE, ActFormat, Scheme, WeightFormat


@dataclass(frozen=True)
class Transform:
    """name; params: a frozen dataclass type; reject: scheme → reason why it does nothing for it, or None; solve: the function."""

    name: str
    params: type[Any]
    reject: Callable[[Scheme], str | None]
    solve: Callable[..., Any]


def round_input(x_RK: torch.Tensor, act: ActFormat, amax: float) -> torch.Tensor:
    """x as the kernel multiplies it: one scale a row (token), or the calibrated one that maps `amax` to the largest code."""
    high = NUMBERS[act.num].high
    top = x_RK.abs().amax(-1, keepdim=True) if act.granularity == "token" else x_RK.new_tensor(amax)
    return _rounded(x_RK, top / high, act.num)


def round_weight(w_NK: torch.Tensor, weight: WeightFormat, amax: float) -> torch.Tensor:
    """w rounded to nearest, one scale a row, or one for the whole tensor, whose largest magnitude is `amax`."""
    high = NUMBERS[weight.num].high
    top = w_NK.new_tensor(amax) if weight.block[0] == WHOLE else w_NK.abs().amax(-1, keepdim=True)
    return _rounded(w_NK, top / high, weight.num)


def _rounded(values: torch.Tensor, scale: torch.Tensor, num: str) -> torch.Tensor:
    number, scale = NUMBERS[num], scale.clamp(min=torch.finfo(torch.float32).tiny)
    codes = (values / scale).clamp_(number.low, number.high)
    return (codes.round_() if number.kind == "int" else codes.to(torch.float8_e4m3fn).float()).mul_(scale)
