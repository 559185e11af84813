"""What every algorithm shares: its shape as an object, and walking a weight in blocks that stay in the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from quantpub.qtensor import QTensor
from quantpub.scheme import Scheme
from quantpub.stats import Stats

# 512 Ki float32 elements are 2 MiB: several passes over one block run out of cache instead of memory.
# Measured on two cores, rounding to nearest: 2.1 ns an element on whole tensors, 0.4 in such blocks.
BLOCK_ELEMENTS = 1 << 19


@dataclass(frozen=True)
class Algorithm:
    """name; params: a frozen dataclass type; reject: scheme → reason it cannot, or None; quantize: the function."""

    name: str
    params: type[Any]
    reject: Callable[[Scheme], str | None]
    quantize: Callable[[torch.Tensor, Stats | None, Scheme, Any], QTensor]


Rows = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def by_row_blocks(rows: Rows, w_NK: torch.Tensor, scheme: Scheme) -> QTensor:
    """Apply `rows`: w_RK → (codes_RK, scale_RG) to blocks of rows, and join. For blocks of one row (bn == 1) only."""
    assert scheme.weight.block[0] == 1, scheme
    n, k = w_NK.shape
    step = max(1, BLOCK_ELEMENTS // k) if w_NK.device.type == "cpu" else n
    parts = [rows(block) for block in w_NK.split(step)]
    codes, scales = (torch.cat(column) if len(parts) > 1 else column[0] for column in zip(*parts, strict=True))
    return QTensor(scheme, codes, scales)


def nonzero(scale: torch.Tensor) -> torch.Tensor:
    """A group of zeros has no scale of its own: give it 1, so that dividing by it is defined and codes are 0."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)
