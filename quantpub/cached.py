"""Attention with an FP8 KV cache, in a transformers model: keys and values rounded as an engine's cache holds them.

transformers looks attention functions up by name. Here one of our own stands in front of the model's: it rounds the keys,
normalized and rotated by then, and the values of every attention that has scales, and hands them on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from quantpub.activations import fp8_cached

NAME = "quantpub_fp8_cache"
Scales = Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # attention → k_scale, v_scale


class RoundedCache:
    """reached: the attentions that were computed so far with rounded keys and values."""

    def __init__(self, model: Any, scales: Scales) -> None:
        self.scales = scales
        self.reached: set[str] = set()
        self._names = {id(module): name for name, module in model.named_modules() if name in scales}
        self._config, self._before = model.config, str(model.config._attn_implementation)

    def __enter__(self) -> None:
        _register(self._attend, self._before)
        self._config._attn_implementation = NAME

    def __exit__(self, *_: object) -> None:
        self._config._attn_implementation = self._before

    def _attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if name := self._names.get(id(module)):
            k_scale, v_scale = self.scales[name]
            key, value = fp8_cached(key, k_scale), fp8_cached(value, v_scale)
            self.reached.add(name)
        return _attention(self._before, module)(module, query, key, value, *args, **kwargs)


def _attention(name: str, module: Any) -> Callable[..., Any]:
    """The function called `name`; `eager` is each architecture's own."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    return found


def _register(attend: Callable[..., Any], like: str) -> None:
    """Under `NAME`, with the masks of the function that it stands in front of."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[like])
