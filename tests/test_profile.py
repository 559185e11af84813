"""Kernels on real ops, GEMM shapes by hand, planted faults, and the stage as a whole on the demo model."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO_MODEL, make_artifact

from quantpub.artifact import Artifact
from quantpub.decode import Decoder
from quantpub.errors import GateError, InputError, UsageError
from quantpub.families import FAMILIES
from quantpub.gemms import Gemm, engine_gemms, fuse, group
from quantpub.kernels import KERNELS, dense, torch_fp8, torch_int4, torch_int8
from quantpub.kernels.base import Kernel, Operands, Weight
from quantpub.kernels.check import (
    GEMM_TOLERANCE,
    PROBE_ROWS,
    check,
    check_split,
    directions,
    make_probe,
    relative_error,
    tolerance,
)
from quantpub.kernels.measure import GemmBench
from quantpub.merged import load as load_merged
from quantpub.profile import profile
from quantpub.profile_table import gemm_table, usable
from quantpub.qtensor import QTensor, dequantize
from quantpub.registry import Entry, load
from quantpub.scheme import WHOLE, Scheme, preset
from quantpub.timing import MINIMUM, Bench, wall

W4, FP8 = preset("W4A16"), preset("FP8_DYNAMIC")


def int4(n: int = 64, k: int = 256, scheme: Scheme = W4, seed: int = 0) -> QTensor:
    """Every code, and scales of both signs."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
    groups = 1 if scheme.group_size == WHOLE else k // scheme.group_size
    size = 0.002 + 0.01 * torch.rand(n, groups, generator=generator)
    sign = torch.where(torch.rand(n, groups, generator=generator) < 0.5, -1.0, 1.0)
    return QTensor(scheme, codes, (size * sign).bfloat16())


def fp8(n: int = 64, k: int = 256, seed: int = 0) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    w_NK = torch.randn(n, k, generator=generator)
    scale_N1 = (w_NK.abs().amax(-1, keepdim=True) / 448).bfloat16()
    return QTensor(FP8, (w_NK / scale_N1.float()).clamp(-448, 448).to(torch.float8_e4m3fn), scale_N1)


def int8(scheme: Scheme, n: int = 64, k: int = 256, seed: int = 0) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    return QTensor(scheme, codes, (0.0002 + 0.001 * torch.rand(n, 1, generator=generator)).bfloat16())


def fp8_tensor(limit: float = 5.5) -> QTensor:
    """One scale of all; activations may be as large as `limit`."""
    codes = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).mul_(90).to(torch.float8_e4m3fn)
    return QTensor(preset("FP8"), codes, torch.full((1, 1), 0.003), input_scale=torch.tensor(limit / 448))


def given(q: QTensor) -> Weight:
    """For kernels that start from the meaning, not from the bytes."""
    return Weight(q, {}, "")


CASES = {
    "bf16": int4(),
    "dequantized": int4(),
    "torch-int4": int4(),
    "torch-int8-weight": int8(preset("W8A16")),
    "torch-int8": int8(preset("W8A8")),
    "torch-fp8": fp8(),
    "torch-fp8-tensor": fp8_tensor(),
}
OBJECTS = {
    "bf16": dense.BF16,
    "dequantized": dense.DEQUANTIZED,
    "torch-int4": torch_int4.KERNEL,
    "torch-int8-weight": torch_int8.WEIGHT,
    "torch-int8": torch_int8.KERNEL,
    "torch-fp8": torch_fp8.KERNEL,
    "torch-fp8-tensor": torch_fp8.TENSOR,
}


MISSING = torch_fp8.unavailable()
needs_fp8 = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def test_the_registry_and_the_kernels_agree() -> None:
    loaded = {name: load(KERNELS, "kernel", name) for name in KERNELS}
    assert all(kernel.name == name for name, kernel in loaded.items())
    assert {name: kernel for name, kernel in loaded.items() if "cpu" in kernel.devices} == OBJECTS


@pytest.mark.parametrize("m", [1, 2, 3, 17, 61, 200])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_fp8 if name == "torch-fp8" else ()) for name in OBJECTS]
)
def test_kernels_compute_what_the_weight_means(name: str, m: int) -> None:
    kernel, q = OBJECTS[name], CASES[name]
    assert kernel.unavailable() is None and kernel.reject(q.scheme, *q.shape) is None
    x_MK = torch.randn(m, q.shape[1], generator=torch.Generator().manual_seed(m)).bfloat16()
    expected_MN = (x_MK.double() @ dequantize(q).double().T).float()
    assert relative_error(kernel.run(x_MK, kernel.prepare(given(q))), expected_MN) < tolerance(kernel)


def test_int4_by_hand_with_a_negative_scale() -> None:
    """The identity reads the weight off: 16 codes by −½ and by ¼, exact in bf16."""
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(16, 4)  # [16, 64], two groups of 32
    q = QTensor(preset("W4A16", 32), codes, torch.tensor([[-0.5, 0.25]]).repeat(16, 1).bfloat16())
    y_KN = torch_int4.KERNEL.run(torch.eye(64).bfloat16(), torch_int4.KERNEL.prepare(given(q)))
    row = [-0.5 * c for c in range(-8, 8)] * 2 + [0.25 * c for c in range(-8, 8)] * 2
    assert y_KN.T.float().tolist() == [row] * 16


@pytest.mark.parametrize("m", [1, 5, 64])
def test_int4_takes_the_sign_of_a_scale_as_a_factor(m: int) -> None:
    q, x_MK = int4(), torch.randn(m, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    kernel = torch_int4.KERNEL
    y, mirrored = (kernel.run(x_MK, kernel.prepare(given(each))) for each in (q, replace(q, scale=-q.scale)))
    assert torch.equal(y, -mirrored) and y.abs().max() > 0


@pytest.mark.parametrize("k", [256, 384, 96])
def test_int4_with_one_scale_a_row(k: int) -> None:
    q = int4(32, k, preset("W4A16", WHOLE))
    operands = torch_int4.KERNEL.prepare(given(q))
    assert operands[1].shape == ({256: 1, 384: 3, 96: 3}[k], 32, 2)
    check(torch_int4.KERNEL, "g", operands, make_probe(q), PROBE_ROWS)


@needs_fp8
def test_fp8_by_hand() -> None:
    """The identity again: one token is one unit, whose scale is 1/448."""
    w_NK = torch.tensor([[1.0, -2.5, 448.0, 0.0], [0.0625, 3.5, -7.0, 208.0]]).repeat(8, 4)
    q = QTensor(FP8, w_NK.to(torch.float8_e4m3fn), torch.full((16, 1), 0.5).bfloat16())
    y_KN = torch_fp8.KERNEL.run(torch.eye(16).bfloat16(), torch_fp8.KERNEL.prepare(given(q)))
    assert torch.equal(y_KN.T.float(), w_NK / 2)


def test_fp8_quantizes_each_token_by_its_largest_value() -> None:
    x_MK = torch.tensor([[448.0, -224.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0], [7.0, -14.0, 0.4375, 1.0]]).bfloat16()
    codes, scale = torch_fp8.quantize(x_MK)
    assert scale[0].item() == 1.0 and scale[2].item() == pytest.approx(14 / 448)
    assert codes[0].tolist() == [448.0, -224.0, 3.0, 0.0] and codes[1].tolist() == [0.0] * 4
    assert codes[2].tolist() == [224.0, -448.0, 14.0, 32.0]


def test_fp8_reads_its_weight_column_major_where_it_lies() -> None:
    q = fp8()
    w_KN, scale_1N = torch_fp8.prepare(given(q))
    assert w_KN.stride() == (1, 256) and w_KN.data_ptr() == q.codes_NK.data_ptr() and scale_1N.shape == (1, 64)
    assert w_KN.clone().stride() == (1, 256)  # what rotates through the cache is column-major too


@pytest.mark.parametrize(
    ("kernel", "scheme", "n", "k", "word"),
    [
        (torch_int4.KERNEL, FP8, 64, 256, "not FP8_DYNAMIC"),
        (torch_int4.KERNEL, W4, 72, 256, "72 is not a multiple of 16"),
        (torch_int4.KERNEL, preset("W4A16", 16), 64, 256, "groups of 16 columns"),
        (torch_int4.KERNEL, preset("W4A16", WHOLE), 64, 100, "groups of 100 columns"),
        (torch_fp8.KERNEL, W4, 64, 256, "not W4A16"),
        (torch_fp8.KERNEL, replace(FP8, act=None), 64, 256, "FP8 activations"),
    ],
)
def test_refusals_say_why(kernel: Kernel, scheme: Scheme, n: int, k: int, word: str) -> None:
    reason = kernel.reject(scheme, n, k)
    assert reason is not None and word in reason


@pytest.mark.parametrize("n", [72, 100])
def test_what_int4_refuses_the_op_refuses_too(n: int) -> None:
    with pytest.raises(RuntimeError, match="16"):
        torch_int4.prepare(given(int4(n)))


# ---------------------------------------------------------------- planted faults


def swapped_nibbles(q: QTensor) -> QTensor:
    """Each pair of neighbours in the other order. As bytes, since FP8 cannot be flipped."""
    codes = q.codes_NK.view(torch.uint8).view(len(q.codes_NK), -1, 2).flip(-1).flatten(1)
    return replace(q, codes_NK=codes.view(q.codes_NK.dtype))


def shifted_groups(q: QTensor) -> QTensor:
    return replace(q, scale=q.scale.roll(1, dims=1))


def one_wrong_group(q: QTensor) -> QTensor:
    scale = q.scale.clone()
    scale[5, 0] = scale[5, 1]
    return replace(q, scale=scale)


def shifted_rows(q: QTensor) -> QTensor:
    return replace(q, scale=q.scale.roll(1, dims=0))


def lost_signs(q: QTensor) -> QTensor:
    return replace(q, scale=q.scale.abs())


def codes_one_off(q: QTensor) -> QTensor:
    return replace(q, codes_NK=(q.codes_NK + 1).clamp(-8, 7))


def four_percent(q: QTensor) -> QTensor:
    return replace(q, scale=q.scale.float() * 1.04)


def broken(kernel: Kernel, fault: Callable[[QTensor], QTensor]) -> Kernel:
    return replace(kernel, name="broken", prepare=lambda w: kernel.prepare(replace(w, q=fault(w.q))))


FAULTS = [
    *[
        (name, fault)
        for name in ("torch-int4", "bf16")
        for fault in (
            swapped_nibbles,
            shifted_groups,
            one_wrong_group,
            shifted_rows,
            lost_signs,
            codes_one_off,
            four_percent,
        )
    ],
    *[pytest.param("torch-fp8", fault, marks=needs_fp8) for fault in (swapped_nibbles, shifted_rows, four_percent)],
    *[
        (name, fault)
        for name in ("torch-int8", "torch-int8-weight")
        for fault in (swapped_nibbles, shifted_rows, four_percent)
    ],
    *[("torch-fp8-tensor", fault) for fault in (swapped_nibbles, four_percent)],
]


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_fault_in_the_operands_is_caught(name: str, fault: Callable[[QTensor], QTensor]) -> None:
    kernel, q = broken(OBJECTS[name], fault), CASES[name]
    operands, probe = kernel.prepare(given(q)), make_probe(q)
    with pytest.raises(GateError) as caught:
        check_split(kernel, "mlp.down_proj", operands, probe, q)
        check(kernel, "mlp.down_proj", operands, probe, PROBE_ROWS)
    assert "kernel broken computes mlp.down_proj wrong" in str(caught.value)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_constants_and_nan_are_not_results(value: float) -> None:
    q = int4()
    kernel = replace(dense.BF16, run=lambda x_MK, operands: torch.full((len(x_MK), 64), value))
    with pytest.raises(GateError):
        check(kernel, "g", kernel.prepare(given(q)), make_probe(q), 1)


def test_a_weight_of_zeros_tolerates_nothing_else() -> None:
    expected = torch.ones(PROBE_ROWS, 3)
    expected[:, 1] = 0
    assert relative_error(expected.clone(), expected) == 0
    off = expected.clone()
    off[7, 1] = 1e-3
    assert relative_error(off, expected) > 1


def rows_of_ones(m: int = 64, n: int = 48) -> torch.Tensor:
    """As many directions as columns: row after row another one."""
    return torch.randn(m, n, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("m", [32, 8192])
def test_one_wrong_row_is_seen_among_many(m: int) -> None:
    expected = rows_of_ones(m)
    off = expected.clone()
    off[m // 2] *= 1.1
    assert float((off - expected).norm() / expected.norm()) < 0.1 / m**0.5 * 1.5
    assert 0.06 < relative_error(off, expected) < 0.15
    off[m // 2] = 0
    assert relative_error(off, expected) > 0.6 and math.isnan(relative_error(off * torch.nan, expected))


def test_a_row_is_judged_where_it_has_enough_directions() -> None:
    """Rows of one direction are all alike, however many columns: where the size is small by chance, nothing is said."""
    one = torch.linspace(-1, 1, 64)[:, None] * torch.randn(1, 4096, generator=torch.Generator().manual_seed(5))
    assert directions(one) == pytest.approx(1, rel=0.1)
    assert directions(torch.eye(61, 64) + 0) > 1e6  # no two alike
    wide = rows_of_ones(61, 4096)
    assert 3000 < directions(wide) < 6000 and 30 < directions(wide[:, :48]) < 70
    uneven = wide * torch.where(torch.arange(4096) < 4, 100.0, 1.0)  # four columns outweigh the rest
    assert 3 < directions(uneven) < 6 and directions(torch.zeros(61, 8)) == 0
    wrong = one.clone()
    wrong[63] *= 1.1
    assert relative_error(wrong, one) < 0.05


def test_a_row_that_is_small_by_chance_is_measured_by_the_usual_one() -> None:
    expected = rows_of_ones()
    expected[5] *= 1e-3
    off = expected.clone()
    off[5] *= 2
    assert relative_error(off, expected) < 0.01


@pytest.mark.parametrize("m", [5, 200])
def test_what_activations_lose_does_not_hide_them_at_another_m_either(m: int) -> None:
    def run(x_MK: torch.Tensor, operands: Operands) -> torch.Tensor:
        return torch_int8.KERNEL.run(x_MK, operands) * (1.012 if len(x_MK) == m else 1)

    kernel, q = replace(torch_int8.KERNEL, run=run), int8(preset("W8A8"))
    bench = GemmBench("g", given(q), dense.BF16, [kernel], Bench(wall()), 1 << 16)
    with pytest.raises(GateError, match=rf"torch-int8 computes g wrong at M = {m}: .* explain 0\.00781"):
        bench.cell(kernel, m, 0.0, 9.0)
    assert isinstance(bench.cell(kernel, m + 1, 0.0, 9.0), dict | str)


@needs_fp8
def test_what_activations_lose_does_not_hide_the_gemms_faults() -> None:
    """4 % more in an FP8 scale stays below the whole kernel's tolerance; the GEMM alone shows it."""
    q, kernel = fp8(), broken(torch_fp8.KERNEL, four_percent)
    operands, probe = kernel.prepare(given(q)), make_probe(q)
    assert check(kernel, "g", operands, probe, PROBE_ROWS) < tolerance(kernel)
    assert tolerance(kernel) > 5 * GEMM_TOLERANCE
    with pytest.raises(GateError):
        check_split(kernel, "g", operands, probe, q)


# ---------------------------------------------------------------- the model's GEMMs


def llama(layers: int = 2, hidden: int = 64, kv: int = 16, mlp: int = 160) -> dict[str, tuple[int, int]]:
    shapes: dict[str, tuple[int, int]] = {}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {
            f"{at}mlp.down_proj": (hidden, mlp),
            f"{at}mlp.gate_proj": (mlp, hidden),
            f"{at}mlp.up_proj": (mlp, hidden),
        }
        shapes |= {
            f"{at}self_attn.k_proj": (kv, hidden),
            f"{at}self_attn.o_proj": (hidden, hidden),
            f"{at}self_attn.q_proj": (hidden, hidden),
            f"{at}self_attn.v_proj": (kv, hidden),
        }
    return shapes


def facts(found: list[Gemm]) -> dict[str, tuple[int, int, int]]:
    return {gemm.name: (gemm.n, gemm.k, gemm.count) for gemm in found}


def test_llama_gemms_by_hand() -> None:
    found = group(llama(), FAMILIES["llama"])
    assert facts(found) == {
        "mlp.down_proj": (64, 160, 2),
        "mlp.gate_up_proj": (320, 64, 2),
        "self_attn.qkv_proj": (96, 64, 2),
        "self_attn.o_proj": (64, 64, 2),
    }
    at = "model.layers.0.self_attn."
    assert next(g for g in found if g.name == "self_attn.qkv_proj").members == (
        f"{at}q_proj",
        f"{at}k_proj",
        f"{at}v_proj",
    )


def test_members_that_are_not_all_quantized_are_not_merged() -> None:
    shapes = {name: shape for name, shape in llama(1).items() if not name.endswith("v_proj")}
    assert set(facts(group(shapes, FAMILIES["llama"]))) == {
        "mlp.down_proj",
        "mlp.gate_up_proj",
        "self_attn.k_proj",
        "self_attn.o_proj",
        "self_attn.q_proj",
    }


def test_layers_of_other_shapes_are_other_gemms() -> None:
    shapes = llama(2) | {"model.layers.1.mlp.down_proj": (64, 320)}
    assert {name: f for name, f in facts(group(shapes, FAMILIES["llama"])).items() if "down" in name} == {
        "mlp.down_proj 64×160": (64, 160, 1),
        "mlp.down_proj 64×320": (64, 320, 1),
    }


def test_moe_gemms_by_hand() -> None:
    """Two layers, four experts of which a token meets two, and a shared expert: a token meets 2 · 2 experts' GEMMs."""
    shapes: dict[str, tuple[int, int]] = {}
    for i in range(2):
        for inner in (*(f"experts.{e}" for e in range(4)), "shared_expert"):
            at = f"model.layers.{i}.mlp.{inner}."
            shapes |= {f"{at}down_proj": (64, 48), f"{at}gate_proj": (48, 64), f"{at}up_proj": (48, 64)}
    found = group(shapes, FAMILIES["qwen3_moe"], top_k=2)
    assert facts(found) == {
        "mlp.experts.down_proj": (64, 48, 4),
        "mlp.experts.gate_up_proj": (96, 64, 4),
        "mlp.shared_expert.down_proj": (64, 48, 2),
        "mlp.shared_expert.gate_up_proj": (96, 64, 2),
    }
    assert [gemm.experts for gemm in found] == [4, 4, 0, 0]
    assert len(fuse(shapes, FAMILIES["qwen3_moe"])) == 2 * 5 * 2


def test_mixtral_and_phi_use_their_own_names() -> None:
    at = "model.layers.0.block_sparse_moe.experts.0."
    mixtral = group({f"{at}w1": (48, 64), f"{at}w2": (64, 48), f"{at}w3": (48, 64)}, FAMILIES["mixtral"], 1)
    assert facts(mixtral) == {"block_sparse_moe.experts.w13": (96, 64, 1), "block_sparse_moe.experts.w2": (64, 48, 1)}
    assert mixtral[0].members == (f"{at}w1", f"{at}w3")
    phi = group({"model.layers.0.self_attn.qkv_proj": (96, 64)}, FAMILIES["phi3"])
    assert facts(phi) == {"self_attn.qkv_proj": (96, 64, 1)}


def test_the_demo_models_gemms_and_stacked_weights(any_artifact: Path) -> None:
    artifact = Artifact.open(any_artifact)
    decoder = Decoder(artifact)
    found = engine_gemms(artifact, decoder)
    assert facts(found) == {
        "mlp.down_proj": (128, 384, 4),
        "mlp.gate_up_proj": (768, 128, 4),
        "self_attn.qkv_proj": (256, 128, 4),
        "self_attn.o_proj": (128, 128, 4),
    }
    for gemm in found:
        stacked = torch.cat([dequantize(decoder.qtensor(member)) for member in gemm.members])
        assert torch.equal(dequantize(load_merged(decoder, gemm)[0]), stacked) and stacked.shape == (gemm.n, gemm.k)


def test_experts_without_a_top_k_are_an_error(artifact: Path) -> None:
    config = json.loads((artifact / "config.json").read_text()) | {"model_type": "qwen3_moe"}
    (artifact / "config.json").write_text(json.dumps(config))
    decoder = Decoder(Artifact.open(artifact))
    decoder._modules = {"model.layers.0.mlp.experts.0.down_proj": {"shape": [64, 64]}}
    with pytest.raises(InputError, match="num_experts_per_tok"):
        engine_gemms(decoder.artifact, decoder)


# ---------------------------------------------------------------- the stage

PLANTED: Kernel = dense.BF16


def plant(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PLANTED", kernel)
    monkeypatch.setitem(KERNELS, "broken", Entry(f"{__name__}:PLANTED", "a kernel of this test"))


def cells(evidence: dict[str, Any]) -> list[tuple[str, str, int]]:
    """Every (GEMM, kernel, M) that has a row or a reason."""
    rows = [(row["gemm"], row["kernel"], row["m"]) for row in evidence["rows"]]
    return sorted(rows + [(e["gemm"], e["kernel"], m) for e in evidence["not_measured"] for m in e["m"]])


@pytest.mark.slow
def test_the_stage_measures_or_says_why_not(any_artifact: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(any_artifact, tmp_path / "copy"))
    artifact, seen = Artifact.open(path), []
    evidence = profile(artifact, m=[1, 64, 5], budget_seconds=0.6, progress=lambda n, total: seen.append((n, total)))
    names = [kernel["name"] for kernel in evidence["kernels"] if not kernel["unavailable"]]
    gemms = [gemm["name"] for gemm in evidence["gemms"]]
    assert cells(evidence) == sorted((g, k, m) for g in gemms for k in names for m in (1, 5, 64))
    assert seen == [(i + 1, len(cells(evidence))) for i in range(len(seen))] and len(seen) == len(cells(evidence))
    own = "torch-fp8" if artifact.run()["layout"] == "ct-float" else "torch-int4"
    assert (
        names == (["dequantized"] if own == "torch-fp8" and MISSING else ["dequantized", own])
        and len(evidence["kernels"]) == len(KERNELS) - 1
    )
    assert {(n["kernel"], n["gemm"]) for n in evidence["numerics"]} == {(k, g) for k in ("bf16", *names) for g in gemms}
    assert all(0 < n["relative_error"] < n["tolerance"] for n in evidence["numerics"])
    assert artifact.read_json("profile.json") == evidence and artifact.damage() == []
    assert str(tmp_path) not in (artifact.meta / "profile.json").read_text()


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every round counts, whatever else this machine does, and the fewest are enough: there are rows to look at."""
    monkeypatch.setattr("quantpub.timing.MAXIMUM", MINIMUM)
    monkeypatch.setattr("quantpub.kernels.work.Bench", lambda stopwatch: Bench(stopwatch, waited=lambda: 0))


@pytest.mark.usefixtures("quiet")
def test_every_row_is_sound(artifact: Path) -> None:
    evidence = profile(Artifact.open(artifact), m=[1, 16], kernels=["torch-int4"], budget_seconds=30)
    assert len(evidence["rows"]) == 8 and evidence["not_measured"] == []
    for row in evidence["rows"]:
        low, high = row["ci95_us"]
        assert 0 < low <= row["median_us"] <= high and row["repeats"] >= MINIMUM and row["disturbed"] >= 0
        assert row["speedup_ci95"][0] <= row["speedup"] <= row["speedup_ci95"][1]
        assert "quantize_us" not in row


@needs_fp8
@pytest.mark.usefixtures("quiet")
def test_fp8_is_timed_in_its_parts(tmp_path: Path) -> None:
    artifact = Artifact.open(make_artifact(DEMO_MODEL, "fp8-dynamic", tmp_path / "fp8", "ct-float"))
    rows = profile(artifact, m=[32], kernels=["torch-fp8"], budget_seconds=30)["rows"]
    assert len(rows) == 4
    for row in rows:
        assert row["quantize_us"] > 0 and row["gemm_us"] > 0 and row["median_us"] > 0


def test_the_verdict_is_not_proven_and_recorded(artifact: Path) -> None:
    opened = Artifact.open(artifact)
    evidence = profile(opened, m=[1], kernels=["torch-int4"], budget_seconds=0.2)
    verdict = evidence["verdict"]
    assert (verdict["gate"], verdict["workload"], verdict["min_speedup"]) == ("not proven", "serving", 0.9)
    assert "on this CPU" in verdict["reason"] and "vllm or sglang" in verdict["reason"]
    assert evidence["device_class"] == "cpu" and "nothing about the serving engine" in evidence["label"]
    assert evidence["made_by"]["settings"]["m"] == [1] and evidence["made_by"]["device"]["cores"] >= 1
    assert opened.run()["stages"]["profile"]["gate"] == "not proven"


def test_a_budget_too_small_lists_everything(artifact: Path) -> None:
    evidence = profile(Artifact.open(artifact), budget_seconds=1e-9)
    assert evidence["rows"] == [] and evidence["totals"] == [] and len(cells(evidence)) == 4 * 2 * 10
    title, columns, rows = gemm_table(evidence, usable(evidence))
    assert title == "speedup over bf16"
    assert columns == ["kernel", "M", "down_proj", "gate_up_proj", "qkv_proj", "o_proj", "all"]
    assert len(rows) == 20 and all(row[2:] == ["–"] * 5 for row in rows)


@pytest.mark.parametrize("fault", [swapped_nibbles, shifted_rows])
def test_a_wrong_kernel_ends_the_stage_without_a_number(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[QTensor], QTensor]
) -> None:
    plant(monkeypatch, broken(torch_int4.KERNEL, fault))
    with pytest.raises(GateError, match=r"kernel broken computes mlp\.down_proj wrong"):
        profile(Artifact.open(artifact), m=[1], kernels=["torch-int4", "broken"], budget_seconds=0.2)
    assert not Artifact.open(artifact).has("profile.json")


def test_a_kernel_wrong_at_one_m_only_is_caught_before_it_is_timed(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def run(x_MK: torch.Tensor, operands: Operands) -> torch.Tensor:
        calls.append(len(x_MK))
        y_MN = dense.run(x_MK, operands)
        return y_MN.roll(16, dims=0) if len(x_MK) == 256 else y_MN

    plant(monkeypatch, replace(dense.BF16, name="broken", run=run))
    with pytest.raises(GateError, match="at M = 256"):
        profile(Artifact.open(artifact), m=[256], kernels=["broken"], budget_seconds=5)
    assert calls == [1, 1, PROBE_ROWS, PROBE_ROWS, 256, 256]  # other activations first: a stale answer would show


def test_what_this_machine_lacks_is_listed_with_its_reason(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, replace(dense.BF16, name="broken", unavailable=lambda: "no such op in this torch"))
    evidence = profile(Artifact.open(artifact), m=[1], kernels=["broken", "torch-fp8"], budget_seconds=0.2)
    assert [kernel["unavailable"] for kernel in evidence["kernels"]] == [
        "no such op in this torch",
        "it multiplies FP8 weights with a scale a row or one of all, not W4A16",
    ]
    plant(monkeypatch, replace(dense.BF16, name="broken", devices=("cuda",)))
    evidence = profile(Artifact.open(artifact), m=[1], kernels=["broken"], budget_seconds=0.2)
    assert evidence["kernels"][0]["unavailable"] == "it runs on cuda; this was measured on cpu"


def test_a_shape_that_a_kernel_refuses_is_listed(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, replace(dense.BF16, name="broken", reject=lambda scheme, n, k: "too wide" if n == 768 else None))
    evidence = profile(Artifact.open(artifact), m=[1, 2], kernels=["broken"], budget_seconds=0.2)
    assert {"gemm": "mlp.gate_up_proj", "kernel": "broken", "m": [1, 2], "reason": "too wide"} in evidence[
        "not_measured"
    ]
    assert evidence["totals"] == []


def test_an_op_that_fails_is_listed(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(x_MK: torch.Tensor, operands: Operands) -> torch.Tensor:
        raise RuntimeError("expect M to be even\nat line 12")

    plant(monkeypatch, replace(dense.BF16, name="broken", run=run))
    evidence = profile(Artifact.open(artifact), m=[1, 3], kernels=["broken"], budget_seconds=1)
    assert {entry["reason"] for entry in evidence["not_measured"]} == {"the op failed: expect M to be even"}
    assert len(cells(evidence)) == 4 * 2


@pytest.mark.parametrize("wrong", [{"m": [0]}, {"m": []}, {"kernels": ["marlyn"]}, {"budget_seconds": 0.0}])
def test_wrong_use_is_said_before_anything_is_measured(artifact: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        profile(Artifact.open(artifact), **wrong)


@pytest.mark.slow
def test_the_default_on_the_demo_model_takes_less_than_15_seconds(artifact: Path) -> None:
    started = time.monotonic()
    evidence = profile(Artifact.open(artifact))
    assert time.monotonic() - started < 15
    assert len(cells(evidence)) == 4 * 2 * 10


def test_a_machine_that_is_busy_throughout_is_named_as_the_reason(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look at the scheduler finds a second lost: no round counts, and that is what is said of all of them."""
    waits = iter(range(10**12, 10**18, 10**9))
    monkeypatch.setattr("quantpub.kernels.work.Bench", lambda stopwatch: Bench(stopwatch, waited=lambda: next(waits)))
    evidence = profile(Artifact.open(artifact), m=[1, 4], kernels=["torch-int4"], budget_seconds=0.4)
    assert evidence["rows"] == [] and len(cells(evidence)) == 4 * 2
    assert all(entry["reason"].startswith("other work on this machine") for entry in evidence["not_measured"])
