"""Calibration statistics of one linear, as algorithms and transforms see them. Data-free recipes pass none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Stats:
    """second_moment_K: mean square of each input channel over the calibration tokens, float32 [K]."""

    second_moment_K: torch.Tensor | None = None
