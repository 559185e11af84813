"""SmoothQuant's factors: blocks computed by hand, rounding against what serving kernels and algorithms do, the search."""

from __future__ import annotations

import math

import pytest
import torch

from quantpub.activations import fp8_per_token, fp8_static, int8_per_token
from quantpub.algorithms import fp8, rtn
from quantpub.qtensor import dequantize
from quantpub.scheme import PRESETS, preset
from quantpub.stats import Observed, Stats
from quantpub.transforms.base import round_input, round_weight
from quantpub.transforms.smoothquant import (
    Limits,
    Params,
    Reader,
    Size,
    error,
    factors,
    reader_of,
    reject,
    solve,
    stacked,
)

FREE, EXACT = Limits(False, 16), Limits(True, 16)
INT8 = PRESETS["W8A8"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seen(x_RK: torch.Tensor) -> Observed:
    return Observed(len(x_RK), x_RK.abs().amax(0), x_RK.square().mean(0), x_RK)


def outliers(channels: tuple[int, ...] = (3, 40), factor: float = 100.0) -> tuple[torch.Tensor, torch.Tensor]:
    x_RK, w_NK = normal(64, 64), normal(48, 64, seed=1)
    x_RK[:, channels], w_NK[:, channels] = x_RK[:, channels] * factor, w_NK[:, channels] / factor
    return x_RK, w_NK


def sizes(x: list[float], w: list[float]) -> Size:
    return Size(torch.tensor(x), torch.tensor(w))


@pytest.mark.parametrize(
    ("x", "w", "alpha", "limits", "s"),
    [
        ([16.0, 1.0], [1.0, 1.0], 0.5, FREE, [2.0, 0.5]),  # 4 and 1, centred on 1
        ([16.0, 1.0], [1.0, 16.0], 0.5, FREE, [4.0, 0.25]),
        ([16.0, 1.0], [1.0, 64.0], 1.0, FREE, [4.0, 0.25]),  # only x counts
        ([16.0, 1.0], [1.0, 64.0], 0.0, FREE, [8.0, 0.125]),  # only W
        ([8.0, 1.0, 1.0], [1.0, 1.0, 1.0], 1.0, FREE, [4.0, 0.5, 0.5]),
        ([5.0, 1.0], [1.0, 1.0], 1.0, EXACT, [2.0, 0.5]),  # √5 and its inverse, to the nearest power of two
        ([16.0, 1.0], [1.0, 1.0], 0.5, Limits(True, 16, below_one=True), [1.0, 0.25]),
        ([2.0**40, 1.0], [1.0, 1.0], 1.0, Limits(False, 6), [64.0, 1 / 64]),
        ([16.0, 0.0, 1.0, 4.0], [1.0, 1.0, 1.0, 0.0], 0.5, FREE, [2.0, 1.0, 0.5, 1.0]),  # dead channels
        ([0.0, 0.0], [1.0, 1.0], 0.5, FREE, [1.0, 1.0]),
    ],
)
def test_factors_by_hand(x: list[float], w: list[float], alpha: float, limits: Limits, s: list[float]) -> None:
    assert torch.allclose(factors(sizes(x, w), alpha, limits), torch.tensor(s), rtol=1e-6)


def test_exact_factors_are_powers_of_two_and_float32() -> None:
    s_F = factors(Size(normal(500).abs() * 50, normal(500, seed=2).abs()), 0.6, EXACT)
    assert s_F.dtype == torch.float32 and torch.equal(torch.frexp(s_F).mantissa, torch.full_like(s_F, 0.5))


def test_inputs_are_rounded_as_the_kernels_round_them() -> None:
    x_RK = normal(32, 48) * torch.logspace(-3, 3, 32)[:, None]
    for name, kernel in (("W8A8", int8_per_token), ("FP8_DYNAMIC", fp8_per_token)):
        act = PRESETS[name].act
        assert act is not None and torch.equal(round_input(x_RK, act, 0.0), kernel(x_RK)), name
    static, amax = PRESETS["FP8"].act, float(x_RK.abs().amax())
    assert static is not None
    assert torch.equal(round_input(x_RK, static, amax), fp8_static(x_RK, fp8.amax_scale(amax)))


def test_weights_are_rounded_as_the_algorithms_round_them() -> None:
    w_NK = normal(24, 64)
    for name in ("FP8_DYNAMIC", "FP8"):
        amax = float(w_NK.abs().amax())
        q = fp8.quantize(w_NK, Stats(input_amax=1.0), PRESETS[name], fp8.Params())
        assert torch.allclose(round_weight(w_NK, PRESETS[name].weight, amax), dequantize(q), rtol=1e-6), name
    q = rtn.quantize(w_NK, None, INT8, rtn.Params())  # whose rows span 255 codes, not 254
    off = round_weight(w_NK, INT8.weight, 0.0) - dequantize(q)
    assert (off.abs() <= w_NK.abs().amax(1, keepdim=True) / 127 * 1.01).all()


def test_the_error_is_that_of_rounded_matrices_written_out() -> None:
    x_RK, w_NK, s_K = normal(6, 8), normal(5, 8, seed=1), normal(8, seed=2).abs() + 0.5
    logs = []
    for x in x_RK.double():
        step = (x / s_K).abs().max() / 127
        rounded = (x / s_K / step).round() * step
        off, all_ = 0.0, 0.0
        for w in w_NK.double():
            unit = (w * s_K).abs().max() / 127
            codes = (w * s_K / unit).round().clamp(-128, 127)
            off, all_ = off + float(x @ w - rounded @ (codes * unit)) ** 2, all_ + float(x @ w) ** 2
        logs.append(math.log(off / all_))
    reader = reader_of(seen(x_RK), w_NK, INT8, 1.0)
    found = error([reader], [x_RK @ w_NK.T], s_K)
    assert found == pytest.approx(math.exp(sum(logs) / len(logs)), rel=1e-3)


def test_columns_that_share_a_factor_take_the_largest_of_them() -> None:
    """Two query heads of one value head: entry 0 serves columns 0 and 2, entry 1 columns 1 and 3."""
    x_RK = torch.tensor([[1.0, 1.0, 16.0, 1.0]]).repeat(4, 1)
    reader = reader_of(seen(x_RK), torch.ones(4, 4), INT8, 1.0)
    found = solve([reader], torch.tensor([0, 1, 0, 1]), FREE, Params(alpha=1.0))
    assert torch.allclose(found.s_F, torch.tensor([4.0, 0.25]))


def test_readers_of_one_input_are_stacked_and_judged_by_a_part_of_their_rows() -> None:
    x_RK, w_NK = outliers()
    parts = [reader_of(seen(x_RK), part, INT8, 0.25) for part in (w_NK[:40], w_NK[40:])]
    whole = stacked(parts)
    assert whole.w_NK.shape == (12, 64) and torch.equal(whole.amax.w, w_NK.abs().amax(0))
    assert torch.equal(parts[0].w_NK[0], w_NK[0]) and torch.equal(parts[0].w_NK[-1], w_NK[39])


@pytest.mark.parametrize("limits", [FREE, EXACT, Limits(False, 16, below_one=True)])
def test_outliers_of_a_hundred_times_are_taken_out(limits: Limits) -> None:
    x_RK, w_NK = outliers()
    found = solve([reader_of(seen(x_RK), w_NK, INT8, 1.0)], torch.arange(64), limits, Params())
    assert found.alpha is not None and found.error < found.unsmoothed / 300
    assert found.s_F[[3, 40]].min() > 20 * found.s_F[[0, 1, 2, 4]].max()


def test_the_search_is_no_worse_on_its_tokens_than_any_alpha() -> None:
    x_RK, w_NK = outliers((5, 6, 7), 12.0)
    w_NK[:, 20:24] *= 30  # channels of W alone, which alpha 0 would give to x
    reader = reader_of(seen(x_RK), w_NK, INT8, 1.0)
    found = solve([reader], torch.arange(64), FREE, Params())
    fixed = [solve([reader], torch.arange(64), FREE, Params(alpha=a / 10, by="rms")).error for a in range(11)]
    assert found.error == min(fixed) < found.unsmoothed and max(fixed) > 2 * min(fixed)


def test_no_smoothing_is_an_answer_of_the_search_but_not_of_a_fixed_alpha() -> None:
    """Rows are uniform, channels of W are not: any move of range makes x worse."""
    x_RK, w_NK = torch.ones(8, 2) * 127, torch.tensor([[127.0, 1.0], [127.0, 3.0]])
    reader = reader_of(seen(x_RK), w_NK, INT8, 1.0)
    found = solve([reader], torch.arange(2), EXACT, Params())
    assert found.alpha is None and torch.equal(found.s_F, torch.ones(2)) and found.error == found.unsmoothed
    assert solve([reader], torch.arange(2), EXACT, Params(alpha=0.0)).alpha == 0.0


def test_a_fixed_alpha_takes_the_papers_largest_magnitudes_and_the_search_root_mean_squares() -> None:
    assert Params(alpha=0.5).largest and not Params().largest and Params(by="amax").largest
    x_RK = torch.tensor([[16.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])  # amax 16 and 1, rms 8 and 1
    reader = reader_of(seen(x_RK), torch.ones(2, 2), INT8, 1.0)
    found = [solve([reader], torch.arange(2), FREE, Params(alpha=1.0, by=by)).s_F[0] for by in ("amax", "rms")]
    assert found == pytest.approx([4.0, math.sqrt(8)])


def test_schemes_that_have_nothing_to_smooth_are_refused_with_the_reason() -> None:
    said = {name: reject(scheme) for name, scheme in PRESETS.items()}
    assert {name for name, reason in said.items() if reason is None} == {"W8A8", "FP8", "FP8_DYNAMIC"}
    assert said["W4A16"] == "W4A16 leaves activations in 16 bits: there is nothing to smooth"
    assert "one scale, which those of NVFP4 have not" in str(said["NVFP4"])
    assert "one scale, which those of LLM_INT8 have not" in str(said["LLM_INT8"])
    assert "not those of W8A8" in str(reject(preset("W8A8", 64)))


@pytest.mark.parametrize("given", [{"alpha": 1.5}, {"alpha": -0.1}, {"alpha": "best"}, {"steps": 0}])
def test_parameters_out_of_range_are_refused(given: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"alpha|steps|float"):
        Params(**given)  # type: ignore[arg-type]


def test_a_reader_keeps_the_dtype_of_its_work() -> None:
    x_RK, w_NK = outliers()
    bf16 = Observed(64, x_RK.abs().amax(0), x_RK.square().mean(0), x_RK.bfloat16())
    reader: Reader = reader_of(bf16, w_NK, INT8, 1.0)
    assert {t.dtype for t in (reader.x_RK, reader.w_NK, reader.amax.x, reader.rms.w)} == {torch.float32}
