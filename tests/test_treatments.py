"""Treatments: rules of the recipe's own scheme on any layout, refusals before any work, rules that have no effect."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import DEMO_MODEL, make_artifact, run_cli, save_llama

from quantpub import files
from quantpub.artifact import Artifact
from quantpub.checkpoint import open_checkpoint
from quantpub.decode import Decoder
from quantpub.errors import InputError
from quantpub.plan import make_plan
from quantpub.recipe import Recipe, load_recipe
from quantpub.verify.run import verify

DOWN = r"re:.*\.down_proj"


def ruled(layout: str, rule: dict[str, object]) -> Recipe:
    base = load_recipe("w4a16").model_dump()
    return Recipe.model_validate(base | {"engines": {"vllm": layout}, "rules": [rule]})


@pytest.mark.parametrize("layout", ["ct-pack", "gptq", "awq"])
def test_a_rule_may_change_the_algorithm_alone(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(ruled(layout, {"match": DOWN, "scheme": "W4A16", "algorithm": {"name": "rtn"}}).as_yaml())
    artifact = Artifact.open(make_artifact(DEMO_MODEL, str(path), tmp_path / "a", layout))
    plain = make_artifact(DEMO_MODEL, "w4a16", tmp_path / "plain", layout)
    assert artifact.config() == Artifact.open(plain).config(), "one scheme is one group, whatever found the scales"
    assert {check["status"] for check in verify(artifact, str(DEMO_MODEL))["checks"]} == {"passed"}
    decoder = Decoder(artifact)
    assert {decoder.place(m) for m, _ in decoder.modules() if m.endswith("down_proj")} == {1}


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_another_group_size_needs_a_layout_of_groups(layout: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"a checkpoint in layout {layout} cannot hold weights of scheme W4A16"):
        make_plan(
            open_checkpoint(str(DEMO_MODEL)),
            ruled(layout, {"match": DOWN, "scheme": "W4A16", "group_size": 32}),
            layout,
        )
    make_plan(
        open_checkpoint(str(DEMO_MODEL)),
        ruled("ct-pack", {"match": DOWN, "scheme": "W4A16", "group_size": 48}),
        "ct-pack",
    )


def test_a_rule_on_what_is_never_quantized_has_no_effect_and_the_plan_says_so(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        ruled("ct-pack", {"match": "model.norm", "scheme": "W8A16", "algorithm": {"name": "rtn"}}).as_yaml()
    )
    shown = run_cli("plan", DEMO_MODEL, "-r", path).out
    assert "model.norm matches nothing that is quantized" in shown


def test_the_layouts_own_files_come_before_config_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at before and after each rename, where a run may die: config.json is never there without hf_quant_config.json."""
    out, seen = tmp_path / "out", list[frozenset[str]]()

    def look(point: str) -> None:
        there = {name for name in ("config.json", "hf_quant_config.json") if (out / name).is_file()}
        if point in ("rename", "renamed"):
            seen.append(frozenset(there))

    monkeypatch.setattr(files, "write_point", look)
    make_artifact(save_llama(tmp_path / "m", shards=1), "nvfp4a16", out, "modelopt-nvfp4")
    assert frozenset({"config.json"}) not in seen
    assert list(dict.fromkeys(map(len, seen))) == [0, 1, 2], "the order was met"


@pytest.mark.parametrize(
    ("scheme", "algorithm", "layout"),
    [
        ("FP8", "fp8", "ct-float"),
        ("FP8", "fp8", "modelopt-fp8"),
        ("NVFP4", "nvfp4", "ct-nvfp4"),
        ("NVFP4", "nvfp4", "modelopt-nvfp4"),
    ],
)
def test_what_needs_calibration_says_so_in_the_plan(scheme: str, algorithm: str, layout: str) -> None:
    base = load_recipe("fp8-dynamic").model_dump()
    recipe = Recipe.model_validate(
        base | {"scheme": scheme, "algorithm": {"name": algorithm}, "engines": {"vllm": layout}}
    )
    plan = make_plan(open_checkpoint(str(DEMO_MODEL)), recipe, layout)
    assert not plan.rejections
    assert plan.calibrates == {"inputs"}


@pytest.mark.parametrize("layout", ["ct-pack", "gptq", "awq"])
def test_a_merged_linear_that_stays_is_named_too(layout: str) -> None:
    """Engines that look up the merged name alone would build it quantized, and find no such weights."""
    ignoring = {"ignore": ["lm_head", r"re:model\.layers\.2\.self_attn\.[qkv]_proj", "model.layers.3.mlp.down_proj"]}
    base = load_recipe("w4a16").model_dump() | {"engines": {"vllm": layout}}
    plan = make_plan(open_checkpoint(str(DEMO_MODEL)), Recipe.model_validate(base | ignoring), layout)
    at = "model.layers.2.self_attn."
    assert plan.ignored == (
        "lm_head",
        at + "k_proj",
        at + "q_proj",
        at + "qkv_proj",
        at + "v_proj",
        "model.layers.3.mlp.down_proj",
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_magnitudes_that_no_weight_has_are_refused(dtype: str, tmp_path: Path) -> None:
    """Their squares overflow, and scales found from them would be infinite."""
    import torch
    from safetensors.torch import load_file, save_file

    model = save_llama(tmp_path / "m", shards=1)
    (model / "model.safetensors.index.json").unlink()
    shard = next(model.glob("*.safetensors")).rename(model / "model.safetensors")
    tensors = {name: t.to(getattr(torch, dtype)) for name, t in load_file(shard).items()}
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = 2.0**96
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"holds values of 2\^96 and more"):
        make_artifact(model, "w4a16", tmp_path / "a")
    assert not (tmp_path / "a").exists()
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = 2.0**60
    tensors["model.norm.weight"][7] = -(2.0**120)  # copied, as masks are
    save_file(tensors, shard, metadata={"format": "pt"})
    artifact = make_artifact(model, "w4a16-rtn", tmp_path / "b")
    assert artifact.is_dir()
