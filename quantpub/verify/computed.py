"""What of a model's config decides what is computed, in one meaning however it is spelled, and where two configs differ in it.

A checkpoint of the right weights that is computed with another base of its rotations, another number of experts a token or
without its window answers worse, and nothing fails. Releases of transformers spell the same thing differently: `rope_theta`
and `rope_scaling` at the top, or both within `rope_parameters`, for each kind of layer where they differ; what describes the
language model at the top or in `text_config`. What one side does not state has its class's default and is not judged, but
where that is known: rotations are not scaled, and their base is that of `THETA`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from quantpub.verify.whole import TIED

Config = Mapping[str, Any]

# Stated by both, they must be equal; null is as good as nothing
KEYS = (
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "layer_types"),
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "norm_type"),
    *("hidden_act", "hidden_activation", "attention_bias", "mlp_bias", "qkv_bias", "use_bias", "bias"),
    *("use_qk_norm", "query_pre_attn_scalar", "attention_multiplier", "residual_multiplier"),
    *("embedding_multiplier", "logits_scaling", "logit_scale", "scale_emb", "scale_depth"),
    *("attn_output_gate", "full_attention_interval", "no_rope_layers", "attention_chunk_size", "clip_qkv"),
    *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_interleave"),
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "n_shared_experts"),
    *("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "norm_topk_prob", "scoring_func"),
    *("topk_method", "n_group", "topk_group", "routed_scaling_factor", "moe_routed_scaling_factor"),
    *("first_k_dense_replace", "moe_layer_freq", "decoder_sparse_step", "mlp_only_layers", "moe_layer_start_index"),
)
# Null says that there is none: stated by both, it must be so in both
OFF = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "q_lora_rank")
SAME = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}
# An older name; and what says of what positions are made, not how they are scaled
SCALED = {"su": "longrope", "mrope": "default"}
# model_type → the base of rotations where nothing states one, as transformers has it; they are not scaled then
THETA: dict[str, float] = {
    **dict.fromkeys(("llama", "mistral", "ministral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe"), 1e4),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "gemma", "gemma2", "granite"), 1e4),
    **dict.fromkeys(("olmo", "olmo2", "olmoe", "arcee", "cohere2", "exaone4", "exaone_moe", "seed_oss"), 1e4),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "starcoder2", "phi3", "glm", "glm4", "glm4_moe"), 1e4),
    **dict.fromkeys(("dots1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite"), 1e4),
    **dict.fromkeys(("cohere", "ernie4_5", "ernie4_5_moe", "flex_olmo"), 5e5),
    **dict.fromkeys(("mixtral", "phimoe"), 1e6),
    **{"smollm3": 2e6, "minimax_m2": 5e6},
}
TIE = "tie_word_embeddings"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def differences(found: Config, source: Config) -> list[str]:
    """One sentence for each setting of a checkpoint's config.json that is not its source's."""
    ours, theirs = settings(found), settings(source)
    return [
        f"{key} is {_short(ours[key])}, the source's {_short(theirs[key])}"
        for key in ours
        if key in theirs and not _equal(ours[key], theirs[key])
    ]


def settings(config: Config) -> dict[str, Any]:
    """What is computed, as far as the config says: setting → value, in one spelling."""
    flat = _flat(config)
    found = {key: flat[key] for key in KEYS if flat.get(key) is not None}
    found |= {key: flat[key] for key in OFF if key in flat}
    if flat.get("use_sliding_window") is False:
        found["sliding_window"] = None
    if "kv_lora_rank" in found:  # transformers derives it, and states it or not
        found.pop("head_dim", None)
    for key in ("hidden_act", "hidden_activation"):
        if isinstance(found.get(key), str):
            found[key] = SAME.get(found[key].lower(), found[key].lower())
    if str(flat.get("model_type")).startswith("gemma"):  # transformers passes it over
        found.pop("hidden_act", None)
    rope = {key if key.startswith("rope") else f"rope {key}": value for key, value in _rope(flat).items()}
    return _names(config) | _tied(config) | found | rope


def stray_ids(config: Config, source: Config | None) -> list[str]:
    """Tokens that end, begin and fill, and that the vocabulary does not have. A source's own are no fault of its copy."""
    flat, base = _flat(config), _flat(source or {})
    size = flat.get("vocab_size")
    return [
        f"{key} is {value}, and vocab_size is {size}"
        for key in IDS
        for value in _whole(flat.get(key))
        if isinstance(size, int) and value >= size and (base.get(key), base.get("vocab_size")) != (flat.get(key), size)
    ]


def _flat(config: Config) -> dict[str, Any]:
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, Mapping) else dict(config)


def _names(config: Config) -> dict[str, Any]:
    """Of the whole model: what it is, and the classes that hold it."""
    classes = config.get("architectures")
    found = {"architectures": [str(name).lower() for name in classes]} if isinstance(classes, list) and classes else {}
    return found | ({"model_type": config["model_type"]} if config.get("model_type") else {})


def _tied(config: Config) -> dict[str, Any]:
    """Of a model within another only where its config and the whole one do not contradict each other: releases differ."""
    inner = config.get("text_config")
    if not isinstance(inner, Mapping):
        return {TIE: bool(config.get(TIE, config.get("model_type") in TIED))}
    said = {bool(each[TIE]) for each in (config, inner) if TIE in each}
    return {TIE: said.pop()} if len(said) == 1 else {}


def _rope(flat: Config) -> dict[str, Any]:
    """How positions are rotated: the keys of `rope_parameters`; of kinds of layers but full attention after a dot."""
    found: dict[str, Any] = {}
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if flat.get(key) is not None:
            found[key] = flat[key]
    if flat.get("rope_local_base_freq") is not None:
        found["sliding_attention.rope_theta"] = flat["rope_local_base_freq"]
    for key in ("rope_scaling", "rope_parameters"):
        for name, value in _entries(flat.get(key)):
            found[name] = value
    model_type = str(flat.get("model_type"))
    if model_type in THETA:
        found = {"rope_type": "default", "rope_theta": THETA[model_type]} | found
    return found


def _entries(stated: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(stated, Mapping):
        return
    kind = stated.get("rope_type", stated.get("type"))
    if isinstance(kind, str):
        yield "rope_type", SCALED.get(kind, kind)
    for key, value in stated.items():
        if isinstance(value, Mapping):
            prefix = "" if key == "full_attention" else f"{key}."
            yield from ((f"{prefix}{name}", inner) for name, inner in _entries(value))
        elif key not in ("type", "rope_type") and value is not None:
            yield key, value


def _equal(a: Any, b: Any) -> bool:
    """Numbers as they are after a float32 has held them."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if _number(a) and _number(b):
        return math.isclose(a, b, rel_tol=1e-6)
    return bool(a == b)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [each for each in values if isinstance(each, int) and not isinstance(each, bool)]


def _short(value: object) -> str:
    return f"{json.dumps(value):.60}"
