"""FP8, NVFP4 and MXFP4: against hand-computed blocks, brute force, and torchao, ModelOpt and compressed-tensors."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compressed-tensors compiles its FP4 cast; the plain one gives the same

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize as ct_quantize
from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from quantpub import e2m1
from quantpub.algorithms import fp8, mxfp4, nvfp4
from quantpub.algorithms.base import BLOCK_ELEMENTS
from quantpub.qtensor import E2M1, QTensor, code_values, dequantize, same_bits
from quantpub.scheme import PRESETS, Scheme
from quantpub.stats import Stats

GOLDEN = Path(__file__).parent / "golden"
NV, MX, BLOCK, TENSOR = (PRESETS[name] for name in ("NVFP4A16", "MXFP4A16", "FP8_BLOCK", "FP8"))
ALL = [(nvfp4, NV), (nvfp4, PRESETS["NVFP4"]), (mxfp4, MX), (fp8, BLOCK), (fp8, TENSOR), (fp8, PRESETS["FP8_DYNAMIC"])]
IDS = [f"{module.__name__.split('.')[-1]}-{scheme.name}" for module, scheme in ALL]
FP4 = [(nvfp4, NV), (mxfp4, MX)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def weights(n: int, k: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal weights, every row of its own size."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.exp2(torch.randint(-3, 4, (n, 1), generator=generator))
    return (torch.randn((n, k), generator=generator) * rows * 0.02).to(dtype)


def run(module: Any, scheme: Scheme, w: torch.Tensor, stats: Stats | None = None, **params: bool) -> QTensor:
    """Activations that take a calibrated scale were never larger than 1, unless `stats` says otherwise."""
    if scheme.act is not None and (scheme.act.global_scale or not scheme.act.dynamic):
        stats = replace(Stats(input_amax=1.0) if stats is None else stats, input_amax=1.0)
    q: QTensor = module.quantize(w, stats, scheme, module.Params(**params))
    return q


def group_errors(w: torch.Tensor, q: QTensor, weight: torch.Tensor | float = 1.0) -> torch.Tensor:
    off = (w.double() - dequantize(q).double()).square() * weight
    return off.view(*q.scale.shape, -1).sum(-1)


# ---------------------------------------------------------------------------------------------------------- E2M1


def test_every_e2m1_value_is_its_own_code() -> None:
    values = torch.tensor([*E2M1, *(-value for value in E2M1[1:])])
    codes = [*range(8), *range(9, 16)]
    assert e2m1.codes(values).tolist() == codes
    assert torch.equal(code_values(torch.tensor(codes, dtype=torch.uint8), "fp4_e2m1"), values)


def test_e2m1_ties_go_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -5.0])
    assert e2m1.codes(ties).tolist() == [0, 2, 2, 4, 4, 6, 6, 8, 14]
    above = torch.nextafter(ties, ties * 2)
    assert e2m1.codes(above).tolist() == [1, 2, 3, 4, 5, 6, 7, 9, 15]
    below = torch.nextafter(ties, torch.zeros(()))
    assert e2m1.codes(below).tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 14]


def test_e2m1_saturates() -> None:
    assert e2m1.codes(torch.tensor([6.0, 7.0, 8.0, 1e30, -1e30])).tolist() == [7, 7, 7, 7, 15]


def test_e2m1_equals_torchao() -> None:
    golden = load_file(GOLDEN / "fp4_torchao.safetensors")
    assert torch.equal(e2m1.codes(golden["e2m1.x"]), golden["e2m1.codes"])


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=64))
def test_e2m1_equals_compressed_tensors(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    assert torch.equal(code_values(e2m1.codes(x), "fp4_e2m1"), FP4_E2M1_DATA.cast_to_fp4(x.clone()))


# --------------------------------------------------------------------------------------------------------- NVFP4


def test_nvfp4_by_hand() -> None:
    """amax 2688 / 1024: amax / 4 = 672 / 1024 fits 448 · 2^-9, so the global scale is 2^-9."""
    row = torch.zeros(32)
    row[:8] = torch.tensor([2688.0, -1344.0, 448.0, -224.0, 100.0, 112.0, -700.0, 1792.0]) / 1024
    row[16] = -6 / 512
    q = run(nvfp4, NV, row[None], search=False)
    assert q.global_scale is not None and q.global_scale.item() == 2.0**-9
    assert q.scale.float().tolist() == [[224.0, 1.0]]  # 2688 / 1024 · 512 / 6; 6 / 512 · 512 / 6
    # in units of 224 / 512: 6, −3, 1, −0.5, 0.223, 0.25 (a tie), −1.5625, 4
    assert q.codes_NK[0, :8].tolist() == [7, 13, 2, 9, 0, 0, 11, 6]
    assert q.codes_NK[0, 16].item() == 15 and not q.codes_NK[0, 17:].any()
    mirrored = run(nvfp4, NV, -row[None], search=False)  # the largest magnitude is negative
    assert torch.equal(dequantize(mirrored), -dequantize(q)) and same_bits(mirrored.global_scale, q.global_scale)


def test_nvfp4_search_puts_the_largest_at_four_where_that_is_exact() -> None:
    """4, 3, 2, 1 are E2M1 values at scale 1; at the plain scale, 4/6, rounded to 0.6875, none but 4 comes near."""
    row = torch.tensor([4.0, 3.0, -2.0, 1.0] * 4)
    plain, found = (run(nvfp4, NV, row[None], search=search) for search in (False, True))
    assert torch.equal(dequantize(found), row[None])
    assert (group_errors(row[None], plain) > 0.3).all()


@pytest.mark.parametrize("amax", [0.0, 1e-30, 0.011, 0.7, 1.0, 1792.0, 1793.0, 3e38])
def test_nvfp4_global_scale_is_the_least_power_of_two(amax: float) -> None:
    scale = nvfp4.global_scale(amax)
    assert torch.frexp(torch.tensor(scale)).mantissa == 0.5
    assert amax / 4 / scale <= 448
    assert amax == 0 or amax / 4 / (scale / 2) > 448
    assert 1 / torch.tensor(1 / scale) == torch.tensor(scale)


def test_nvfp4_equals_modelopt() -> None:
    golden = load_file(GOLDEN / "fp4_modelopt.safetensors")
    w, global_scale = golden["nvfp4.w"], golden["nvfp4.global_scale"]
    q = run(nvfp4, NV, w, search=False)
    assert same_bits(q.global_scale, global_scale)
    assert same_bits(q.scale, golden["nvfp4.scale"])
    assert torch.equal(q.codes_NK, golden["nvfp4.codes"])
    given_scale = (golden["nvfp4.given"].float() * global_scale).repeat_interleave(16, 1)
    assert torch.equal(e2m1.codes(w.float() / given_scale), golden["nvfp4.given_codes"])


def test_nvfp4_search_finds_the_best_of_all_scales() -> None:
    """All 119 normal E4M3 scales for each of 512 groups, in float64."""
    w = weights(32, 256, 1, torch.bfloat16)
    q = run(nvfp4, NV, w)
    assert q.global_scale is not None
    x = (w.double() / q.global_scale.double()).view(32, 16, 16)
    levels = torch.tensor(E2M1, dtype=torch.float64)
    best = torch.full((32, 16), torch.inf, dtype=torch.float64)
    for scale in torch.arange(0x08, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double():
        off = (x.abs()[..., None] - levels * scale).abs().amin(-1)
        best = torch.minimum(best, off.square().sum(-1))
    assert group_errors(w, q).sum() / (best.sum() * q.global_scale.double() ** 2) < 1.001


def test_nvfp4_search_weighs_channels_by_their_activations() -> None:
    w, moment = weights(64, 128, 9), torch.ones(128)
    moment[::8] = 100.0
    plain, weighted = run(nvfp4, NV, w), run(nvfp4, NV, w, Stats(second_moment_K=moment))
    assert group_errors(w, weighted, moment).sum() < 0.8 * group_errors(w, plain, moment).sum()


def test_nvfp4_takes_the_amax_of_its_fused_group() -> None:
    w = weights(8, 64, 3, torch.bfloat16)
    amax = 7 * w.float().abs().max().item()
    q = run(nvfp4, NV, w, Stats(group_amax=amax))
    assert q.global_scale is not None and q.global_scale.item() == nvfp4.global_scale(amax)
    assert q.global_scale.item() > nvfp4.global_scale(w.float().abs().max().item())
    assert group_errors(w, q).sum() < 0.01 * w.double().square().sum()


@pytest.mark.parametrize("search", [True, False])
def test_nvfp4_scales_are_positive_normal_numbers(search: bool) -> None:
    """A group of zeros, and groups 2^-12 to 2^-40 of the largest weight."""
    w = torch.randn((40, 32), generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    w[:, 16:] *= torch.exp2(-torch.arange(40.0))[:, None]
    w[3] = 0
    q = run(nvfp4, NV, w, search=search)
    assert q.scale.float().min() == 2.0**-6 and bool(torch.isfinite(q.scale.float()).all())
    assert not q.codes_NK[3].any() and (q.scale[3].float() == 2.0**-6).all()
    assert (group_errors(w, q)[:, 1] <= w.double()[:, 16:].square().sum(-1)).all()


# --------------------------------------------------------------------------------------------------------- MXFP4


def test_mxfp4_by_hand() -> None:
    w = torch.zeros(5, 32)
    w[0, :4] = torch.tensor([7.5, -5.0, 1.25, 0.25])  # plain: 7.5 is in [4, 8), scale 1; it saturates at 6
    w[1, :2] = torch.tensor([3.999, -0.5])  # plain: scale 1/2, 7.998 saturates
    w[2, 0] = 2.0**-130
    w[4, :2] = torch.tensor([2.0**127, -(2.0**126)])
    q = run(mxfp4, MX, w, search=False)
    assert q.scale.view(torch.uint8)[:, 0].tolist() == [127, 126, 0, 127, 252]  # zeros: 1
    assert q.codes_NK[0, :4].tolist() == [7, 14, 2, 0]  # −5 and 1.25 and 0.25 are ties
    assert q.codes_NK[1, :2].tolist() == [7, 10]
    assert dequantize(q)[1, 0] == 3.0
    assert not q.codes_NK[2:4].any()  # 2^-130 is an eighth of the smallest scale
    assert dequantize(q)[4, :2].tolist() == [2.0**127, -(2.0**126)]
    found = run(mxfp4, MX, w)
    assert found.scale.view(torch.uint8)[:2, 0].tolist() == [128, 127]  # 2 · 4 is nearer to 7.5, 1 · 4 to 3.999


def test_mxfp4_equals_torchao() -> None:
    golden = load_file(GOLDEN / "fp4_torchao.safetensors")
    q = run(mxfp4, MX, golden["mx.w"], search=False)
    assert torch.equal(q.scale.view(torch.uint8), golden["mx.scale"])
    assert torch.equal(q.codes_NK, golden["mx.codes"])


def test_mxfp4_search_finds_the_best_of_all_scales() -> None:
    w = weights(64, 256, 2, torch.bfloat16)
    levels, best = torch.tensor(E2M1, dtype=torch.float64), torch.full((64, 8), torch.inf, dtype=torch.float64)
    for exponent in range(-20, 4):
        off = (w.double().abs().view(64, 8, 32, 1) - levels * 2.0**exponent).abs().amin(-1)
        best = torch.minimum(best, off.square().sum(-1))
    found, plain = group_errors(w, run(mxfp4, MX, w)), group_errors(w, run(mxfp4, MX, w, search=False))
    torch.testing.assert_close(found, best, rtol=1e-5, atol=0)
    assert found.sum() < 0.97 * plain.sum()


def test_mxfp4_search_weighs_channels_by_their_activations() -> None:
    w, moment = weights(64, 128, 9), torch.ones(128)
    moment[::8] = 100.0
    plain, weighted = run(mxfp4, MX, w), run(mxfp4, MX, w, Stats(second_moment_K=moment))
    assert group_errors(w, weighted, moment).sum() < 0.97 * group_errors(w, plain, moment).sum()


# ----------------------------------------------------------------------------------------------------------- FP8


def test_fp8_block_by_hand() -> None:
    """[130, 129] is four blocks, three of them parts of one; the last is all zeros."""
    w = torch.zeros(130, 129)
    w[0, 0], w[127, 127], w[5, 128], w[129, 3] = 448.0, -17.0, 896.0, 0.448
    w[6, 128] = 1.0
    q = run(fp8, BLOCK, w)
    assert q.scale.dtype == torch.float32
    torch.testing.assert_close(q.scale, torch.tensor([[1.0, 2.0], [0.001, 1.0]]))
    assert q.codes_NK[0, 0].item() == 448 and q.codes_NK[127, 127].item() == -16  # 17 is a tie between 16 and 18
    assert q.codes_NK[5, 128].item() == 448 and q.codes_NK[6, 128].item() == 0.5 and q.codes_NK[129, 3].item() == 448


def blocks_apart(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales, each block cut out of the weight and quantized alone."""
    codes, scale = (
        torch.empty_like(w, dtype=torch.float8_e4m3fn),
        torch.empty(-(-w.shape[0] // 128), -(-w.shape[1] // 128)),
    )
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            amax = w[at].float().abs().max()
            scale[i, j] = amax / 448 if amax > 0 else 1.0
            codes[at] = (w[at].float() / scale[i, j]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scale


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**31), st.sampled_from(DTYPES), st.booleans())
def test_fp8_blocks_are_quantized_each_on_its_own(n: int, k: int, seed: int, dtype: torch.dtype, hole: bool) -> None:
    w = weights(n, k, seed, dtype)
    if hole:
        w[:128, -(k % 128) :] = 0
    q, (codes, scale) = run(fp8, BLOCK, w), blocks_apart(w)
    assert same_bits(q.codes_NK, codes) and same_bits(q.scale, scale)


@pytest.mark.parametrize("shape", [(256, 384), (200, 384), (256, 300), (130, 129)])
def test_fp8_blocks_equal_compressed_tensors(shape: tuple[int, int]) -> None:
    w = weights(*shape, 5)
    q = run(fp8, BLOCK, w)
    arguments = QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[128, 128])
    padded = torch.nn.functional.pad(w, (0, -shape[1] % 128, 0, -shape[0] % 128))
    tiles = padded.view(q.scale.shape[0], 128, q.scale.shape[1], 128)
    scale, zero = calculate_qparams(tiles.amin((1, 3)), tiles.amax((1, 3)), arguments)
    assert torch.equal(q.scale, scale)
    reference = ct_quantize(w, scale, zero, arguments, dtype=torch.float8_e4m3fn)
    assert same_bits(q.codes_NK, reference)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_of_a_whole_tensor_equals_compressed_tensors(dtype: torch.dtype) -> None:
    w = weights(BLOCK_ELEMENTS // 512 + 9, 512, 4, dtype) + 0  # more than one band of rows; no minus zeros
    w[-1, 3] = -2 * w.abs().max()
    q = run(fp8, TENSOR, w)
    arguments = QuantizationArgs(num_bits=8, type="float", strategy="tensor")
    scale, zero = calculate_qparams(w.float().min()[None], w.float().max()[None], arguments)
    assert q.scale.dtype == torch.float32 and torch.equal(q.scale, scale.view(1, 1))
    assert same_bits(q.codes_NK, ct_quantize(w.float(), scale, zero, arguments, dtype=torch.float8_e4m3fn))
    assert q.input_scale is not None and torch.equal(q.input_scale, torch.tensor(1 / 448))


def test_fp8_of_a_whole_tensor_takes_the_amax_of_its_fused_group() -> None:
    w = weights(16, 64, 7, torch.bfloat16)
    q = run(fp8, TENSOR, w, Stats(group_amax=44.8))
    assert q.scale.shape == (1, 1) and q.scale.item() == pytest.approx(0.1, rel=1e-6)
    assert same_bits(q.codes_NK, (w.float() / q.scale).to(torch.float8_e4m3fn))


def test_fp8_saturates_where_the_stored_scale_was_rounded_down() -> None:
    """amax / 448 = 1.4 · 2^-24 is rounded to 2^-24, the smallest float16: 627 would not fit E4M3."""
    w = torch.tensor([[1.4 * 448 * 2.0**-24, -(2.0**-18)]], dtype=torch.float16)
    q = run(fp8, PRESETS["FP8_DYNAMIC"], w)
    assert q.scale.item() == 2.0**-24
    assert q.codes_NK.float().tolist() == [[448.0, -64.0]]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 300), st.integers(0, 2**31), st.sampled_from(DTYPES))
def test_fp8_row_search_is_never_worse_than_the_plain_rule(n: int, k: int, seed: int, dtype: torch.dtype) -> None:
    w, scheme = weights(n, k, seed, dtype), PRESETS["FP8_DYNAMIC"]
    found, plain = run(fp8, scheme, w, row_search=True), run(fp8, scheme, w)
    assert (group_errors(w, found) <= group_errors(w, plain) * (1 + 1e-5)).all()
    assert found.scale.dtype == dtype


def test_fp8_row_search_comes_close_to_brute_force() -> None:
    """200 scales over two octaves for each row: the search of eight is within 5 % of the best."""
    w, scheme = weights(64, 512, 12), PRESETS["FP8_DYNAMIC"]
    best, plain_scale = torch.full((64, 1), torch.inf), w.abs().amax(1, keepdim=True) / 448
    for step in torch.linspace(-0.5, 1.5, 200).exp2().tolist():
        scale = plain_scale * step
        off = (w / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale - w
        best = torch.minimum(best, off.square().sum(1, keepdim=True))
    found, plain = (group_errors(w, run(fp8, scheme, w, row_search=search)).sum() for search in (True, False))
    assert found < 1.05 * best.sum() and found < 0.93 * plain


# ----------------------------------------------------------------------------------------------------------- all


@pytest.mark.parametrize(("module", "scheme"), FP4)
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 9),
    groups=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    power=st.integers(-118, 118),
    weighted=st.booleans(),
)
def test_the_search_is_never_worse_than_the_plain_rule(
    module: Any, scheme: Scheme, n: int, groups: int, seed: int, dtype: torch.dtype, power: int, weighted: bool
) -> None:
    k = groups * scheme.group_size
    largest = torch.finfo(dtype).max
    w = (weights(n, k, seed).double() * 2.0**power).clamp(-largest, largest).to(dtype)
    moment = torch.rand(k, generator=torch.Generator().manual_seed(seed)) if weighted else None
    found = run(module, scheme, w, Stats(second_moment_K=moment))
    plain = run(module, scheme, w, search=False)
    weight = 1.0 if moment is None else moment.double()
    assert (group_errors(w, found, weight) <= group_errors(w, plain, weight) * (1 + 1e-5)).all()
    assert bool(torch.isfinite(dequantize(found)).all()) and int(found.codes_NK.max()) < 16
    assert bool(torch.isfinite(found.scale.float()).all()) and bool((found.scale.float() > 0).all())


@pytest.mark.parametrize(("module", "scheme"), FP4)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_power_of_two_changes_the_scales_alone(module: Any, scheme: Scheme, dtype: torch.dtype) -> None:
    """From 2^-100 to 2^100 the codes are the same and the weights scale along."""
    w = weights(8, 64, 6, dtype)
    q = run(module, scheme, w)
    for power in (-100, -20, 7, 100):
        other = run(module, scheme, (w.double() * 2.0**power).to(dtype))
        assert torch.equal(other.codes_NK, q.codes_NK)
        assert torch.equal(dequantize(other).double(), dequantize(q).double() * 2.0**power)


@pytest.mark.parametrize(("module", "scheme"), ALL, ids=IDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zeros(module: Any, scheme: Scheme, dtype: torch.dtype) -> None:
    q = run(module, scheme, torch.zeros((3, 96), dtype=dtype))
    assert not dequantize(q).any()
    assert bool(torch.isfinite(q.scale.float()).all()) and bool((q.scale.float() > 0).all())
    assert q.global_scale is None or q.global_scale.item() == 1


@pytest.mark.parametrize(("module", "scheme"), ALL, ids=IDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_dtypes_and_that_the_weight_is_left_as_it_was(module: Any, scheme: Scheme, dtype: torch.dtype) -> None:
    w = weights(130, 160, 8, dtype)
    before = w.clone()
    q = run(module, scheme, w)
    assert torch.equal(w, before)
    assert q.codes_NK.shape == w.shape and q.scale.shape == scheme.weight.scale_shape(*w.shape)
    assert q.codes_NK.is_contiguous() and q.scale.is_contiguous() and q.zero is None
    assert (q.global_scale is not None) == scheme.weight.global_scale
    floor = {"fp8_e4m3": 1e-3, "fp4_e2m1": 0.017}[scheme.weight.num]  # 30 dB and 17.7 dB
    assert (w.double() - dequantize(q)).square().sum() < floor * w.double().square().sum()


@pytest.mark.parametrize(("module", "scheme"), FP4)
def test_row_blocks_join_to_the_whole(module: Any, scheme: Scheme) -> None:
    """A weight of several blocks of rows equals its rows quantized one by one under the same global scale."""
    w = weights(BLOCK_ELEMENTS // 4096 + 3, 4096, 1, torch.bfloat16)
    whole, amax = run(module, scheme, w), w.float().abs().max().item()
    for row in (0, len(w) - 4, len(w) - 1):
        part = run(module, scheme, w[row : row + 1], Stats(group_amax=amax))
        assert torch.equal(part.codes_NK, whole.codes_NK[row : row + 1])
        assert same_bits(part.scale, whole.scale[row : row + 1].contiguous())


@pytest.mark.parametrize("module", [fp8, nvfp4, mxfp4])
def test_an_algorithm_takes_its_own_schemes_and_says_why_not_others(module: Any) -> None:
    reasons = {name: module.reject(scheme) for name, scheme in PRESETS.items()}
    taken = {name for name, reason in reasons.items() if reason is None}
    assert (
        taken == {fp8: {"FP8", "FP8_BLOCK", "FP8_DYNAMIC"}, nvfp4: {"NVFP4", "NVFP4A16"}, mxfp4: {"MXFP4A16"}}[module]
    )
    assert "FP8 codes, not int4" in reasons["W4A16"] if module is fp8 else "W4A16" in reasons["W4A16"]
