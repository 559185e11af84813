"""Experts under calibration: how many tokens the router sent to each, and a floor for those that got few.

transformers runs a layer's experts as one module: forward(x_MK, top_k_index [M, k], top_k_weights [M, k]). What enters it
is watched; once all batches went through, an expert that saw fewer than ENOUGH tokens is given rows of that input by
name, so that every expert's statistics, those of its down_proj too, rest on ENOUGH tokens of the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantpub.errors import InputError
from quantpub.observe.watch import Gathered, Watch, spread

ENOUGH = 128  # tokens that every expert is shown, by the router or by name
LEAST = 16  # a layer that saw fewer tokens in all has no statistics worth the name


@dataclass(frozen=True, eq=False)
class Experts:
    """module: transformers' own. name: of the experts in the checkpoint. firsts: of every expert the linear that reads x."""

    module: torch.nn.Module
    name: str
    firsts: Sequence[str]


class Router:
    """Watches what enters the experts of one layer."""

    def __init__(self, experts: Experts, watch: Watch) -> None:
        self.experts, self._watch = experts, watch
        self._hook = experts.module.register_forward_pre_hook(self._see, with_kwargs=True)
        self.routed: list[int] = []

    def _see(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        self._watch.see([self.experts.name], x)

    def finish(self) -> None:
        """After all batches: counts, and the floor. Call it within the watch."""
        self._hook.remove()
        whole = self._watch.gathered.get(self.experts.name)
        counts = [_tokens(self._watch, first) for first in self.experts.firsts]
        self.routed = counts
        if whole is None or whole.tokens < LEAST:
            seen = 0 if whole is None else whole.tokens
            what = f"the experts saw {seen} tokens in all, fewer than {LEAST}"
            raise InputError(what, where=self.experts.name, next="calibrate with more samples")
        rows_RK = whole.sample()
        for expert, count in enumerate(counts):
            if count < ENOUGH:
                self._send(rows_RK[spread(len(rows_RK), ENOUGH - count, 0)], expert)

    def _send(self, x_MK: torch.Tensor, expert: int) -> None:
        index_M1 = torch.full((len(x_MK), 1), expert, device=x_MK.device)
        self.experts.module(x_MK, index_M1, torch.ones(len(x_MK), 1, dtype=x_MK.dtype, device=x_MK.device))


def _tokens(watch: Watch, module: str) -> int:
    found: Gathered | None = watch.gathered.get(watch.inputs.get(module, module))
    return 0 if found is None else found.tokens
