"""Model families: what every tensor of a checkpoint is, by name. One entry a family; data, no torch.

A role decides what may happen to a tensor: `linear` is quantized, everything else is copied. The reasons:
  embedding, head   the head's error goes straight into the logits, and engines hold it in a class of its own
  norm, bias, buffer   small, and one-dimensional
  router            a few kilobytes that choose the experts: an error there changes which weights are read at all
A tensor that no pattern of its family matches is an error, never a silent copy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache

LINEAR, EMBEDDING, HEAD, NORM, BIAS, ROUTER, BUFFER = "linear", "embedding", "head", "norm", "bias", "router", "buffer"

_LAYER = r"model\.layers\.\d+\."
_BASE = (
    (r"model\.embed_tokens\.weight", EMBEDDING),
    (r"lm_head\.weight", HEAD),
    (r"model\.norm\.weight", NORM),
    (_LAYER + r"(input_layernorm|(pre|post)_(attention|feedforward)_layernorm|self_attn\.[qk]_norm)\.weight", NORM),
    (_LAYER + r"self_attn\.rotary_emb\.inv_freq", BUFFER),
)
_SPLIT_ATTENTION = (
    (_LAYER + r"self_attn\.[qkvo]_proj\.weight", LINEAR),
    (_LAYER + r"self_attn\.[qkvo]_proj\.bias", BIAS),
)
_DENSE_MLP = (
    (_LAYER + r"mlp\.(gate|up|down)_proj\.weight", LINEAR),
    (_LAYER + r"mlp\.(gate|up|down)_proj\.bias", BIAS),
)
_QWEN_MOE = (
    (_LAYER + r"mlp\.experts\.\d+\.(gate|up|down)_proj\.weight", LINEAR),
    (_LAYER + r"mlp\.shared_expert\.(gate|up|down)_proj\.weight", LINEAR),
    (_LAYER + r"mlp\.(gate|shared_expert_gate)\.weight", ROUTER),
)
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Family:
    """patterns: (regex of the whole tensor name, role), first match wins. fused: engine module → members it merges.

    packed_experts: suffix of a 3-D expert parameter [E, members*N, K] → the 2-D linears it holds, in row order.
    """

    name: str
    patterns: tuple[tuple[str, str], ...]
    fused: dict[str, tuple[str, ...]] = field(default_factory=lambda: dict(_FUSED))
    packed_experts: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def role(self, tensor: str) -> str | None:
        """The role of a tensor, or None when this family does not know it."""
        return next((role for pattern, role in self.patterns if _compiled(pattern).fullmatch(tensor)), None)

    def expert_members(self, tensor: str) -> tuple[str, ...]:
        """The linears inside a 3-D expert parameter; empty for every other tensor."""
        return self.packed_experts.get(tensor.rpartition(".experts.")[2], ()) if ".experts." in tensor else ()


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


_LLAMA = Family("llama", _BASE + _SPLIT_ATTENTION + _DENSE_MLP)
_MOE = Family(
    "qwen-moe",
    _BASE + _SPLIT_ATTENTION + _QWEN_MOE + _DENSE_MLP,
    packed_experts={"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
)
_MIXTRAL = Family(
    "mixtral",
    (
        *_BASE,
        *_SPLIT_ATTENTION,
        (_LAYER + r"block_sparse_moe\.experts\.\d+\.w[123]\.weight", LINEAR),
        (_LAYER + r"block_sparse_moe\.gate\.weight", ROUTER),
    ),
    fused={"qkv_proj": _FUSED["qkv_proj"], "w13": ("w1", "w3")},
)
_PHI = Family(
    "phi3",
    (
        *_BASE,
        (_LAYER + r"self_attn\.(qkv|o)_proj\.weight", LINEAR),
        (_LAYER + r"mlp\.(gate_up|down)_proj\.weight", LINEAR),
    ),
    fused={},
)

# model_type of config.json → family
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "granite": _LLAMA,
    "olmo2": _LLAMA,
    "smollm3": _LLAMA,
    "phi3": _PHI,
    "qwen2_moe": _MOE,
    "qwen3_moe": _MOE,
    "mixtral": _MIXTRAL,
}
