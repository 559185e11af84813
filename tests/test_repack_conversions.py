"""Conversions between schemes of the same codes: what they cost, measured, and that none is done unasked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import DEMO_MODEL, make_artifact, run_cli
from hypothesis import given, settings
from hypothesis import strategies as st
from repacks import GOLDEN, again, made, same_weights, weights, wide
from safetensors.torch import load_file, save_file

from quantpub import repack as module
from quantpub.conversions import convert, cost, loss, relative
from quantpub.errors import GateError, InputError
from quantpub.opened import open_quantized
from quantpub.pairs import CONVERSIONS, Conversion
from quantpub.qtensor import E2M1, QTensor, code_values, dequantize
from quantpub.repacking import make_repack
from quantpub.scheme import preset

pytestmark = pytest.mark.usefixtures("unsynced")

DTYPES = {"W4A16": (torch.float16, torch.float32), "W4A16_ASYM": (torch.float16, torch.bfloat16)}
SIDES = st.tuples(st.integers(1, 9), st.integers(1, 3))
SEEDS = st.integers(0, 2**31)


def some(scheme_name: str, n: int, groups: int, seed: int, dtype: torch.dtype) -> QTensor:
    """Any weight of a scheme, in groups of 32 (of 16 in FP4), whole rows in W8A16's kind."""
    generator = torch.Generator().manual_seed(seed)
    size = {"LLM_INT8": -1, "NVFP4": 16}.get(scheme_name, 32)
    scheme = preset(scheme_name, size)
    k = groups * 32
    shape = (n, scheme.weight.scale_shape(n, k)[1])
    if scheme_name == "NVFP4":
        codes = torch.randint(0, 2 * len(E2M1), (n, k), generator=generator, dtype=torch.uint8)
        scale = (torch.rand(shape, generator=generator) * 400 + 1).to(torch.float8_e4m3fn)
        one = torch.tensor(2.0**-7)
        return QTensor(scheme, codes, scale, global_scale=one, input_scale=one)
    high = 128 if scheme.weight.num == "int8" else 8
    codes = torch.randint(-high, high, (n, k), generator=generator, dtype=torch.int8)
    scale = (torch.rand(shape, generator=generator) * 0.02 + 0.001).to(dtype)
    scale = torch.where(torch.rand(shape, generator=generator) < 0.3, -scale, scale)
    zero = None
    if scheme.weight.zero_domain == "int":
        zero = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)
    if scheme.weight.zero_domain == "float":
        zero = (scale.float() * torch.randn(shape, generator=generator) * 5).to(dtype)
    return QTensor(scheme, codes, scale, zero)


def in_float64(q: QTensor) -> torch.Tensor:
    """The weight by its definition, nothing rounded."""
    spread = [
        None if value is None else value.double().repeat_interleave(q.shape[1] // q.scale.shape[1], 1)
        for value in (q.scale, q.zero)
    ]
    codes, (scale, zero) = code_values(q.codes_NK, q.scheme.weight.num).double(), spread
    assert scale is not None
    if zero is None:
        return codes * scale
    return codes * scale + zero if q.scheme.weight.zero_domain == "float" else (codes - zero) * scale


def dtypes_of(each: Conversion) -> tuple[torch.dtype, ...]:
    if each.name in ("bf16-zero", "bf16-scale"):
        return DTYPES[each.source]
    return (torch.float32,) if each.name == "model-scale" else (torch.bfloat16, torch.float16)


LOSSY = [each for each in CONVERSIONS if not each.exact]


@pytest.mark.parametrize("each", LOSSY, ids=lambda each: f"{each.name}-{each.source}")
@settings(max_examples=40, deadline=None)
@given(sides=SIDES, seed=SEEDS, which=st.integers(0, 1))
def test_the_loss_is_that_of_the_definition_in_float64(
    each: Conversion, sides: tuple[int, int], seed: int, which: int
) -> None:
    kinds = dtypes_of(each)
    q = some(each.source, *sides, seed, kinds[which % len(kinds)])
    after = convert(q, each, preset(each.target, q.scheme.group_size), "BF16")
    before_NK, after_NK = in_float64(q), in_float64(after)
    due = float((after_NK - before_NK).norm() / before_NK.norm())
    assert loss(q, after) == pytest.approx(due, rel=1e-6, abs=1e-12)
    assert torch.equal(after.codes_NK, q.codes_NK)


@settings(max_examples=30, deadline=None)
@given(sides=SIDES, seed=SEEDS)
def test_costs_of_blocks_of_rows_add_up(sides: tuple[int, int], seed: int) -> None:
    """Also where some rows do not move at all."""
    n, groups = sides[0] + 1, sides[1]
    each = next(c for c in CONVERSIONS if c.name == "bf16-scale")
    q = some("W4A16", n, groups, seed, torch.float16)
    q.scale[0] = 2.0**-6
    after = convert(q, each, q.scheme, "BF16")
    parts = [
        cost(*(QTensor(one.scheme, one.codes_NK[rows], one.scale[rows]) for one in (q, after)))
        for rows in (slice(0, 1), slice(1, n))
    ]
    assert parts[0][0] == 0
    assert relative(*map(sum, zip(*parts, strict=True))) == pytest.approx(loss(q, after), rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(sides=SIDES, seed=SEEDS)
def test_what_is_exact_keeps_every_bit(sides: tuple[int, int], seed: int) -> None:
    for each in (each for each in CONVERSIONS if each.exact):
        q = some(each.source, *sides, seed, torch.bfloat16)
        if q.zero is not None:
            if bool(q.zero.any()):
                with pytest.raises(ValueError, match="zeros are not in the middle"):
                    convert(q, each, preset(each.target, q.scheme.group_size), "")
            q = QTensor(q.scheme, q.codes_NK, q.scale, torch.zeros_like(q.zero))
        after = convert(q, each, preset(each.target, q.scheme.group_size), "")
        assert loss(q, after) == 0 and torch.equal(dequantize(after), dequantize(q))
        assert after.zero is None and after.input_scale is None


def test_by_hand() -> None:
    """Codes 1 and 3 at scale 2 with zero 0.5: 2.5 and 6.5; the whole zero is 0, each weight loses 0.5."""
    q = QTensor(
        preset("W4A16_FLOAT_ZERO", 2),
        torch.tensor([[1, 3]], dtype=torch.int8),
        torch.tensor([[2.0]]),
        torch.tensor([[0.5]]),
    )
    after = convert(q, next(c for c in CONVERSIONS if c.name == "whole-zero"), preset("W4A16_ASYM", 2), "")
    assert dequantize(q).tolist() == [[2.5, 6.5]] and dequantize(after).tolist() == [[2.0, 6.0]]
    assert loss(q, after) == pytest.approx((2 * 0.25 / (2.5**2 + 6.5**2)) ** 0.5)


def test_scales_that_the_other_float_does_not_reach_are_refused() -> None:
    each = next(c for c in CONVERSIONS if c.name == "model-scale")
    q = QTensor(preset("LLM_INT8"), torch.ones(2, 4, dtype=torch.int8), torch.tensor([[1e-9], [0.1]]))
    with pytest.raises(ValueError, match="1 of its 2 scales are not numbers of f16"):
        convert(q, each, preset("W8A16"), "F16")


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(DEMO_MODEL, "int4-hqq-tile", tmp_path_factory.mktemp("tiles") / "tiles")


def test_a_loss_is_told_before_anything_is_written(tiles: Path, tmp_path: Path) -> None:
    ran = run_cli("repack", tiles, "--layout", "ct-pack", "-o", tmp_path / "out")
    assert (ran.code, ran.out, ran.err.count("\n")) == (3, "", 1)
    assert "float zeros are rounded to whole codes" in ran.err and "--accept-loss" in ran.err
    assert "9.6 % on average" in ran.err and "in 16 of 28 linears measured" in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_seed_case_from_end_to_end(tiles: Path, tmp_path: Path) -> None:
    """Repacked with its loss accepted: verified, evaluated, carded and rehearsed as any artifact; the card tells the loss."""
    out = tmp_path / "out"
    ran = run_cli("repack", tiles, "--layout", "ct-pack", "-o", out, "--accept-loss")
    assert ran.code == 0, ran.err
    stage = json.loads((out / ".quantpub/run.json").read_text())["stages"]["repack"]
    assert stage["equal"] == 0 and [c["name"] for c in stage["conversions"]] == ["whole-zero"]
    before, after = weights(tiles), weights(out)
    real = {name: float((after[name] - w).norm() / w.norm()) for name, w in before.items()}
    worst = max(real, key=lambda name: real[name])
    assert stage["lost"] == {"max": pytest.approx(real[worst], rel=1e-5), "worst": worst}
    assert run_cli("verify", out, "--source", DEMO_MODEL).code == 0
    assert run_cli("card", out).code == 0
    done = run_cli("publish", "someone/tiles", out, "--rehearse")
    assert done.code == 0, done.err
    evaluated = run_cli(
        "eval", out, "--baseline", DEMO_MODEL, "--data", "demo/eval.jsonl", "--windows", "2", "--window", "64"
    )
    assert "KL to base" in evaluated.out
    assert run_cli("card", out).code == 0 and run_cli("card", "--check", out).code == 0
    card = (out / "README.md").read_text()
    assert f"{100 * stage['lost']['max']:.2g} % is lost at most (`{worst}`)" in card
    assert "quantpub quantize pycode-tiny-2m --recipe int4-hqq-tile --layout torchao-tile" in card
    assert "quantpub repack ./tiles --layout ct-pack --accept-loss" in card
    assert "of the base's 3.68 MB" in card
    # repacked once more without a loss, the loss before is still told
    assert run_cli("repack", out, "--layout", "awq", "-o", tmp_path / "awq").code == 0
    assert run_cli("card", tmp_path / "awq").code == 0
    assert f"{100 * stage['lost']['max']:.2g} % is lost at most" in (tmp_path / "awq/README.md").read_text()


@pytest.mark.slow
def test_the_card_of_anothers_checkpoint_says_who_quantized_it(tmp_path: Path) -> None:
    import shutil

    theirs = Path(shutil.copytree(GOLDEN / "gptqmodel-gptq-dense", tmp_path / "theirs"))
    for base, line, words in (
        ("acme/base", "base_model: acme/base\n", "`acme/base`, as the card of what it was repacked from says"),
        ("", "", "not stated by its makers"),
    ):
        (theirs / "README.md").write_text(f"---\nlicense: mit\n{line}---\n")
        out = tmp_path / f"out{len(base)}"
        assert run_cli("repack", theirs, "--layout", "ct-pack", "-o", out).code == 0
        assert run_cli("card", out).code == 0 and run_cli("card", "--check", out).code == 0
        card = (out / "README.md").read_text()
        assert words in card and "quantized by gptqmodel:7.6.0" in card
        assert "of the base's" not in card and "in place of" not in card and "No calibration data" not in card
        assert "quantpub quantize" not in card and "quantpub repack ./theirs --layout ct-pack" in card
        assert ("base_model_relation: quantized" in card) == bool(base)
        assert "The checkpoint it was repacked from states `license: mit`" in card


def test_a_loss_in_a_linear_that_was_not_sampled_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 numbers in fp16 scales lose nothing; in one linear of seven they are others."""
    import shutil

    theirs = Path(shutil.copytree(GOLDEN / "autoround-w4a16-dense", tmp_path / "theirs"))
    monkeypatch.setattr(module, "SAMPLED", 2)
    made_ = make_repack(open_quantized(str(theirs)), "torchao-tile")
    module.require_lossless(made_)
    path = theirs / "model.safetensors"
    tensors = load_file(path)
    name = sorted(key for key in tensors if key.endswith(".scales"))[-1]
    tensors[name][0, 0] = 0.01
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(GateError, match=r"scales are rounded to bf16"):
        module.require_lossless(make_repack(open_quantized(str(theirs)), "torchao-tile"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "layout", "target", "limit"),
    [
        ("W4A16_ASYM", "ct-pack", "torchao-tile", 0.002),
        ("LLM_INT8", "bnb-int8", "ct-pack", 0.003),
        ("W4A16_FLOAT_ZERO", "torchao-tile", "awq", 0.2),
    ],
)
def test_a_loss_is_measured_and_recorded(tmp_path: Path, scheme: str, layout: str, target: str, limit: float) -> None:
    one = made(wide(tmp_path / "model"), scheme, layout, tmp_path / "one")
    with pytest.raises(GateError, match="the weights would change"):
        again(one, target, tmp_path / "two")
    proof = again(one, target, tmp_path / "two", accept_loss=True)
    before, after = weights(one), weights(tmp_path / "two")
    real = max(float((after[name] - w).norm() / w.norm()) for name, w in before.items())
    assert 0 < proof["lost"]["max"] < limit and proof["lost"]["max"] == pytest.approx(real, rel=1e-3)


@pytest.mark.slow
def test_nvfp4_without_its_scale_of_activations_keeps_its_weights(tmp_path: Path) -> None:
    proof = again(GOLDEN / "modelopt-nvfp4-dense", "torchao-nvfp4", tmp_path / "out")
    assert proof["equal"] == 7 and [c["name"] for c in proof["conversions"]] == ["no-input-scale"]
    again(GOLDEN / "modelopt-nvfp4-dense", "modelopt-nvfp4", tmp_path / "same")
    assert same_weights(tmp_path / "out", tmp_path / "same")


@pytest.mark.slow
def test_zeros_in_the_middle_are_left_out_and_others_refused(tmp_path: Path) -> None:
    """Symmetric weights in tiles are read by others as ones with a float zero: back in GPTQ nothing is lost."""
    import shutil

    tile = made(wide(tmp_path / "model"), "W4A16", "torchao-tile", tmp_path / "tile")
    due = weights(tile)
    shutil.rmtree(tile / ".quantpub")
    proof = again(tile, "gptq", tmp_path / "gptq")
    assert proof["equal"] == 7 and [c["name"] for c in proof["conversions"]] == ["no-zero"]
    found = weights(tmp_path / "gptq")
    assert all(torch.equal(found[name], w) for name, w in due.items())
    with pytest.raises(InputError, match="zeros are not in the middle, and gptq has no place for them"):
        again(made(tmp_path / "model", "W4A16_ASYM", "ct-pack", tmp_path / "asym"), "gptq", tmp_path / "never")
    assert not (tmp_path / "never").exists()
