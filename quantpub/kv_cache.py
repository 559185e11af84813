"""The FP8 KV cache of a checkpoint: which tensors hold its scales, what a scale is, and which models cannot have it.

    key ≈ E4M3(key / k_scale) * k_scale      of all heads and positions of an attention, after norm and rotation; values alike

An engine writes its cache under these scales and multiplies by them on reading. A scale that is missing counts as 1.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from quantpub.families import LINEAR, Family
from quantpub.layouts.base import KvCache, Layout, Spec

if TYPE_CHECKING:
    import torch

LETTERS = {"k_proj": "k", "v_proj": "v", "qkv_proj": "kv"}  # a projection → what it makes of k and v
ATTENTION = re.compile(r"model\.layers\.(\d+)\.self_attn")
# family → why its models have none
WITHOUT = {
    "deepseek": "its attention caches one compressed latent for all heads (MLA), and checkpoints have no scale for that",
    "qwen-next": "most of its layers keep a state instead of keys and values, and vLLM drops the scales of the others "
    "(vLLM issue 54623)",
}


def kv_scale(amax: float) -> torch.Tensor:
    """The scale of keys or values of which `amax` is the largest magnitude seen: float32 scalar, positive, finite."""
    from quantpub.algorithms.fp8 import amax_scale

    return amax_scale(amax)


def scales(module: str, layout: Layout, layers: int | None) -> Spec:
    """Tensors that come with a projection of an attention: name → (dtype, shape). Empty for every other linear.

    layers: how many the model runs; further ones, heads that draft tokens, are never calibrated.
    """
    attention, _, leaf = module.rpartition(".")
    found = ATTENTION.fullmatch(attention)
    if layout.kv_cache is None or found is None or (layers is not None and int(found[1]) >= layers):
        return {}
    cache: KvCache = layout.kv_cache
    return {cache.name(attention, letter): ("F32", cache.shape) for letter in LETTERS.get(leaf, "")}


def letter_of(name: str) -> str:
    """`k` or `v`: whose scale the tensor of this name is."""
    return name.removesuffix("_scale")[-1]


def refusal(family: Family, layout: Layout, linears: Iterable[tuple[str, str]]) -> str | None:
    """Why a checkpoint of these (module, role) cannot hold the scales of an FP8 KV cache, or None."""
    if layout.kv_cache is None:
        return f"{layout.name} has no place for the scales of an FP8 KV cache"
    if family.name in WITHOUT:
        return f"no FP8 KV cache for {family.name} models: {WITHOUT[family.name]}"
    leaves: dict[str, str] = {}
    for module, role in linears:
        attention, _, leaf = module.rpartition(".")
        if role == LINEAR and ATTENTION.fullmatch(attention):
            leaves[attention] = leaves.get(attention, "") + LETTERS.get(leaf, "")
    odd = next((attention for attention, made in leaves.items() if sorted(made) != ["k", "v"]), None)
    if odd or not leaves:
        return f"{odd or 'the model'} makes no keys and values by linears that are known here"
    return None
