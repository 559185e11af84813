"""Calibrated activations: scales, rounding under them, plans, what engines share, and the forward pass."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO_MODEL
from hooked import TOKENS, Hooked, make_calibrated
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_verify import failing, reseal

from quantpub.activations import fp8_static, nvfp4
from quantpub.algorithms import fp8
from quantpub.algorithms import nvfp4 as nvfp4_algorithm
from quantpub.artifact import Artifact
from quantpub.checkpoint import open_checkpoint
from quantpub.decode import Decoder
from quantpub.errors import UsageError
from quantpub.forward import ArtifactModel, quiet_transformers
from quantpub.plan import make_plan
from quantpub.qtensor import dequantize
from quantpub.recipe import load_recipe
from quantpub.scheme import PRESETS
from quantpub.stats import Stats
from quantpub.verify.run import verify

pytestmark = pytest.mark.slow  # together more than a few seconds

GOLDEN = load_file(Path(__file__).parent / "golden" / "activations_modelopt.safetensors")
CASES = [
    ("fp8-static", "ct-float"),
    ("fp8-static", "modelopt-fp8"),
    ("nvfp4", "ct-nvfp4"),
    ("nvfp4", "modelopt-nvfp4"),
]
W = torch.randn(32, 64, generator=torch.Generator().manual_seed(3)).bfloat16()


@pytest.fixture(scope="module")
def observed() -> Hooked:
    return Hooked(DEMO_MODEL)


# ------------------------------------------------------------------------------------------------- scales


@pytest.mark.parametrize(
    ("amax", "scale"), [(448.0, 1.0), (896.0, 2.0), (1.0, 1 / 448), (0.0, 1.0), (1e-40, 2.0**-126)]
)
def test_fp8_input_scale_by_hand(amax: float, scale: float) -> None:
    q = fp8.quantize(W, Stats(input_amax=amax), PRESETS["FP8"], fp8.Params())
    assert q.input_scale is not None and q.input_scale.dtype == torch.float32 and q.input_scale.shape == ()
    assert q.input_scale == torch.tensor(scale), "rounded once, and with a reciprocal that is finite"


@settings(max_examples=60, deadline=None)
@given(amax=st.floats(1e-30, 1e30))
def test_nvfp4_input_scale_is_the_least_power_of_two_that_fits(amax: float) -> None:
    scale = nvfp4_algorithm.input_scale(amax)
    assert math.frexp(scale)[0] == 0.5
    assert 224 < amax / 6 / scale <= 448 or scale == 2.0**-126


def test_nvfp4_input_scale_of_nothing() -> None:
    assert nvfp4_algorithm.input_scale(0.0) == 1
    assert nvfp4_algorithm.input_scale(2688.0) == 1
    assert nvfp4_algorithm.input_scale(math.nextafter(2688.0, 3000.0)) == 2


@pytest.mark.parametrize(("scheme", "module"), [("FP8", fp8), ("NVFP4", nvfp4_algorithm)])
@pytest.mark.parametrize("stats", [None, Stats()])
def test_activations_that_were_not_observed_are_an_assertion(scheme: str, module: Any, stats: Stats | None) -> None:
    with pytest.raises(AssertionError, match="no input was observed"):
        module.quantize(W, stats, PRESETS[scheme], module.Params())


def test_weights_do_not_depend_on_the_activations() -> None:
    for static, plain, module in (("NVFP4", "NVFP4A16", nvfp4_algorithm),):
        a = module.quantize(W, Stats(input_amax=3.0), PRESETS[static], module.Params())
        b = module.quantize(W, Stats(), PRESETS[plain], module.Params())
        assert torch.equal(dequantize(a), dequantize(b)) and b.input_scale is None


def test_nvfp4_channels_that_no_activation_reached() -> None:
    """A group of them is searched as without moments; a few of them in a group do not count, and nothing is not finite."""
    moment_K = torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.1
    moment_K[:16] = 0
    moment_K[20] = 0
    scheme, params = PRESETS["NVFP4A16"], nvfp4_algorithm.Params()
    weighted = nvfp4_algorithm.quantize(W, Stats(moment_K), scheme, params)
    plain = nvfp4_algorithm.quantize(W, Stats(), scheme, params)
    assert torch.equal(dequantize(weighted)[:, :16], dequantize(plain)[:, :16])

    def error(q: Any, weight_K: torch.Tensor) -> float:
        return float(((dequantize(q) - W.float()).square() * weight_K).sum())

    assert error(weighted, moment_K) < error(plain, moment_K), "the search weighs what it was given"


# ------------------------------------------------------------------------------------------------- rounding


def test_static_fp8_by_hand() -> None:
    """Scale 2: 900 / 2 saturates at 448; 2.125 / 2 lies half way between 1 and 1.125, and goes to even."""
    x = torch.tensor([[900.0, -896.0, 2.125, 0.0, 2.0**-9, 2.0**-8]])
    assert fp8_static(x, torch.tensor(2.0)).tolist() == [[896.0, -896.0, 2.0, 0.0, 0.0, 2.0**-8]]


def test_nvfp4_by_hand() -> None:
    """Global scale 1. Group 0: amax 12, scale 2. Group 1: amax 5000, scale saturates at 448: 2688 is the most it holds.

    Group 2: amax / 6 is 2^-11, which E4M3 rounds to 0: zeros.
    """
    x = torch.zeros(1, 48)
    x[0, :4] = torch.tensor([12.0, 5.0, -1.5, 0.4])
    x[0, 16:18] = torch.tensor([5000.0, -700.0])
    x[0, 32] = 6 * 2.0**-11
    due = torch.zeros(1, 48)
    due[0, :4] = torch.tensor([12.0, 4.0, -2.0, 0.0])  # 2.5 and 0.75 are ties: to even
    due[0, 16:18] = torch.tensor([2688.0, -672.0])
    assert torch.equal(nvfp4(x, torch.tensor(1.0), 16), due)


def test_rounding_equals_modelopt() -> None:
    assert torch.equal(fp8_static(GOLDEN["x"], GOLDEN["fp8.scale"]), GOLDEN["fp8.out"])
    assert torch.equal(nvfp4(GOLDEN["x"], GOLDEN["nvfp4.scale"], 16), GOLDEN["nvfp4.out"])
    assert GOLDEN["x"].abs().max() > GOLDEN["nvfp4.out"].abs().max() > GOLDEN["fp8.out"].abs().max(), "both saturate"


def compressed_tensors(x: torch.Tensor, scheme: str, scale: torch.Tensor) -> torch.Tensor:
    """Rounded by compressed-tensors' own fake quantization."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    if scheme == "FP8":
        arguments = QuantizationArgs(num_bits=8, type="float", strategy="tensor")
        return fake_quantize(x, scale.reshape(1), torch.zeros(1), arguments)
    arguments = QuantizationArgs(
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        dynamic="local",
        scale_dtype="torch.float8_e4m3fn",
    )
    divisor, groups = scale.reciprocal().reshape(1), x.unflatten(-1, (-1, 16))
    local, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments, global_scale=divisor)
    return fake_quantize(x, local, zero, arguments, global_scale=divisor)


def test_rounding_equals_compressed_tensors() -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(5)) * torch.logspace(-3, 1, 256)
    scale = x.abs().max() / 448 * 0.7
    torch.testing.assert_close(fp8_static(x, scale), compressed_tensors(x, "FP8", scale), rtol=1e-6, atol=0)
    assert torch.equal(nvfp4(x, torch.tensor(2.0**-7), 16), compressed_tensors(x, "NVFP4", torch.tensor(2.0**-7)))


# ------------------------------------------------------------------------------------------------- plans, recipes


@pytest.mark.parametrize(
    ("recipe", "layout", "needs"),
    [
        ("fp8-static", "ct-float", {"inputs"}),
        ("nvfp4", "modelopt-nvfp4", {"inputs"}),
        ("fp8-static-kv", "modelopt-fp8", {"inputs", "kv"}),
        ("fp8-dynamic-kv", "ct-float", {"kv"}),
        ("fp8-dynamic", "ct-float", set()),
        ("nvfp4a16", "ct-nvfp4", set()),
    ],
)
def test_a_plan_says_what_it_calibrates(recipe: str, layout: str, needs: set[str]) -> None:
    plan = make_plan(open_checkpoint(str(DEMO_MODEL)), load_recipe(recipe), layout)
    assert plan.calibrates == needs and not plan.rejections


def test_an_engine_that_refuses_the_layout_is_refused_with_its_reason() -> None:
    with pytest.raises(UsageError, match=r"TensorRT-LLM.*it has no INT8: the codes would be cast to FP8 in silence"):
        load_recipe("int8-dynamic").layouts(["tensorrt-llm"], [])
    with pytest.raises(UsageError, match=r"no layout for engine 'vlm' \| did you mean vllm"):
        load_recipe("int8-dynamic").layouts(["vlm"], [])


# ------------------------------------------------------------------------------------------------- artifacts


@pytest.mark.parametrize(("recipe", "layout"), CASES)
def test_an_artifact_is_sound_and_its_scales_are_those_observed(
    recipe: str, layout: str, observed: Hooked, tmp_path: Path
) -> None:
    artifact = make_calibrated(DEMO_MODEL, recipe, tmp_path / "a", layout, observed)
    checks = {check["id"]: check for check in verify(Artifact.open(artifact), str(DEMO_MODEL))["checks"]}
    assert {check["status"] for check in checks.values()} == {"passed"}
    assert "one scale of activations in each of 8" in checks["merged"]["detail"]
    tensors = load_file(artifact / "model.safetensors")
    for module in observed.inputs:
        if module == "lm_head" or f"{module}.weight_scale" not in tensors:
            continue
        amax = float(observed.input(module).amax_K.max())
        stored = tensors.get(f"{module}.input_scale", tensors.get(f"{module}.input_global_scale"))
        assert stored is not None and stored.dtype == torch.float32
        multiplier = float(1 / stored if layout == "ct-nvfp4" else stored)
        if recipe == "fp8-static":
            assert multiplier == pytest.approx(amax / 448)
        else:
            assert multiplier / 2 < amax / 2688 <= multiplier


@pytest.mark.parametrize("layout", ["ct-float", "modelopt-nvfp4"])
@pytest.mark.parametrize("factor", [2.0, 0.0, -1.0, math.inf, math.nan])
def test_a_scale_of_activations_that_differs_or_is_unsound(
    layout: str, factor: float, observed: Hooked, tmp_path: Path
) -> None:
    recipe = "fp8-static" if layout == "ct-float" else "nvfp4"
    artifact = make_calibrated(DEMO_MODEL, recipe, tmp_path / "a", layout, observed)
    tensors = load_file(artifact / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.input_scale"] *= factor
    save_file(tensors, artifact / "model.safetensors", metadata={"format": "pt"})
    reseal(artifact)
    assert failing(artifact, None) == ({"merged"} if factor == 2 else {"merged", "scales"})


def plain(artifact: Path, model: Path) -> Any:
    """A float32 transformers model of the weights that the artifact stands for."""
    from transformers import AutoModelForCausalLM

    decoder, tensors = Decoder(Artifact.open(artifact)), load_file(model / "model.safetensors")
    folder = Path(shutil.copytree(model, artifact.parent / "plain"))
    tensors |= {f"{module}.weight": dequantize(decoder.qtensor(module)) for module, _ in decoder.modules()}
    save_file(
        {name: t.float().contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


@pytest.mark.parametrize(("recipe", "layout"), [CASES[0], CASES[2]])
def test_the_forward_pass_rounds_each_input_under_its_own_scale(
    recipe: str, layout: str, observed: Hooked, tmp_path: Path
) -> None:
    """Against hooks on every linear that round by compressed-tensors, with the scales as they lie in the file."""
    artifact = make_calibrated(DEMO_MODEL, recipe, tmp_path / "a", layout, observed)
    tensors, net = load_file(artifact / "model.safetensors"), plain(artifact, DEMO_MODEL)
    scheme = "FP8" if recipe == "fp8-static" else "NVFP4"
    for name, module in net.named_modules():
        stored = tensors.get(f"{name}.input_scale", tensors.get(f"{name}.input_global_scale"))
        if stored is not None:
            scale = (stored if scheme == "FP8" else stored.reciprocal()).reshape(())
            module.register_forward_pre_hook(lambda _, x, scale=scale: compressed_tensors(x[0], scheme, scale))
    with quiet_transformers(), torch.inference_mode():
        model = ArtifactModel(Decoder(Artifact.open(artifact)))
        got, due = model.forward(TOKENS[:1]), net(TOKENS[:1], use_cache=False).logits
    assert model.not_emulated() == []
    off = (got - due).norm() / due.norm()
    assert off < 0.02, "a value on the edge between two codes may fall to either side"


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "head_dim": 32, "vocab_size": 512}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    config = Qwen3MoeConfig(**sizes, **heads, num_experts=4, num_experts_per_tok=2, tie_word_embeddings=True)
    folder = tmp_path_factory.mktemp("experts") / "m"
    with quiet_transformers():
        Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("recipe", "layout"), [CASES[0], CASES[3]])
def test_experts_share_their_scales_and_are_rounded_one_by_one(
    recipe: str, layout: str, experts: Path, tmp_path: Path
) -> None:
    artifact = make_calibrated(experts, recipe, tmp_path / "a", layout)
    decoder = Decoder(Artifact.open(artifact))
    assert "merged" not in failing(artifact, str(experts))
    for layer in range(2):
        at = f"model.layers.{layer}.mlp.experts."
        sides = [{float(decoder.input_scale(f"{at}{e}.{leaf}") or 0) for e in range(4) for leaf in leaves} for leaves in
                 (("gate_proj", "up_proj"), ("down_proj",))]  # fmt: skip
        assert all(len(side) == 1 for side in sides)
    with quiet_transformers(), torch.inference_mode():
        model = ArtifactModel(decoder)
        rounded = model.forward(TOKENS)
        plainly = model.model(TOKENS, use_cache=False).logits
    assert model.not_emulated() == []
    assert 1e-4 < (rounded - plainly).norm() / plainly.norm() < 0.5


def test_one_expert_with_a_scale_of_its_own_is_found(experts: Path, tmp_path: Path) -> None:
    artifact = make_calibrated(experts, "fp8-static", tmp_path / "a", "ct-float")
    tensors = load_file(artifact / "model.safetensors")
    tensors["model.layers.1.mlp.experts.3.down_proj.input_scale"] *= 2
    save_file(tensors, artifact / "model.safetensors", metadata={"format": "pt"})
    reseal(artifact)
    found = {c["id"]: c["detail"] for c in verify(Artifact.open(artifact))["checks"] if c["status"] == "failed"}
    assert found.keys() == {"merged"} and "experts.3.down_proj" in found["merged"]


def test_the_configuration_is_what_compressed_tensors_parses(observed: Hooked, tmp_path: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    artifact = make_calibrated(DEMO_MODEL, "nvfp4-kv", tmp_path / "a", "ct-nvfp4", observed)
    stated = json.loads((artifact / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate(stated)
    inputs = parsed.config_groups["group_0"].input_activations
    assert inputs.dynamic == "local" and parsed.kv_cache_scheme.num_bits == 8
