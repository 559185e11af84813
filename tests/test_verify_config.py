"""What of a config is computed: one meaning in every spelling, and every change of it told."""

from __future__ import annotations

from typing import Any

import pytest

from quantpub.verify.computed import TIE, differences, settings, stray_ids

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "rope_theta": 500000.0,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "vocab_size": 128256,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008],
}
MOE: dict[str, Any] = LLAMA | {
    "model_type": "deepseek_v3",
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "first_k_dense_replace": 3,
}
GEMMA: dict[str, Any] = {
    "model_type": "gemma3_text",
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window": 1024,
    "final_logit_softcapping": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "layer_types": ["sliding_attention", "full_attention"],
}


def newer(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 5 writes it."""
    found = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    inner = {"rope_type": "default"} | (config.get("rope_scaling") or {}) | {"rope_theta": config["rope_theta"]}
    return found | {"dtype": "bfloat16", "rope_parameters": inner, "pad_token_id": None}


SPELLED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("rope_parameters", newer(LLAMA), LLAMA),
    ("type for rope_type", LLAMA | {"rope_scaling": {"type": "yarn", "factor": 4}},
     newer(LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})),
    ("a base that is stated nowhere", {"model_type": "llama", "rope_theta": 10000.0}, {"model_type": "llama"}),
    ("no scaling, in words", {"model_type": "llama", "rope_parameters": {"rope_type": "default"}}, {"model_type": "llama"}),
    ("kinds of layers", newer(GEMMA) | {"rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}, GEMMA),
    ("positions in three parts", LLAMA | {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
     LLAMA | {"rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]}}),
    ("a part of the head", LLAMA | {"partial_rotary_factor": 0.5},
     newer(LLAMA) | {"rope_parameters": newer(LLAMA)["rope_parameters"] | {"partial_rotary_factor": 0.5}}),
    ("a window that is not used", LLAMA | {"use_sliding_window": False, "sliding_window": 131072},
     LLAMA | {"use_sliding_window": False, "sliding_window": None}),
    ("keys that one side leaves to their defaults", {"model_type": "llama"}, LLAMA | {"rope_theta": 1e4, "rope_scaling": None}),
    ("a text model within another", {"model_type": "llava", "text_config": LLAMA | {"model_type": "llama"}},
     {"model_type": "llava", "text_config": newer(LLAMA)}),
    ("an epsilon after float32", LLAMA | {"rms_norm_eps": 9.999999747378752e-06}, LLAMA),
    ("an activation's other name", LLAMA | {"hidden_act": "swish"}, LLAMA),
    ("an activation that is passed over", {"model_type": "gemma", "hidden_act": "gelu"},
     {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh"}),
    ("a head tied here and not there", {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}},
     {"tie_word_embeddings": False, "text_config": {}}),
    ("a class in old capitals", LLAMA | {"architectures": ["LLaMAForCausalLM"]}, LLAMA),
    ("a head's size that follows from others", MOE | {"head_dim": 64}, MOE),
    ("heads for keys that null stands for", LLAMA | {"num_key_value_heads": None}, LLAMA),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), [case[1:] for case in SPELLED], ids=[case[0] for case in SPELLED])
def test_one_meaning_in_two_spellings_is_no_difference(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert differences(one, other) == differences(other, one) == []
    assert differences(one, one) == []


CHANGED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (LLAMA | {"rope_theta": 1e4}, LLAMA, "rope_theta is 10000.0, the source's 500000.0"),
    ({k: v for k, v in LLAMA.items() if k != "rope_theta"}, LLAMA, "rope_theta is 10000.0, the source's 500000.0"),
    (newer(LLAMA | {"rope_theta": 1e6}), LLAMA, "rope_theta is 1000000.0, the source's 500000.0"),
    (LLAMA | {"rope_scaling": None}, LLAMA, 'rope_type is "default", the source\'s "llama3"'),
    (newer(LLAMA | {"rope_scaling": LLAMA["rope_scaling"] | {"factor": 4.0}}), LLAMA, "rope factor is 4.0, the source's 8.0"),
    (GEMMA | {"rope_local_base_freq": 1e6}, GEMMA, "rope sliding_attention.rope_theta is 1000000.0, the source's 10000.0"),
    (GEMMA | {"sliding_window": None}, GEMMA, "sliding_window is null, the source's 1024"),
    (GEMMA | {"final_logit_softcapping": 30.0}, GEMMA, "final_logit_softcapping is 30.0, the source's null"),
    (GEMMA | {"layer_types": ["full_attention"] * 2}, GEMMA, "layer_types is"),
    (LLAMA | {"rms_norm_eps": 1e-6}, LLAMA, "rms_norm_eps is 1e-06, the source's 1e-05"),
    (LLAMA | {"hidden_act": "gelu"}, LLAMA, 'hidden_act is "gelu", the source\'s "silu"'),
    (LLAMA | {"num_attention_heads": 64}, LLAMA, "num_attention_heads is 64, the source's 32"),
    (LLAMA | {"num_hidden_layers": 31}, LLAMA, "num_hidden_layers is 31, the source's 32"),
    (LLAMA | {"attention_bias": True}, LLAMA, "attention_bias is true, the source's false"),
    (LLAMA | {"tie_word_embeddings": True}, LLAMA, "tie_word_embeddings is true, the source's false"),
    (LLAMA | {"model_type": "mistral"}, LLAMA, 'model_type is "mistral", the source\'s "llama"'),
    (LLAMA | {"architectures": ["LlamaModel"]}, LLAMA, 'architectures is ["llamamodel"]'),
    (MOE | {"num_experts_per_tok": 6}, MOE, "num_experts_per_tok is 6, the source's 8"),
    (MOE | {"norm_topk_prob": False}, MOE, "norm_topk_prob is false, the source's true"),
    (MOE | {"n_group": 1}, MOE, "n_group is 1, the source's 8"),
    (MOE | {"routed_scaling_factor": 1.0}, MOE, "routed_scaling_factor is 1.0, the source's 2.5"),
    ({"text_config": {TIE: True}}, {TIE: False, "text_config": {}}, "tie_word_embeddings is true, the source's false"),
    ({"text_config": LLAMA | {"rope_theta": 1e4}}, {"text_config": LLAMA}, "rope_theta is 10000.0"),
]  # fmt: skip


@pytest.mark.parametrize(("found", "source", "says"), CHANGED, ids=[case[2] for case in CHANGED])
def test_what_changes_the_computation_is_told_once(found: dict[str, Any], source: dict[str, Any], says: str) -> None:
    (said,) = differences(found, source)
    assert said.startswith(says)


def test_what_changes_no_number_is_not_compared() -> None:
    """Who wrote it, in which dtype, and how it is cached."""
    more = {"transformers_version": "5.0", "use_cache": False, "torch_dtype": "float16", "pad_token_id": 7}
    assert differences(LLAMA | more, LLAMA) == []
    assert "torch_dtype" not in settings(LLAMA)


def test_tokens_that_the_vocabulary_does_not_have() -> None:
    assert stray_ids(LLAMA, None) == stray_ids(LLAMA, LLAMA) == []
    assert stray_ids(LLAMA | {"pad_token_id": -1}, None) == []
    odd = LLAMA | {"pad_token_id": 128256}
    assert stray_ids(odd, None) == stray_ids(odd, LLAMA) == ["pad_token_id is 128256, and vocab_size is 128256"]
    assert stray_ids(odd, odd) == [], "the source's own is no fault of the copy"
    cut = LLAMA | {"vocab_size": 128008}
    assert stray_ids(cut, LLAMA) == ["eos_token_id is 128008, and vocab_size is 128008"]
    assert stray_ids({"text_config": {"vocab_size": 8}, "eos_token_id": 9}, None)
