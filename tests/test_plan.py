"""Law 3 and the plan's figures: every tensor once, sizes exact, nothing skipped silently; families against transformers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import DEMO_MODEL, make_artifact, save_llama
from safetensors.torch import load_file, save_file

from quantpub.checkpoint import open_checkpoint
from quantpub.errors import InputError
from quantpub.families import FAMILIES, LINEAR
from quantpub.plan import Plan, make_plan, require_runnable
from quantpub.plan_facts import summary, tensor_parallel
from quantpub.recipe import Recipe, ignores, load_recipe
from quantpub.shards import read_header
from quantpub.treatments import natural

LAYOUT = {"w4a16": "ct-pack", "fp8-dynamic": "ct-float"}


def plan_of(folder: Path | str, recipe: str | Recipe = "w4a16") -> Plan:
    chosen = load_recipe(recipe) if isinstance(recipe, str) else recipe
    return make_plan(open_checkpoint(str(folder)), chosen, chosen.layouts([], [])[0])


def test_every_source_tensor_has_one_action(tmp_path: Path) -> None:
    plan = plan_of(save_llama(tmp_path / "m"))
    stored = [name for shard in (tmp_path / "m").glob("*.safetensors") for name in load_file(shard)]
    assert Counter(action.part.name for action in plan.actions) == Counter(stored)


@pytest.mark.parametrize("recipe", ["w4a16", "fp8-dynamic"])
def test_sizes_are_exact_to_the_byte(tmp_path: Path, recipe: str) -> None:
    model = save_llama(tmp_path / "m")
    plan = plan_of(model, recipe)
    out = make_artifact(model, recipe, tmp_path / "out")
    assert {shard: plan.shard_bytes(shard) for shard in plan.shards} == {
        shard: (out / shard).stat().st_size for shard in plan.shards
    }
    assert summary(plan)["output_bytes"] == sum(p.stat().st_size for p in out.glob("*.safetensors"))
    written = {
        name: (info.dtype, info.shape) for shard in plan.shards for name, info in read_header(out / shard)[0].items()
    }
    assert written == {name: spec for shard in plan.shards for name, spec in plan.outputs(shard).items()}


def test_bits_per_weight_by_hand() -> None:
    """int4 codes and a bf16 scale for 128 of them: 4 + 16/128 = 4.125, and 128 bits of shape a tensor."""
    facts = summary(plan_of(DEMO_MODEL))
    weights = 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 384 * 128)
    assert facts["quantized_parameters"] == weights
    assert facts["bits_per_quantized_weight"] == pytest.approx(4.125 + 28 * 128 / weights, abs=1e-4)
    assert summary(plan_of(DEMO_MODEL, "fp8-dynamic"))["bits_per_quantized_weight"] == pytest.approx(
        8 + 4 * (128 * 2 + 64 * 2 + 384 * 2 + 128) * 16 / weights, abs=1e-4
    )


def test_the_plan_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantpub import checkpoint

    def forbidden(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(checkpoint, "ShardReader", forbidden)
    summary(plan_of(save_llama(tmp_path / "m")))


def test_a_shape_the_layout_cannot_hold_is_an_error_unless_ignored(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    odd = "model.layers.1.mlp.down_proj.weight"
    tensors[odd] = torch.zeros(128, 200, dtype=torch.bfloat16)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    plan = plan_of(model)
    assert list(plan.rejections) == [odd]
    with pytest.raises(InputError, match="in_features 200 is not a multiple of the group size 128"):
        require_runnable(plan)
    recipe = load_recipe("w4a16").model_copy(update={"ignore": ("lm_head", r"re:model\.layers\.1\..*\.down_proj")})
    ignoring = plan_of(model, recipe)
    require_runnable(ignoring)
    assert ignoring.ignored == ("lm_head", "model.layers.1.mlp.down_proj")


def test_a_tensor_of_unknown_name_is_an_error(model: Path) -> None:
    tensors = load_file(model / "model.safetensors") | {"model.layers.0.mlp.extra_proj.weight": torch.zeros(8, 8)}
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(InputError, match="extra_proj"):
        plan_of(model)


def test_tensor_parallel_by_hand() -> None:
    """down_proj has K = 384: whole groups of 128 on one GPU, not on two; FP8 has no groups."""
    found = tensor_parallel(plan_of(DEMO_MODEL))
    assert found[1] is None
    assert found[2] == "model.layers.0.mlp.down_proj: 384 in_features / 2 is not a multiple of 128"
    assert set(tensor_parallel(plan_of(DEMO_MODEL, "fp8-dynamic")).values()) == {None}


def test_packed_experts_become_linears(tmp_path: Path) -> None:
    """3-D parameters [E, 2I, H] and [E, H, I]: expert 1's up_proj is rows I…2I of slab 1, byte for byte."""
    experts, inner, hidden = 3, 128, 256
    gate_up = torch.randn(experts, 2 * inner, hidden).bfloat16()
    down = torch.randn(experts, hidden, inner).bfloat16()
    at = "model.layers.0.mlp.experts."
    (tmp_path / "m").mkdir()
    save_file({at + "gate_up_proj": gate_up, at + "down_proj": down}, tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    plan = plan_of(tmp_path / "m", "fp8-dynamic")
    assert len(plan.actions) == experts * 3
    assert Counter(action.part.source for action in plan.actions) == {at + "gate_up_proj": 6, at + "down_proj": 3}
    out = make_artifact(tmp_path / "m", "fp8-dynamic", tmp_path / "out")
    codes = load_file(out / "model.safetensors")
    w, name = gate_up[1, inner:], f"{at}1.up_proj.weight"
    scale = (w.float().abs().amax(1, keepdim=True) / 448).bfloat16()
    assert torch.equal(
        codes[name].view(torch.uint8),
        (w.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8),
    )
    assert codes[f"{at}2.down_proj.weight"].shape == (hidden, inner)


@pytest.mark.parametrize(
    ("entry", "module", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", False),
        ("re:.*v_proj", "model.layers.0.self_attn.v_proj", True),
        ("re:.*v_proj", "model.layers.0.self_attn.qkv_projx", False),
        ("re:v_proj", "model.layers.0.self_attn.v_proj", False),
    ],
)
def test_ignore_entries_match_whole_names(entry: str, module: str, expected: bool) -> None:
    assert ignores((entry,), module) is expected


def test_ignored_names_are_in_natural_order() -> None:
    assert sorted(["a.10.g", "a.9.g", "lm_head"], key=natural) == ["a.9.g", "a.10.g", "lm_head"]


FAMILY_CONFIGS = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "granite": {},
    "olmo2": {},
    "smollm3": {"pad_token_id": 0},
    "phi3": {"pad_token_id": 0},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32},
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(FAMILY_CONFIGS))
def test_families_know_what_transformers_saves(model_type: str, tmp_path: Path) -> None:
    """Every tensor transformers writes for a tiny model has a role, and every nn.Linear but head and routers is a linear."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        model_type,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        **FAMILY_CONFIGS[model_type],
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    names = [name for shard in tmp_path.glob("*.safetensors") for name in load_file(shard)]
    roles = {name: FAMILIES[model_type].role(name) for name in names}
    assert [name for name, role in roles.items() if role is None] == []
    linear = {name.removesuffix(".weight") for name, role in roles.items() if role == LINEAR}
    modules = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert modules - linear <= {"lm_head"} | {m for m in modules if m.endswith((".gate", ".shared_expert_gate"))}
    if "moe" in model_type or model_type == "mixtral":
        assert sum(".experts." in name for name in linear) == 2 * 4 * 3
