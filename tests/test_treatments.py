"""Treatments: rules of the recipe's own scheme on any layout, refusals before any work, rules that have no effect."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import DEMO_MODEL, make_artifact, run_cli, save_llama, spawn_cli

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


@pytest.mark.slow
def test_the_layouts_own_files_come_before_config_json(tmp_path: Path) -> None:
    """Killed at each rename in turn: config.json is never there without hf_quant_config.json."""
    model, seen = save_llama(tmp_path / "m", shards=1), set()
    for point in range(1, 30):
        out = tmp_path / str(point)
        env = {"QUANTPUB_CRASH_AT": f"renamed:{point}"}
        ran = spawn_cli("quantize", model, "-r", "nvfp4a16", "--layout", "modelopt-nvfp4", "-o", out, env=env)
        there = {name for name in ("config.json", "hf_quant_config.json") if (out / name).is_file()}
        assert "config.json" not in there or "hf_quant_config.json" in there
        seen.add(frozenset(there))
        if ran.code == 0:
            break
    assert {frozenset(), frozenset({"hf_quant_config.json"})} < seen, "the order was met"
