"""Stored profiles: what a file keeps of a profile, and how near derived times come to measured ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from quantpub.derived import ESTIMATED, OTHER, SAME, Asked, derive, fit, held_out, held_out_kernels
from quantpub.gpus import GPUS
from quantpub.measured import INT4_H200
from quantpub.roofline import machine
from quantpub.scheme import preset
from quantpub.served import Linear
from quantpub.stored import FOLDER, Part, Point, Series, Stored, read, stored

ON = machine(GPUS["H200"])
SHAPES = ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288))
SIZES = (1, 16, 64, 256, 1024, 4096)
W4A16 = preset("W4A16")
SUMS = read([FOLDER / "h200-int4-layer.json"])["H200"]  # of the four shapes


def series(time: Callable[[float], float], shape: tuple[int, int], kernel: str = "machete") -> Series:
    """A kernel that takes time(floor)."""
    part = Part(*shape)
    us = {m: time(part.work(m, W4A16).us(ON)) for m in SIZES}
    return Series("H200", kernel, kernel.capitalize(), W4A16, (part,), us, ON)


def layer(n: int, k: int) -> Linear:
    return Linear("", n, k, 1, 1)


def test_what_was_measured_is_given_back() -> None:
    """The four shapes of a layer, whose sum was measured."""
    for kernel, row, scheme in (("machete", "Machete", "W4A16"), ("tinygemm", "tinygemm", "W4A16_FLOAT_ZERO")):
        found = [derive(Asked(layer(*shape), preset(scheme), row, ON), SUMS.series) for shape in SHAPES]
        assert {each.confidence for each in found} == {SAME} and not any(each.basis for each in found)
        for line in INT4_H200:
            assert sum(each.us(line.m) for each in found) == pytest.approx(line.of(kernel)[0], rel=1e-3)


def test_a_law_is_found_again_from_shapes_that_follow_it() -> None:
    measured = [series(lambda floor: 4 + 1.3 * floor, shape) for shape in SHAPES]
    found = derive(Asked(layer(8192, 8192), W4A16, "Machete", ON), measured)
    assert found.confidence == OTHER
    for m in SIZES:
        assert found.us(m) == pytest.approx(4 + 1.3 * Part(8192, 8192).work(m, W4A16).us(ON), rel=1e-6)
    one = Stored(GPUS["H200"], ON, tuple(measured), {}, {}, ())
    error = held_out(one)
    assert error is not None and error.largest < 1e-6 and error.count == len(SHAPES) * len(SIZES)


def test_held_out_shapes_show_how_far_a_kernel_is_from_any_law() -> None:
    odd = [series(lambda floor: 4 + 1.3 * floor, shape) for shape in SHAPES[1:]]
    one = Stored(GPUS["H200"], ON, (*odd, series(lambda floor: 8 + 2.6 * floor, SHAPES[0])), {}, {}, ())
    error = held_out(one, "Machete")
    assert error is not None and error.largest > 0.45 and error.median > 0.1
    assert held_out(one, "Marlin") is None


def test_every_stored_gpu_with_shapes_apart_derives_them_within_a_quarter() -> None:
    found = {name: held_out(one) for name, one in stored().items()}
    assert "H200" in found
    assert all(error is None or error.median < 0.25 for error in found.values())


def test_an_estimate_of_a_measured_kernel_is_known_to_be_poor() -> None:
    """Machete, Marlin and tinygemm, each from the two others: this figure stands beside every estimate."""
    error = held_out_kernels(SUMS)
    assert error is not None and 0.2 < error.median < 1


def test_a_fit_never_starts_below_zero_nor_beats_the_roofline_by_much() -> None:
    falling = fit([Point(1, 10, 20, True), Point(1, 20, 50, True)])  # start would be −10
    assert falling.start == 0 and falling.slope == pytest.approx(2.25)
    flat = fit([Point(1, 10, 20, True), Point(1, 40, 22, True)])
    assert flat.slope == 0.8 and flat.start > 0
    assert fit([Point(1, 10, 14, True)]).us(20) == pytest.approx(24)  # one shape, bound by memory: a start
    assert fit([Point(1, 10, 14, False)]).us(20) == pytest.approx(28)  # by arithmetic: a slope


def test_no_kernel_takes_less_than_its_launch() -> None:
    tiny = derive(Asked(layer(64, 64), W4A16, "Machete", ON), [series(lambda floor: 2 * floor, (4096, 4096))])
    assert tiny.us(1) == 2.5


def test_a_kernel_borrows_from_itself_first() -> None:
    known = [series(lambda floor: 10 * floor, SHAPES[0], "marlin"), series(lambda floor: floor, SHAPES[0], "machete")]
    asym = derive(Asked(layer(*SHAPES[0]), preset("W4A16_ASYM"), "Marlin", ON), known)
    assert asym.confidence == SAME and asym.basis == "at the efficiency of Marlin W4A16 on H200"
    elsewhere = derive(Asked(layer(*SHAPES[0]), W4A16, "Marlin", machine(GPUS["L4"])), known)
    assert elsewhere.confidence == ESTIMATED and elsewhere.basis == "at the efficiency of Marlin W4A16 on H200"
    other = derive(Asked(layer(*SHAPES[0]), W4A16, "Humming", ON), known)
    assert other.basis == "at the efficiency of Machete W4A16, Marlin W4A16 on H200"
    bare = derive(Asked(layer(*SHAPES[0]), preset("W8A8"), "CUTLASS INT8", ON), known)
    assert bare.confidence == ESTIMATED and "bare roofline" in bare.basis


def test_times_elsewhere_follow_the_bandwidth() -> None:
    """Weights of 4 bits at M = 1 are bound by memory: a GPU of a sixteenth of the bandwidth takes up to 16 times as long."""
    here, there = (
        derive(Asked(layer(24576, 4096), W4A16, "Marlin", machine(GPUS[gpu]))).us(1) for gpu in ("H200", "L4")
    )
    assert 3 < there / here <= GPUS["H200"].bandwidth / GPUS["L4"].bandwidth


def profile(tmp_path: Path) -> Path:
    """As `quantpub profile` writes it, in an artifact's folder."""
    folder = tmp_path / "artifact"
    (folder / ".quantpub").mkdir(parents=True)
    config = {
        "model_type": "qwen3_moe", "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 64, "moe_intermediate_size": 256, "intermediate_size": 1024, "vocab_size": 1000,
        "num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    row: dict[str, Any] = {
        "gemm": "self_attn.o_proj",
        "kernel": "machete",
        "m": 16,
        "median_us": 4.0,
        "baseline_us": 5.0,
    }
    rows = [
        row,
        row | {"m": 1, "median_us": 3.0},
        row | {"kernel": "dequantized", "median_us": 5.0},
        row | {"kernel": "marlin", "median_us": 6.0},
        row | {"gemm": "mlp.experts", "kernel": "vllm-marlin-moe", "median_us": 30.0, "baseline_us": 50.0},
    ]
    gemm = {"name": "self_attn.o_proj", "n": 512, "k": 512, "count": 2, "scheme": "W4A16", "layout": "ct-pack"}
    experts = {"name": "mlp.experts", "experts": 8, "top_k": 2, "hidden": 512, "intermediate": 256, "count": 2}
    evidence = {
        "made_by": {"versions": {"torch": "x"}, "device": {"gpu": {"name": "NVIDIA H200", "driver": "1"}}},
        "gemms": [gemm, experts | {"n": 512, "k": 512, "scheme": "W4A16", "layout": "ct-pack"}],
        "kernels": [{"name": "marlin", "repacked": {"layout": "ct-pack", "scheme": "W4A16_ASYM"}}],
        "rows": rows,
        "around": {"machine": {"bandwidth": 4e12, "compute": {"bf16": 7e14}}, "rest": {"sustained": 0.9}},
    }
    path = folder / ".quantpub" / "profile.json"
    path.write_text(json.dumps(evidence))
    return path


def store(out: Path, *profiles: Path) -> str:
    command = [sys.executable, "scripts/store_profile.py", str(out), *map(str, profiles)]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.slow
def test_a_profile_is_stored_and_read_back(tmp_path: Path) -> None:
    assert store(tmp_path / "one.json", profile(tmp_path)).endswith("one.json: 3 series\n")
    one = read([tmp_path / "one.json"])["H200"]
    assert one.machine.bandwidth == 4e12 and one.machine.compute["bf16"] == 7e14 and one.rest == {"sustained": 0.9}
    assert one.model["hidden"] == 512 and one.model["kv_heads"] == 2
    found = {each.name: each for each in one.series}
    assert found["Machete W4A16"].us == {1: 3.0, 16: 4.0}
    assert found["Marlin W4A16_ASYM"].us == {16: 6.0}  # the weight was repacked for it
    assert found["Marlin MoE W4A16"].parts == (Part(512, 512, 8, 2), Part(512, 256, 8, 2))
    bf16 = [each for each in one.series if each.scheme is None]
    assert sorted(max(each.us.values()) for each in bf16) == [5.0, 50.0] and len(bf16) == 2


@pytest.mark.slow
def test_two_files_of_a_gpu_are_one(tmp_path: Path) -> None:
    store(tmp_path / "one.json", profile(tmp_path))
    both = read([tmp_path / "one.json", *sorted(FOLDER.glob("*.json"))])["H200"]
    assert len(both.series) > len(stored()["H200"].series) and len(both.evidence) > len(stored()["H200"].evidence)
    assert all(each.machine == both.machine for each in both.series)
    known = [each for each in both.series if each.experts]
    expert = Linear("mlp.experts.down_proj", 512, 256, 4, 2, 8)
    assert derive(Asked(expert, W4A16, "Marlin MoE", both.machine, 2), known).confidence == SAME


def test_the_stored_files_are_what_the_script_makes_of_the_evidence(tmp_path: Path) -> None:
    store(tmp_path / "again.json", Path("docs/evidence/h200-int4-kernels.json"))
    assert (tmp_path / "again.json").read_text() == (FOLDER / "h200-int4-layer.json").read_text()
    for one in stored().values():
        assert one.evidence and all((ROOT / path).is_file() for path in one.evidence)
