"""Calibration statistics gathered in the plainest way: the whole model in memory, every linear and every attention watched."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from quantpub.artifact import Artifact
from quantpub.checkpoint import open_checkpoint
from quantpub.plan import make_plan
from quantpub.quantize import quantize
from quantpub.recipe import load_recipe
from quantpub.stats import Observed

TOKENS = torch.randint(1, 500, (4, 64), generator=torch.Generator().manual_seed(7))


class Hooked(TorchFunctionMode):
    """What an observing pass would find of `model` on `tokens_BT`. Experts of Qwen's kind are told apart; those that no
    token reached have an input of zeros."""

    def __init__(self, model: Path, tokens_BT: torch.Tensor = TOKENS) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__()
        self.key, self.record = "hooked", {"key": "hooked", "tokens": tokens_BT.numel()}
        self.inputs: dict[str, list[torch.Tensor]] = {}
        self.cache: dict[str, tuple[float, float]] = {}
        options = {"dtype": torch.float32, "attn_implementation": "eager", "experts_implementation": "eager"}
        net = AutoModelForCausalLM.from_pretrained(model, **options).eval()
        self.modules = dict(places(net))
        with torch.no_grad(), watched_attention(net, self.cache), self:
            net(tokens_BT, use_cache=False)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            for module in self.modules.get(args[1].data_ptr(), ()):
                self.inputs.setdefault(module, []).append(args[0].flatten(0, -2).float())
        return func(*args, **(kwargs or {}))

    def has(self, module: str) -> bool:
        return any(module in modules for modules in self.modules.values())

    def input(self, module: str) -> Observed:
        x_MK = torch.cat(self.inputs.get(module, [torch.zeros(1, 1)]))
        return Observed(len(x_MK), x_MK.abs().amax(0), x_MK.square().mean(0), x_MK[:128])

    def kv(self, attention: str) -> tuple[float, float]:
        return self.cache[attention]


def places(net: Any) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Address of a matrix → the checkpoint's linears that it is."""
    for name, weight in net.named_parameters():
        path, _, leaf = name.removesuffix(".weight").rpartition(".")
        leaves = {"gate_up_proj": ("gate_proj", "up_proj")}.get(leaf, (leaf,))
        if weight.dim() == 2:
            yield weight.data_ptr(), (f"{path}.{leaf}",)
        if weight.dim() == 3:
            for expert, part in enumerate(weight):
                yield part.data_ptr(), tuple(f"{path}.{expert}.{each}" for each in leaves)


@contextmanager
def watched_attention(net: Any, cache: dict[str, tuple[float, float]]) -> Iterator[None]:
    """The largest keys and values that the architecture's own eager attention is given."""
    names, home = {module: name for name, module in net.named_modules()}, sys.modules[type(net).__module__]
    eager = home.eager_attention_forward

    def attention(module: Any, query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> Any:
        cache[names[module]] = (float(key.abs().max()), float(value.abs().max()))
        return eager(module, query, key, value, *rest, **options)

    home.eager_attention_forward = attention
    try:
        yield
    finally:
        home.eager_attention_forward = eager


def make_calibrated(model: Path, recipe: str, out: Path, layout: str, statistics: Any = None) -> Path:
    """The artifact of a recipe that needs calibration."""
    plan = make_plan(open_checkpoint(str(model)), load_recipe(recipe), layout)
    quantize([plan], out, statistics=statistics or Hooked(model))
    return Artifact.open(out).path
