"""The FP8 KV cache: names and scales on disk, models that cannot have it, checks, and attention with a rounded cache."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO_MODEL, make_artifact
from hooked import TOKENS, Hooked, make_calibrated
from safetensors.torch import load_file, save_file
from test_families import save_tiny
from test_verify import failing, reseal

from quantpub import cached
from quantpub.activations import fp8_cached
from quantpub.artifact import Artifact
from quantpub.cached import RoundedCache
from quantpub.checkpoint import open_checkpoint
from quantpub.decode import Decoder
from quantpub.errors import InputError
from quantpub.evaluate import evaluate
from quantpub.forward import ArtifactModel, load_baseline, quiet_transformers
from quantpub.kv_cache import kv_scale
from quantpub.plan import make_plan
from quantpub.recipe import Recipe, load_recipe
from quantpub.verify.run import verify

pytestmark = pytest.mark.slow  # together more than a few seconds

AT = "model.layers.{}.self_attn."


@pytest.fixture(scope="module")
def observed() -> Hooked:
    return Hooked(DEMO_MODEL)


@pytest.mark.parametrize(("amax", "scale"), [(448.0, 1.0), (14.0, 1 / 32), (0.0, 1.0)])
def test_a_scale_by_hand(amax: float, scale: float) -> None:
    found = kv_scale(amax)
    assert found.shape == () and found.dtype == torch.float32 and float(found) == scale


def test_what_comes_out_of_the_cache_by_hand() -> None:
    """Scale 1/2: codes of 300 and 1000 are those of 600 and 2000, beyond 448; 1.0625 and 100 are ties, to even."""
    x = torch.tensor([300.0, -1000.0, 1.0625, 0.0, 100.0])
    assert fp8_cached(x, torch.tensor(0.5)).tolist() == [224.0, -224.0, 1.0, 0.0, 96.0]


@pytest.mark.parametrize(
    ("recipe", "layout", "key", "shape"),
    [
        ("fp8-static-kv", "ct-float", "k_scale", (1,)),
        ("fp8-static-kv", "modelopt-fp8", "k_proj.k_scale", ()),
        ("nvfp4-kv", "ct-nvfp4", "k_scale", (1,)),
        ("nvfp4-kv", "modelopt-nvfp4", "k_proj.k_scale", ()),
    ],
)
def test_names_shapes_and_values_on_disk(
    recipe: str, layout: str, key: str, shape: tuple[int, ...], observed: Hooked, tmp_path: Path
) -> None:
    artifact = make_calibrated(DEMO_MODEL, recipe, tmp_path / "a", layout, observed)
    tensors = load_file(artifact / "model.safetensors")
    for layer in range(4):
        k, v = (tensors[AT.format(layer) + name] for name in (key, key.replace("k", "v")))
        due = observed.kv(AT.format(layer)[:-1])
        assert k.shape == v.shape == shape and k.dtype == v.dtype == torch.float32
        assert (float(k), float(v)) == pytest.approx((due[0] / 448, due[1] / 448))
        read = Decoder(Artifact.open(artifact)).kv_scales()[AT.format(layer)[:-1]]
        assert (float(read[0]), float(read[1])) == (float(k), float(v))
    assert {check["status"] for check in verify(Artifact.open(artifact), str(DEMO_MODEL))["checks"]} == {"passed"}
    stated = json.loads((artifact / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert (stated["num_bits"], stated["type"], stated["dynamic"]) == (8, "float", False)
    if layout.startswith("modelopt"):
        nested = json.loads((artifact / "hf_quant_config.json").read_text())["quantization"]
        assert nested["kv_cache_quant_algo"] == "FP8"


def test_without_a_cache_nothing_is_said(tmp_path: Path) -> None:
    artifact = Artifact.open(make_artifact(DEMO_MODEL, "fp8-dynamic", tmp_path / "a", "ct-float"))
    assert Decoder(artifact).kv_scales() == {}
    assert artifact.config()["quantization_config"]["kv_cache_scheme"] is None
    assert "kv" not in (artifact.meta / "plan.jsonl").read_text().replace("kv_", "")


def with_cache(recipe: str, layout: str, **changes: Any) -> Recipe:
    base = load_recipe(recipe).model_dump() | {"kv_cache": "fp8", "engines": {"vllm": layout}}
    return Recipe.model_validate(base | changes)


@pytest.mark.parametrize(
    ("recipe", "layout"), [("w4a16", "gptq"), ("w4a16", "awq"), ("fp8-block", "hf-fp8"), ("llm-int8", "bnb-int8")]
)
def test_layouts_without_a_place_for_the_scales(recipe: str, layout: str) -> None:
    plan = make_plan(open_checkpoint(str(DEMO_MODEL)), with_cache(recipe, layout), layout)
    assert f"{layout} has no place for the scales of an FP8 KV cache" in plan.rejections.values()


@pytest.mark.parametrize(("model_type", "reason"), [("deepseek_v3", "MLA"), ("qwen3_5_text", "vLLM drops the scales")])
def test_models_that_cannot_have_it(model_type: str, reason: str, tmp_path: Path) -> None:
    save_tiny(model_type, tmp_path / "m")
    plan = make_plan(open_checkpoint(str(tmp_path / "m")), load_recipe("fp8-dynamic-kv"), "ct-float")
    assert any(reason in why for why in plan.rejections.values())


@pytest.mark.parametrize("recipe", ["w4a16", "int8-dynamic", "mxfp4"])
def test_every_layout_of_compressed_tensors_can_have_it(recipe: str) -> None:
    layout = load_recipe(recipe).engines["vllm"]
    plan = make_plan(open_checkpoint(str(DEMO_MODEL)), with_cache(recipe, layout), layout)
    assert plan.calibrates == {"kv"} and len(plan.kv) == 8 and not plan.rejections


def test_projections_that_stay_in_high_precision_have_scales_too() -> None:
    recipe = with_cache("fp8-dynamic", "ct-float", ignore=["lm_head", r"re:.*self_attn\.[qkv]_proj"])
    plan = make_plan(open_checkpoint(str(DEMO_MODEL)), recipe, "ct-float")
    assert len(plan.kv) == 8 and not plan.rejections
    assert AT.format(0) + "k_scale" in plan.outputs("model.safetensors")


def test_one_projection_for_queries_keys_and_values(tmp_path: Path) -> None:
    save_tiny("phi3", tmp_path / "m")
    plan = make_plan(open_checkpoint(str(tmp_path / "m")), load_recipe("fp8-static-kv"), "modelopt-fp8")
    at = AT.format(0)
    assert set(plan.kv[at + "qkv_proj"]) == {at + "k_proj.k_scale", at + "v_proj.v_scale"}


def test_layers_that_the_model_does_not_run_have_none(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    layers = config["num_hidden_layers"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers - 1}))
    plan = make_plan(open_checkpoint(str(tmp_path / "m")), load_recipe("fp8-dynamic-kv"), "ct-float")
    assert len(plan.kv) == 2 * (layers - 1)


# ------------------------------------------------------------------------------------------------- checks


def doctored(artifact: Path, change: Any) -> Path:
    tensors = load_file(artifact / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("k_scale", "v_scale"))]:
        change(tensors, name)
    save_file(tensors, artifact / "model.safetensors", metadata={"format": "pt"})
    reseal(artifact)
    return artifact


@pytest.mark.parametrize("value", [0.0, -0.1, float("nan"), float("inf"), 1.0])
def test_scales_that_cannot_be_right(value: float, observed: Hooked, tmp_path: Path) -> None:
    artifact = make_calibrated(DEMO_MODEL, "fp8-dynamic-kv", tmp_path / "a", "ct-float", observed)
    doctored(artifact, lambda tensors, name: tensors.update({name: torch.tensor([value])}))
    assert failing(artifact, None) == {"kv-cache"}


def test_a_scale_that_is_missing(observed: Hooked, tmp_path: Path) -> None:
    artifact = make_calibrated(DEMO_MODEL, "fp8-dynamic-kv", tmp_path / "a", "ct-float", observed)
    gone = AT.format(2) + "v_scale"
    doctored(artifact, lambda tensors, name: tensors.pop(gone) if name == gone else None)
    assert "tensors" in failing(artifact, None)
    with pytest.raises(InputError, match="v_scale is missing"):
        Decoder(Artifact.open(artifact)).kv_scales()


# ------------------------------------------------------------------------------------------------- attention


def test_the_forward_pass_with_a_rounded_cache(
    observed: Hooked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against values rounded as they leave v_proj, and keys as they leave the rotation, by hooks of the architecture."""
    from transformers.models.llama import modeling_llama

    artifact = Artifact.open(make_calibrated(DEMO_MODEL, "fp8-dynamic-kv", tmp_path / "a", "ct-float", observed))
    with quiet_transformers(), torch.inference_mode():
        model = ArtifactModel(Decoder(artifact))
        got = model.forward(TOKENS)
        model._cache = None
        without = model.forward(TOKENS)
        layers, rotate = iter(range(4)), modeling_llama.apply_rotary_pos_emb

        def rotated(*args: Any, **options: Any) -> Any:
            query, key = rotate(*args, **options)
            return query, cast(key, model.kv_scales[AT.format(next(layers))[:-1]][0])

        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotated)
        for name, module in model.model.named_modules():
            if name.endswith("v_proj"):
                scale = model.kv_scales[name.removesuffix(".v_proj")][1]
                module.register_forward_hook(lambda _, x, out, scale=scale: cast(out, scale))
        due = model.forward(TOKENS)
    assert torch.equal(got, due)
    assert (got - without).norm() / without.norm() > 1e-3


def cast(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def test_evaluation_says_that_the_cache_was_rounded(observed: Hooked, tmp_path: Path) -> None:
    from conftest import DEMO_TEXT

    artifact = Artifact.open(make_calibrated(DEMO_MODEL, "fp8-dynamic-kv", tmp_path / "a", "ct-float", observed))
    found = evaluate(artifact, str(DEMO_MODEL), DEMO_TEXT, windows=1, window=64)["activations"]
    assert found["kv_cache"] == "fp8_e4m3, 4 attentions" and found["not_emulated"] == []


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "qwen3_moe", "gemma2", "phi3", "mixtral", "glm4", "olmo2"])
def test_any_architecture_is_the_same_but_for_the_rounding(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks, soft caps and scales of attention stay what they are: with a cache that rounds nothing, every bit is the same."""
    save_tiny(model_type, tmp_path / "m")
    with quiet_transformers(), torch.inference_mode():
        net = load_baseline(tmp_path / "m")
        scales = {name: (torch.tensor(0.01),) * 2 for name, _ in net.named_modules() if name.endswith("self_attn")}
        x_BT = TOKENS[:2, :48] % net.config.vocab_size
        due, cache = net(x_BT, use_cache=False).logits, RoundedCache(net, scales)
        with cache:
            rounded = net(x_BT, use_cache=False).logits
        assert cache.reached == set(scales) and not torch.equal(rounded, due)
        monkeypatch.setattr(cached, "fp8_cached", lambda x, scale: x)
        with cache:
            assert torch.equal(net(x_BT, use_cache=False).logits, due)
        assert torch.equal(net(x_BT, use_cache=False).logits, due), "afterwards the model is as it was"
    assert net.config._attn_implementation != cached.NAME
    assert "eager_attention_forward" in vars(sys.modules[type(net).__module__])
