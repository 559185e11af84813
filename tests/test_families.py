"""Families against transformers: tiny models of every architecture are saved, and each of their tensors is accounted for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from quantpub.actions import QUANTIZE
from quantpub.checkpoint import open_checkpoint
from quantpub.families import BUFFER, EMBEDDING, FAMILIES, HEAD, LINEAR, NORM, REFUSED, ROUTER
from quantpub.gemms import EXPERT, fuse
from quantpub.plan import make_plan
from quantpub.plan_facts import tensor_parallel
from quantpub.recipe import load_recipe

EXPERTS, TOP_K, LAYERS = 4, 2, 4
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_k": TOP_K,
    "moe_topk": TOP_K,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
SHARED = MOE | {"first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
MLA = SHARED | {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 2,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
# model_type → what a tiny one needs beyond TINY
EXTRA: dict[str, dict[str, Any]] = {
    "mixtral": MOE,
    "phimoe": MOE,
    "minimax_m2": MOE,
    "qwen2_moe": MOE,
    "qwen3_moe": MOE,
    "olmoe": MOE,
    "flex_olmo": MOE,
    "hunyuan_v1_moe": MOE,
    "ernie4_5_moe": MOE | {"moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "glm4_moe": SHARED,
    "dots1": SHARED,
    "exaone_moe": SHARED,
    "deepseek_v2": MLA | {"head_dim": 8},
    "deepseek_v3": MLA | {"head_dim": 8, "n_group": 2},
    "glm4_moe_lite": MLA | {"mlp_layer_types": ["dense", *["sparse"] * 3]},
    "qwen3_next": MOE | DELTA,
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": MOE | DELTA,
}
DENSE_FIRST = {"glm4_moe", "dots1", "exaone_moe", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "ernie4_5_moe"}
WITH_EXPERTS = {name for name, extra in EXTRA.items() if extra.keys() >= MOE.keys()}


def save_tiny(model_type: str, folder: Path, **more: Any) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """(every saved tensor with its shape, names of the nn.Linear modules) of a random tiny model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **(TINY | EXTRA.get(model_type, {}) | more))
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    model.save_pretrained(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, "pt") as f:
            shapes |= {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118
    return shapes, {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


Tiny = Callable[[str], tuple[Path, dict[str, tuple[int, ...]], set[str]]]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """model_type → (folder, shapes of its tensors, its linears); each is made once."""

    @cache
    def make(model_type: str) -> tuple[Path, dict[str, tuple[int, ...]], set[str]]:
        folder = tmp_path_factory.mktemp(model_type)
        return folder, *save_tiny(model_type, folder)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_tensor_that_transformers_saves_is_accounted_for(model_type: str, tiny: Tiny) -> None:
    """By role: matrices are linears unless they are embedding, head or router, and every expert is there."""
    _, shapes, modules = tiny(model_type)
    family = FAMILIES[model_type]
    roles = {name: family.role(name) for name in shapes}
    assert [name for name, role in roles.items() if role is None] == []
    linears = {name.removesuffix(".weight") for name, role in roles.items() if role == LINEAR}
    others = {name.removesuffix(".weight") for name, role in roles.items() if role in (ROUTER, HEAD)}
    assert all(len(shapes[f"{module}.weight"]) == 2 for module in linears)
    saved = {name.removesuffix(".weight") for name in shapes}
    assert {m for m in modules if m in saved} <= linears | others
    matrices = {name for name, shape in shapes.items() if len(shape) == 2 and min(shape) > 1 and "bias" not in name}
    assert {roles[name] for name in matrices} <= {LINEAR, EMBEDDING, HEAD, ROUTER}
    layers = LAYERS - 1 if model_type in DENSE_FIRST else LAYERS
    assert sum(EXPERT.search(module) is not None for module in linears) == (
        layers * EXPERTS * 3 if model_type in WITH_EXPERTS else 0
    )


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_the_plan_takes_every_tensor_once_and_merges_what_engines_merge(model_type: str, tiny: Tiny) -> None:
    folder, shapes, _ = tiny(model_type)
    plan = make_plan(open_checkpoint(str(folder)), load_recipe("fp8-dynamic"), "ct-float")
    assert Counter(action.part.name for action in plan.actions) == Counter(list(shapes))
    assert plan.rejections == {}
    linears = {a.module: (a.part.info.shape[0], a.part.info.shape[1]) for a in plan.actions if a.role == LINEAR}
    merged = fuse(linears, plan.family)
    assert sorted(member for members in merged.values() for member in members) == sorted(linears)
    if any(module.endswith("self_attn.k_proj") for module in linears):
        assert any(module.endswith("self_attn.qkv_proj") for module in merged)
    if any(module.endswith("mlp.up_proj") for module in linears) and model_type != "arcee":
        assert any(module.endswith("mlp.gate_up_proj") for module in merged)


def test_deepseek_without_a_low_rank_query(tmp_path: Path) -> None:
    """DeepSeek-V2-Lite has q_proj in place of q_a_proj and q_b_proj; nothing is merged with kv_a_proj_with_mqa then."""
    shapes, _ = save_tiny("deepseek_v2", tmp_path, q_lora_rank=None)
    family = FAMILIES["deepseek_v2"]
    assert None not in {family.role(name) for name in shapes}
    at = "model.layers.0.self_attn."
    assert family.role(at + "q_proj.weight") == LINEAR
    small = {at + "q_proj": (32, 32), at + "kv_a_proj_with_mqa": (24, 32)}
    assert fuse(small, family) == {
        at + "q_proj": (at + "q_proj",),
        at + "kv_a_proj_with_mqa": (at + "kv_a_proj_with_mqa",),
    }
    both = {at + "q_a_proj": (16, 32), at + "kv_a_proj_with_mqa": (24, 32)}
    assert fuse(both, family) == {at + "fused_qkv_a_proj": tuple(both)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "kept"),
    [
        ("deepseek_v2", {"kv_b_proj"}),
        ("deepseek_v3", {"kv_b_proj"}),
        ("glm4_moe_lite", {"kv_b_proj"}),
        ("qwen3_next", {"in_proj_ba"}),
        ("qwen3_5_text", {"in_proj_a", "in_proj_b"}),
        ("qwen3_5_moe_text", {"in_proj_a", "in_proj_b"}),
        ("llama", set()),
    ],
)
def test_linears_that_are_kept_by_default(model_type: str, kept: set[str], tiny: Tiny) -> None:
    _, shapes, _ = tiny(model_type)
    family = FAMILIES[model_type]
    linears = [name.removesuffix(".weight") for name in shapes if family.role(name) == LINEAR]
    assert {module.rpartition(".")[2] for module in linears if family.kept(module)} == kept


def test_every_entry_of_keep_has_a_reason_and_names_linears_only() -> None:
    for family in FAMILIES.values():
        for _, reason in family.keep:
            assert len(reason) > 20
    assert FAMILIES["qwen3_next"].role("model.layers.0.linear_attn.in_proj_ba.weight") == LINEAR


@pytest.mark.parametrize(
    ("model_type", "tensor", "role"),
    [
        ("glm4_moe", "model.layers.46.eh_proj.weight", HEAD),
        ("glm4_moe", "model.layers.46.shared_head.head.weight", HEAD),
        ("glm4_moe", "model.layers.46.enorm.weight", NORM),
        ("deepseek_v3", "model.layers.61.embed_tokens.weight", EMBEDDING),
        ("deepseek_v3", "model.layers.61.self_attn.q_b_proj.weight", LINEAR),
        ("deepseek_v3", "model.layers.3.mlp.gate.e_score_correction_bias", BUFFER),
        ("qwen3_next", "mtp.fc.weight", HEAD),
        ("qwen3_next", "mtp.layers.0.mlp.experts.7.up_proj.weight", HEAD),
        ("qwen3_next", "mtp.layers.0.mlp.gate.weight", HEAD),
        ("qwen3_next", "mtp.layers.0.self_attn.q_norm.weight", NORM),
        ("qwen3_next", "mtp.pre_fc_norm_hidden.weight", NORM),
        ("llama", "model.layers.0.eh_proj.weight", None),
        ("llama", "mtp.fc.weight", None),
    ],
)
def test_heads_that_predict_further_tokens(model_type: str, tensor: str, role: str | None) -> None:
    assert FAMILIES[model_type].role(tensor) == role


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4_text"])
def test_what_is_refused_is_as_the_reason_says(model_type: str, tmp_path: Path) -> None:
    """[E, K, 2N] experts: hidden first, where other families hold [E, 2N, K]."""
    more = {"intermediate_size_mlp": 64, "interleave_moe_layer_step": 2} if model_type == "llama4_text" else {}
    shapes, _ = save_tiny(model_type, tmp_path, **(MOE | more))
    found = {shape for name, shape in shapes.items() if name.endswith("experts.gate_up_proj")}
    assert found == {(EXPERTS, 32, 128)}
    assert model_type not in FAMILIES


def test_what_is_refused_is_no_family_and_says_why() -> None:
    assert not set(REFUSED) & set(FAMILIES)
    assert all(reason.startswith("its experts are") for reason in REFUSED.values())
    assert "interleaved and with biases" in REFUSED["gpt_oss"]


def test_packed_experts_of_a_family_are_its_linears() -> None:
    for family in FAMILIES.values():
        for suffix, members in family.packed_experts.items():
            tensor = f"model.layers.0.mlp.experts.{suffix}"
            assert family.expert_members(tensor) == members
            assert {family.role(f"model.layers.0.mlp.experts.0.{member}.weight") for member in members} == {LINEAR}


@pytest.mark.slow
def test_packed_experts_on_disk_become_linears_in_the_new_families_too(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    gate_up, down = torch.randn(2, 64, 32).bfloat16(), torch.randn(2, 32, 32).bfloat16()
    at = "model.layers.0.mlp.experts."
    save_file({at + "gate_up_proj": gate_up, at + "down_proj": down}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    plan = make_plan(open_checkpoint(str(tmp_path)), load_recipe("fp8-dynamic"), "ct-float")
    assert Counter(action.kind for action in plan.actions) == {QUANTIZE: 6}


# Leaves of a family's linears as vLLM 0.25.1's model files build them: RowParallelLinear, and ReplicatedLinear or without
# tensor parallelism (fused_qkv_a_proj); down_proj and w2 of experts are cut along K too. The others are column parallel.
ROW_PARALLEL = {
    "starcoder2": {"o_proj", "c_proj"},
    "phi3": {"o_proj", "down_proj"},
    "mixtral": {"o_proj", "w2"},
    "phimoe": {"o_proj", "w2"},
    "minimax_m2": {"o_proj", "w2"},
    "qwen3_next": {"o_proj", "down_proj", "out_proj"},
    "qwen3_5_text": {"o_proj", "down_proj", "out_proj"},
    "qwen3_5_moe_text": {"o_proj", "down_proj", "out_proj"},
}
_MLA_DOWN = {"q_a_proj", "kv_a_proj_with_mqa"}
REPLICATED = {"deepseek_v2": _MLA_DOWN, "deepseek_v3": _MLA_DOWN, "glm4_moe_lite": _MLA_DOWN}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_tensor_parallelism_cuts_what_vllm_cuts(model_type: str, tiny: Tiny) -> None:
    _, shapes, _ = tiny(model_type)
    family = FAMILIES[model_type]
    cuts: dict[str | None, set[str]] = {"in": set(), "out": set(), None: set()}
    for name in shapes:
        if family.role(name) == LINEAR:
            module = name.removesuffix(".weight")
            cuts[family.cut(module)].add(module.rpartition(".")[2])
    assert cuts["in"] == ROW_PARALLEL.get(model_type, {"o_proj", "down_proj"})
    assert cuts[None] == REPLICATED.get(model_type, set())
    assert cuts["out"].isdisjoint(cuts["in"] | cuts[None])


def test_tensor_parallelism_is_as_transformers_plans_it() -> None:
    """But for the delta net, whose projections transformers gathers: vLLM cuts the K of its out_proj."""
    from transformers import AutoConfig

    styles = {"colwise": "out", "colwise_gather_output": "out", "rowwise": "in", "rowwise_split_input": "in"}
    styles |= {"mla_kv_a_proj": None}  # type: ignore[dict-item]
    seen = Counter[str]()
    for model_type, family in FAMILIES.items():
        for name, style in (AutoConfig.for_model(model_type).base_model_tp_plan or {}).items():
            module = "model." + name.replace("*", "0")
            if family.role(f"{module}.weight") == LINEAR and ".linear_attn." not in module:
                assert family.cut(module) == styles[style], (model_type, module)
                seen[model_type] += 1
    # their plans name no linear of these, whose experts are 3-D parameters there
    assert set(FAMILIES) - set(seen) == {"hunyuan_v1_dense", "hunyuan_v1_moe", "phimoe"}


@pytest.mark.parametrize(
    ("model_type", "module", "shape", "reasons"),
    [
        ("starcoder2", "mlp.c_proj", (128, 384), {2: "384 in_features / 2", 4: "384 in_features / 4"}),
        ("starcoder2", "mlp.c_fc", (384, 128), {}),
        ("qwen3_next", "linear_attn.out_proj", (128, 384), {2: "384 in_features / 2", 4: "384 in_features / 4"}),
        ("deepseek_v3", "self_attn.q_a_proj", (6, 128), {}),
        ("deepseek_v3", "self_attn.kv_a_proj_with_mqa", (6, 128), {}),
        ("deepseek_v3", "self_attn.q_b_proj", (6, 128), {4: "6 out_features / 4"}),
        ("mixtral", "block_sparse_moe.experts.0.w2", (128, 384), {2: "384 in_features / 2", 4: "384 in_features / 4"}),
    ],
)
def test_the_verdict_on_tensor_parallelism(
    model_type: str, module: str, shape: tuple[int, int], reasons: dict[int, str], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    save_file({f"model.layers.0.{module}.weight": torch.zeros(shape).bfloat16()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "num_experts_per_tok": 1}))
    verdicts = tensor_parallel(make_plan(open_checkpoint(str(tmp_path)), load_recipe("w4a16"), "ct-pack"))
    for size in (1, 2, 4):
        assert (verdicts[size] is None) == (size not in reasons), verdicts
        assert reasons.get(size, "") in str(verdicts[size])


def test_what_every_gpu_holds_whole_is_whole_blocks_where_it_is_merged(tmp_path: Path) -> None:
    """Zeros are packed 8 rows to a word: q_a_proj, which kv_a_proj_with_mqa follows, needs whole words on any number of GPUs."""
    from safetensors.torch import save_file

    at = "model.layers.0.self_attn."
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    for rows, verdict in ((136, None), (132, f"{at}q_a_proj: 132 out_features / 1 is not a multiple of 8")):
        tensors = {f"{at}q_a_proj.weight": (rows, 128), f"{at}kv_a_proj_with_mqa.weight": (12, 128)}
        save_file({n: torch.zeros(shape).bfloat16() for n, shape in tensors.items()}, tmp_path / "model.safetensors")
        plan = make_plan(open_checkpoint(str(tmp_path)), load_recipe("w4a16-asym"), "ct-pack")
        assert tensor_parallel(plan) == dict.fromkeys((1, 2, 4, 8), verdict)
