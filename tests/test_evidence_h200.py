"""What is on record of Qwen3-8B's shapes on an H200: the figures are those that the code computes, and they say what we say.

Nothing is measured here. The profiles hold the rows; what stands beside them must follow from the rows alone, and the
predictions from the profiles alone. What the rows themselves show is what the project claims of these kernels.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
from conftest import ROOT

from quantpub.findings import MARGIN, totals
from quantpub.forecast import Forecast
from quantpub.kernels.check import GEMM_TOLERANCE
from quantpub.recipe import Gate
from quantpub.verdict import judged
from quantpub.workloads import WORKLOADS

HOME = ROOT / "docs" / "evidence" / "h200-qwen3-8b"
CHOSEN = {
    "w4a16-rtn": "machete",
    "fp8-dynamic": "cutlass-fp8",
    "fp8-block": "cutlass-fp8-block",
    "int8-dynamic": "cutlass-int8",
    "nvfp4a16": "fp4-marlin",
    "int4-hqq-tile": "tinygemm",
}
PASSED = ("w4a16-rtn", "fp8-dynamic", "fp8-block", "int8-dynamic")
LINEARS = {
    "mlp.down_proj": (4096, 12288),
    "mlp.gate_up_proj": (24576, 4096),
    "self_attn.qkv_proj": (6144, 4096),
    "self_attn.o_proj": (4096, 4096),
}
M = [1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096, 8192]
GATE = Gate(workload="serving", min_speedup=0.9)
each_profile = pytest.mark.parametrize("name", CHOSEN)


@cache
def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((HOME / f"{name}.json").read_text())
    return found


@cache
def found(name: str) -> dict[str, Any]:
    """As JSON gives it back."""
    value: dict[str, Any] = json.loads(json.dumps(judged(load(name), load("config"), GATE, None)))
    return value


def speedups(name: str, kernel: str | None = None) -> dict[int, float]:
    """M → of all GEMMs, from the rows: Σ count · bf16 over Σ count · kernel."""
    evidence, sums = load(name), dict[int, list[float]]()
    counts = {gemm["name"]: gemm["count"] for gemm in evidence["gemms"]}
    for row in evidence["rows"]:
        if row["kernel"] == (kernel or CHOSEN[name]):
            base, own = sums.setdefault(row["m"], [0.0, 0.0])
            count = counts[row["gemm"]]
            sums[row["m"]] = [base + count * row["baseline_us"], own + count * row["median_us"]]
    return {m: base / own for m, (base, own) in sums.items()}


@cache
def side_by_side() -> Any:
    spec = importlib.util.spec_from_file_location("side_by_side", ROOT / "scripts" / "side_by_side.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# the figures are those that the code computes


@each_profile
@pytest.mark.parametrize("key", ["workloads", "crossover", "roofline", "dense_path", "verdict"])
def test_what_stands_beside_the_rows_follows_from_them(name: str, key: str) -> None:
    assert load(name).get(key) == found(name).get(key)
    assert (key in load(name)) == (key != "dense_path" or load(name)["weights"]["computes_in"] == "bf16")


@each_profile
def test_totals_follow_from_the_rows(name: str) -> None:
    evidence = load(name)
    again = totals({gemm["name"]: gemm["count"] for gemm in evidence["gemms"]}, evidence["rows"])
    key = lambda one: (one["kernel"], one["m"])  # noqa: E731
    assert sorted(again, key=key) == sorted(evidence["totals"], key=key)
    for total in evidence["totals"]:
        assert total["speedup"] == pytest.approx(speedups(name, total["kernel"])[total["m"]], abs=1e-4)


@each_profile
def test_the_profile_is_whole(name: str) -> None:
    evidence = load(name)
    usable = [kernel["name"] for kernel in evidence["kernels"] if not kernel["unavailable"]]
    cells = {(row["gemm"], row["kernel"], row["m"]) for row in evidence["rows"]}
    assert cells == {(gemm, kernel, m) for gemm in LINEARS for kernel in usable for m in M}
    assert len(evidence["rows"]) == len(cells) and evidence["not_measured"] == []
    assert {gemm["name"]: (gemm["n"], gemm["k"]) for gemm in evidence["gemms"]} == LINEARS
    assert {gemm["count"] for gemm in evidence["gemms"]} == {36}
    assert all(row["cold"] and row["repeats"] >= 6 for row in evidence["rows"])
    assert evidence["made_by"]["device"]["gpu"]["name"] == "NVIDIA H200"
    assert evidence["made_by"]["versions"]["vllm"] == "0.25.1"


@each_profile
def test_every_row_agrees_with_itself(name: str) -> None:
    """The paired ratio lies near the ratio of the medians, both in their intervals, and the parts make up the whole."""
    for row in load(name)["rows"]:
        assert row["ci95_us"][0] <= row["median_us"] <= row["ci95_us"][1]
        assert row["speedup_ci95"][0] <= row["speedup"] <= row["speedup_ci95"][1]
        assert row["speedup"] == pytest.approx(row["baseline_us"] / row["median_us"], rel=0.1)
        if "quantize_us" in row:
            assert row["quantize_us"] < row["median_us"]
            assert row["median_us"] == pytest.approx(row["quantize_us"] + row["gemm_us"], rel=0.2)


@each_profile
def test_no_time_is_below_its_floor(name: str) -> None:
    """But for noise of the rates. Of int8 only few tokens are looked at: its rate is `_int_mm`'s, which is no peak."""
    parts = load(name)["roofline"]
    assert [(one["gemm"], one["m"]) for one in parts] == [(gemm, m) for gemm in LINEARS for m in M]
    assert all(0 < one["baseline_part"] < 1.05 for one in parts)
    assert all(0 < one["part"] < 1.05 for one in parts if name != "int8-dynamic" or one["m"] <= 128)


# what the engine ran


@each_profile
def test_the_selector_answered_for_every_gemm(name: str) -> None:
    engine = load(name)["engine"]
    assert engine["runs"] == dict.fromkeys(LINEARS, CHOSEN[name]) and engine["unknown"] == {}
    assert [choice["gemm"] for choice in engine["choices"]] == list(LINEARS)
    said = {choice["source"] for choice in engine["choices"]}
    assert len(said) == 1 and said.pop().startswith("read" if name == "int4-hqq-tile" else "asked vllm 0.25.1")


@each_profile
def test_the_profiler_saw_every_kernel(name: str) -> None:
    evidence = load(name)
    usable = {kernel["name"] for kernel in evidence["kernels"] if not kernel["unavailable"]}
    seen = {(one["kernel"], one["m"]) for one in evidence["symbols"]}
    assert seen == {(kernel, m) for kernel in usable | {"bf16"} for m in (1, 256)}
    assert all(one["seen"] and one["unconfirmed"] is None for one in evidence["symbols"])


@each_profile
def test_every_kernel_computed_what_the_weights_mean(name: str) -> None:
    evidence = load(name)
    usable = {kernel["name"] for kernel in evidence["kernels"] if not kernel["unavailable"]}
    assert {(one["kernel"], one["gemm"]) for one in evidence["numerics"]} == {
        (kernel, gemm) for kernel in usable | {"bf16"} for gemm in LINEARS
    }
    for one in evidence["numerics"]:
        assert 0 < one["relative_error"] <= one["tolerance"] and one["tolerance"] >= GEMM_TOLERANCE
        assert one["kernel"] not in ("bf16", "dequantized") or one["tolerance"] == GEMM_TOLERANCE


@each_profile
def test_the_control_is_as_fast_as_bf16(name: str) -> None:
    """Weights decompressed when loaded are bf16: what else is seen there is noise."""
    assert all(one == pytest.approx(1, abs=0.02) for one in speedups(name, "dequantized").values())


# what the rows show


def test_tile_packed_weights_pay_for_a_handful_of_tokens_only() -> None:
    tinygemm = speedups("int4-hqq-tile")
    assert all((speedup > 1) == (m <= 4) for m, speedup in tinygemm.items()) and tinygemm[1] > 1.5
    assert tinygemm[4096] < 1 / 20 and 4 < load("int4-hqq-tile")["crossover"]["all"] < 8
    assert all(one > two for one, two in zip(tinygemm.values(), list(tinygemm.values())[1:], strict=False))


def test_weight_only_int4_on_machete_is_faster_up_to_some_64_tokens() -> None:
    machete, crossing = speedups("w4a16-rtn"), load("w4a16-rtn")["crossover"]["all"]
    assert 32 < crossing < 256 and all(machete[m] > 1.2 for m in M if m <= 32)
    assert all(0.8 < machete[m] < 1 for m in M if m >= 96)
    assert load("w4a16-rtn")["dense_path"]["from_m"] == crossing


def test_marlin_is_faster_than_machete_for_few_tokens_and_half_as_fast_for_many() -> None:
    marlin, machete = (speedups("w4a16-rtn", kernel) for kernel in ("marlin", "machete"))
    assert all(marlin[m] > machete[m] for m in M if m <= 32)
    assert all(0.4 * machete[m] < marlin[m] < 0.65 * machete[m] for m in M if m >= 256)
    told = found("w4a16-rtn")["faster"]
    assert {(one["workload"], one["kernel"]) for one in told} == {("interactive", "marlin")}
    assert all(one["speedup"] > load("w4a16-rtn")["workloads"][one["workload"]]["speedup"] for one in told)


@pytest.mark.parametrize("name", ["fp8-dynamic", "int8-dynamic"])
def test_eight_bits_by_eight_pay_at_every_m_with_the_quantizing_included(name: str) -> None:
    total = speedups(name)
    assert all(1.2 <= total[m] <= 2 for m in M if m >= 256) and min(total.values()) > 1.1
    crossings = load(name)["crossover"]
    assert [gemm for gemm, m in crossings.items() if m is not None] == [
        "self_attn.o_proj"
    ]  # bf16 is as fast near M = 150
    assert 100 < crossings["self_attn.o_proj"] < 200
    rows = [row for row in load(name)["rows"] if row["kernel"] == CHOSEN[name]]
    assert all(row["quantize_us"] > 0 for row in rows)
    shares = [load(name)["workloads"][each]["shares"]["activation quantization"] for each in WORKLOADS]
    assert all(0.01 < share < 0.15 for share in shares)


def test_blocks_of_fp8_cost_some_of_that_and_lose_between() -> None:
    block, rows = speedups("fp8-block"), speedups("fp8-dynamic")
    assert all(block[m] < rows[m] for m in M) and all(block[m] > 1.05 for m in M if m >= 256)
    assert all(block[m] < 1 for m in (4, 8, 16, 32, 64))


def test_nvfp4_on_marlin_reads_less_and_computes_slower() -> None:
    total = speedups("nvfp4a16")
    assert all(total[m] > 1.25 for m in M if m <= 32) and all(total[m] < 0.5 for m in M if m >= 256)


# verdicts


@each_profile
def test_the_gate_passes_what_it_should_and_nothing_else(name: str) -> None:
    verdict, workload = load(name)["verdict"], load(name)["workloads"]["serving"]
    assert verdict["gate"] == ("passed" if name in PASSED else "failed")
    assert (workload["speedup"] >= 0.9) == (name in PASSED)
    assert (verdict["workload"], verdict["min_speedup"]) == ("serving", 0.9)
    assert f"{workload['speedup']:.2f}x in serving on {CHOSEN[name]}" in verdict["reason"]


def test_tile_packed_fails_and_its_cure_is_named() -> None:
    evidence = load("int4-hqq-tile")
    verdict = evidence["verdict"]
    cure = verdict["cure"]
    assert (cure["format"], cure["layout"], cure["kernel"]) == ("pack-quantized", "ct-pack", "machete")
    assert not cure["lossless"] and "half a step" in cure["note"] and cure["note"] in verdict["next"]
    assert "repack it as pack-quantized" in verdict["next"] and "machete it passes" in verdict["next"]
    runs = dict.fromkeys(LINEARS, "machete")
    assert cure["speedup"] == Forecast(evidence, load("config")).workload(WORKLOADS["serving"], runs)["speedup"] >= 0.9
    assert evidence["workloads"]["serving"]["speedup"] < 0.1 < 0.9 <= cure["speedup"]


def test_a_stricter_gate_says_that_the_cure_does_not_reach_it() -> None:
    verdict = judged(load("int4-hqq-tile"), load("config"), Gate(workload="serving", min_speedup=1.0), None)["verdict"]
    assert verdict["gate"] == "failed" and "comes nearest, though the gate asks for 1.0x" in verdict["next"]


def test_tile_packed_passes_where_one_talks_to_it_alone() -> None:
    verdict = judged(load("int4-hqq-tile"), load("config"), GATE, "interactive")["verdict"]
    assert (verdict["gate"], verdict["workload"]) == ("passed", "interactive")


def test_what_fails_without_a_repack_says_so() -> None:
    verdict = load("nvfp4a16")["verdict"]
    assert "cure" not in verdict and "no layout of these codes was measured to be faster" in verdict["next"]


@each_profile
def test_everything_beside_the_linears_was_measured(name: str) -> None:
    for one in load(name)["workloads"].values():
        assert one["estimated"] == [] and sum(one["shares"].values()) == pytest.approx(1, abs=1e-3)


# predicted and served

SERVED = ("served", "served-tile-1", "served-tile-2")


@cache
def rows() -> list[dict[str, Any]]:
    """Predicted anew, from the committed throughputs and profiles, as the script does it."""
    side = side_by_side()
    bench = side.merged([load(name) for name in SERVED])
    known = side.profiles(HOME, list(bench["checkpoints"]), None)
    found: list[dict[str, Any]] = json.loads(json.dumps(side.joined(bench, known, "bf16", side.forecast)))
    return found


def test_the_comparison_on_record_is_what_the_scripts_compute() -> None:
    record = load("predicted-and-served")
    assert rows() == record["rows"] and side_by_side().summary(rows()) == record["summary"]


def test_every_prediction_is_within_a_tenth_of_what_vllm_served() -> None:
    """tokens/s predicted over tokens/s measured, from seconds: neither figure of the record is taken on trust."""
    record, measured = load("predicted-and-served"), throughputs()
    assert len(record["rows"]) == len(measured) == 35
    for row in record["rows"]:
        seconds, tokens = measured[row["checkpoint"], row["ran"]]
        assert row["measured_s"] == seconds and row["measured_tokens_per_s"] == pytest.approx(tokens, rel=1e-3)
        error = seconds / row["predicted_s"] - 1
        assert abs(error) <= 0.10 and error == pytest.approx(row["error"], abs=2e-4)
    assert record["summary"]["within_10_percent"] == record["summary"]["predicted"] == record["summary"]["runs"] == 35


def throughputs() -> Mapping[tuple[str, str], tuple[float, float]]:
    """(checkpoint, workload as run) → (median seconds, tokens/s), from the benches alone."""
    found = {}
    for bench in map(load, SERVED):
        for name, checkpoint in bench["checkpoints"].items():
            for run in checkpoint["workloads"]:
                assert (name, run["ran"]) not in found
                assert run["median_s"] == pytest.approx(statistics.median(run["seconds"]), abs=1e-4)
                found[name, run["ran"]] = run["median_s"], run["total_tokens_per_s"]
    return found


def test_all_the_artifacts_and_all_the_workloads_are_compared() -> None:
    compared = {(row["checkpoint"], row["workload"].split("@")[0]) for row in rows()}
    named = {"bf16", "w4a16-rtn", "fp8-dynamic", "int8-dynamic", "int4-hqq-tile"}
    assert compared >= {(name, workload) for name in named for workload in WORKLOADS}
    assert all("missing" not in row for row in rows())
    base = {row["workload"]: row["measured_s"] for row in rows() if row["checkpoint"] == "bf16"}
    for row in rows():
        if row["measured_speedup"] is not None:
            assert row["measured_speedup"] == pytest.approx(base[row["workload"]] / row["measured_s"], abs=1e-3)


def test_served_and_predicted_speedups_fall_on_the_same_side() -> None:
    """What the gate decides: an artifact is not said to pay where it was served slower, nor the other way round."""
    for row in rows():
        if row["checkpoint"] != "bf16" and row["measured_speedup"] is not None:
            high, low = (
                max(row["measured_speedup"], row["predicted_speedup"]),
                min(row["measured_speedup"], row["predicted_speedup"]),
            )
            assert low > 0.95 or high < 1.05


def test_the_margin_of_a_crossover_is_what_the_control_shows() -> None:
    """`dequantized` is the very call of the baseline: what it differs by says nothing about a kernel."""
    off = [abs(row["speedup"] - 1) for name in CHOSEN for row in load(name)["rows"] if row["kernel"] == "dequantized"]
    assert len(off) > 300 and round(sum(each <= MARGIN for each in off) / len(off), 2) == 0.95
