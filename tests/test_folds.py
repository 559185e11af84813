"""Folds against transformers: random factors folded into random models of every family leave their logits as they were."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import DELTA, EXTRA, TINY

from quantpub.families import FAMILIES, LINEAR, ROUTER
from quantpub.folds import NORM, UP, VALUE, Fold, folds, useful
from quantpub.smoothing import Smoothing

WIDE = TINY | {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
BIASES = {"attention_bias": True, "mlp_bias": True, "use_bias": True, "use_qk_norm": True, "attention_dropout": 0.0}
# model_type → what becomes of TINY's entries so that grouped heads, biases and shared experts are all there
MORE: dict[str, dict[str, Any]] = {
    "qwen3_next": DELTA | {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_text": DELTA | {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_moe_text": DELTA | {"layer_types": ["linear_attention", "full_attention"]},
} | {name: {"num_key_value_heads": 4} for name in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")}
MORE["glm4_moe_lite"] |= {"mlp_layer_types": ["dense", "sparse"]}
FAST = ["gemma2", "gemma3_text", "llama", "mixtral", "phi3", "qwen2_moe", "qwen3", "qwen3_moe"]
EVERY = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in sorted(FAMILIES)]


def save_random(model_type: str, folder: Path, **more: Any) -> dict[str, torch.Tensor]:
    """A tiny float32 model whose vectors (norms, biases) are random too: initialised to 0 and 1 they hide a wrong fold."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = WIDE | EXTRA.get(model_type, {}) | BIASES | MORE.get(model_type, {}) | more
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.rand_like(parameter) * 0.5
            else:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.arange(1, 41).view(2, 20)).logits


def random_factors(found: tuple[Fold, ...], least: int = -6, most: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {f.source: torch.randint(least, most + 1, (f.size,), generator=generator).float().exp2() for f in found}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def found_in(folder: Path, tensors: dict[str, torch.Tensor]) -> tuple[Fold, ...]:
    config = config_of(folder)
    return folds(config["model_type"], config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})


def folded(folder: Path, tensors: dict[str, torch.Tensor], smoothing: Smoothing, to: Path) -> Path:
    to.mkdir()
    save_file(
        {name: smoothing.apply(name, w) for name, w in tensors.items()}, to / "model.safetensors", {"format": "pt"}
    )
    (to / "config.json").write_text((folder / "config.json").read_text())
    return to


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("model_type", EVERY)
def test_random_factors_leave_the_function_as_it_was(model_type: str, tmp_path: Path) -> None:
    tensors = save_random(model_type, tmp_path / "a")
    found = found_in(tmp_path / "a", tensors)
    smoothing = Smoothing(found, random_factors(found))
    before, after = logits(tmp_path / "a"), logits(folded(tmp_path / "a", tensors, smoothing, tmp_path / "b"))
    assert relative(after, before) < 1e-5


# Linears that read no smoothed input, by their leaf; every other linear and router is a reader of exactly one fold
_INTO = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
WITHOUT: dict[str, set[str]] = {
    **dict.fromkeys(("olmo", "olmo2", "olmo3", "exaone4"), _INTO),
    "flex_olmo": _INTO | {"gate"},
    "arcee": {"down_proj"},
    "starcoder2": {"c_proj"},
    **{name: {"kv_b_proj"} for name in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")},
}


@pytest.mark.parametrize("model_type", EVERY)
def test_every_linear_and_router_reads_one_smoothed_input_but_those_listed(model_type: str, tmp_path: Path) -> None:
    tensors = save_random(model_type, tmp_path / "a")
    found = found_in(tmp_path / "a", tensors)
    readers = [reader for fold in found for reader in fold.readers]
    assert len(readers) == len(set(readers)) and len({fold.source for fold in found}) == len(found)
    family = FAMILIES[model_type]
    linears = {name.removesuffix(".weight") for name in tensors if family.role(name) in (LINEAR, ROUTER)}
    assert {module.rpartition(".")[2] for module in linears - set(readers)} == WITHOUT.get(model_type, set())
    assert {fold.source + ".weight" for fold in found} <= set(tensors)


def shapes_of(**modules: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"model.layers.0.{name.replace('__', '.')}.weight": shape for name, shape in modules.items()}


def test_query_heads_of_a_group_share_the_factors_of_their_value_head() -> None:
    """4 query heads of 2 channels on 2 value heads: columns 0…7 of o_proj take factors 0 1 0 1 2 3 2 3."""
    shapes = shapes_of(self_attn__v_proj=(4, 16), self_attn__o_proj=(16, 8))
    (fold,) = folds("llama", {"num_attention_heads": 4}, shapes)
    assert (fold.kind, fold.size, fold.columns(), fold.rows()) == (VALUE, 4, [0, 1, 0, 1, 2, 3, 2, 3], [0, 1, 2, 3])


def test_values_are_the_last_rows_of_a_stacked_projection() -> None:
    shapes = shapes_of(self_attn__qkv_proj=(8 + 4 + 4, 16), self_attn__o_proj=(16, 8))
    (fold,) = folds("phi3", {"num_attention_heads": 4}, shapes)
    assert (fold.rows(), fold.columns()) == ([12, 13, 14, 15], [0, 1, 0, 1, 2, 3, 2, 3])
    (fold,) = folds("phi3", {}, shapes_of(mlp__gate_up_proj=(12, 4), mlp__down_proj=(4, 6)))
    assert (fold.kind, fold.rows(), fold.columns()) == (UP, [6, 7, 8, 9, 10, 11], [0, 1, 2, 3, 4, 5])


def test_values_of_latent_attention_follow_the_keys_of_their_head() -> None:
    """2 heads of 3 rows of keys and 2 of values."""
    shapes = shapes_of(self_attn__kv_b_proj=(10, 8), self_attn__o_proj=(8, 4))
    (fold,) = folds("deepseek_v3", {"num_attention_heads": 2}, shapes)
    assert (fold.rows(), fold.columns()) == ([3, 4, 8, 9], [0, 1, 2, 3])


def test_a_model_that_clips_its_values_keeps_them() -> None:
    shapes = shapes_of(self_attn__v_proj=(4, 16), self_attn__o_proj=(16, 4))
    config = {"num_attention_heads": 2}
    assert len(folds("olmoe", config, shapes)) == 1 and folds("olmoe", config | {"clip_qkv": 8.0}, shapes) == ()


@pytest.mark.parametrize("shape", [(16, 7), (16, 0), (16, 24)])
def test_shapes_that_do_not_fit_are_left_alone(shape: tuple[int, int]) -> None:
    shapes = shapes_of(self_attn__v_proj=(4, 16), self_attn__o_proj=shape, mlp__up_proj=(5, 16), mlp__down_proj=shape)
    found = folds("llama", {"num_attention_heads": 4}, shapes)
    assert all(fold.size * fold.group == shape[1] and max(fold.rows()) < 5 for fold in found)


def test_heads_that_draft_tokens_and_models_without_layers_have_none() -> None:
    shapes = {"mtp.layers.0.input_layernorm.weight": (4,), "mtp.layers.0.self_attn.q_proj.weight": (4, 4)}
    assert folds("qwen3_next", {"num_attention_heads": 2}, shapes) == ()


def test_a_fold_is_of_use_where_an_input_is_rounded_and_a_rounded_cache_keeps_its_values() -> None:
    shapes = shapes_of(self_attn__v_proj=(4, 16), self_attn__o_proj=(16, 8), input_layernorm=(16,))
    found = folds("llama", {"num_attention_heads": 4}, shapes)
    at = "model.layers.0.self_attn."
    assert [fold.kind for fold in found] == [NORM, VALUE]
    assert [f.kind for f in useful(found, [at + "o_proj"], cached=False)] == [VALUE]
    assert [f.kind for f in useful(found, [at + "v_proj", at + "o_proj"], cached=True)] == [NORM]


@pytest.mark.slow
def test_latent_attention_without_a_low_rank_query(tmp_path: Path) -> None:
    tensors = save_random("deepseek_v2", tmp_path / "a", q_lora_rank=None)
    found = found_in(tmp_path / "a", tensors)
    smoothing = Smoothing(found, random_factors(found))
    assert relative(logits(folded(tmp_path / "a", tensors, smoothing, tmp_path / "b")), logits(tmp_path / "a")) < 1e-5


@pytest.mark.parametrize("change", ["a head of the group", "the norm's one", "the up rows"])
def test_a_fold_that_is_wrong_changes_the_function(change: str, tmp_path: Path) -> None:
    """What the comparison of logits would say of folds with a slip in them."""
    from dataclasses import replace

    model_type = {"a head of the group": "llama", "the norm's one": "gemma2", "the up rows": "phi3"}[change]
    tensors = save_random(model_type, tmp_path / "a", num_hidden_layers=1)
    found = list(found_in(tmp_path / "a", tensors))
    for place, fold in enumerate(found):
        if change == "a head of the group" and fold.kind == VALUE:
            found[place] = replace(fold, head=fold.head // 2)
        if change == "the norm's one" and fold.kind == NORM:
            found[place] = replace(fold, less_one=False)
        if change == "the up rows" and fold.kind == UP:
            found[place] = replace(fold, first=0)
    smoothing = Smoothing(tuple(found), random_factors(tuple(found)))
    off = relative(logits(folded(tmp_path / "a", tensors, smoothing, tmp_path / "b")), logits(tmp_path / "a"))
    assert off > 1e-2 and math.isfinite(off)
