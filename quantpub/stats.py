"""Calibration statistics of one linear, as algorithms and transforms see them. What is None was not gathered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Stats:
    """second_moment_K: mean square of each input channel over the calibration tokens, float32 [K].

    group_amax: largest weight magnitude in the group that an engine fuses with this one (q/k/v, gate/up), itself included.
    """

    second_moment_K: torch.Tensor | None = None
    group_amax: float | None = None
