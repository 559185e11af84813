"""Smoothing of a checkpoint: what is planned, solved, folded, stored and verified; and that it recovers what outliers cost."""

from __future__ import annotations

import json
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO_MODEL, DEMO_TEXT
from hooked import Hooked, make_calibrated
from safetensors.torch import load_file, save_file
from test_folds import folded, found_in, logits, random_factors, relative, save_random
from test_verify import reseal

from quantpub.actions import COPY, QUANTIZE, SMOOTH
from quantpub.activations import int8_per_token
from quantpub.artifact import Artifact
from quantpub.checkpoint import open_checkpoint, read_slice
from quantpub.errors import InputError
from quantpub.folds import NORM, VALUE, Fold, folds
from quantpub.plan import Plan, make_plan
from quantpub.qtensor import dequantize
from quantpub.recipe import Recipe, load_recipe
from quantpub.smoothing import Smoothing, bound, realised, solve
from quantpub.stats import Observed, Stats
from quantpub.verify.run import verify

pytestmark = pytest.mark.slow  # together more than a few seconds

NAME = "int8-smoothquant"


def recipe(**changes: Any) -> Recipe:
    return Recipe(**(load_recipe(NAME).model_dump() | changes))


def plan_of(model: Path, **changes: Any) -> Plan:
    return make_plan(open_checkpoint(str(model)), recipe(**changes), "ct-int")


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    """Tokens of the demo text: 8 rows to calibrate, 8 to judge."""
    from transformers import AutoTokenizer

    tokenizer, ids = AutoTokenizer.from_pretrained(DEMO_MODEL), []
    for line in DEMO_TEXT.read_text("utf-8").splitlines():
        ids += [0, *tokenizer(json.loads(line)["text"])["input_ids"]]
    return torch.tensor(ids[: 16 * 128]).view(16, 128)


def make_outliers(folder: Path) -> Path:
    """The demo model with norm weights × 128 in 3 channels and the columns that read them / 128: the same function, exactly."""
    shutil.copytree(DEMO_MODEL, folder)
    tensors = load_file(folder / "model.safetensors")
    for fold in found_in(folder, tensors):
        if fold.kind == NORM:
            channels = [5, 17 + len(fold.source) % 7, 40]
            tensors[f"{fold.source}.weight"][channels] *= 128
            for reader in fold.readers:
                tensors[f"{reader}.weight"][:, channels] /= 128
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def outlying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_outliers(tmp_path_factory.mktemp("outliers") / "model")


# --------------------------------------------------------------------------------------------------- plans


def test_the_plan_says_what_is_quantized_smoothed_and_copied() -> None:
    actions = {action.part.name: action for action in plan_of(DEMO_MODEL).actions}
    kinds = {name.removeprefix("model.layers.0."): action.kind for name, action in actions.items()}
    assert kinds["self_attn.q_proj.weight"] == kinds["mlp.down_proj.weight"] == QUANTIZE
    assert kinds["input_layernorm.weight"] == kinds["post_attention_layernorm.weight"] == SMOOTH
    assert kinds["model.norm.weight"] == kinds["model.embed_tokens.weight"] == COPY
    reason = actions["model.layers.0.input_layernorm.weight"].reason
    assert reason == "norm stays in BF16; factors of smoothing are folded into it"


def test_the_plan_is_made_from_headers_alone(tmp_path: Path) -> None:
    """Weights that are not there cannot be read: the file ends in a hole where they would be."""
    shutil.copytree(DEMO_MODEL, tmp_path / "m")
    path = tmp_path / "m/model.safetensors"
    size, header = path.stat().st_size, 8 + int.from_bytes(path.read_bytes()[:8], "little")
    os.truncate(path, header)
    os.truncate(path, size)
    assert [a.as_json() for a in plan_of(tmp_path / "m").actions] == [a.as_json() for a in plan_of(DEMO_MODEL).actions]


def test_without_a_transform_nothing_is_smoothed() -> None:
    plan = make_plan(open_checkpoint(str(DEMO_MODEL)), load_recipe("int8-dynamic"), "ct-int")
    assert plan.folds == () and SMOOTH not in {action.kind for action in plan.actions}


def test_routers_kept_linears_and_biases_that_take_part_are_smoothed(tmp_path: Path) -> None:
    save_random("qwen2_moe", tmp_path / "m", qkv_bias=True)
    plan = plan_of(tmp_path / "m", ignore=["lm_head", "re:.*0.self_attn.k_proj"])
    smoothed = {
        a.part.name.partition(".0.")[2] for a in plan.actions if a.kind == SMOOTH and ".layers.0." in a.part.name
    }
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert smoothed == norms | {"mlp.gate.weight", "mlp.shared_expert_gate.weight", "self_attn.v_proj.bias"} | {
        "self_attn.k_proj.weight"
    }


def test_a_transform_without_rounded_activations_is_a_rejection() -> None:
    chosen = recipe(scheme="W8A16", engines={"vllm": "ct-pack"})
    plan = make_plan(open_checkpoint(str(DEMO_MODEL)), chosen, "ct-pack")
    assert list(plan.rejections.values()) == ["W8A16 leaves activations in 16 bits: there is nothing to smooth"]


def test_a_model_without_a_fold_is_a_rejection(tmp_path: Path) -> None:
    save_file({"model.layers.0.mlp.c_proj.weight": torch.zeros(8, 8).bfloat16()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "starcoder2"}))
    plan = plan_of(tmp_path)
    said = "there is no place in this starcoder2 model that takes the factors of smoothquant"
    assert plan.rejections == {"model.layers.0.mlp.c_proj.weight": said}


def test_values_keep_their_channels_under_an_fp8_cache() -> None:
    assert VALUE in {fold.kind for fold in plan_of(DEMO_MODEL).folds}
    fp8 = {"scheme": "FP8_DYNAMIC", "algorithm": {"name": "fp8"}, "engines": {"vllm": "ct-float"}, "kv_cache": "fp8"}
    plan = make_plan(open_checkpoint(str(DEMO_MODEL)), recipe(**fp8), "ct-float")
    assert VALUE not in {fold.kind for fold in plan.folds} and plan.folds


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"alhpa": 0.5}, "transform smoothquant has no parameter 'alhpa'"),
        ({"alpha": 2.0}, "alpha is a number from 0 to 1, or search"),
        ({"alpha": "best"}, "alpha"),
    ],
)
def test_parameters_that_do_not_fit_are_one_clear_line(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        bound(recipe(transform={"name": "smoothquant", **given}))


# ------------------------------------------------------------------------------------------------- solving


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen2_moe", "phi3"])
def test_what_is_solved_leaves_a_float32_model_as_it_was(model_type: str, tmp_path: Path) -> None:
    tensors = save_random(model_type, tmp_path / "a")
    plan = plan_of(tmp_path / "a")
    smoothing = solve(plan, Anything(plan))
    assert any(float(s.std()) > 0.05 for s in smoothing.vectors().values())
    assert relative(logits(folded(tmp_path / "a", tensors, smoothing, tmp_path / "b")), logits(tmp_path / "a")) < 1e-5


class Anything:
    """Statistics of inputs that no model made: every linear saw normal values, of channels of different sizes."""

    def __init__(self, plan: Plan, *unseen: str) -> None:
        self.plan, self.unseen, self.made = plan, unseen, cache(self._made)

    def has(self, module: str) -> bool:
        return module not in self.unseen

    def input(self, module: str) -> Observed:
        return self.made(self.plan.shapes[module][1])

    def _made(self, k: int) -> Observed:
        generator = torch.Generator().manual_seed(k)
        x_RK = torch.randn(32, k, generator=generator) * torch.randn(k, generator=generator).exp2()
        return Observed(32, x_RK.abs().amax(0), x_RK.square().mean(0), x_RK)


def test_factors_are_powers_of_two_where_a_router_or_a_bias_keeps_its_bits(tmp_path: Path) -> None:
    save_random("qwen2_moe", tmp_path / "m", qkv_bias=True)
    plan = plan_of(tmp_path / "m")
    for name, s in solve(plan, Anything(plan)).vectors().items():
        exact = torch.equal(torch.frexp(s).mantissa, torch.full_like(s, 0.5))
        assert exact == (name.endswith(("post_attention_layernorm", "v_proj"))), name


@pytest.mark.parametrize("less_one", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_is_exact_though_its_weight_is_rounded(dtype: torch.dtype, less_one: bool) -> None:
    """weight' · s is the weight, to the last bit of a float32: what rounding takes off, s gives back."""
    weight = (torch.rand(200, generator=torch.Generator().manual_seed(0)) + 0.1).to(dtype)
    wanted = torch.rand(200, generator=torch.Generator().manual_seed(1)) * 0.9 + 0.05
    s_F = realised(weight, wanted, less_one)
    fold = Fold(NORM, "norm", ("reader",), 200, head=200, less_one=less_one)
    held = Smoothing((fold,), {"norm": s_F}).apply("norm.weight", weight)
    assert held.dtype == dtype
    assert torch.allclose((held.double() + int(less_one)) * s_F, weight.double() + int(less_one), rtol=1e-6, atol=0)
    assert torch.allclose(s_F, wanted, rtol=2**-6)


def test_fp16_sources_stay_within_their_range(tmp_path: Path) -> None:
    tensors = {name: w.half() for name, w in save_random("llama", tmp_path / "m").items()}
    save_file(tensors, tmp_path / "m/model.safetensors", {"format": "pt"})
    plan = plan_of(tmp_path / "m")
    statistics = Anything(plan)
    smoothing = solve(plan, Wild(statistics))
    assert max(float(s.log2().abs().max()) for s in smoothing.vectors().values()) <= 6.01
    for name, w in tensors.items():
        made = smoothing.apply(name, w)
        assert made.dtype == torch.float16 and torch.isfinite(made).all()


class Wild:
    """Channels of which the largest is 2^40 times the smallest."""

    def __init__(self, inner: Anything) -> None:
        self.inner, self.has = inner, inner.has

    def input(self, module: str) -> Observed:
        seen = self.inner.input(module)
        spread = torch.linspace(-20, 20, len(seen.amax_K)).exp2()
        return Observed(32, seen.amax_K * spread, seen.second_moment_K * spread**2, seen.sample_RK * spread)


def test_what_calibration_did_not_reach_is_left_alone() -> None:
    plan = plan_of(DEMO_MODEL)
    down = "model.layers.1.mlp.down_proj"
    smoothing = solve(plan, Anything(plan, down))
    assert torch.equal(smoothing.vectors()["model.layers.1.mlp.up_proj"], torch.ones(plan.shapes[down][1]))
    assert smoothing.evidence["model.layers.1.mlp.up_proj"] == {"observed": False}
    assert smoothing.evidence["model.layers.0.mlp.up_proj"].keys() == {"alpha", "error", "unsmoothed"}
    json.dumps(smoothing.evidence)


def test_solving_twice_gives_the_same_bits() -> None:
    plan = plan_of(DEMO_MODEL)
    a, b = (solve(plan, Anything(plan)).vectors() for _ in range(2))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------- folding


def test_apply_by_hand() -> None:
    """q reads a norm divided by s; v does too, and its rows are divided for o. The rest is returned as it came."""
    at = "model.layers.0."
    shapes = {
        at + "input_layernorm.weight": (2,),
        at + "self_attn.v_proj.weight": (2, 2),
        at + "self_attn.o_proj.weight": (2, 2),
    }
    found = folds("llama", {"num_attention_heads": 1}, shapes)
    s = {at + "input_layernorm": torch.tensor([2.0, 4.0]), at + "self_attn.v_proj": torch.tensor([0.5, 8.0])}
    smoothing = Smoothing(found, s)
    ones = torch.ones(2, 2, dtype=torch.bfloat16)
    assert smoothing.apply(at + "input_layernorm.weight", ones[0]).tolist() == [0.5, 0.25]
    assert smoothing.apply(at + "self_attn.v_proj.weight", ones).tolist() == [[4.0, 8.0], [0.25, 0.5]]
    assert smoothing.apply(at + "self_attn.v_proj.bias", ones[0]).tolist() == [2.0, 0.125]
    assert smoothing.apply(at + "self_attn.o_proj.weight", ones).tolist() == [[0.5, 8.0], [0.5, 8.0]]
    bias = ones[0]
    assert smoothing.apply(at + "self_attn.o_proj.bias", bias) is bias
    assert smoothing.apply("model.norm.weight", ones) is ones and torch.equal(ones, torch.ones_like(ones))


def test_observed_is_what_the_folded_model_would_show(outlying: Path, tmp_path: Path) -> None:
    tensors = load_file(outlying / "model.safetensors")
    found = found_in(outlying, tensors)
    smoothing = Smoothing(found, random_factors(found))
    before, after = Hooked(outlying), Hooked(folded(outlying, tensors, smoothing, tmp_path / "b"))
    for module in (reader for fold in found for reader in fold.readers):
        expected, given = after.input(module), smoothing.observed(module, before.input(module))
        for field in ("amax_K", "second_moment_K", "sample_RK"):
            assert torch.allclose(getattr(given, field), getattr(expected, field), rtol=1e-3, atol=1e-5), module
    assert smoothing.observed("lm_head", expected) is expected


def test_vectors_come_back_and_others_are_refused() -> None:
    plan = plan_of(DEMO_MODEL)
    made = solve(plan, Anything(plan))
    again = Smoothing.from_vectors(plan.folds, made.vectors())
    name = "model.layers.0.mlp.up_proj.weight"
    part = next(a.part for a in plan.actions if a.part.name == name)
    w = read_slice(plan.checkpoint.source, part)
    assert torch.equal(again.apply(name, w), made.apply(name, w)) and not torch.equal(made.apply(name, w), w)
    up = "model.layers.0.mlp.up_proj"
    for change, said in (
        ({up: made.vectors()[up][:-1]}, "not .* positive float32"),
        ({up: -made.vectors()[up]}, "not .* positive float32"),
        ({up: made.vectors()[up] * float("nan")}, "not .* positive float32"),
        ({up: made.vectors()[up].double()}, "not .* positive float32"),
        ({"model.norm": torch.ones(4)}, "model.norm is no place where this model is smoothed"),
    ):
        with pytest.raises(InputError, match=said):
            Smoothing.from_vectors(plan.folds, made.vectors() | change)
    with pytest.raises(InputError, match=f"the factors of {up} are missing"):
        Smoothing.from_vectors(plan.folds, {k: v for k, v in made.vectors().items() if k != up})


# ------------------------------------------------------------------------------------------------- quality


def divergence(model: Path, statistics: Hooked, transform: dict[str, Any] | None, text: torch.Tensor) -> float:
    """KL (nats a token) of the model with its linears in W8A8, each activation rounded as the kernel rounds it."""
    from transformers import AutoModelForCausalLM

    name = NAME if transform else "int8-dynamic"
    chosen = Recipe(**(load_recipe(name).model_dump() | {"transform": transform}))
    plan = make_plan(open_checkpoint(str(model)), chosen, "ct-int")
    smoothing = solve(plan, statistics) if transform else Smoothing((), {})
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        wanted = net(text).logits.log_softmax(-1)
    algorithm, params = plan.recipe.bind(plan.recipe.algorithm, plan.scheme)
    parameters = dict(net.named_parameters())
    with torch.no_grad():
        for action in plan.actions:
            w = smoothing.apply(action.part.name, read_slice(plan.checkpoint.source, action.part))
            if action.kind == QUANTIZE:
                w = dequantize(algorithm.quantize(w, Stats(), plan.scheme, params))
                net.get_submodule(action.module).register_forward_pre_hook(lambda _, x: (int8_per_token(x[0]),))
            parameters[action.part.name].copy_(w)
        got = net(text).logits.log_softmax(-1)
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())


def test_smoothing_recovers_what_outliers_cost(outlying: Path, text: torch.Tensor) -> None:
    """Of what int8 loses to channels of a hundred times, nine tenths and more come back; the search does what 0.5 does."""
    calibration, held = text[:8], text[8:]
    sound = divergence(DEMO_MODEL, Hooked(DEMO_MODEL, calibration), None, held)
    statistics = Hooked(outlying, calibration)
    naive = divergence(outlying, statistics, None, held)
    half = divergence(outlying, statistics, {"name": "smoothquant", "alpha": 0.5}, held)
    searched = divergence(outlying, statistics, {"name": "smoothquant", "alpha": "search"}, held)
    assert naive > 20 * sound
    assert (naive - searched) / (naive - sound) > 0.95
    assert searched <= half


# ---------------------------------------------------------------------------------------------- artifacts


@pytest.fixture(scope="module")
def made(outlying: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_calibrated(outlying, NAME, tmp_path_factory.mktemp("made") / "artifact", "ct-int")


def checks(folder: Path, source: Path | None) -> dict[str, tuple[str, str]]:
    found = verify(Artifact.open(folder), str(source) if source else None)["checks"]
    return {check["id"]: (check["status"], check["detail"]) for check in found}


def test_a_smoothed_artifact_is_verified_against_the_folded_source(made: Path, outlying: Path) -> None:
    found = checks(made, outlying)
    assert {status for status, _ in found.values()} == {"passed"}, found
    assert "8 of them after the factors of smoothing" in found["copies"][1], found["copies"]
    assert checks(made, DEMO_MODEL)["copies"][0] == "failed", "the weights of another model"


def test_factors_that_are_changed_lost_or_of_another_model_are_found(
    made: Path, outlying: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "a"))
    path = copy / ".quantpub/smoothing.safetensors"
    vectors = load_file(path)
    norm = "model.layers.0.input_layernorm"
    save_file(vectors | {norm: vectors[norm] * 2}, path)
    reseal(copy)
    found = checks(copy, outlying)
    assert {name for name, (status, _) in found.items() if status == "failed"} == {"copies", "values"}
    save_file({name: s for name, s in vectors.items() if name != norm}, path)
    reseal(copy)
    assert f"the factors of {norm} are missing" in checks(copy, outlying)["copies"][1]
    path.unlink()
    reseal(copy)
    assert "the vectors of smoothing cannot be read" in checks(copy, outlying)["values"][1]


def test_a_norm_that_was_not_folded_is_found(made: Path, outlying: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "a"))
    tensors, source = load_file(copy / "model.safetensors"), load_file(outlying / "model.safetensors")
    name = "model.layers.1.post_attention_layernorm.weight"
    save_file(tensors | {name: source[name]}, copy / "model.safetensors", {"format": "pt"})
    reseal(copy)
    status, detail = checks(copy, outlying)["copies"]
    assert (status, detail) == ("failed", f"{name} differs from the source")
