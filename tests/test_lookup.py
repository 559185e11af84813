"""Lookups by name: configs of other tools and of ours resolve to what the weights are; each planted fault is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantpub.families import FAMILIES
from quantpub.layouts import LAYOUTS
from quantpub.layouts.base import Layout, ct_config
from quantpub.lookup import head_problems, looked_up, name_problems, readers
from quantpub.lookup_names import Entries, engine_modules
from quantpub.registry import load
from quantpub.scheme import PRESETS
from quantpub.treatments import Treatment, declared, unquantized

PEERS = json.loads((Path(__file__).parent / "golden" / "peer_configs.json").read_text())
DENSE = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ATTENTION = tuple(f"self_attn.{letter}_proj" for letter in "qkvo")
LLAMA = FAMILIES["llama"].fused
QKV, GATE_UP = "model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj"


def dense(layers: int = 2) -> list[str]:
    return [f"model.layers.{layer}.{leaf}" for layer in range(layers) for leaf in (*ATTENTION, *DENSE)]


def moe(layers: int, experts: int) -> list[str]:
    leaves = [f"mlp.experts.{e}.{leaf}_proj" for e in range(experts) for leaf in ("gate", "up", "down")]
    return [f"model.layers.{layer}.{leaf}" for layer in range(layers) for leaf in (*ATTENTION, *leaves)]


def mixtral(layers: int = 2, experts: int = 2) -> list[str]:
    leaves = [f"block_sparse_moe.experts.{e}.w{n}" for e in range(experts) for n in (1, 2, 3)]
    return [f"model.layers.{layer}.{leaf}" for layer in range(layers) for leaf in (*ATTENTION, *leaves)]


def group(*targets: str, bits: int = 4) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "strategy": "channel"}
    return {"targets": list(targets), "weights": weights, "input_activations": None, "format": "pack-quantized"}


def ct(*groups: dict[str, Any], ignore: tuple[str, ...] = ("lm_head",)) -> dict[str, Any]:
    return ct_config(groups, ignore)


def of(names: list[str], scheme: str = "W4A16") -> dict[str, str]:
    return dict.fromkeys(names, scheme)


def peer(name: str) -> tuple[dict[str, Any], dict[str, str], list[str], str]:
    """(config, quantized, unquantized, model_type) of a checkpoint that another tool made."""
    row, shape = PEERS["configs"][name], PEERS["models"][name.split("/")[0]]
    layers, experts = shape["layers"], shape["experts"]
    linears = moe(layers, experts) if experts else dense(layers)
    held = set(row["quantized"])
    quantized = [n for n in linears if "".join("#" if c.isdigit() else c for c in n) in held]
    assert len(quantized) == len([n for n in linears if any(n.endswith(h.rpartition("#")[2]) for h in held)])
    kept = [n for n in linears if n not in set(quantized)]
    routers = [f"model.layers.{layer}.mlp.gate" for layer in range(layers)] if experts else []
    return row["quantization_config"], of(quantized), [*kept, *routers, "lm_head"], shape["model_type"]


@pytest.mark.parametrize("name", sorted(PEERS["configs"]))
def test_what_other_tools_write_resolves_to_what_they_stored(name: str) -> None:
    config, quantized, kept, model_type = peer(name)
    assert quantized
    problems = name_problems(config, quantized, kept, FAMILIES[model_type].fused, model_type)
    if name.startswith("qwen3moe") and "/ao-" in name:  # torchao names no router, and vLLM's Qwen3-MoE asks for it
        assert [p.split(":")[1].strip() for p in problems] == ["model.layers.0.mlp.gate"]
    else:
        assert problems == []
    assert bool(readers(config)) == ("/mlx-" not in name)


@pytest.mark.parametrize("name", [n for n, row in PEERS["configs"].items() if "hf_quant_config" in row])
def test_modelopts_nested_form_resolves_as_the_flat_one(name: str) -> None:
    flat, quantized, kept, model_type = peer(name)
    nested = PEERS["configs"][name]["hf_quant_config"]
    for engine in readers(flat):
        said = [looked_up(engine, c, [*quantized, *kept], LLAMA, model_type=model_type) for c in (flat, nested)]
        assert {m: a.kind for m, a in said[0].items()} == {m: a.kind for m, a in said[1].items()}
    assert name_problems(nested, quantized, kept, LLAMA, model_type) == []


def held(layout: Layout) -> str:
    return next(name for name, scheme in PRESETS.items() if not layout.reject(scheme, 1024, 1024, "BF16"))


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_ours_resolve_to_what_was_quantized(name: str, model_type: str) -> None:
    layout: Layout = load(LAYOUTS, "layout", name)
    family, scheme = FAMILIES[model_type], PRESETS[held(layout)]
    linears = {"llama": dense(), "qwen3_moe": moe(2, 2), "mixtral": mixtral(), "deepseek_v3": mla()}[model_type]
    if layout.method == "torchao":  # which holds no experts
        linears = [n for n in linears if ".experts." not in n]
    kept = [n for n in linears if n.startswith("model.layers.1.self_attn") or n.endswith("kv_b_proj")]
    if model_type == "deepseek_v3":  # as its family keeps them
        kept = [n for n in kept if n.endswith("kv_b_proj")]
    copied = [(n, "linear") for n in kept] + [(n, "router") for n in routers(model_type)] + [("lm_head", "head")]
    ignored = unquantized(copied, family)
    quantized = {n: 0 for n in linears if n not in kept}
    config = declared([Treatment(scheme, {"name": "rtn"}, layout)], quantized, ignored)
    assert name_problems(config, quantized, [n for n, _ in copied], family.fused, model_type) == []


def routers(model_type: str) -> list[str]:
    block = {"mixtral": "block_sparse_moe", "llama": None}.get(model_type, "mlp")
    return [f"model.layers.{layer}.{block}.gate" for layer in range(2)] if block else []


def mla() -> list[str]:
    parts = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    leaves = [f"self_attn.{part}" for part in parts]
    leaves += [f"mlp.experts.{e}.{leaf}_proj" for e in range(2) for leaf in ("gate", "up", "down")]
    leaves += [f"mlp.shared_experts.{leaf}_proj" for leaf in ("gate", "up", "down")]
    return [f"model.layers.{layer}.{leaf}" for layer in range(2) for leaf in leaves]


@pytest.mark.parametrize("linears", [dense(), moe(2, 3), mixtral()], ids=["dense", "moe", "mixtral"])
def test_ours_of_two_schemes_resolve_alike_in_every_engine(linears: list[str]) -> None:
    layout: Layout = load(LAYOUTS, "layout", "ct-pack")
    treatments = [Treatment(PRESETS[name], {"name": "rtn"}, layout) for name in ("W4A16", "W8A16")]
    treated = {n: int(".self_attn." in n) for n in linears}
    family = FAMILIES["mixtral" if "w1" in linears[4] else "qwen3_moe"]
    config = declared(treatments, treated, ["lm_head"])
    assert len(config["config_groups"]) == 2
    assert name_problems(config, treated, ["lm_head"], family.fused) == []
    schemes = {m: a.scheme for m, a in looked_up("vllm", config, linears, family.fused).items()}
    assert all((scheme == "group_1") == (".self_attn." in module) for module, scheme in schemes.items())


def test_modules_are_those_of_the_engine() -> None:
    names = [*moe(1, 2), "model.layers.0.mlp.gate", "lm_head", "model.layers.1.self_attn.q_proj"]
    made = {m.name.removeprefix("model.layers."): (m.kind, len(m.members)) for m in engine_modules(names, LLAMA)}
    assert made == {
        "0.self_attn.qkv_proj": ("linear", 3),
        "0.self_attn.o_proj": ("linear", 1),
        "0.mlp.experts": ("experts", 6),
        "0.mlp.gate": ("linear", 1),
        "lm_head": ("head", 1),
        "1.self_attn.q_proj": ("linear", 1),  # its k and v are not there
    }


def test_entries_match_from_the_start_in_their_order() -> None:
    entries = Entries(["re:.*v_proj", "a.qkv_proj", "re:a\\.o_proj$", "gate"])
    assert entries.first("a.qkv_proj") == "re:.*v_proj"
    assert entries.first("a.o_proj") == "re:a\\.o_proj$" and entries.first("b.a.o_proj") is None
    assert entries.first("mlp.gate") is None and entries.suffix("mlp.gate") == "gate"
    with pytest.raises(ValueError, match="is not a regular expression"):
        Entries(["re:("])


def problems(config: dict[str, Any], quantized: dict[str, str] | None = None, kept: tuple[str, ...] = ("lm_head",)):
    return name_problems(config, of(dense(2)) if quantized is None else quantized, kept, LLAMA)


def test_an_unanchored_pattern_that_changes_a_merged_module_is_found() -> None:
    kinds = {n: "W8A16" if n.endswith("v_proj") else "W4A16" for n in dense(1)}
    others = [f"re:.*{leaf.split('.')[1]}$" for leaf in (*ATTENTION, *DENSE) if "v_proj" not in leaf]
    mixed = problems(ct(group(*others), group("re:.*v_proj", bits=8)), kinds)
    assert mixed == [
        f"{QKV}: engines hold it in one module, but its members are of different schemes: q_proj W4A16 and v_proj W8A16"
    ]
    # gate and up are W4A16; the pattern is meant for an `up_proj` of something else that ends here
    down = {n: "W8A16" if "down" in n else "W4A16" for n in dense(1)}
    config = ct(
        group("re:.*up_proj", "re:.*down_proj$", bits=8), group("re:.*(q|k|v|o|gate)_proj$", r"re:.*mlp\.up_proj$")
    )
    found = problems(config, down)
    assert len(found) == 1 and found[0].startswith(f"vLLM and SGLang: {GATE_UP}: looked up as quantized as group_0")
    assert "by 're:.*up_proj'; gate_proj by itself is quantized as group_1" in found[0]


def test_an_unanchored_pattern_that_changes_nothing_is_no_fault() -> None:
    """`re:.*v_proj` reaches qkv_proj by its merged name, and its members are of that group all the same."""
    kinds = [f"re:.*{leaf.split('.')[1]}" for leaf in (*ATTENTION, *DENSE)]
    assert problems(ct(group(*kinds))) == []
    attention = [n for n in dense(2) if ".self_attn." in n]
    kept = ("lm_head", *(n for n in dense(2) if n not in attention))
    config = ct(group("Linear"), ignore=("lm_head", "re:.*up_proj", "re:.*gate_proj", "re:.*down_proj"))
    assert problems(config, of(attention), kept) == []


def test_a_class_name_before_the_members_is_a_disagreement() -> None:
    kinds = {n: "W8A16" if ".self_attn." in n else "W4A16" for n in dense(2)}
    names = [n for n in dense(2) if ".self_attn." in n]
    found = problems(ct(group("Linear"), group(*names, bits=8)), kinds)
    assert len(found) == 1, "two layers are one finding"
    assert found[0].startswith(f"{QKV}: engines disagree: vLLM: quantized as group_1, by '{names[0]}'")
    assert "vLLM 0.25: quantized as group_0, by 'Linear'" in found[0]
    assert "SGLang: quantized as group_0, by 'Linear'" in found[0] and found[0].endswith("(and 1 modules alike)")


def test_groups_of_equal_content_are_one_scheme() -> None:
    names = [n for n in dense(2) if ".self_attn." in n]
    assert problems(ct(group("Linear"), group(*names))) == []


def test_a_fused_group_that_is_mixed_is_found() -> None:
    k = "model.layers.1.self_attn.k_proj"
    quantized = of([n for n in dense(2) if n != k])
    found = problems(ct(group("Linear"), ignore=("lm_head", k)), quantized, ("lm_head", k))
    assert found == [
        "model.layers.1.self_attn.qkv_proj: engines hold it in one module, but k_proj is not quantized and q_proj is"
    ]
    # every weight is quantized, and the config ignores one member
    found = problems(ct(group("Linear"), ignore=("lm_head", k)))
    assert found == [
        "vLLM and SGLang: model.layers.1.self_attn.qkv_proj: ignore names some of its members and not q_proj, v_proj "
        f"(by '{k}')"
    ]


def test_a_quantized_module_that_is_ignored_or_not_reached_is_found() -> None:
    o, down = "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"
    found = problems(ct(group("Linear"), ignore=("lm_head", o)))
    assert found == [f"vLLM and SGLang: {o}: its weights are quantized, but it is looked up as not quantized, by '{o}'"]
    found = problems(ct(group(r"re:.*self_attn\..*_proj$", r"re:.*(gate|up)_proj$")), of(dense(1)))
    assert [f.split(":")[0] for f in found] == ["vLLM", "SGLang"]
    assert f"{down}: its weights are quantized, but it is looked up as not quantized: no entry reaches it" in found[0]
    assert f"{down}: no target and no ignore entry reaches it" in found[1]


def test_an_unquantized_linear_must_be_ignored() -> None:
    o = "model.layers.0.self_attn.o_proj"
    quantized = of([n for n in dense(2) if n != o])
    found = problems(ct(group("Linear")), quantized, ("lm_head", o))
    assert found == [
        f"vLLM and SGLang: {o}: its weights are in high precision, but it is looked up as quantized as group_0, by 'Linear'"
    ]
    named = ct(group(*quantized))
    found = problems(named, quantized, ("lm_head", o))
    assert found == [f"SGLang: {o}: no target and no ignore entry reaches it: unable to find matching target"]
    assert problems(named | {"ignore": ["lm_head", o]}, quantized, ("lm_head", o)) == []


def test_sglang_ignores_by_suffix_and_vllm_does_not() -> None:
    kept = tuple(n for n in dense(2) if n.endswith("o_proj"))
    quantized = of([n for n in dense(2) if n not in kept])
    found = problems(ct(group("Linear"), ignore=("lm_head", "self_attn.o_proj")), quantized, ("lm_head", *kept))
    assert len(found) == 1 and "engines disagree: vLLM: quantized as group_0" in found[0]
    assert "SGLang: not quantized, by 'self_attn.o_proj'" in found[0]


def test_a_quantized_head_needs_a_target_of_its_own() -> None:
    quantized = of([*dense(1), "lm_head"])
    found = problems(ct(group("Linear"), ignore=()), quantized, ())
    assert found == [
        "vLLM and SGLang: lm_head: its weights are quantized, but nothing names it, and a class name as `Linear` does not "
        "reach a head"
    ]
    assert problems(ct(group("Linear", "lm_head"), ignore=()), quantized, ()) == []
    assert problems(ct(group("Linear", "re:.*lm_head"), ignore=()), quantized, ()) == []


def test_of_experts_the_first_is_asked_by_the_usual_names() -> None:
    linears = mixtral()
    fused = FAMILIES["mixtral"].fused
    named = ct(group(*[r"re:.*self_attn\..*$", r"re:.*experts\.\d+\.w[123]$"]))
    found = name_problems(named, of(linears), ["lm_head"], fused)
    assert any(
        f.startswith("model.layers.0.block_sparse_moe.experts: engines disagree: vLLM: quantized") for f in found
    )
    both = ct(group(r"re:.*self_attn\..*$", r"re:.*experts\.\d+\.(w[123]|(gate|up|down)_proj)$"))
    assert name_problems(both, of(linears), ["lm_head"], fused) == []
    half = {n: "W8A16" if n.endswith("experts.1.w2") else "W4A16" for n in linears}
    assert any("of different schemes: 0.w1 W4A16 and 1.w2 W8A16" in f for f in name_problems(both, half, [], fused))
    gates = group(r"re:.*(gate|up)_proj$", bits=8)
    split = ct(gates, group(r"re:.*(down|q|k|v|o)_proj$"))
    answers = looked_up("vllm", split, moe(1, 1), LLAMA)
    assert answers["model.layers.0.mlp.experts"].by == "gate, up and down of its experts resolve to different schemes"


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


def test_a_part_of_a_name_excludes_more_than_was_meant() -> None:
    linears, router = [*moe(1, 2), *(n.replace("layers.0", "layers.1") for n in dense(1))], "model.layers.0.mlp.gate"
    found = name_problems(
        AWQ | {"modules_to_not_convert": ["gate"]}, of(linears), [router, "lm_head"], LLAMA, "qwen3_moe"
    )
    assert found == [
        "vLLM and SGLang: model.layers.1.mlp.gate_up_proj: its weights are quantized, but it is looked up as not quantized, "
        "by 'gate'"
    ]
    config = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head", "o_proj"]}
    found = problems(config)
    assert found == [
        "vLLM and SGLang: model.layers.0.self_attn.o_proj: its weights are quantized, but it is looked up as not quantized, "
        "by 'o_proj' (and 1 modules alike)"
    ]
    tail = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head", "model.layers.1"]}
    found = name_problems(tail, of(dense(12)), ["lm_head"], LLAMA)
    assert len(found) == 8 and any("model.layers.10." in name for name in excluded(tail, dense(12)))


def excluded(config: dict[str, Any], linears: list[str]) -> list[str]:
    return [m for m, answer in looked_up("vllm", config, linears, LLAMA).items() if answer.kind == "ignored"]


def test_modelopt_globs_reach_a_tree_and_no_more() -> None:
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "model.layers.1.mlp*"]}
    kept = tuple(n for n in dense(2) if n.startswith("model.layers.1.mlp"))
    assert problems(config, of([n for n in dense(2) if n not in kept]), ("lm_head", *kept)) == []
    assert problems(config | {"ignore": ["lm_head", "model.layers.1.mlp.*"]}, of(dense(2)))


def test_sglang_excludes_a_part_of_mla_in_every_layer_at_once() -> None:
    one = "model.layers.1.self_attn.q_b_proj"
    config = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head", one]}
    quantized = of([n for n in mla() if n != one])
    found = name_problems(config, quantized, [one, "lm_head"], FAMILIES["deepseek_v3"].fused)
    assert len(found) == 1 and found[0].startswith(
        "model.layers.0.self_attn.q_b_proj: engines disagree: vLLM: quantized"
    )
    assert f"SGLang: not quantized, by '{one}'" in found[0]


def test_modelopt_of_several_algorithms_looks_into_quantized_layers() -> None:
    layers = {n: {"quant_algo": "FP8" if ".self_attn." in n else "NVFP4"} for n in [*dense(1)]}
    config = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers, "ignore": []}
    kinds = {n: layer["quant_algo"] for n, layer in layers.items()}
    assert problems(config, kinds) == []
    layers["model.layers.0.mlp.up_proj"] = {"quant_algo": "FP8"}
    found = problems(config, kinds)
    assert found == [f"vLLM and SGLang: {GATE_UP}: quantized_layers gives its members FP8 and NVFP4"]
    del layers["model.layers.0.self_attn.o_proj"]
    assert any("o_proj: its weights are quantized" in f for f in problems(config, kinds))


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "lm_head": False}


def test_gptq_rules_are_asked_with_the_merged_name() -> None:
    kept = tuple(n for n in dense(2) if n.endswith(("q_proj", "k_proj", "v_proj")))
    quantized = of([n for n in dense(2) if n not in kept])
    # "-:.*q_proj" reaches no qkv_proj; vLLM saves itself by what is stored
    found = problems(GPTQ | {"dynamic": {r"-:.*\.[qk]_proj": {}}}, quantized, ("lm_head", *kept))
    assert len(found) == 1 and "engines disagree: vLLM: not quantized" in found[0] and "SGLang: quantized" in found[0]
    assert problems(GPTQ | {"dynamic": {r"-:.*\.(q|k|v|qkv)_proj": {}}}, quantized, ("lm_head", *kept)) == []
    kinds = {n: "8 bits" if n.endswith("up_proj") else "4 bits" for n in dense(1)}
    assert "of different schemes" in problems(GPTQ | {"dynamic": {r"+:.*\.up_proj": {"bits": 8}}}, kinds)[0]
    found = problems(GPTQ | {"dynamic": {"+:.*v_proj": {"bits": 8}}})
    assert (
        len(found) == 1 and 'looked up as quantized as gptq {"bits": 8}' in found[0] and "q_proj by itself" in found[0]
    )


def test_gptq_lists_are_parts_of_names() -> None:
    listed = GPTQ | {"modules_in_block_to_quantize": [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.down_proj"]]}
    found = problems(listed)
    assert any("leaves out some of its members" in f and QKV in f for f in found)
    assert any(f.startswith("model.layers.0.self_attn.o_proj: engines disagree") for f in found)


def test_fp8_wants_whole_names_in_vllm_and_parts_of_the_path_in_sglang() -> None:
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    kept = tuple(n for n in dense(2) if n.endswith("o_proj"))
    quantized = of([n for n in dense(2) if n not in kept])
    assert problems(fp8 | {"modules_to_not_convert": [*kept]}, quantized, ("lm_head", *kept)) == []
    found = problems(fp8 | {"modules_to_not_convert": ["o_proj"]}, quantized, ("lm_head", *kept))
    assert len(found) == 1 and "engines disagree: vLLM: quantized as fp8" in found[0]
    assert problems(fp8) == [], "the head is never taken as quantized, named or not"
    routed = name_problems(
        fp8, of(mla()), [*routers("deepseek_v3"), "lm_head"], FAMILIES["deepseek_v3"].fused, "deepseek_v3"
    )
    assert routed == [], "no engine asks for the router of a DeepSeek"


def test_torchao_asks_with_the_merged_name_and_never_for_experts() -> None:
    kind = {"_type": "Int4WeightOnlyConfig", "_data": {}}
    plain = {"quant_method": "torchao", "quant_type": {"default": kind}, "modules_to_not_convert": ["lm_head"]}
    kept = tuple(n for n in dense(1) if n.endswith(("q_proj", "k_proj", "v_proj")))
    quantized = of([n for n in dense(1) if n not in kept])
    assert problems(plain) == []
    found = problems(plain | {"modules_to_not_convert": ["lm_head", *kept]}, quantized, ("lm_head", *kept))
    assert found == [f"vLLM: {QKV}: its weights are in high precision, but it is looked up as quantized as torchao"]
    assert problems(plain | {"modules_to_not_convert": ["lm_head", QKV]}, quantized, ("lm_head", *kept)) == []
    assert "no entry reaches it" in name_problems(plain, of(moe(1, 2)), [], LLAMA)[0]
    keys = {r"re:model\.layers\.\d+\.mlp\..*": kind, "_default": None, "model.layers.0.self_attn.o_proj": kind}
    fqn = plain | {"quant_type": {"default": {"_type": "ModuleFqnToConfig", "_data": {"module_fqn_to_config": keys}}}}
    assert problems(fqn, quantized, ("lm_head", *kept)) == []
    assert problems(fqn, of(dense(1)))


def test_auto_round_reads_extra_config_and_blocks() -> None:
    base = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "data_type": "int"}
    o = "model.layers.0.self_attn.o_proj"
    blocks = base | {"block_name_to_quantize": "model.layers.0"}
    kept = tuple(n for n in dense(2) if n.startswith("model.layers.1"))
    assert problems(blocks, of(dense(1)), ("lm_head", *kept)) == []
    extra = base | {"extra_config": {o: {"bits": 16, "data_type": "float"}}}
    assert problems(extra, of([n for n in dense(2) if n != o]), ("lm_head", o)) == []
    assert "looked up as not quantized, by" in problems(extra)[0]
    half = base | {"extra_config": {"model.layers.0.mlp.up_proj": {"bits": 8}}}
    assert any("extra_config treats its members differently" in f for f in problems(half))


def test_a_pattern_that_is_none_and_a_method_that_is_unknown() -> None:
    found = problems(ct(group("re:(", "Linear")), of(dense(1)))
    assert found and all("is not a regular expression" in f for f in found)
    for config in ({"quant_method": "bitsandbytes"}, {"group_size": 128, "bits": 4}, {}):
        assert readers(config) == () and problems(config) == []


def test_a_head_that_transformers_takes_for_quantized_and_engines_do_not() -> None:
    """Loaded with transformers 5.23, `lm_head.weight_scale` is missing, and logits are infinite."""
    bare = ct(group("Linear"), ignore=())
    (said,) = head_problems(bare, ["lm_head", "model.layers.0.mlp.gate"])
    assert said.startswith("transformers: lm_head: its weights are in high precision") and "'Linear'" in said
    assert name_problems(bare, of(dense()), ["lm_head"], LLAMA) == []
    assert head_problems(ct(group("re:.*head"), ignore=()), ["model.lm_head"]) != []


@pytest.mark.parametrize(
    "ignore", [("lm_head",), ("re:.*lm_head",), ("re:lm_head",), ("language_model.lm_head",), ("Linear",)]
)
def test_a_head_that_is_named_is_let_be(ignore: tuple[str, ...]) -> None:
    for name in ("lm_head", "language_model.lm_head"):
        assert head_problems(ct(group("Linear"), ignore=ignore), [name]) == []
    assert head_problems(ct(group("re:model.layers.*"), ignore=()), ["lm_head"]) == []
    assert head_problems({"quant_method": "fp8"}, ["lm_head"]) == []
    assert head_problems(ct(group("re:("), ignore=()), ["lm_head"]) == [], "a broken pattern is said of every module"
