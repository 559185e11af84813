"""Completeness by names alone: norms of known architectures, and language models within others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from quantpub.errors import InputError
from quantpub.held import open_held
from quantpub.verify.language import NORMS, language, lost_norms
from quantpub.verify.source import _beside
from quantpub.verify.whole import wrong_sizes

TWO = ("input_layernorm", "post_attention_layernorm")
LINEARS = tuple(f"self_attn.{letter}_proj" for letter in "qkvo")


def lost(model_type: str, *norms: str, more: tuple[str, ...] = LINEARS, final: bool = True) -> list[str]:
    parts = frozenset(f"{name}.weight" for name in (*norms, *more))
    return lost_norms({0: parts}, {"model.norm.weight": 1} if final else {}, model_type)


@pytest.mark.parametrize("name", ["layers.3.mlp.up_proj.weight", "embed_tokens.weight", "norm.weight"])
@pytest.mark.parametrize(
    "prefix", ["language_model.model.", "model.language_model.", "model.text_model.", "llm.model.", "thinker.model."]
)
def test_a_language_model_is_known_within_others(prefix: str, name: str) -> None:
    assert language(prefix + name) == f"model.{name}"


def test_heads_and_what_is_no_language_model() -> None:
    assert language("language_model.lm_head.weight") == "lm_head.weight"
    names = ["model.layers.3.mlp.up_proj.weight", "lm_head.weight", "model.visual.blocks.0.norm1.weight"]
    names += ["vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight", "text_model.encoder.layers.0.norm"]
    names += ["talker.model.layers.0.mlp.up_proj.weight", "multi_modal_projector.language_model.norm.weight"]
    assert [language(name) for name in names] == names


def test_norms_that_are_lost() -> None:
    assert lost("llama", *TWO) == []
    assert lost("llama", TWO[0]) == ["layer 0 lacks post_attention_layernorm.weight"]
    assert lost("llama", *TWO, final=False) == ["model.norm.weight is missing"]
    assert lost("qwen3", *TWO, "self_attn.q_norm") == ["layer 0 lacks self_attn.k_norm.weight"]
    assert lost("qwen3_next", *TWO, more=("linear_attn.out_proj",)) == ["layer 0 lacks linear_attn.norm.weight"]
    mla = ("self_attn.kv_a_proj_with_mqa", "self_attn.q_proj")
    assert lost("deepseek_v2", *TWO, more=mla) == ["layer 0 lacks self_attn.kv_a_layernorm.weight"]


def test_heads_have_the_size_of_their_architecture_where_none_is_stated() -> None:
    """As gemma-3-12b: 8 heads of 256 for keys, where 3840 / 16 is 240."""
    config = {"model_type": "gemma3_text", "hidden_size": 3840, "num_attention_heads": 16, "num_key_value_heads": 8}
    shapes = {"model.layers.0.self_attn.k_proj.weight": (2048, 3840)}
    assert wrong_sizes(shapes, config) == []
    (said,) = wrong_sizes(shapes, config | {"model_type": "qwen3"})
    assert "num_key_value_heads · head_dim is 1024" in said
    assert "is 1920" in wrong_sizes(shapes, config | {"model_type": "llama"})[0]


def test_architectures_without_some_norms_are_let_be() -> None:
    assert lost("olmo", final=False) == lost("cohere", "input_layernorm") == []
    assert lost("olmo2", *NORMS["olmo2"], "self_attn.q_norm", "self_attn.k_norm") == []
    assert lost("gemma2", *NORMS["gemma2"]) == []
    assert lost("glm4", *TWO) == [
        f"layer 0 lacks {norm}.weight" for norm in ("post_self_attn_layernorm", "post_mlp_layernorm")
    ]


def test_what_is_said_of_the_files_beside_a_stranger_s_weights() -> None:
    held = SimpleNamespace(source=SimpleNamespace(files={"tokenizer.json": 1}))
    subject = cast(Any, SimpleNamespace(quantized_here=False, held=held))
    said = "; files beside them, as the tokenizer, were not compared"
    assert _beside(subject, ["tokenizer.json"]) == said
    assert _beside(subject, ["tokenizer.json", "vocab.txt"]) == f"{said}: vocab.txt missing"
    assert _beside(subject, ["a.json", "b.json", "c.json"]) == f"{said}: a.json and 2 more missing"
    assert _beside(cast(Any, SimpleNamespace(quantized_here=True)), ["a.json"]) == ", 1 files beside them"


@pytest.mark.parametrize(
    ("name", "says"),
    [("model-Q4_K_M.gguf", "GGUF, llama.cpp's format"), ("pytorch_model.bin", "pickles"), ("a.txt", "no safetensors")],
)
def test_weights_in_other_files_are_named(name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=says):
        open_held(str(tmp_path))
