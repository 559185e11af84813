"""Every recipe that comes with quantpub, in every layout that holds it: planned, quantized, verified, described."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import DEMO_MODEL, ROOT, make_artifact, run_cli

from quantpub.artifact import Artifact
from quantpub.card import card
from quantpub.card.components import precision
from quantpub.checkpoint import open_checkpoint
from quantpub.decode import Decoder
from quantpub.errors import InputError
from quantpub.layouts import LAYOUTS
from quantpub.plan import make_plan
from quantpub.plan_facts import summary
from quantpub.recipe import load_recipe
from quantpub.scheme import PRESETS
from quantpub.verify.run import verify

# Layouts that hold a recipe's weights beside those that its engines are given. fp8-block as ct-float wants K > 128.
BESIDE = {
    "w4a16": ("gptq", "gptq-v2", "awq", "torchao-tile"),
    "w4a16-rtn": ("gptq", "gptq-v2", "awq", "torchao-tile"),
    "w4a16-gptq": ("gptq", "gptq-v2", "awq", "torchao-tile"),
    "w4a16-asym": ("gptq-v2", "awq"),
    "w4a16-hqq": ("gptq-v2", "awq"),
    "w8a16": ("gptq", "gptq-v2"),
    "fp8-dynamic": ("modelopt-fp8-channel",),
    "fp8-dynamic-kv": ("modelopt-fp8-channel",),
    "fp8-dynamic-search": ("modelopt-fp8-channel",),
    "nvfp4a16": ("torchao-nvfp4",),
}
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
PAIRS = [
    (name, layout)
    for name in RECIPES
    for layout in dict.fromkeys((*load_recipe(name).engines.values(), *BESIDE.get(name, ())))
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_a_recipe_is_planned_quantized_verified_and_described(name: str, layout: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    facts = summary(make_plan(open_checkpoint(str(DEMO_MODEL)), recipe, layout))
    assert facts["quantized"] == 28 and not facts["rejected"] and facts["kernels"]
    artifact = Artifact.open(make_artifact(DEMO_MODEL, name, tmp_path / "a", layout))
    evidence = verify(artifact, str(DEMO_MODEL))
    assert {check["status"] for check in evidence["checks"]} == {"passed"}, evidence["checks"]
    card(artifact)
    text = (artifact.path / "README.md").read_text("utf-8")
    for treatment in Decoder(artifact).treatments:
        assert " | ".join(precision(treatment.scheme)) in text
    assert facts["bits_per_quantized_weight"] == artifact.run()["stages"]["quantize"]["bits_per_quantized_weight"]
    assert artifact.damage() == []


@pytest.mark.parametrize("name", RECIPES)
def test_no_other_layout_holds_it(name: str) -> None:
    """What `BESIDE` and the engines leave out is refused with a reason that names the scheme or the shape."""
    source, scheme = open_checkpoint(str(DEMO_MODEL)), r"[A-Z][A-Z0-9_]+"
    for layout in set(LAYOUTS) - {held for recipe, held in PAIRS if recipe == name}:
        try:
            plan = make_plan(source, load_recipe(name), layout)
        except InputError as error:  # of several schemes one cannot stand in this layout's checkpoint
            assert layout in error.what and load_recipe(name).rules
            continue
        assert plan.rejections, layout
        said = rf"not {scheme}|features|{scheme} has|zero of {scheme}|would round|{layout} has no place for"
        assert all(re.search(said, reason) for reason in plan.rejections.values()), (layout, plan.rejections)


def test_the_recipes_cover_the_schemes() -> None:
    assert {load_recipe(name).scheme for name in RECIPES} == set(PRESETS)


def test_every_recipe_is_in_the_readme_and_says_what_it_is() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    for name in RECIPES:
        assert f"| `{name}` |" in readme, name
        recipe = load_recipe(name)
        assert recipe.gate.max_kl and recipe.gate.workload, name
        recipe.require_bindable()


@pytest.mark.parametrize("layout", ["marlin", "machete"])
def test_a_kernels_layout_is_no_checkpoint(layout: str, tmp_path: Path) -> None:
    ran = run_cli("quantize", DEMO_MODEL, "-r", "w4a16", "--layout", layout, "-o", tmp_path / "a")
    assert ran.code == 2 and f"{layout} is what a kernel eats" in ran.err and not (tmp_path / "a").exists()


def test_modelopts_second_file_says_the_same(tmp_path: Path) -> None:
    artifact = make_artifact(DEMO_MODEL, "nvfp4a16", tmp_path / "a", "modelopt-nvfp4")
    flat = json.loads((artifact / "config.json").read_text())["quantization_config"]
    nested = json.loads((artifact / "hf_quant_config.json").read_text())["quantization"]
    assert flat["quant_algo"] == nested["quant_algo"] == "W4A16_NVFP4" and flat["ignore"] == nested["exclude_modules"]
    (artifact / "hf_quant_config.json").write_text("{}")
    evidence = verify(Artifact.open(artifact), str(DEMO_MODEL))
    failed = {check["id"]: check["detail"] for check in evidence["checks"] if check["status"] == "failed"}
    assert "hf_quant_config.json is not what the layout states" in failed["config"]
