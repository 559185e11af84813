"""GPTQ against the definition, solved anew for every column, against llm-compressor's codes, and against planted faults."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from quantpub.algorithms import gptq, search
from quantpub.algorithms.gptq import Params, Solver
from quantpub.algorithms.scales import descend, joint_moments
from quantpub.qtensor import QTensor, dequantize, same
from quantpub.recipe import load_recipe
from quantpub.scheme import Scheme, preset
from quantpub.stats import Stats

GOLDEN = Path(__file__).parent / "golden"
SCHEMES = [preset("W4A16", 32), preset("W4A16_ASYM", 32), preset("W8A16"), preset("W4A16")]


def drawn(n: int, k: int, seed: int, tokens: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(w_NK, hessian_KK) of correlated inputs whose sizes span two orders of magnitude."""
    by = torch.Generator().manual_seed(seed)
    x = torch.randn((tokens or 4 * k, k // 4), generator=by) @ torch.randn((k // 4, k), generator=by)
    x = (x / (k // 4) ** 0.5 + 0.5 * torch.randn(x.shape, generator=by)) * torch.logspace(-1, 1, k)[
        torch.randperm(k, generator=by)
    ]
    return torch.randn((n, k), generator=by).mul_(0.02), x.T @ x / len(x)


def lost(w: torch.Tensor, values: torch.Tensor, hessian: torch.Tensor) -> float:
    """The mean squared error of the linear's outputs, summed over outputs."""
    off = w.double() - values.double()
    return float(((off @ hessian.double()) * off).sum())


def by_definition(
    w: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    scheme: Scheme,
    params: Params,
) -> torch.Tensor:
    """Codes less their zero. After every column the rest is the exact minimum of the error, all columns so far held.

    float64; nothing is factored or carried along: each step solves H_FF d_F = −H_FD e_D for the free columns F anew.
    """
    k = w.shape[1]
    h, w64, number = hessian.double().clone(), w.double(), scheme.weight.number
    h.diagonal().add_(params.damp * h.diagonal().mean())
    each = k // scale.shape[1]
    wide = scale.double().repeat_interleave(each, 1)
    shift = torch.zeros_like(wide) if zero is None else zero.double().repeat_interleave(each, 1)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    order = order if params.order == "falling" else list(range(k))
    codes, now = torch.zeros_like(w64), w64.clone()
    for place, column in enumerate(order):
        low, high = number.low - shift[:, column], number.high - shift[:, column]
        codes[:, column] = torch.clamp((now[:, column] / wide[:, column]).round(), low, high)
        done, free = order[: place + 1], order[place + 1 :]
        if free:
            off = w64[:, done] - codes[:, done] * wide[:, done]  # what the columns so far err: E_D = w_D − ŵ_D
            now[:, free] = w64[:, free] + torch.linalg.solve(h[free][:, free], h[free][:, done] @ off.T).T
    return codes


def scales(w: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Some scales and zeros: those of a search that knows no inputs."""
    q = search.quantize(w, None, scheme, search.Params())
    return q.scale, None if q.zero is None else q.zero.float()


def agree(solved: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Codes equal, all but what rounding in float32 may turn: one in a thousand."""
    return int((solved.double() != wanted.double()).sum()) <= wanted.numel() // 1000


# --------------------------------------------------------------------------------------------------- against the definition


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.name}-{s.group_size}")
@pytest.mark.parametrize("order", ["falling", "original"])
@pytest.mark.parametrize("damp", [0.01, 0.3])
def test_codes_are_those_of_the_definition(scheme: Scheme, order: str, damp: float) -> None:
    """256 columns: two blocks, and groups that the order of work tears apart."""
    w, hessian = drawn(6, 256, seed=3)
    params, (scale, zero) = Params(damp=damp, order="falling" if order == "falling" else "original"), scales(w, scheme)
    u, _, error = Solver.of(hessian, scheme, params).solve(w, scale, zero)
    wanted = by_definition(w, hessian, scale, zero, scheme, params)
    assert torch.equal(u.double(), wanted)
    damped = hessian + params.damp * hessian.diagonal().mean() * torch.eye(256)
    values = u * scale.float().repeat_interleave(256 // scale.shape[1], 1)
    assert float(error.sum()) == pytest.approx(lost(w, values, damped), rel=1e-3)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 5),
    groups=st.integers(1, 5),
    seed=st.integers(0, 2**31),
    order=st.sampled_from(["falling", "original"]),
    asymmetric=st.booleans(),
)
def test_codes_are_those_of_the_definition_in_any_shape(
    n: int, groups: int, seed: int, order: str, asymmetric: bool
) -> None:
    scheme = preset("W4A16_ASYM" if asymmetric else "W4A16", 32)
    w, hessian = drawn(n, 32 * groups, seed)
    params, (scale, zero) = Params(order="falling" if order == "falling" else "original"), scales(w, scheme)
    u, _, _ = Solver.of(hessian, scheme, params).solve(w, scale, zero)
    assert agree(u, by_definition(w, hessian, scale, zero, scheme, params))


@pytest.mark.parametrize("order", ["original", "falling"])
@pytest.mark.parametrize("kind", ["sym", "asym", "row"])
def test_codes_are_those_of_llm_compressor(kind: str, order: str) -> None:
    golden = load_file(GOLDEN / "gptq_solver.safetensors")
    x, made = golden["x"].double(), {name: golden[f"{kind}.{order}.{name}"] for name in ("scale", "zero", "codes")}
    scheme = {"sym": preset("W4A16", 32), "asym": preset("W4A16_ASYM", 32), "row": preset("W8A16")}[kind]
    params = Params(damp=0.01, order="falling" if order == "falling" else "original")
    zero = made["zero"].float() if kind == "asym" else None
    u, _, _ = Solver.of((x.T @ x / len(x)).float(), scheme, params).solve(golden["w"], made["scale"], zero)
    each = u.shape[1] // made["scale"].shape[1]
    assert torch.equal((u + made["zero"].float().repeat_interleave(each, 1)).to(torch.int8), made["codes"])
    zeros, number = made["zero"].float().repeat_interleave(each, 1), scheme.weight.number
    nearest = (golden["w"].float() / made["scale"].repeat_interleave(each, 1)).round().add(zeros)
    assert (made["codes"] != nearest.clamp(number.low, number.high)).float().mean() > 0.2  # far from rounding


# ------------------------------------------------------------------------------------------------------------ planted faults


def _half_again(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Errors that leave a block count half as much again as they should: over-corrected, and still better than rounding."""
    return lambda *args: plain(*args) * 1.5


def _own_columns_only(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Errors that never leave their block."""
    return lambda *args: plain(*args) * 0


def _eager(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The diagonal of U taken a tenth too small, inside a block and beyond it."""

    def faulty(w: torch.Tensor, u: torch.Tensor, factor: torch.Tensor, *rest: object) -> torch.Tensor:
        bent = factor.clone()
        bent.diagonal().mul_(0.9)
        return plain(w, u, bent, *rest)

    return faulty


@pytest.mark.slow
@pytest.mark.parametrize("fault", [_half_again, _own_columns_only, _eager])
def test_a_fault_that_still_beats_rounding_is_seen(
    fault: Callable[..., Callable[..., torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme, params = preset("W4A16", 32), Params(damp=0.01)
    w, hessian = drawn(32, 256, seed=3)
    scale, _ = scales(w, scheme)
    wide = scale.float().repeat_interleave(32, 1)
    rounded = lost(w, dequantize(search.quantize(w, None, scheme, search.Params())), hessian)
    monkeypatch.setattr(gptq, "_round", fault(gptq._round))
    u, _, _ = Solver.of(hessian, scheme, params).solve(w, scale, None)
    assert lost(w, u * wide, hessian) < rounded  # a test against rounding would pass it
    assert not agree(u, by_definition(w, hessian, scale, None, scheme, params))


# -------------------------------------------------------------------------------------------------------- scales and sweeps


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.name}-{s.group_size}")
def test_every_stage_lowers_the_error(scheme: Scheme) -> None:
    """Rounding, one pass, scales searched again, a sweep: each under the damped Hessian that it answers to."""
    w, hessian = drawn(48, 256, seed=5)
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(256)
    stats = Stats(second_moment_K=hessian.diagonal(), hessian_KK=hessian)

    def of(passes: int, sweeps: int) -> float:
        q = gptq.quantize(w, stats, scheme, Params(passes=passes, sweeps=sweeps))
        return lost(w, dequantize(q), damped)

    rounded = lost(w, dequantize(search.quantize(w, stats, scheme, search.Params())), damped)
    once, again, swept, more = of(1, 0), of(2, 0), of(2, 1), of(2, 3)
    assert once < 0.8 * rounded and again < once and swept < again and more < swept


def test_a_sweep_is_coordinate_descent() -> None:
    """Against the definition: each code in turn takes, of all codes, the one of least error; columns in two blocks."""
    scheme, (w, hessian) = preset("W4A16_ASYM", 32), drawn(3, 160, seed=8)
    solver = Solver.of(hessian, scheme, Params(damp=0.1))
    scale, zero = scales(w, scheme)
    assert zero is not None
    wide, shift = scale.double().repeat_interleave(32, 1), zero.double().repeat_interleave(32, 1)
    start = torch.minimum(torch.maximum((w / wide.float()).round(), -8 - shift.float()), 7 - shift.float())
    codes, h = start.double(), solver.hessian_KK.double()
    for column in range(160):
        tried = torch.arange(-8.0, 8.0, dtype=torch.float64)[:, None] - shift[:, column]
        off = (w.double() - codes * wide).expand(16, -1, -1).clone()
        off[:, :, column] = w[:, column].double() - tried * wide[:, column]
        best = torch.einsum("crk,kl,crl->cr", off, h, off).argmin(0)
        codes[:, column] = tried.gather(0, best[None])[0]
    assert torch.equal(solver.sweep(w, start, scale, zero).double(), codes)
    assert (start.double() != codes)[:, :128].any() and (start.double() != codes)[:, 128:].any()


def test_descent_keeps_its_books() -> None:
    """The change it returns is that of w − scale·u, and `pull` ends as h times the new error."""
    w, h = drawn(7, 64, seed=2)
    w, h = w.T.contiguous(), h + 0.1 * torch.eye(64)
    scale, u = torch.full((64, 7), 0.01), torch.zeros(64, 7)
    pull, wide = h @ w, torch.full((64, 7), 8.0)
    moved = descend(u, pull, h[..., None], scale, -wide, wide - 1)
    assert torch.allclose(w + moved, w - u * scale, atol=1e-6)
    assert torch.allclose(pull, h @ (w - u * scale), atol=1e-4)


def test_search_with_a_sample_beats_search_without() -> None:
    """By the error on inputs that the sample does not hold; moments alone leave the codes at the nearest."""
    by = torch.Generator().manual_seed(4)
    mix = torch.randn((16, 256), generator=by) / 4
    x = torch.randn((2048, 16), generator=by) @ mix + 0.5 * torch.randn((2048, 256), generator=by)
    w, scheme = torch.randn((64, 256), generator=by).mul_(0.02), preset("W4A16")
    seen, unseen = x[:1024], x[1024:].T @ x[1024:] / 1024
    moments = seen.square().mean(0)

    def of(stats: Stats, sweeps: int = 2) -> QTensor:
        return search.quantize(w, stats, scheme, search.Params(sweeps=sweeps))

    with_sample, without = of(Stats(moments, sample_RK=seen[::8])), of(Stats(moments))
    assert lost(w, dequantize(with_sample), unseen) < 0.9 * lost(w, dequantize(without), unseen)
    assert torch.equal(with_sample.scale, without.scale)
    assert same(of(Stats(moments, sample_RK=seen[::8]), sweeps=0), without)
    assert same(of(Stats(moments, sample_RK=seen[:0])), without)


@pytest.mark.parametrize("order", ["falling", "original"])
def test_a_column_weighs_what_those_after_it_cannot_make_good(order: str) -> None:
    """Against the definition: of the damped H of a column and all after it, 1 / (H⁻¹)_ii."""
    _, hessian = drawn(1, 64, seed=13)
    solver = Solver.of(hessian, preset("W4A16", 32), Params(order="falling" if order == "falling" else "original"))
    h, order_K = solver.hessian_KK.double(), solver.order_K.tolist()
    assert (order_K == list(range(64))) == (order == "original")
    rests = [order_K[place:] for place in range(64)]
    wanted = torch.stack([1 / torch.linalg.inv(h[rest][:, rest])[0, 0] for rest in rests])
    assert torch.allclose(solver.weight_K[solver.order_K].double(), wanted, rtol=1e-5)


def test_joint_moments_by_hand() -> None:
    """Two tokens for pairs of channels: correlations count 2 / (2 + 3·2), a quarter. A channel that is always zero gets 1."""
    sample = torch.tensor([[1.0, 1.0, 2.0, 0.0], [1.0, -3.0, 2.0, 0.0]]).bfloat16()
    h_ggG = joint_moments(Stats(torch.tensor([4.0, 5.0, 4.0, 0.0]), sample_RK=sample), 2, torch.device("cpu"))
    assert h_ggG is not None
    between = -2 * (4 / 2) ** 0.5 * (5 / 10) ** 0.5 * 0.25  # x₁·x₂ = −2, each scaled to its moment over all tokens
    wanted = torch.tensor([[[4.0, between], [between, 5.0]], [[4.0, 0.0], [0.0, 1.0]]])
    assert torch.allclose(h_ggG.permute(2, 0, 1), wanted)


# ------------------------------------------------------------------------------------------------------- hessians as they come


def test_with_equal_and_independent_channels_it_is_search() -> None:
    w, eye = drawn(40, 256, seed=1)[0], torch.eye(256)
    for scheme in SCHEMES:
        q = gptq.quantize(w, Stats(hessian_KK=eye), scheme, Params(damp=0.0))
        nearest = search.quantize(w, None, scheme, search.Params())
        assert torch.equal(q.scale, nearest.scale) and torch.equal(q.codes_NK, nearest.codes_NK)


def test_dead_channels_are_rounded_and_change_nothing_else() -> None:
    scheme, (w, hessian) = preset("W4A16", 32), drawn(16, 128, seed=6)
    dead = torch.zeros(128, dtype=torch.bool)
    dead[3::7] = True
    hessian[dead] = 0
    hessian[:, dead] = 0
    q = gptq.quantize(w, Stats(hessian_KK=hessian), scheme, Params())
    wide = q.scale.float().repeat_interleave(32, 1)
    assert torch.equal(q.codes_NK[:, dead].float(), (w / wide).round().clamp(-8, 7)[:, dead])
    moved = w.clone()
    moved[:, dead] += 0.001
    solver = Solver.of(hessian, scheme, Params())
    assert not solver.weight_K[dead].any() and solver.weight_K[~dead].all()
    (u, _, _), (again, _, _) = (solver.solve(some, q.scale, None) for some in (w, moved))
    assert torch.equal(u[:, ~dead], again[:, ~dead]) and not torch.equal(u[:, dead], again[:, dead])
    assert torch.equal(solver.sweep(w, u, q.scale, None)[:, dead], u[:, dead])
    nothing = gptq.quantize(w, Stats(hessian_KK=torch.zeros(128, 128)), scheme, Params())
    assert torch.equal(nothing.codes_NK, search.quantize(w, None, scheme, search.Params()).codes_NK)


def test_a_hessian_of_few_tokens_is_damped_until_it_can_be_factored() -> None:
    """8 tokens for 128 channels, no damping asked for; and one that rounding made indefinite."""
    w, hessian = drawn(8, 128, seed=7, tokens=8)
    scheme = preset("W4A16", 32)
    q = gptq.quantize(w, Stats(hessian_KK=hessian), scheme, Params(damp=0.0))
    assert same(q, gptq.quantize(w, Stats(hessian_KK=hessian), scheme, Params(damp=0.0)))
    assert lost(w, dequantize(q), hessian) < lost(
        w, dequantize(search.quantize(w, None, scheme, search.Params())), hessian
    )
    bent = hessian - 0.02 * hessian.diagonal().mean() * (torch.ones(128, 128) - torch.eye(128))
    assert torch.linalg.eigvalsh(bent.double())[0] < 0
    assert torch.isfinite(dequantize(gptq.quantize(w, Stats(hessian_KK=bent), scheme, Params(damp=0.001)))).all()


@pytest.mark.parametrize(
    ("hessian", "said"),
    [
        (None, "needs the Hessian"),
        (torch.eye(96), "for 128 columns"),
        (torch.full((128, 128), torch.nan), "not finite"),
        (-torch.eye(128), "negative"),
        (torch.eye(128) - 1e9 * (torch.ones(128, 128) - torch.eye(128)), "not positive definite"),
    ],
)
def test_a_hessian_that_cannot_be_is_refused(hessian: torch.Tensor | None, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        gptq.quantize(torch.ones(2, 128), Stats(hessian_KK=hessian), preset("W4A16"), Params())


def test_inputs_are_left_as_they_were() -> None:
    w, hessian = drawn(4, 128, seed=9)
    kept = w.clone(), hessian.clone()
    gptq.quantize(w, Stats(hessian_KK=hessian), preset("W4A16"), Params())
    assert torch.equal(w, kept[0]) and torch.equal(hessian, kept[1])


def test_linears_of_one_input_may_be_given_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows do not know of one another: in one weight, in blocks of rows, or alone."""
    scheme, (w, hessian) = preset("W4A16"), drawn(40, 256, seed=11)
    stats = Stats(hessian_KK=hessian)
    whole = gptq.quantize(w.bfloat16(), stats, scheme, Params())
    monkeypatch.setattr(gptq, "ELEMENTS", 16 * 256)
    parts = gptq.quantize(w.bfloat16(), stats, scheme, Params())
    assert same(whole, parts)
    alone = gptq.quantize(w[24:].bfloat16(), stats, scheme, Params())
    assert torch.equal(alone.codes_NK, whole.codes_NK[24:]) and torch.equal(alone.scale, whole.scale[24:])


def test_bytes_do_not_hang_on_the_number_of_threads() -> None:
    scheme, (w, hessian) = preset("W4A16"), drawn(64, 256, seed=12)
    threads = torch.get_num_threads()
    try:
        made = []
        for count in (1, 2):
            torch.set_num_threads(count)
            made.append(gptq.quantize(w.bfloat16(), Stats(hessian_KK=hessian), scheme, Params()))
    finally:
        torch.set_num_threads(threads)
    assert same(*made)


def test_parameters_out_of_range_are_refused() -> None:
    for wrong in ({"damp": -1.0}, {"passes": 0}, {"sweeps": -1}, {"grid": 0}, {"shrink": 0.0}, {"refine": -1}):
        with pytest.raises(ValueError, match="at least"):
            Params(**wrong)


def test_the_recipe_binds() -> None:
    recipe = load_recipe("w4a16-gptq")
    algorithm, params = recipe.bind(recipe.algorithm, recipe.resolved_scheme())
    assert algorithm.needs == ("hessian",) and params.order == "falling"
