"""Watching a layer compute: statistics of what enters its linears, and of the keys and values of its attention.

Legend: M tokens of a batch, K in_features, R sampled rows.

A weight is recognised by its address, so that experts, which multiply by slices of one parameter, are told apart. Linears
that read the very same tensor (q/k/v, gate/up) share one entry. Sums are kept in float64: their order, which the number
of processes changes, then hardly ever changes the float32 that is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CHUNK = 256  # rows at a time: they stay in the cache while squares are summed
SAMPLE = 128  # rows kept of every input
GOLDEN = 0.6180339887498949
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


class Gathered:
    """What was seen of one input so far. batches: how many there will be, of all processes together."""

    def __init__(self, k: int, batches: int, device: torch.device, hessian: bool) -> None:
        self.tokens = 0
        self.amax_K = torch.zeros(k, device=device)
        self.sum_K = torch.zeros(k, dtype=torch.float64, device=device)
        self.sum_KK = torch.zeros(k, k, device=device) if hessian else None
        self.samples: dict[int, torch.Tensor] = {}
        self._rows = -(-SAMPLE // batches)

    def add(self, x_MK: torch.Tensor, batch: int) -> None:
        m = len(x_MK)
        if not m:
            return
        self.tokens += m
        self.amax_K = torch.maximum(self.amax_K, largest(x_MK))
        for chunk in x_MK.split(CHUNK if x_MK.device.type == "cpu" else m):
            self.sum_K += chunk.float().square().sum(0)
        if self.sum_KK is not None:
            wide = x_MK.float()
            self.sum_KK.addmm_(wide.T, wide)
        self.samples[batch] = x_MK[spread(m, self._rows, batch)].clone()

    def sample(self) -> torch.Tensor:
        """At most SAMPLE rows, evenly out of all batches, [R, K]."""
        rows_RK = torch.cat([self.samples[batch] for batch in sorted(self.samples)])
        return rows_RK[spread(len(rows_RK), SAMPLE, 0)]


def spread(rows: int, count: int, batch: int) -> torch.Tensor:
    """`count` places among `rows`, evenly; where in their stretch they lie differs from batch to batch."""
    if rows <= count:
        return torch.arange(rows)
    shift = (batch * GOLDEN + 0.5) % 1
    return ((torch.arange(count, dtype=torch.float64) + shift) * rows / count).floor().long().clamp_(max=rows - 1)


def largest(x_MK: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each column, float32 [K]: without their sign, bits of floats are ordered as the values are."""
    integer = _BITS[x_MK.dtype]
    bits = x_MK.view(integer) & torch.iinfo(integer).max
    return bits.amax(0).view(x_MK.dtype).float()


class Watch(TorchFunctionMode):
    """Within this context inputs of `weights` are gathered; `batch` is the number of the one that runs.

    weights: (address, elements) → the checkpoint's linears that this weight holds. attention: whose keys and values pass.
    gathered: first linear that read an input → what was seen. inputs: linear → the one that it shares an entry with.
    """

    def __init__(
        self,
        weights: Mapping[tuple[int, int], Sequence[str]],
        attention: str,
        batches: int,
        hessian: bool = False,
    ) -> None:
        super().__init__()
        self.weights, self.attention, self.batches, self.hessian = weights, attention, batches, hessian
        self.gathered: dict[str, Gathered] = {}
        self.inputs: dict[str, str] = {}
        self.kv: dict[str, tuple[float, float]] = {}
        self.batch = 0
        self._last: tuple[str, torch.Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear and len(args) >= 2:
            if names := self.weights.get((args[1].data_ptr(), args[1].numel())):
                self.see(names, args[0])
        elif func is torch.nn.functional.scaled_dot_product_attention:
            key, value = (args[1] if len(args) > 1 else kwargs["key"]), (args[2] if len(args) > 2 else kwargs["value"])
            self._see_kv(key, value)
        return func(*args, **kwargs)

    def see(self, names: Sequence[str], x: torch.Tensor) -> None:
        first = names[0]
        if self._last is not None and self._last[1] is x:
            self.inputs |= dict.fromkeys(names, self._last[0])
            return
        owner = self.inputs.setdefault(first, first)
        self.inputs |= dict.fromkeys(names, owner)
        x_MK = x.detach().reshape(-1, x.shape[-1])
        if owner not in self.gathered:
            self.gathered[owner] = Gathered(x_MK.shape[1], self.batches, x.device, self.hessian)
        self.gathered[owner].add(x_MK, self.batch)
        self._last = (owner, x)

    def _see_kv(self, key: torch.Tensor, value: torch.Tensor) -> None:
        k, v = self.kv.get(self.attention, (0.0, 0.0))
        self.kv[self.attention] = (max(k, _amax(key)), max(v, _amax(value)))


def _amax(x: torch.Tensor) -> float:
    return float(largest(x.detach().reshape(-1, x.shape[-1])).max())
