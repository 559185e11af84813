"""Integer algorithms against hand-computed blocks, brute force and their originals; every algorithm against its laws.

The tests over PAIRS take every algorithm of the registry with every preset that it does not refuse.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize as ct_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from conftest import needed
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from quantpub.algorithms import ALGORITHMS, hqq, rtn, search
from quantpub.algorithms.base import BLOCK_ELEMENTS, INVERSE_127, Algorithm, Groups, stored
from quantpub.qtensor import CODE_DTYPES, QTensor, dequantize, same_bits, scale_dtype
from quantpub.registry import load
from quantpub.scheme import PRESETS, Scheme, preset
from quantpub.stats import Stats

GOLDEN = Path(__file__).parent / "golden"
ALL: dict[str, Algorithm] = {name: load(ALGORITHMS, "algorithm", name) for name in ALGORITHMS}
PAIRS = [(name, scheme) for name in ALL for scheme in PRESETS if ALL[name].reject(PRESETS[scheme]) is None]
INTEGER = [(name, scheme) for name, scheme in PAIRS if PRESETS[scheme].weight.number.kind == "int"]
G4, ASYM4 = preset("W4A16", 4), preset("W4A16_ASYM", 4)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def weights(n: int, k: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn((n, k), generator=torch.Generator().manual_seed(seed)).mul_(0.02).to(dtype)


def run(name: str, scheme: Scheme, w: torch.Tensor, stats: Stats | None = None) -> QTensor:
    return ALL[name].quantize(w, needed(ALL[name], scheme, w, stats), scheme, ALL[name].params())


def rounded(scheme: str, w: torch.Tensor) -> QTensor:
    return rtn.quantize(w, None, PRESETS[scheme], rtn.Params())


def squares(w: torch.Tensor, values: torch.Tensor, q: QTensor) -> torch.Tensor:
    """Squared error of every group of `q`, where its blocks are of one row."""
    return (w.double() - values.double()).square().view(*q.scale.shape, -1).sum(-1)


def error(w: torch.Tensor, q: QTensor) -> torch.Tensor:
    return squares(w, dequantize(q), q)


# ------------------------------------------------------------------------------------------------ laws of every algorithm


def test_every_preset_has_an_algorithm_and_every_algorithm_a_preset() -> None:
    assert {name for name, _ in PAIRS} == set(ALGORITHMS)
    assert {scheme for _, scheme in PAIRS} == set(PRESETS)


def plain(w: torch.Tensor, q: QTensor) -> torch.Tensor:
    """What rounding to nearest, with a scale from the whole range of each group, makes of `w`; the scale as `q` stores it.

    Written anew for each format from its definition: nothing of the algorithms is used but a global scale.
    """
    number, (rows, columns) = q.scheme.weight.number, q.scale.shape
    groups = w.double().view(rows, columns, -1)
    low, high, amax = groups.amin(-1, True), groups.amax(-1, True), groups.abs().amax(-1, True)
    kept = scale_dtype(q.scheme, w.dtype)
    if q.scheme.weight.zero_domain == "float":
        scale = _stored((high - low) / 15, kept)
        zero = ((low + high) / 2 + scale / 2).to(w.dtype).double()
        return (((groups - zero) / scale).round().clamp(-8, 7) * scale + zero).view(w.shape)
    if q.scheme.weight.zero_domain == "int":
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = _stored((high - low) / 15, kept)
        zero = (-8 - low / scale).round()
        return (((groups / scale).round() + zero).clamp(-8, 7).sub(zero) * scale).view(w.shape)
    if number.kind == "int":
        steps = 127 if q.scheme.weight.scale_dtype == "absmax127" else (number.high - number.low) / 2
        scale = _stored(amax / steps, kept)
        return ((groups / scale).round().clamp(number.low, number.high) * scale).view(w.shape)
    if q.scheme.weight.num == "fp8_e4m3":
        scale = _stored(amax / 448, kept)
        return ((groups / scale).clamp(-448, 448).float().to(torch.float8_e4m3fn).double() * scale).view(w.shape)
    if q.scheme.weight.scale_dtype == "e8m0":
        scale = torch.exp2(torch.floor(torch.log2(amax.clamp(min=2.0**-100))) - 2)
    else:
        assert q.global_scale is not None
        shared = q.global_scale.double()
        scale = (amax / 6 / shared).clamp(2**-6, 448).float().to(torch.float8_e4m3fn).double() * shared
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    values = torch.cat([values, -values])
    nearest = ((groups / scale)[..., None] - values).abs().argmin(-1)
    return (values[nearest] * scale).view(w.shape)


def _stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rounded = scale.to(dtype).double()
    return torch.where(rounded == 0, 1.0, rounded)


def half_quadratic(w: torch.Tensor, values: torch.Tensor, q: QTensor) -> torch.Tensor:
    """The loss that hqq descends, by its own definition: x²/2 up to the turn, its slope x^(p-1)/beta beyond."""
    params = hqq.Params()
    p, beta = params.lp_norm, params.beta * params.kappa**params.iters
    groups, off = (t.double().view(*q.scale.shape, -1) for t in (w, w.double() - values.double()))
    unit = (groups.amax(-1, True) - groups.amin(-1, True)) / (q.scheme.weight.number.high - q.scheme.weight.number.low)
    x, turn = (off / torch.where(unit == 0, 1.0, unit)).abs(), beta ** (-1 / (2 - p))
    beyond = turn**2 / 2 + (x.clamp(min=turn) ** p - turn**p) / (p * beta)
    return torch.where(x <= turn, x.square() / 2, beyond).sum(-1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scheme"), [pair for pair in PAIRS if PRESETS[pair[1]].weight.block[0] == 1])
@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 9),
    groups=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    power=st.integers(-8, 6),
    shift=st.sampled_from([0.0, 0.03]),
)
def test_never_worse_than_plain_rounding_group_by_group(
    name: str, scheme: str, n: int, groups: int, seed: int, dtype: torch.dtype, power: int, shift: float
) -> None:
    """By the algorithm's own measure: squared error, or the loss of hqq."""
    width = PRESETS[scheme].group_size
    w = (weights(n, groups * (128 if width == -1 else width), seed, torch.float32) + shift).mul_(2.0**power).to(dtype)
    w[0, : w.shape[1] // groups] = 0
    q, measure = run(name, PRESETS[scheme], w), half_quadratic if name == "hqq" else squares
    assert (measure(w, dequantize(q), q) <= measure(w, plain(w, q), q) * (1 + 1e-4)).all()


@pytest.mark.parametrize(("name", "scheme"), PAIRS)
@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 140),
    groups=st.integers(1, 3),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["normal", "zeros", "equal", "one outlier", "tiny"]),
)
def test_codes_in_range_scales_finite_and_dtypes_as_stored(
    name: str, scheme: str, n: int, groups: int, seed: int, dtype: torch.dtype, kind: str
) -> None:
    chosen = PRESETS[scheme]
    w = weights(n, 128 * groups, seed, torch.float32)
    if kind == "one outlier":
        w[n // 2, 1] = 50.0
    w = (w * {"zeros": 0.0, "tiny": 2.0**-12}.get(kind, 1.0)).to(dtype)
    w = torch.full_like(w, 0.75) if kind == "equal" else w
    q = run(name, chosen, w)
    number, zero = chosen.weight.number, chosen.weight.zero_domain
    assert q.scheme == chosen and q.shape == w.shape
    assert q.codes_NK.dtype == CODE_DTYPES[chosen.weight.num]
    assert q.scale.dtype == scale_dtype(chosen, dtype)
    assert tuple(q.scale.shape) == chosen.weight.scale_shape(*w.shape)
    assert bool(torch.isfinite(q.scale.float()).all()) and bool((q.scale.float() != 0).all())
    assert (q.global_scale is not None) == chosen.weight.global_scale
    ends = (0, 15) if chosen.weight.num == "fp4_e2m1" else (number.low, number.high)
    assert q.codes_NK.float().min() >= ends[0] and q.codes_NK.float().max() <= ends[1]
    assert (q.zero is None) == (zero == "none")
    if q.zero is not None:
        assert q.zero.shape == q.scale.shape and q.zero.dtype == (torch.int8 if zero == "int" else dtype)
        assert bool(torch.isfinite(q.zero.float()).all())
    if zero == "int":
        assert q.zero is not None and q.zero.min() >= number.low and q.zero.max() <= number.high
    assert bool(torch.isfinite(dequantize(q)).all())
    if kind == "zeros":
        assert not dequantize(q).any()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scheme"), [pair for pair in PAIRS if PRESETS[pair[1]].weight.block[0] == 1])
def test_row_blocks_join_to_the_whole(name: str, scheme: str) -> None:
    """A weight of several blocks equals its rows quantized one by one, under the same largest magnitude."""
    k = 4096 if name != "gptq" else 1024
    w = weights(BLOCK_ELEMENTS // k + 3, k, 1)
    stats = Stats(group_amax=w.abs().max().item())
    whole = run(name, PRESETS[scheme], w, stats)
    for row in (0, len(w) - 4, len(w) - 1):
        part = run(name, PRESETS[scheme], w[row : row + 1], stats)
        assert same_bits(part.codes_NK, whole.codes_NK[row : row + 1])
        assert same_bits(part.scale, whole.scale[row : row + 1])
        assert same_bits(part.zero, None if whole.zero is None else whole.zero[row : row + 1])


@pytest.mark.parametrize("name", ALL)
def test_an_algorithm_refuses_foreign_schemes_with_a_reason(name: str) -> None:
    for scheme in PRESETS:
        reason = ALL[name].reject(PRESETS[scheme])
        assert ((name, scheme) in PAIRS) == (reason is None)
        assert reason is None or (reason.startswith(name) and len(reason) < 130)


@pytest.mark.parametrize(("name", "scheme"), PAIRS)
def test_the_weight_is_left_as_it_was(name: str, scheme: str) -> None:
    w, moment = weights(4, 256, 2, torch.float32), torch.ones(256)
    before = w.clone()
    run(name, PRESETS[scheme], w, Stats(moment))
    assert torch.equal(w, before) and torch.equal(moment, torch.ones(256))


@pytest.mark.parametrize("name", ["search", "hqq"])
@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W4A16_FLOAT_ZERO", "W8A16"])
def test_channels_weigh_by_their_activations(name: str, scheme: str) -> None:
    if (name, scheme) not in PAIRS:
        assert (name, scheme) == ("search", "W4A16_FLOAT_ZERO")
        return
    w, moment = weights(64, 128, 9, torch.float32), torch.ones(128)
    moment[::8] = 100.0

    def weighed(q: QTensor) -> float:
        return float(((w - dequantize(q)).square() * moment).sum())

    weighted = run(name, PRESETS[scheme], w, Stats(moment))
    assert weighed(weighted) < 0.95 * weighed(run(name, PRESETS[scheme], w))
    same = run(name, PRESETS[scheme], w, Stats(torch.full((128,), 4.0)))
    assert weighed(same) == pytest.approx(weighed(run(name, PRESETS[scheme], w)), rel=1e-2)


# ------------------------------------------------------------------------------------------------------ round to nearest


def test_rtn_by_hand() -> None:
    w = torch.tensor([[7.5, -7.5, 1.0, 0.4], [0.0, 0.0, 0.0, 0.0]])
    q = rtn.quantize(w, None, G4, rtn.Params())
    assert q.scale.tolist() == [[1.0], [1.0]]  # 7.5 / 7.5; a group of zeros gets 1
    assert q.codes_NK.tolist() == [[7, -8, 1, 0], [0, 0, 0, 0]]  # 7.5 rounds to 8 and clips to 7; −7.5 rounds to −8


def test_rtn_with_a_zero_by_hand() -> None:
    """Range −3…12 is 15 steps of 1: zero −8 + 3. Range 5…15 is widened to 0…15. Range 0 keeps every code at the zero."""
    w = torch.tensor([[-3.0, 12.0, 0.0, 4.4], [5.0, 15.0, 6.0, 7.0], [0.0, 0.0, 0.0, 0.0]])
    q = rtn.quantize(w, None, ASYM4, rtn.Params())
    assert q.zero is not None
    assert q.scale.tolist() == [[1.0], [1.0], [1.0]] and q.zero.tolist() == [[-5], [-8], [-8]]
    assert q.codes_NK.tolist() == [[-8, 7, -5, -1], [-3, 7, -2, -1], [-8, -8, -8, -8]]
    assert dequantize(q).tolist() == [[-3, 12, 0, 4], [5, 15, 6, 7], [0, 0, 0, 0]]


def test_rtn_scale_is_rounded_before_the_codes() -> None:
    """amax 1.0 → 1/7.5 = 0.13333, in bf16 0.13379: 0.8694 / 0.13379 = 6.498 rounds to 6, with the exact scale to 7."""
    w = torch.tensor([[1.0, 0.8694, 0.0, 0.0]]).bfloat16()
    w_f = w.float()[0, 1].item()
    q = rtn.quantize(w, None, G4, rtn.Params())
    value = q.scale.float().item()
    assert value != pytest.approx(1 / 7.5, rel=1e-4)
    assert q.codes_NK[0, 1].item() == round(w_f / value)


@pytest.mark.parametrize(
    ("scheme", "bits", "group"), [("W4A16", 4, 128), ("W4A16_ASYM", 4, 128), ("W8A16", 8, None), ("W8A8", 8, None)]
)
def test_rtn_equals_compressed_tensors(scheme: str, bits: int, group: int | None) -> None:
    """Scale and zero by its min-max rule, codes by its quantize function."""
    w = weights(16, 256, 7, torch.float32) + 0.004
    w_ng = w.view(16, -1, group or 256)
    arguments = QuantizationArgs(
        num_bits=bits, symmetric=scheme != "W4A16_ASYM", strategy="group" if group else "channel", group_size=group
    )
    scale, zero = calculate_qparams(w_ng.amin(-1), w_ng.amax(-1), arguments)
    q = rounded(scheme, w)
    assert torch.allclose(q.scale, scale, rtol=1e-6)  # it divides in one order, we in another
    if q.zero is not None:
        assert torch.equal(q.zero, zero.to(torch.int8))
    codes = ct_quantize(w, q.scale, zero, arguments, dtype=torch.int8)
    assert torch.equal(q.codes_NK, codes)


def test_rtn_equals_bitsandbytes() -> None:
    golden, module = load_file(GOLDEN / "bnb_int8.safetensors"), "model.layers.0.self_attn.k_proj"
    q = rounded("LLM_INT8", golden[f"source.{module}"])
    assert torch.equal(q.codes_NK, golden[f"{module}.weight"])
    assert torch.equal(q.scale, golden[f"{module}.SCB"][:, None] * INVERSE_127)


def test_a_scale_stored_as_a_magnitude_is_one_of_its_values() -> None:
    """`stored` finds a float32 m with fl32(m · fl32(1/127)) as its result, no further from the wish than 2^-22 of it."""
    wish = torch.rand(4096, generator=torch.Generator().manual_seed(3)) + 1e-3
    scale, inverse = stored(wish, PRESETS["LLM_INT8"], torch.bfloat16), torch.tensor(1 / 127, dtype=torch.float32)
    assert scale.dtype == torch.float32 and inverse.item() == INVERSE_127
    assert ((scale - wish).abs() <= wish * 2**-22).all()
    near = [scale * 127]
    for end in (torch.inf, -torch.inf):
        near.append(torch.nextafter(near[0], torch.full_like(scale, end)))
    assert torch.stack([magnitude * inverse == scale for magnitude in near]).any(0).all()
    assert stored(torch.zeros(1), PRESETS["LLM_INT8"], torch.bfloat16).item() == pytest.approx(1 / 127)


# --------------------------------------------------------------------------------------------------------------- search


def brute_force(w: torch.Tensor, group: int, zeros: list[int]) -> torch.Tensor:
    """Least squared error of every group over a fine grid of scales of both signs, with each of `zeros`."""
    groups = w.view(len(w), -1, group)
    best = torch.full(groups.shape[:2], torch.inf)
    for step in torch.linspace(0.4, 1.2, 600).tolist():
        for sign in (1, -1):
            scale = groups.abs().amax(-1, keepdim=True) * (sign * step / 8)
            for zero in zeros:
                off = (groups / scale).round().clamp(-8 - zero, 7 - zero) * scale - groups
                best = torch.minimum(best, off.square().sum(-1))
    return best


def test_search_comes_close_to_brute_force() -> None:
    w = weights(8, 64, 11, torch.float32)
    q = search.quantize(w, None, preset("W4A16", 32), search.Params(grid=12, shrink=0.65))
    assert (error(w, q).sum() / brute_force(w, 32, [0]).sum()).item() < 1.01
    q = search.quantize(w, None, preset("W4A16", 32), search.Params())
    assert (error(w, q).sum() / brute_force(w, 32, [0]).sum()).item() < 1.02


def test_search_with_zeros_comes_close_to_brute_force() -> None:
    w = weights(8, 64, 11, torch.float32) + 0.01
    q = search.quantize(w, None, preset("W4A16_ASYM", 32), search.Params())
    # scales of a range that is not symmetric are smaller: a grid of amax/8 from 0.4 covers them
    assert (error(w, q).sum() / brute_force(w, 32, list(range(-8, 8))).sum()).item() < 1.02


def test_search_uses_the_longer_side_for_the_larger_weights() -> None:
    w = torch.tensor([[8.0, 1.0, 2.0, -3.0]])
    q = search.quantize(w, None, G4, search.Params())
    assert q.scale.item() == -1.0
    assert q.codes_NK.tolist() == [[-8, -1, -2, 3]]


@pytest.mark.parametrize(
    ("scheme", "part"), [("W4A16", 0.80), ("W4A16_ASYM", 0.93), ("W8A16", 0.99), ("LLM_INT8", 0.995)]
)
def test_search_beats_rounding_on_normal_weights(scheme: str, part: float) -> None:
    w = weights(256, 512, 5)
    found = error(w, search.quantize(w, None, PRESETS[scheme], search.Params())).sum()
    assert found < part * error(w, rounded(scheme, w)).sum()


def test_a_scale_stored_as_a_magnitude_is_positive() -> None:
    for name in ("rtn", "search", "hqq"):
        assert (run(name, PRESETS["LLM_INT8"], weights(64, 256, 8)).scale > 0).all()


# ------------------------------------------------------------------------------------------------------- half-quadratic


def lp(w: torch.Tensor, values: torch.Tensor, p: float = 0.7) -> torch.Tensor:
    return (w.float() - values).abs().pow(p).view(len(w), -1, 128).sum(-1)


def spread(t: torch.Tensor) -> torch.Tensor:
    return t.float().repeat_interleave(128, 1)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "hqq.safetensors")


def test_hqq_has_less_error_than_its_original(golden: dict[str, torch.Tensor]) -> None:
    """Over all in squares and in the l_p norm that the original means to lower; in squares, and with a beta that makes the
    loss an l_p norm in that norm, group by group too."""
    w = golden["w"].float()
    theirs = (golden["hqq.codes"].float() - spread(golden["hqq.zero"])) * spread(golden["hqq.scale"])
    ours = dequantize(run("hqq", PRESETS["W4A16_FLOAT_ZERO"], w))
    assert lp(w, ours).sum() < 0.95 * lp(w, theirs).sum()
    assert lp(w, ours, 2).sum() < 0.90 * lp(w, theirs, 2).sum()
    assert (lp(w, ours, 2) < 1.01 * lp(w, theirs, 2)).all()
    towards_lp = hqq.Params(beta=30.0, iters=40, grid=8, phases=8)
    ours = dequantize(hqq.quantize(w, None, PRESETS["W4A16_FLOAT_ZERO"], towards_lp))
    assert (lp(w, ours) < lp(w, theirs)).all()


def test_hqq_has_less_error_than_torchao_in_bf16(golden: dict[str, torch.Tensor]) -> None:
    w = golden["w"]
    theirs = (golden["torchao.codes"].float() - 8) * spread(golden["torchao.scale"]) + spread(golden["torchao.zero"])
    q = run("hqq", PRESETS["W4A16_FLOAT_ZERO"], w)
    assert q.zero is not None and q.zero.dtype == torch.bfloat16
    assert lp(w, dequantize(q)).sum() < 0.95 * lp(w, theirs).sum()
    assert (lp(w, dequantize(q), 2) < 1.01 * lp(w, theirs, 2)).all()


def test_hqq_float_zero_is_near_that_of_its_original(golden: dict[str, torch.Tensor]) -> None:
    """Zeros of (codes − 8)·scale + zero; theirs is (8 − zero)·scale. The scales differ, so zeros do by part of a step."""
    q = run("hqq", PRESETS["W4A16_FLOAT_ZERO"], golden["w"].float())
    assert q.zero is not None
    off = (q.zero - (8 - golden["hqq.zero"]) * golden["hqq.scale"]).abs() / golden["hqq.scale"]
    assert off.max() < 1 and off.median() < 0.4


@pytest.mark.parametrize(("p", "beta"), [(0.7, 1.0), (0.7, 10.0), (0.5, 3.0)])
def test_hqq_shrinks_as_its_original_does(golden: dict[str, torch.Tensor], p: float, beta: float) -> None:
    x = golden["x"].view(1, 1, -1)
    pull = hqq._Loss(torch.ones(1, 1), p, beta).pull(x)
    assert torch.allclose((x - pull).view(-1), golden[f"shrunk.{p}.{beta}"], atol=1e-6)


def test_the_shrinkage_of_the_original_is_without_effect_on_weights(golden: dict[str, torch.Tensor]) -> None:
    """Why errors are measured in steps here: in the unit of the weights they never reach the threshold."""
    assert torch.equal(golden["hqq.codes"], golden["inert.codes"])
    assert torch.equal(golden["hqq.zero"], golden["inert.zero"])


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W4A16_FLOAT_ZERO", "W8A16"])
@pytest.mark.parametrize("beta", [0.01, 1.0, 10.0])
def test_every_alternation_lowers_the_loss(scheme: str, beta: float) -> None:
    """With beta fixed. Before rounding: in the stored dtype a fit can only be kept or refused."""
    w = weights(16, 256, 21, torch.float32)
    chosen, params = PRESETS[scheme], hqq.Params(grid=1, shrink=0.8, iters=1, beta=beta, kappa=1.0)
    groups = Groups.of(w, None, chosen)
    unit = hqq._centred(groups).scale_RG
    loss, fit = hqq._Loss(unit, params.lp_norm, beta), hqq._begin(groups, hqq._starts(groups, chosen, params))
    before = first = hqq._error(groups, fit, loss)
    for _ in range(8):
        fit = hqq._alternate(groups, fit, unit, params)
        after = hqq._error(groups, fit, loss)
        assert (after <= before * (1 + 1e-4)).all()
        before = after
    assert before.sum() < first.sum()


def test_a_large_beta_forgives_an_outlier_and_a_small_one_does_not() -> None:
    w = weights(32, 128, 4, torch.float32)
    w[:, 5] = 0.15  # 7.5 standard deviations

    def bulk(beta: float) -> float:
        q = hqq.quantize(w, None, PRESETS["W4A16"], hqq.Params(beta=beta, iters=30, shrink=0.5, grid=12))
        off = (w - dequantize(q)).abs().pow(0.7)
        return float(off.sum() - off[:, 5].sum())

    assert bulk(100.0) < 0.98 * bulk(0.01)


def test_hqq_with_a_float_zero_comes_close_to_brute_force() -> None:
    w = weights(6, 64, 12, torch.float32) + 0.005
    q = hqq.quantize(w, None, preset("W4A16_FLOAT_ZERO", 32), hqq.Params(beta=1e-3))
    groups = w.view(6, 2, 32)
    low, high = groups.amin(-1, True), groups.amax(-1, True)
    best = torch.full((6, 2), torch.inf)
    for step in torch.linspace(0.6, 1.1, 120).tolist():
        scale = (high - low) * step / 15
        for phase in torch.linspace(-0.6, 0.6, 60).tolist():
            zero = (low + high) / 2 + (0.5 + phase) * scale
            off = ((groups - zero) / scale).round().clamp(-8, 7) * scale + zero - groups
            best = torch.minimum(best, off.square().sum(-1))
    assert (error(w, q).sum() / best.sum()).item() < 1.02


@pytest.mark.parametrize(("scheme", "part"), [("W4A16", 0.80), ("W4A16_ASYM", 0.95)])
def test_hqq_moves_more_than_the_zero(scheme: str, part: float) -> None:
    """With an integer zero or none, moving the zero alone and rounding it would be plain rounding."""
    w = weights(64, 512, 6)
    assert error(w, run("hqq", PRESETS[scheme], w)).sum() < part * error(w, rounded(scheme, w)).sum()


def test_equal_weights_with_a_float_zero_are_exact() -> None:
    w = torch.full((2, 128), 0.0195).bfloat16()
    q = run("hqq", PRESETS["W4A16_FLOAT_ZERO"], w)
    assert torch.equal(dequantize(q), w.float())


@pytest.mark.parametrize(
    ("params", "wrong"),
    [
        (hqq.Params, {"iters": -1}),
        (hqq.Params, {"lp_norm": 0.0}),
        (hqq.Params, {"lp_norm": 2.0}),
        (hqq.Params, {"beta": 0.0}),
        (hqq.Params, {"kappa": 0.9}),
        (hqq.Params, {"grid": 0}),
        (hqq.Params, {"phases": 0}),
        (hqq.Params, {"shrink": 1.5}),
        (search.Params, {"grid": 0}),
        (search.Params, {"shrink": 0.0}),
        (search.Params, {"refine": -1}),
    ],
)
def test_parameters_out_of_range_are_refused(params: Any, wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        params(**wrong)
