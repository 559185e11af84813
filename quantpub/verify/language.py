"""The language model within a checkpoint: by which names it is known, of which family it is, and the norms that it must have.

Models of text and images hold it under a name of its own, `language_model.model.layers…` or `model.language_model.layers…`, and
its config in `text_config`. Norms are small, nothing quantizes them, and a loader that misses one fills it with ones at best.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from quantpub.adopt import ALIASES
from quantpub.families import FAMILIES, GENERIC, Family

_WITHIN = re.compile(
    r"(?:model\.)?(?:language_model|text_model|llm|thinker)\.(?:model\.)?(?=layers\.\d|embed_tokens\.|norm\.|lm_head\.)"
)
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
# model_type of a language model that is a part of others → the same by itself
TEXTS = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
    "glm4v_moe_text": "glm4_moe",
}
_TWO = ("input_layernorm", "post_attention_layernorm")
_AROUND = (*_TWO, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_AFTER = _AROUND[1::2]
# model_type → norms of every layer, where they are not the two of most
NORMS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("olmo2", "olmo3", "exaone4", "flex_olmo"), _AFTER),
    **dict.fromkeys(("gemma2", "gemma3_text"), _AROUND),
    **dict.fromkeys(("cohere", "cohere2"), _TWO[:1]),
    "glm4": (*_TWO, "post_self_attn_layernorm", "post_mlp_layernorm"),
    "olmo": (),
}
# Architectures that norm queries and keys whatever the config says
QK = {
    *("qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "gemma3_text", "olmo2", "olmo3", "olmoe"),
    *("flex_olmo", "exaone4", "exaone_moe", "dots1"),
}
# A norm → the linear that it stands beside in every architecture that has it
BESIDE = {
    "self_attn.kv_a_layernorm": "self_attn.kv_a_proj_with_mqa",
    "self_attn.q_a_layernorm": "self_attn.q_a_proj",
    "linear_attn.norm": "linear_attn.out_proj",
}


def language(name: str) -> str:
    """The name of a tensor as the language model has it by itself; every other name as it is."""
    found = _WITHIN.match(name)
    if found is None:
        return name
    rest = name[found.end() :]
    return rest if rest.startswith("lm_head.") else f"model.{rest}"


def model_type_of(config: Mapping[str, Any]) -> str:
    """Of a language model, by what its config calls it: as it is called by itself."""
    name = str(config.get("model_type"))
    name = TEXTS.get(name, name)
    return ALIASES.get(name, name)


def family_of_text(config: Mapping[str, Any]) -> Family:
    return FAMILIES.get(model_type_of(config), GENERIC)


def lost_norms(layers: Mapping[int, frozenset[str]], names: Mapping[str, object], model_type: str) -> list[str]:
    """Norms that a known architecture has, and that are not there. layers: the names of each one's tensors."""
    lost = [f"layer {i} lacks {norm}" for i, parts in sorted(layers.items()) for norm in _lost(parts, model_type)]
    final = "model.norm.weight"
    return lost + ([f"{final} is missing"] if final not in names and model_type != "olmo" else [])


def _lost(parts: frozenset[str], model_type: str) -> Iterator[str]:
    due = [f"{norm}.weight" for norm in NORMS.get(model_type, _TWO)]
    due += [f"{norm}.weight" for norm, linear in BESIDE.items() if f"{linear}.weight" in parts]
    if model_type in QK and "self_attn.q_proj.weight" in parts:
        due += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    yield from (norm for norm in due if norm not in parts)
