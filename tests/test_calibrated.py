"""Calibrated recipes as a user meets them: what is refused before any data is read, and what a cached calibration is for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO_MODEL, DEMO_TEXT, run_cli
from safetensors import safe_open
from test_families import save_tiny

from quantpub.recipe import load_recipe
from quantpub.sources import SAMPLE, SAMPLES, LocalSource

pytestmark = pytest.mark.slow  # together more than a few seconds

SMALL = ("--calibration", DEMO_TEXT, "--num-samples", 2, "--max-seq-len", 48)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("QUANTPUB_CACHE", str(folder))
    return folder


def described(model: Path, **changes: Any) -> Path:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return model


def edit_between_samples(model: Path, tensor: str) -> None:
    """Turn the signs of a tensor's weights, none of which the fingerprint of the shard looks at."""
    path = model / "model.safetensors"
    before, raw = LocalSource(model).fingerprint(path.name), bytearray(path.read_bytes())
    header = int.from_bytes(raw[:8], "little")
    start, end = json.loads(raw[8 : 8 + header])[tensor]["data_offsets"]
    windows = [max(0, len(raw) - SAMPLE) * i // (SAMPLES - 1) for i in range(SAMPLES)]
    for high in range(8 + header + start + 1, 8 + header + end, 2):  # of a little-endian bf16 the byte with its sign
        if not any(at <= high < at + SAMPLE for at in windows):
            raw[high] ^= 0x80
    path.write_bytes(raw)
    assert LocalSource(model).fingerprint(path.name) == before, "this test is about what a fingerprint does not see"


@pytest.mark.parametrize("recipe", ["w4a16-gptq", "fp8-static"])
def test_a_source_edited_however_lightly_is_calibrated_anew(
    recipe: str, cache: Path, model: Path, tmp_path: Path
) -> None:
    first = run_cli("quantize", model, "-r", recipe, "--engine", "vllm", *SMALL, "-o", tmp_path / "first")
    edit_between_samples(model, "model.layers.1.mlp.down_proj.weight")
    second = run_cli("quantize", model, "-r", recipe, "--engine", "vllm", *SMALL, "-o", tmp_path / "second")
    assert (first.code, second.code) == (0, 0), first.err + second.err
    keys = {
        json.loads((tmp_path / n / ".quantpub" / "calibration.json").read_text())["key"] for n in ("first", "second")
    }
    assert len(keys) == 2
    checked = run_cli("verify", tmp_path / "second", "--source", model)
    assert checked.code == 0, checked.err


@pytest.mark.parametrize("recipe", ["fp8-static", "nvfp4", "w4a16-gptq"])
def test_layers_that_calibration_does_not_run_are_refused_before_it(
    recipe: str, cache: Path, model: Path, tmp_path: Path
) -> None:
    """Heads that draft tokens are layers behind the model's own: here, its last one."""
    described(model, num_hidden_layers=3)
    ran = run_cli("quantize", model, "-r", recipe, "--engine", "vllm", *SMALL, "-o", tmp_path / "out")
    assert ran.code == 3
    assert "model.layers.3." in ran.err
    assert r"'re:model\.layers\.3\..*' under `ignore`" in ran.err
    assert "drafts tokens" in run_cli("plan", model, "-r", recipe, "--engine", "vllm").err
    assert not cache.exists()
    assert not (tmp_path / "out").exists()


def test_ignoring_them_as_the_error_advises_helps(cache: Path, model: Path, tmp_path: Path) -> None:
    described(model, num_hidden_layers=3)
    recipe = load_recipe("fp8-static")
    own = recipe.model_copy(update={"ignore": (*recipe.ignore, r"re:model\.layers\.3\..*")})
    (tmp_path / "own.yaml").write_text(own.as_yaml())
    out = tmp_path / "out"
    ran = run_cli("quantize", model, "-r", tmp_path / "own.yaml", "--engine", "vllm", *SMALL, "-o", out)
    assert ran.code == 0, ran.err
    with safe_open(out / "model.safetensors", "pt") as f:
        held = set(f.keys())
    assert "model.layers.2.mlp.down_proj.input_scale" in held
    assert "model.layers.3.mlp.down_proj.input_scale" not in held


@pytest.mark.parametrize("held", ["file", "folder", "artifact"])
def test_a_folder_that_is_taken_is_told_before_the_calibration(held: str, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if held == "file":
        out.write_text("mine")
    elif held == "folder":
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    else:
        assert run_cli("quantize", DEMO_MODEL, "-r", "fp8-dynamic", "--engine", "vllm", "-o", out).code == 0
    ran = run_cli("quantize", DEMO_MODEL, "-r", "fp8-static", "--engine", "vllm", *SMALL, "-o", out)
    assert ran.code == 5
    assert ran.err.count("\n") == 1
    assert not cache.exists()


def test_other_data_into_a_finished_artifact_is_a_conflict(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_cli("quantize", DEMO_MODEL, "-r", "fp8-static", "--engine", "vllm", *SMALL, "-o", out).code == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = run_cli("quantize", DEMO_MODEL, "-r", "fp8-static", "--engine", "vllm", *SMALL, "--seed", 7, "-o", out)
    assert other.code == 5
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("key", ["algorithm", "transform"])
def test_a_name_that_is_no_name_is_one_line(key: str, tmp_path: Path) -> None:
    text = load_recipe("int8-smoothquant").as_yaml().replace(f"{key}:\n  name:", f"{key}:\n  name: [a]\n  was:")
    (tmp_path / "own.yaml").write_text(text)
    ran = run_cli("plan", DEMO_MODEL, "-r", tmp_path / "own.yaml")
    assert (ran.code, ran.err.count("\n")) == (3, 1)
    assert f"unknown {key}" in ran.err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_local_experts": 2}, "has no place in the [2, "),
        ({"intermediate_size": 32}, "has no place in the [4, "),
        ({"intermediate_size": 128}, "has no place in the [4, "),
    ],
)
def test_a_config_that_does_not_fit_the_experts_is_one_line(
    changes: dict[str, Any], said: str, cache: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    save_tiny("mixtral", model, vocab_size=8192)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, model / name)
    described(model, **changes)
    ran = run_cli("quantize", model, "-r", "fp8-static", "--engine", "vllm", *SMALL, "-o", tmp_path / "out")
    assert (ran.code, ran.err.count("\n")) == (3, 1), ran.err
    assert said in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{"num_hidden_layers": "four"}, {"num_attention_heads": 0}, {"rope_scaling": "x"}])
def test_a_config_that_transformers_does_not_understand_is_one_line(
    changes: dict[str, Any], cache: Path, model: Path, tmp_path: Path
) -> None:
    """Its exceptions are of many kinds."""
    described(model, **changes)
    ran = run_cli("quantize", model, "-r", "fp8-static", "--engine", "vllm", *SMALL, "-o", tmp_path / "out")
    assert (ran.code, ran.err.count("\n")) == (3, 1), ran.err
    assert "transformers does not " in ran.err
    assert not (tmp_path / "out").exists()


def test_a_sequential_algorithm_does_not_follow_smoothing(cache: Path, tmp_path: Path) -> None:
    """It would solve weights that smoothing has not touched, behind norms that it has."""
    recipe = tmp_path / "both.yaml"
    recipe.write_text(
        "description: both\nscheme: W8A8\nalgorithm: {name: gptq}\ntransform: {name: smoothquant, alpha: 0.5}\n"
        "ignore: [lm_head]\nengines: {vllm: ct-int}\n"
    )
    ran = run_cli("quantize", DEMO_MODEL, "-r", recipe, "--engine", "vllm", *SMALL, "-o", tmp_path / "out")
    assert ran.code == 3 and "does not follow smoothquant" in ran.err
    assert not (tmp_path / "out").exists() and not cache.exists()


def test_gemma2_has_no_fp8_cache(tmp_path: Path) -> None:
    save_tiny("gemma2", tmp_path / "model")
    ran = run_cli("plan", tmp_path / "model", "-r", "fp8-dynamic-kv", "--engine", "vllm")
    assert ran.code == 3 and "caps its logits" in ran.err


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("fp8-static", "scales of activations"),
        ("fp8-static-kv", "scales of activations, scales of the KV cache"),
        ("int8-smoothquant", "smoothing"),
        ("w4a16-gptq", "Hessians of inputs"),
    ],
)
def test_the_plan_says_that_data_is_needed(recipe: str, said: str) -> None:
    ran = run_cli("plan", DEMO_MODEL, "-r", recipe, "--engine", "vllm")
    assert f"needs data, for {said}\n" in ran.out
    assert "needs data" not in run_cli("plan", DEMO_MODEL, "-r", "w4a16", "--engine", "vllm").out


def test_an_empty_name_is_no_data(tmp_path: Path) -> None:
    ask = ("quantize", DEMO_MODEL, "-r", "fp8-static", "--engine", "vllm", "-o", tmp_path / "out")
    ran = run_cli(*ask, "--calibration", "")
    assert ran.code == 2 and "--calibration names nothing" in ran.err


def test_a_second_recipe_calibrates_for_free(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other recipe, same data: no sample is read again. Other data: solutions and statistics are others."""
    import quantpub.observe as stage

    assert (
        run_cli("quantize", DEMO_MODEL, "-r", "fp8-static", "--engine", "vllm", *SMALL, "-o", tmp_path / "1").code == 0
    )
    with monkeypatch.context() as patch:
        patch.setattr(stage, "read_samples", lambda *_: pytest.fail("the data was read again"))
        ran = run_cli("quantize", DEMO_MODEL, "-r", "nvfp4", "--engine", "vllm", *SMALL, "-o", tmp_path / "2")
        assert ran.code == 0, ran.err
    other = ("--calibration", DEMO_TEXT, "--num-samples", 3, "--max-seq-len", 48)
    for name, data in (("3", SMALL), ("4", other)):
        ran = run_cli("quantize", DEMO_MODEL, "-r", "w4a16-gptq", "--engine", "vllm", *data, "-o", tmp_path / name)
        assert ran.code == 0, ran.err
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "34"}
    assert weights["3"] != weights["4"]


def test_experts_share_the_largest_input_of_their_layer(cache: Path, tmp_path: Path) -> None:
    from quantpub.artifact import Artifact
    from quantpub.calibrating import Asked, calibrate
    from quantpub.checkpoint import open_checkpoint
    from quantpub.decode import Decoder
    from quantpub.plan import make_plan
    from quantpub.quantize import quantize

    save_tiny("qwen3_moe", tmp_path / "moe")
    ids = tmp_path / "ids.jsonl"
    ids.write_text(
        "".join(json.dumps({"input_ids": [(7 * i + j) % 60 + 3 for j in range(48)]}) + "\n" for i in range(4))
    )
    plan = make_plan(open_checkpoint(str(tmp_path / "moe")), load_recipe("fp8-static"), "ct-float")
    found = calibrate([plan], Asked(str(ids), 4, 48))
    quantize(found.plans, tmp_path / "out", statistics=found.statistics)
    decoder, statistics = Decoder(Artifact.open(tmp_path / "out")), found.statistics
    assert statistics is not None
    for leaf in ("gate_proj", "down_proj"):
        names = [f"model.layers.1.mlp.experts.{e}.{leaf}" for e in range(4)]
        amax = [float(statistics.input(name).amax_K.max()) for name in names]
        assert len(set(amax)) > 1, "this test is about experts that differ"
        assert [float(decoder.qtensor(name).input_scale) for name in names] == [pytest.approx(max(amax) / 448)] * 4
