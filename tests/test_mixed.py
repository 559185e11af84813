"""Mixed precision by rules: first match wins, merged linears stay together, and every engine's lookup finds the same group."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO_MODEL, make_artifact, run_cli, save_llama
from test_partners import NEWEST, our_digests, their_digests

from quantpub.actions import Action
from quantpub.artifact import Artifact
from quantpub.checkpoint import open_checkpoint
from quantpub.decode import Decoder
from quantpub.errors import InputError
from quantpub.families import FAMILIES
from quantpub.gemms import fuse
from quantpub.plan import Plan, make_plan, require_runnable
from quantpub.plan_facts import summary, tensor_parallel
from quantpub.plan_files import quantization_config
from quantpub.recipe import Recipe, load_recipe
from quantpub.treatments import targets
from quantpub.verify.run import verify

MIXED = "w4a16-fp8-down"


def recipe(**changes: object) -> Recipe:
    engines = {"vllm": "ct-pack", "sglang": "ct-pack"}
    return Recipe.model_validate(load_recipe("w4a16").model_dump() | {"engines": engines} | changes)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(DEMO_MODEL, MIXED, tmp_path_factory.mktemp("mixed") / "artifact")


def test_each_linear_has_the_scheme_of_its_rule(mixed: Path) -> None:
    decoder = Decoder(Artifact.open(mixed))
    found = {module: decoder.treated(module).scheme.name for module, _ in decoder.modules()}
    assert {name for module, name in found.items() if module.endswith("down_proj")} == {"FP8_DYNAMIC"}
    assert {name for module, name in found.items() if not module.endswith("down_proj")} == {"W4A16"}
    config = Artifact.open(mixed).config()["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert [group["format"] for group in config["config_groups"].values()] == ["pack-quantized", "float-quantized"]


def test_verify_passes_with_a_floor_for_each_scheme(mixed: Path) -> None:
    evidence = verify(Artifact.open(mixed), str(DEMO_MODEL))
    assert evidence["verdict"] == "passed", evidence["checks"]


@pytest.mark.slow
@pytest.mark.parametrize("site", [None, NEWEST], ids=["pinned by the engines", "newest"])
def test_compressed_tensors_finds_the_same_weights(mixed: Path, site: Path | None) -> None:
    assert their_digests(mixed, site)["digests"] == our_digests(mixed)


def test_every_lookup_order_finds_one_group(mixed: Path) -> None:
    """vLLM: name, then members; SGLang: name, class, members. No class and no merged name matches: the two agree."""
    config = Artifact.open(mixed).config()["quantization_config"]
    entries = [(i, entry) for i, group in enumerate(config["config_groups"].values()) for entry in group["targets"]]
    assert "Linear" not in {entry for _, entry in entries}

    def groups(name: str) -> set[int]:
        return {i for i, entry in entries if entry == name or (entry.startswith("re:") and re.match(entry[3:], name))}

    decoder = Decoder(Artifact.open(mixed))
    for module, _ in decoder.modules():
        assert groups(module) == {decoder.place(module)}
    for merged, members in fuse(dict(decoder.modules()), FAMILIES["llama"]).items():
        assert len({next(iter(groups(member))) for member in members}) == 1
        if len(members) > 1:
            assert groups(merged) == set()


def test_the_first_rule_that_matches_wins() -> None:
    rules = [
        {"match": "model.layers.0.mlp.down_proj", "scheme": "W4A16", "group_size": 64},
        {"match": r"re:.*\.down_proj", "scheme": "FP8_DYNAMIC", "algorithm": {"name": "fp8"}},
    ]
    plan = make_plan(open_checkpoint(str(DEMO_MODEL)), recipe(rules=rules), "ct-pack")
    found = {action.module: action.treatment for action in plan.actions if action.treatment is not None}
    assert [found[f"model.layers.{i}.mlp.down_proj"] for i in range(4)] == [1, 2, 2, 2]
    assert found["model.layers.0.mlp.up_proj"] == 0
    assert plan.treatments[1].scheme.group_size == 64 and plan.treatments[1].algorithm == plan.recipe.algorithm


@pytest.mark.parametrize("match", ["model.layers.1.self_attn.k_proj", r"re:.*\.up_proj"])
def test_linears_that_engines_merge_have_one_treatment(match: str) -> None:
    rules = [{"match": match, "scheme": "FP8_DYNAMIC", "algorithm": {"name": "fp8"}}]
    plan = make_plan(open_checkpoint(str(DEMO_MODEL)), recipe(rules=rules), "ct-pack")
    with pytest.raises(InputError, match="engines merge into"):
        require_runnable(plan)
    ignoring = make_plan(open_checkpoint(str(DEMO_MODEL)), recipe(ignore=[match]), "ct-pack")
    with pytest.raises(InputError, match="engines merge into"):
        require_runnable(ignoring)


def test_a_layout_that_cannot_mix_says_so() -> None:
    rules = [{"match": r"re:.*\.down_proj", "scheme": "FP8_DYNAMIC", "algorithm": {"name": "fp8"}}]
    with pytest.raises(InputError, match="a checkpoint in layout gptq cannot hold weights of scheme FP8_DYNAMIC"):
        make_plan(open_checkpoint(str(DEMO_MODEL)), recipe(rules=rules), "gptq")


def test_tensor_parallelism_asks_each_layout(tmp_path: Path) -> None:
    """down_proj has K = 384, three groups of 128: int4 cannot be cut in two there, FP8 can; o_proj cannot in either."""
    model = save_llama(tmp_path / "m")
    plans = {name: make_plan(open_checkpoint(str(model)), load_recipe(name), "ct-pack") for name in ("w4a16", MIXED)}
    assert "mlp.down_proj: 384" in str(tensor_parallel(plans["w4a16"])[2])
    assert "self_attn.o_proj: 128" in str(tensor_parallel(plans[MIXED])[2])


def test_what_a_family_keeps_is_copied_unless_a_rule_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    kept = replace(FAMILIES["llama"], keep=((r"model\.layers\.\d+\.self_attn\.o_proj", "because"),))
    monkeypatch.setitem(FAMILIES, "llama", kept)
    source = open_checkpoint(str(DEMO_MODEL))
    plain = make_plan(source, load_recipe("w4a16"), "ct-pack")
    assert {a.reason for a in plan_actions(plain, "o_proj")} == {"because"} and len(plain.ignored) == 5
    rules = [{"match": "model.layers.2.self_attn.o_proj", "scheme": "W4A16"}]
    ruled = make_plan(source, recipe(rules=rules), "ct-pack")
    assert [action.treatment for action in plan_actions(ruled, "o_proj")] == [None, None, 1, None]


def plan_actions(plan: Plan, ending: str) -> list[Action]:
    found = [action for action in plan.actions if action.module.endswith(ending)]
    return sorted(found, key=lambda action: action.module)


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4"])
def test_an_architecture_that_cannot_be_done_says_why(model: Path, kind: str) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    with pytest.raises(InputError, match=f"models of type {kind} are not quantized: its experts"):
        make_plan(open_checkpoint(str(model)), load_recipe("w4a16"), "ct-pack")


def test_experts_that_no_engine_of_the_recipe_loads_are_refused(tmp_path: Path) -> None:
    """Tile-packed experts: transformers and vLLM leave them out; ignoring them is the way."""
    import torch
    from safetensors.torch import save_file

    (tmp_path / "m").mkdir()
    at, names = "model.layers.0.mlp.experts.", ("gate", "up", "down")
    tensors = {f"{at}{e}.{name}_proj.weight": torch.randn(256, 256).bfloat16() for e in range(4) for name in names}
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "num_experts_per_tok": 2}))
    source, tile = open_checkpoint(str(tmp_path / "m")), load_recipe("int4-hqq-tile")
    with pytest.raises(InputError, match="leaves the experts of such a checkpoint uninitialised"):
        require_runnable(make_plan(source, tile, "torchao-tile"))
    ignoring = tile.model_copy(update={"ignore": ("lm_head", r"re:.*\.experts\..*")})
    require_runnable(make_plan(source, ignoring, "torchao-tile"))
    require_runnable(make_plan(source, load_recipe("w4a16"), "ct-pack"))
    shown = run_cli("plan", tmp_path / "m", "-r", "int4-hqq-tile")
    assert shown.out.count("rejected") == 3 and shown.code == 3, "one line for experts that differ in numbers only"


def test_a_rule_that_matches_nothing_is_shown() -> None:
    rules = [{"match": "model.layers.9.mlp.down_proj", "scheme": "W4A16"}]
    plan = make_plan(open_checkpoint(str(DEMO_MODEL)), recipe(rules=rules), "ct-pack")
    assert summary(plan)["ignore_unmatched"] == ["model.layers.9.mlp.down_proj"]


def test_targets_are_patterns_where_they_hold_of_all() -> None:
    names = [f"model.layers.{i}.mlp.experts.{e}.{p}" for i in range(2) for e in range(3) for p in ("a", "b")]
    assert targets([n for n in names if n.endswith("a")], names) == [r"re:^model\.layers\.\d+\.mlp\.experts\.\d+\.a$"]
    assert targets(names[:1], names) == names[:1]
    assert targets([names[10], names[0]], names) == [names[0], names[10]]


@pytest.mark.parametrize(
    ("rule", "word"),
    [
        ({"match": "re:(", "scheme": "W4A16"}, "not a valid pattern"),
        ({"match": "x", "scheme": "W9"}, "unknown scheme"),
        ({"match": "x", "scheme": "W4A16", "algorithm": {"name": "nope"}}, "unknown algorithm"),
        ({"match": "x", "scheme": "W4A16", "colour": 1}, "colour"),
        ({"match": "x", "scheme": "FP8_DYNAMIC", "algorithm": {"name": "fp8"}}, "transformers cannot have a recipe of"),
    ],
)
def test_a_bad_rule_is_one_line(rule: dict[str, object], word: str, tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(load_recipe("w4a16").model_dump(mode="json") | {"rules": [rule]}))
    with pytest.raises(InputError, match=word):
        load_recipe(str(path))


def test_a_rule_whose_algorithm_does_not_fit_its_scheme_is_refused_before_any_work() -> None:
    rules = [{"match": "x", "scheme": "FP8_DYNAMIC"}]
    with pytest.raises(InputError, match="search makes integer codes, not fp8_e4m3"):
        recipe(rules=rules).require_bindable()


EXPERT_FORMS = {
    "qwen3_moe": ("mlp.experts", ("gate_proj", "down_proj", "up_proj")),
    "mixtral": ("block_sparse_moe.experts", ("w1", "w2", "w3")),
}
FP8_EXPERTS = {"scheme": "FP8_DYNAMIC", "algorithm": {"name": "fp8"}}
# recipe changes → the schemes of the experts of layers 0 and 1
EXPERT_CASES: dict[str, tuple[dict[str, object], list[str | None]]] = {
    "all": ({"rules": [{"match": r"re:.*\.experts\..*", **FP8_EXPERTS}]}, ["float", "float"]),
    "one layer": ({"rules": [{"match": r"re:.*\.1\..*\.experts\..*", **FP8_EXPERTS}]}, ["int", "float"]),
    "one ignored": (
        {
            "rules": [{"match": r"re:.*\.experts\..*", **FP8_EXPERTS}],
            "ignore": ["lm_head", r"re:.*\.0\..*\.experts\..*"],
        },
        [None, "float"],
    ),
    "one scheme": ({}, ["int", "int"]),
    "one scheme, one ignored": ({"ignore": ["lm_head", r"re:.*\.0\..*\.experts\..*"]}, [None, "int"]),
}


def expert_plan(folder: Path, model_type: str, changes: dict[str, object]) -> Plan:
    import torch
    from safetensors.torch import save_file

    at, leaves = EXPERT_FORMS[model_type]
    modules = [f"{at}.{e}.{leaf}" for e in range(12) for leaf in leaves]
    modules += [f"self_attn.{p}_proj" for p in "qkvo"]
    names = [f"model.layers.{i}.{module}.weight" for i in range(2) for module in modules]
    save_file({name: torch.zeros(128, 128).bfloat16() for name in names}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "num_experts_per_tok": 2}))
    plan = make_plan(open_checkpoint(str(folder)), recipe(**changes), "ct-pack")
    require_runnable(plan)
    return plan


def vllm_experts(config: dict[str, Any], layer_name: str) -> str | None:
    """The type of the weights that vLLM 0.25.1 expects of a layer's experts: `get_moe_method` and `get_scheme_dict`."""

    def matches(value: str, target: str) -> bool:
        return re.match(target[3:], value) is not None if target.startswith("re:") else target == value

    types = {t: group["weights"]["type"] for group in config["config_groups"].values() for t in group["targets"]}
    if "Linear" in types:
        types.setdefault("RoutedExperts", types["Linear"])

    def scheme(name: str) -> str | None:
        if any(matches(name, entry) for entry in config["ignore"]):
            return None
        by_name = [t for t in types if matches(name, t)]
        by_class = [t for t in types if (matches("RoutedExperts", t) if t.startswith("re:") else t == "RoutedExperts")]
        return types[(by_name or by_class)[0]] if by_name or by_class else None

    found = {scheme(f"{layer_name}.0.{leaf}") for leaf in ("gate_proj", "up_proj", "down_proj")}
    assert len(found) == 1, "vLLM refuses projections of several schemes"
    return found.pop()


@pytest.mark.parametrize("case", EXPERT_CASES)
@pytest.mark.parametrize("model_type", EXPERT_FORMS)
def test_vllm_finds_the_scheme_of_experts_whatever_their_names(model_type: str, case: str, tmp_path: Path) -> None:
    changes, expected = EXPERT_CASES[case]
    config = quantization_config(expert_plan(tmp_path, model_type, changes))
    at = EXPERT_FORMS[model_type][0]
    assert [vllm_experts(config, f"model.layers.{i}.{at}") for i in range(2)] == expected


@pytest.mark.parametrize("case", EXPERT_CASES)
@pytest.mark.parametrize("model_type", EXPERT_FORMS)
def test_names_for_vllm_give_no_module_a_second_group(model_type: str, case: str, tmp_path: Path) -> None:
    """By compressed-tensors' own matching; and the names that are added are of no module of the checkpoint."""
    import torch
    from compressed_tensors.utils.match import is_match

    plan = expert_plan(tmp_path, model_type, EXPERT_CASES[case][0])
    config = quantization_config(plan)
    groups, linear = list(config["config_groups"].values()), torch.nn.Linear(1, 1, device="meta")
    used = sorted({action.treatment for action in plan.actions if action.treatment is not None})
    for action in plan.actions:
        found = [
            i for i, group in enumerate(groups) if is_match(action.module, linear, group["targets"], config["ignore"])
        ]
        assert found == ([] if action.treatment is None else [used.index(action.treatment)]), action.module
    if model_type == "mixtral":
        added = re.compile(r"experts\..*_proj")
        named = {entry for group in groups for entry in group["targets"]} | set(config["ignore"])
        of_experts = [entry for entry in named if added.search(entry.replace("\\", ""))]
        assert (case == "one scheme") == (not of_experts)
        modules = [action.module for action in plan.actions]
        assert not any(is_match(module, linear, entry) for module in modules for entry in of_experts)


@pytest.mark.parametrize("value", ["true", "'128'", "64.0"])
@pytest.mark.parametrize("rule", [False, True])
def test_a_group_size_is_a_whole_number(value: str, rule: bool, tmp_path: Path) -> None:
    import yaml

    content = load_recipe("w4a16").model_dump(mode="json", exclude={"group_size"})
    size = {"group_size": yaml.safe_load(value)}
    engines = {"engines": {"vllm": "ct-pack"}}
    rules = {"rules": [{"match": "x", "scheme": "W4A16", **size}]}
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(content | engines | (rules if rule else size)))
    with pytest.raises(InputError, match=r"group_size: Input should be a valid integer"):
        load_recipe(str(path))
