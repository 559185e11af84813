"""Edges where a wrong line of an algorithm, a layout or a rounding would otherwise stay unseen."""

from __future__ import annotations

import pytest
import torch

from quantpub.activations import fp8_per_token, int8_per_token
from quantpub.algorithms import base, fp8, hqq, mxfp4, nvfp4, scales, search
from quantpub.layouts import awq
from quantpub.qtensor import QTensor, dequantize, same
from quantpub.scheme import PRESETS, preset
from quantpub.stats import Stats


def weights(n: int, k: int, seed: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).mul_(0.02)


def error(w: torch.Tensor, q: QTensor) -> float:
    return float((w - dequantize(q)).double().square().sum())


@pytest.mark.parametrize("group", [8, 16, 256])
def test_awq_refuses_groups_that_no_fast_kernel_takes(group: int) -> None:
    assert "has groups of" in str(awq.reject(preset("W4A16_ASYM", group), 64, 512, "F16"))


def test_an_fp8_scale_that_vanishes_in_fp16_becomes_one() -> None:
    """1e-6 / 448 is below the smallest fp16: the row's codes are 0 then, its scale is not."""
    w = torch.full((2, 64), 1e-6, dtype=torch.float16)
    w[1] = 1.0
    q = fp8.quantize(w, None, PRESETS["FP8_DYNAMIC"], fp8.Params())
    assert q.scale[0].item() == 1.0 and bool(torch.isfinite(dequantize(q)).all())


def test_what_is_merged_shares_a_scale_of_the_tensor_only() -> None:
    w = weights(256, 256, 1)
    alone, merged = (fp8.quantize(w, s, PRESETS["FP8_BLOCK"], fp8.Params()) for s in (None, Stats(group_amax=9.0)))
    assert same(alone, merged)
    whole = fp8.quantize(w, Stats(group_amax=9.0, input_amax=1.0), PRESETS["FP8"], fp8.Params())
    assert whole.scale.item() == pytest.approx(9.0 / 448)


def test_a_global_scale_has_a_reciprocal() -> None:
    q = nvfp4.quantize(torch.full((1, 16), 1e-40), None, PRESETS["NVFP4A16"], nvfp4.Params())
    assert q.global_scale is not None and q.global_scale.item() >= 2.0**-126
    assert torch.isfinite(1 / q.global_scale) and 1 / (1 / q.global_scale) == q.global_scale


def test_mxfp4_keeps_the_plain_exponent_on_a_tie() -> None:
    """Ones are 4 · 2^-2 and 2 · 2^-1 alike, both exact: the format's own rule says 2^-2."""
    q = mxfp4.quantize(torch.ones(1, 32), None, PRESETS["MXFP4A16"], mxfp4.Params())
    assert q.scale.float().item() == 0.25 and dequantize(q).eq(1).all()


def test_the_least_scale_of_a_token() -> None:
    """1e-7 over 1/(448·512) is 0.0229, which E4M3 rounds to 12 steps of 2^-9."""
    due = 12 * 2.0**-9 / (448 * 512)
    assert fp8_per_token(torch.tensor([[1e-7, 0.0]]))[0, 0].item() == pytest.approx(due, rel=1e-6)


def test_the_outlier_threshold_itself_is_an_outlier() -> None:
    x = torch.tensor([[6.0, 1.27, 0.014]])
    torch.testing.assert_close(int8_per_token(x, 6.0), torch.tensor([[6.0, 1.27, 0.01]]), rtol=1e-5, atol=0)


def found(w: torch.Tensor, scheme: str, **params: object) -> QTensor:
    return search.quantize(w, None, preset(scheme, 32), search.Params(**params))  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM"])
def test_each_step_of_the_search_pays(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refining, stored neighbours and more candidates each lower the error of coarse settings."""
    w = weights(64, 512, 2).bfloat16()
    coarse = error(w.float(), found(w, scheme, grid=2, shrink=0.6, refine=0))
    assert error(w.float(), found(w, scheme, grid=2, shrink=0.6, refine=3)) < 0.99 * coarse
    assert error(w.float(), found(w, scheme, grid=16, shrink=0.6, refine=0)) < 0.99 * coarse
    with_neighbours = error(w.float(), found(w, scheme))
    monkeypatch.setattr(scales, "neighbours", lambda *_: [])
    assert with_neighbours < error(w.float(), found(w, scheme))


def test_neighbouring_zeros_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights(64, 512, 3)
    best = error(w, found(w, "W4A16_ASYM"))
    whole = base.candidates

    def without(*args: object) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        return whole(*args)[1::3]  # type: ignore[arg-type]  # of each triple the zero that centres the range

    monkeypatch.setattr(scales, "candidates", without)
    assert best < error(w, found(w, "W4A16_ASYM"))


@pytest.mark.parametrize(("knob", "one", "other"), [("kappa", 1.0, 4.0), ("beta", 0.5, 50.0), ("iters", 0, 6)])
def test_each_knob_of_hqq_has_an_effect(knob: str, one: float, other: float) -> None:
    """On weights with outliers, where what is clipped counts."""
    w = weights(32, 512, 4)
    w[:, ::61] *= 8
    made = [
        hqq.quantize(w, None, preset("W4A16_FLOAT_ZERO", 128), hqq.Params(**{"iters": 6, "beta": 10.0, knob: value}))
        for value in (one, other)
    ]
    assert not same(*made)
