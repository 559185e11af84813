"""Algorithms against hand-computed blocks, brute force, and the reference cast."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpub.algorithms import ALGORITHMS, fp8, rtn, search
from quantpub.algorithms.base import BLOCK_ELEMENTS
from quantpub.qtensor import QTensor, dequantize
from quantpub.registry import load
from quantpub.scheme import PRESETS, Scheme, preset
from quantpub.stats import Stats

G4 = preset("W4A16", 4)
PAIRS = [
    (name, scheme)
    for name in ALGORITHMS
    for scheme in PRESETS
    if load(ALGORITHMS, "algorithm", name).reject(PRESETS[scheme]) is None
]


def weights(n: int, k: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn((n, k), generator=torch.Generator().manual_seed(seed)).mul_(0.02).to(dtype)


def error(w: torch.Tensor, q: QTensor) -> torch.Tensor:
    return (w.float() - dequantize(q)).square().view(*q.scale.shape, -1).sum(-1)


def test_rtn_by_hand() -> None:
    w = torch.tensor([[7.5, -7.5, 1.0, 0.4], [0.0, 0.0, 0.0, 0.0]])
    q = rtn.quantize(w, None, G4, rtn.Params())
    assert q.scale.tolist() == [[1.0], [1.0]]  # 7.5 / 7.5; a group of zeros gets 1
    assert q.codes_NK.tolist() == [[7, -8, 1, 0], [0, 0, 0, 0]]  # 7.5 rounds to 8 and clips to 7; −7.5 rounds to −8


def test_rtn_scale_is_rounded_before_the_codes() -> None:
    """amax 1.0 → 1/7.5 = 0.13333, in bf16 0.13379: 0.8694 / 0.13379 = 6.498 rounds to 6, with the exact scale to 7."""
    w = torch.tensor([[1.0, 0.8694, 0.0, 0.0]]).bfloat16()
    w_f = w.float()[0, 1].item()
    q = rtn.quantize(w, None, G4, rtn.Params())
    stored = q.scale.float().item()
    assert stored != pytest.approx(1 / 7.5, rel=1e-4)
    assert q.codes_NK[0, 1].item() == round(w_f / stored)


def test_fp8_equals_the_reference_cast() -> None:
    w = weights(64, 256, 0)
    q = fp8.quantize(w, None, PRESETS["FP8_DYNAMIC"], fp8.Params())
    scale = (w.float().abs().amax(1, keepdim=True) / 448).bfloat16()
    reference = (w.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(q.codes_NK.view(torch.uint8), reference.view(torch.uint8))
    assert torch.equal(q.scale, scale)


def test_fp8_equals_compressed_tensors() -> None:
    """Codes by the quantize function of compressed-tensors, given our scale."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize

    w = weights(96, 128, 3, torch.float32)
    q = fp8.quantize(w, None, PRESETS["FP8_DYNAMIC"], fp8.Params())
    arguments = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="channel", dynamic=False)
    reference = quantize(w, q.scale, torch.zeros_like(q.scale), arguments, dtype=torch.float8_e4m3fn)
    assert torch.equal(q.codes_NK.view(torch.uint8), reference.view(torch.uint8))


@pytest.mark.parametrize(("name", "scheme"), PAIRS)
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 9),
    groups=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    power=st.integers(-12, 6),
)
def test_codes_in_range_scales_stored_and_error_bounded(
    name: str, scheme: str, n: int, groups: int, seed: int, dtype: torch.dtype, power: int
) -> None:
    algorithm = load(ALGORITHMS, "algorithm", name)
    chosen: Scheme = preset(scheme, 32) if scheme == "W4A16" else PRESETS[scheme]
    w = (weights(n, 32 * groups, seed, torch.float32) * 2.0**power).to(dtype)
    q = algorithm.quantize(w, None, chosen, algorithm.params())
    number = chosen.weight.number
    assert q.scale.dtype == dtype
    assert bool(torch.isfinite(q.scale.float()).all()) and bool((q.scale != 0).all())
    assert q.codes_NK.float().min() >= number.low and q.codes_NK.float().max() <= number.high
    baseline = (
        fp8.quantize(w, None, chosen, fp8.Params()) if name == "fp8" else rtn.quantize(w, None, chosen, rtn.Params())
    )
    assert (
        error(w, q) <= error(w, baseline) * (1 + 1e-5) + 1e-30
    ).all()  # never worse than plain rounding, group by group


def test_search_comes_close_to_brute_force() -> None:
    """All scales on a fine grid of both signs, group by group: the search is within 1 % of the best one."""
    w = weights(8, 64, 11, torch.float32)
    q = search.quantize(w, None, preset("W4A16", 32), search.Params())
    groups = w.view(8, 2, 32)
    grid = torch.cat([torch.linspace(0.4, 1.2, 4000), -torch.linspace(0.4, 1.2, 4000)])
    best = torch.full((8, 2), torch.inf)
    for step in grid.tolist():
        scale = groups.abs().amax(-1, keepdim=True) * step / 8
        off = (groups / scale).round().clamp(-8, 7) * scale - groups
        best = torch.minimum(best, off.square().sum(-1))
    assert (error(w, q).sum() / best.sum()).item() < 1.01


def test_search_uses_the_longer_side_for_the_larger_weights() -> None:
    w = torch.tensor([[8.0, 1.0, 2.0, -3.0]])
    q = search.quantize(w, None, G4, search.Params())
    assert q.scale.item() == -1.0
    assert q.codes_NK.tolist() == [[-8, -1, -2, 3]]


def test_search_beats_rounding_on_normal_weights() -> None:
    w = weights(256, 512, 5)
    found = error(w, search.quantize(w, None, PRESETS["W4A16"], search.Params())).sum()
    plain = error(w, rtn.quantize(w, None, PRESETS["W4A16"], rtn.Params())).sum()
    assert found < 0.80 * plain


def test_search_weighs_channels_by_their_activations() -> None:
    w, moment = weights(64, 128, 9, torch.float32), torch.ones(128)
    moment[::8] = 100.0
    scheme = PRESETS["W4A16"]
    plain = search.quantize(w, None, scheme, search.Params())
    weighted = search.quantize(w, Stats(moment), scheme, search.Params())

    def weighed(q: QTensor) -> float:
        return float(((w - dequantize(q)).square() * moment).sum())

    assert weighed(weighted) < 0.9 * weighed(plain)


@pytest.mark.parametrize(("name", "scheme"), PAIRS)
def test_row_blocks_join_to_the_whole(name: str, scheme: str) -> None:
    """A weight of several blocks equals its rows quantized one by one."""
    algorithm = load(ALGORITHMS, "algorithm", name)
    k = 4096
    w = weights(BLOCK_ELEMENTS // k + 3, k, 1)
    whole = algorithm.quantize(w, None, PRESETS[scheme], algorithm.params())
    for row in (0, len(w) - 4, len(w) - 1):
        part = algorithm.quantize(w[row : row + 1], None, PRESETS[scheme], algorithm.params())
        assert torch.equal(part.codes_NK.view(torch.uint8), whole.codes_NK[row : row + 1].view(torch.uint8))
        assert torch.equal(part.scale, whole.scale[row : row + 1])


@pytest.mark.parametrize(
    ("name", "scheme", "word"),
    [("rtn", "FP8_DYNAMIC", "integer"), ("search", "FP8_DYNAMIC", "integer"), ("fp8", "W4A16", "FP8")],
)
def test_an_algorithm_refuses_a_foreign_scheme(name: str, scheme: str, word: str) -> None:
    assert word in load(ALGORITHMS, "algorithm", name).reject(PRESETS[scheme])


@pytest.mark.parametrize(("name", "scheme"), PAIRS)
def test_the_weight_is_left_as_it_was(name: str, scheme: str) -> None:
    algorithm = load(ALGORITHMS, "algorithm", name)
    w = weights(4, 256, 2, torch.float32)
    before = w.clone()
    algorithm.quantize(w, None, PRESETS[scheme], algorithm.params())
    assert torch.equal(w, before)
