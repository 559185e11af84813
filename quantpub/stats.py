"""What calibration saw of the input of a linear, and what of it algorithms and transforms get. None: not gathered.

Legend: K in_features, R sampled tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Observed:
    """One input over all calibration tokens that reached it.

    tokens: how many. amax_K, second_moment_K: largest magnitude and mean square of each channel, float32 [K].
    sample_RK: some of its rows, evenly spread, in the dtype they were computed in.
    """

    tokens: int
    amax_K: torch.Tensor
    second_moment_K: torch.Tensor
    sample_RK: torch.Tensor


@dataclass(frozen=True, eq=False)
class Stats:
    """second_moment_K: mean square of each input channel over the calibration tokens, float32 [K].

    sample_RK: some rows of the inputs, any float dtype, as they were observed.
    hessian_KK: mean outer product of the inputs with themselves, float32 [K, K]; its diagonal is second_moment_K.
    input_amax: largest magnitude of the inputs that an engine gives one scale (those of q/k/v, of a layer's experts).
    group_amax: largest weight magnitude in the group that an engine fuses with this one (q/k/v, gate/up), itself included.
    """

    second_moment_K: torch.Tensor | None = None
    group_amax: float | None = None
    hessian_KK: torch.Tensor | None = None
    input_amax: float | None = None
    sample_RK: torch.Tensor | None = None
