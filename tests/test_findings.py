"""Totals and crossovers by hand; a weight merged and cut as one of several GPUs holds it; the cure of a tile-packed one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO_MODEL, make_artifact

from quantpub.artifact import Artifact
from quantpub.cures import cures, loss, whole_zero, zeros_out_of_reach
from quantpub.decode import Decoder
from quantpub.errors import InputError
from quantpub.findings import crossover, merged, totals
from quantpub.gemms import engine_gemms
from quantpub.layouts import LAYOUTS
from quantpub.merged import load, share
from quantpub.qtensor import QTensor, dequantize, same_bits
from quantpub.registry import load as find
from quantpub.scheme import preset


def test_totals_by_hand() -> None:
    counts = {"a": 3, "b": 2}

    def row(gemm: str, m: int, baseline: float, own: float) -> dict[str, Any]:
        return {"gemm": gemm, "kernel": "k", "m": m, "baseline_us": baseline, "median_us": own}

    rows = [row("a", 1, 10, 5), row("b", 1, 40, 10), row("a", 2, 10, 5)]  # 3·10 + 2·40 = 110, 3·5 + 2·10 = 35
    assert totals(counts, rows) == [{"kernel": "k", "m": 1, "speedup": 3.1429, "baseline_us": 110, "median_us": 35}]


def test_the_quantizing_of_activations_is_summed_too() -> None:
    row = {"gemm": "a", "kernel": "k", "m": 1, "baseline_us": 10, "median_us": 5, "quantize_us": 1.5}
    assert totals({"a": 4}, [row])[0]["quantize_us"] == 6


def test_reasons_are_merged_over_m() -> None:
    assert merged([("g", "k", 1, "no"), ("g", "k", 2, "no"), ("g", "k", 2, "slow")]) == [
        {"gemm": "g", "kernel": "k", "m": [1, 2], "reason": "no"},
        {"gemm": "g", "kernel": "k", "m": [2], "reason": "slow"},
    ]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1, 2.0), (4, 0.5), (2, 1.5)], 2.8),  # from 1.5 at 2 to 0.5 at 4: half of the way, 2·√2
        ([(1, 1.2), (2, 1.1)], None),
        ([(1, 0.9), (2, 1.0)], 0.0),
        ([(1, 0.9), (2, 1.2), (4, 0.8), (8, 0.7)], 0.0),
        ([(1, 1.2), (2, 1.01), (4, 1.5), (8, 1.6)], 2.0),  # 1.01 may be chance: it counts as caught up
        ([(1, 1.4), (16, 0.4)], 3.0),  # 16 ** 0.4 = 3.03
    ],
)
def test_crossovers_by_hand(points: list[tuple[int, float]], expected: float | None) -> None:
    assert crossover(points) == expected


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """Groups of 32, so that half a row is whole groups."""
    folder = tmp_path_factory.mktemp("merged")
    recipe = folder / "small-groups.yaml"
    recipe.write_text(
        "{description: d, scheme: W4A16, group_size: 32, algorithm: {name: rtn}, ignore: [lm_head], engines: {vllm: ct-pack}}"
    )
    make_artifact(DEMO_MODEL, str(recipe), folder / "a")
    return Decoder(Artifact.open(folder / "a"))


@pytest.mark.parametrize("tp", [1, 2])
def test_what_gpus_hold_together_is_the_weight(decoder: Decoder, tp: int) -> None:
    """Of o_proj the first GPU has the first columns, of q/k/v the first rows of each."""
    gemms = {gemm.name: gemm for gemm in engine_gemms(decoder.artifact, decoder, tp)}
    for name, gemm in gemms.items():
        q, packed = load(decoder, gemm, "cpu", tp)
        whole = [dequantize(decoder.qtensor(member)) for member in gemm.members]
        cuts = [
            w_NK[:, : gemm.k] if name.endswith(("o_proj", "down_proj")) else w_NK[: len(w_NK) // tp] for w_NK in whole
        ]
        assert q.shape == (gemm.n, gemm.k)
        assert torch.equal(dequantize(q), torch.cat(cuts))
        layout = decoder.treated(gemm.members[0]).layout
        assert torch.equal(dequantize(layout.unpack(packed, q.scheme, q.shape)), torch.cat(cuts))


def test_the_bytes_are_the_artifacts_own(decoder: Decoder) -> None:
    (gemm,) = (g for g in engine_gemms(decoder.artifact, decoder) if g.name.endswith("o_proj"))
    _, packed = load(decoder, gemm)
    stored = decoder.packed(gemm.members[0])
    assert packed.keys() == stored.keys() and all(same_bits(packed[name], stored[name]) for name in stored)


def test_what_cannot_be_cut_is_refused(decoder: Decoder) -> None:
    with pytest.raises(InputError, match="cannot be shared by 7 GPUs"):
        engine_gemms(decoder.artifact, decoder, 7)
    q = QTensor(preset("W4A16"), torch.zeros(8, 256, dtype=torch.int8), torch.ones(8, 2).bfloat16())
    with pytest.raises(InputError, match="no whole blocks of 128"):
        share(q, "in", 4, "o_proj")


def test_bytes_that_are_not_what_they_mean_are_refused(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    (gemm,) = (g for g in engine_gemms(decoder.artifact, decoder) if g.name.endswith("gate_up_proj"))
    stored = decoder.packed

    def wrong(module: str) -> dict[str, torch.Tensor]:
        return stored(module) | {"weight_shape": torch.tensor([1, 2])}

    monkeypatch.setattr(decoder, "packed", wrong)
    monkeypatch.setattr(
        decoder,
        "qtensor",
        lambda m: decoder.treated(m).layout.unpack(stored(m), decoder.treated(m).scheme, (gemm.n // 2, gemm.k)),
    )
    with pytest.raises(InputError, match="weight_shape does not hold"):
        load(decoder, gemm)


def test_a_float_zero_becomes_a_whole_one_half_a_step_away() -> None:
    scheme = preset("W4A16_FLOAT_ZERO", 64)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (16, 128), generator=generator, dtype=torch.int8)
    scale = (0.01 + 0.01 * torch.rand(16, 2, generator=generator)).bfloat16()
    zero = (scale.float() * (6 * torch.rand(16, 2, generator=generator) - 3)).bfloat16()
    q = QTensor(scheme, codes, scale, zero=zero)
    (cure,) = cures("torchao-tile", "W4A16_FLOAT_ZERO")
    cured = cure.convert(q)
    assert cured.scheme == preset(cure.scheme, 64) and torch.equal(cured.codes_NK, codes) and not cure.lossless
    off = (dequantize(cured) - dequantize(q)).abs()
    assert off.max() > 0 and bool((off <= scale.float().repeat_interleave(64, 1) * 0.51).all())
    assert cure.refuses(q) is None and 0 < loss(q, cured) < 0.1
    layout = find(LAYOUTS, "layout", cure.layout)
    assert layout.reject(cured.scheme, 16, 128, "BF16") is None
    assert cures("ct-pack", "W4A16") == ()


def test_a_zero_that_is_whole_already_is_kept() -> None:
    scheme = preset("W4A16_FLOAT_ZERO", 32)
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(2, 2)
    q = QTensor(scheme, codes, torch.tensor([[0.5], [0.25]]).bfloat16(), zero=torch.tensor([[1.5], [-0.5]]).bfloat16())
    assert whole_zero(q).zero is not None and torch.equal(dequantize(whole_zero(q)), dequantize(q))


def of_one_sign(zero: float, scale: float = 0.5 / 15, groups: int = 4) -> QTensor:
    """The last of the groups with this zero, the others with one of 0."""
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(1, 2 * groups)
    zeros = torch.tensor([[0.0] * (groups - 1) + [zero]]).bfloat16()
    scales = torch.tensor([[0.5 / 15] * (groups - 1) + [scale]]).bfloat16()
    return QTensor(preset("W4A16_FLOAT_ZERO", 32), codes, scales, zero=zeros)


@pytest.mark.parametrize(
    ("q", "refused"),
    [
        (of_one_sign(0.75), True),  # weights from 0.5 to 1: the whole zero would be −23
        (of_one_sign(-0.75), True),
        (of_one_sign(0.1, 0.0), True),  # a constant group, which no code times 0 is
        (of_one_sign(0.0, 0.0), False),
        (of_one_sign(0.25, 0.03125), False),  # −8, the lowest
        (of_one_sign(8.4 * 0.03125, 0.03125), False),  # cut off less than half a step away
        (of_one_sign(8.6 * 0.03125, 0.03125), True),
        (of_one_sign(-7 * 0.03125, 0.03125), False),
        (of_one_sign(-8 * 0.03125, 0.03125), True),
        (of_one_sign(0.5 * 0.03125, -0.03125), False),  # scales may be negative
    ],
)
def test_zeros_that_are_no_codes_are_no_cure(q: QTensor, refused: bool) -> None:
    """Against the weights themselves: half a step of every one of them, or not."""
    (cure,) = cures("torchao-tile", "W4A16_FLOAT_ZERO")
    off = (dequantize(whole_zero(q)) - dequantize(q)).abs()
    half = q.scale.float().abs().repeat_interleave(32, 1) / 2
    assert bool((off > half * 1.001).any()) == refused
    reason = cure.refuses(q)
    assert (reason is not None) == refused
    if reason:
        assert "the zeros of 1 of 4 groups" in reason and f"{100 * loss(q, whole_zero(q)):.2g} %" in reason


def test_the_loss_of_a_cure_by_hand() -> None:
    """Codes 0 and a zero of 10 steps of 1, of which 8 are left: 2 of 10. Of four groups, one."""
    q = QTensor(
        preset("W4A16_FLOAT_ZERO", 32), torch.zeros(1, 32, dtype=torch.int8), torch.ones(1, 1).bfloat16(),
        zero=torch.full((1, 1), 10.0).bfloat16(),
    )  # fmt: skip
    assert loss(q, whole_zero(q)) == pytest.approx(0.2) and loss(q, q) == 0
    assert "20 % would be lost" in str(zeros_out_of_reach(q))


def test_the_path_of_a_missing_profile_is_said(tmp_path: Path) -> None:
    from quantpub.compare import read

    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "profile.json")
    (tmp_path / "profile.json").write_text("{}")
    with pytest.raises(InputError, match="not a profile"):
        read(tmp_path / "profile.json")
