"""Verdicts on small profiles made by hand: what is missing for one, the threshold, cures, and the command's exit code.

`made` is also what the other tests of profiles start from: four GEMMs of a two-layer Llama shape, every time given by kernel
and M, so that what a forecast must say can be added up.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import run_cli

from quantpub.errors import GateError
from quantpub.findings import totals
from quantpub.forecast import Forecast
from quantpub.recipe import Gate
from quantpub.rivals import in_place
from quantpub.verdict import hole, judged, kernels_of, on_cpu, shown
from quantpub.workloads import WORKLOADS, parse

CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128,
    "intermediate_size": 1024, "vocab_size": 1000, "num_hidden_layers": 2, "tie_word_embeddings": False,
}  # fmt: skip
SHAPES = {
    "self_attn.qkv_proj": (1024, 512),
    "self_attn.o_proj": (512, 512),
    "mlp.gate_up_proj": (2048, 512),
    "mlp.down_proj": (512, 1024),
}
M = [4**i for i in range(8)]  # 1 to 16384
BASE = {m: max(400.0, m) for m in M}  # µs of each GEMM: a step takes longer than the host needs to prepare the next
Times = Mapping[int, float]


def scaled(factor: float, to: int = M[-1], since: int = 1) -> dict[int, float]:
    """As fast as bf16 by this factor, at the M from `since` to `to`."""
    return {m: us / factor for m, us in BASE.items() if since <= m <= to}


def entry(name: str, **facts: Any) -> dict[str, Any]:
    return {"name": name, "layout": "ct-pack", "package": "vllm", "unavailable": None, **facts}


def repack(lossless: bool = True, note: str = "") -> dict[str, Any]:
    kept = {"layout": "other", "scheme": "W4A16_ASYM", "format": "other-quantized"}
    return {"repacked": {**kept, "lossless": lossless, "note": note}}


def row(gemm: str, kernel: str, m: int, base: float, own: float, quantize: float | None = None) -> dict[str, Any]:
    found = {"gemm": gemm, "kernel": kernel, "m": m, "median_us": own, "baseline_us": base, "speedup": base / own}
    return found | ({} if quantize is None else {"quantize_us": quantize})


def made(
    kernels: Mapping[str, Times],
    runs: str = "own",
    entries: Sequence[Mapping[str, Any]] = (),
    base: Times = BASE,
    gpu: str = "NVIDIA H200",
    repacked: Sequence[str] = (),
    scheme: tuple[str, str, float] = ("W4A16", "bf16", 4.125),
    quantize: Times | None = None,
    rest: Mapping[str, Any] | None = None,
    tp: int = 1,
) -> dict[str, Any]:
    """A profile on a GPU before it is judged. kernels: name → M → µs of each GEMM. scheme: (name, computes in, bits)."""
    name, num, bits = scheme
    gemms = [
        {"name": gemm, "n": n, "k": k, "count": 2, "scheme": name, "group": None, "layout": "ct-pack"}
        for gemm, (n, k) in SHAPES.items()
    ]
    rows = [
        row(gemm, kernel, m, base[m], us, quantize[m] if quantize else None)
        for gemm in SHAPES
        for kernel, times in kernels.items()
        for m, us in times.items()
    ]
    device = {"cpu": "a CPU", "gpu": {"name": gpu}}
    choices: list[dict[str, Any]] = [
        {"gemm": gemm, "kernel": "Own", "class_name": "OwnKernel", "source": "asked", "rejected": {}, "error": None}
        for gemm in SHAPES
    ]
    settings = {"m": sorted({m for times in kernels.values() for m in times}), "tensor_parallel": tp}
    return {
        "made_by": {"settings": settings, "device": device},
        "device_class": "cuda",
        "baseline": {"name": "bf16"},
        "weights": {"bits": bits, "computes_in": num},
        "gemms": gemms,
        "kernels": [entry(kernel) for kernel in kernels if kernel not in {e["name"] for e in entries}] + [*entries],
        "rows": rows,
        "totals": totals(dict.fromkeys(SHAPES, 2), rows),
        "not_measured": [],
        "around": {"machine": {"bandwidth": 4e12, "compute": {"bf16": 7e14}}, "rest": dict(rest or {})},
        "engine": {
            "engine": "vllm", "version": "0.25.1", "generation": "sm90", "choices": choices,
            "runs": dict.fromkeys(SHAPES, runs), "unknown": {}, "repacked": list(repacked),
        },
    }  # fmt: skip


def asked(evidence: Mapping[str, Any], least: float | None = 1.0, workload: str | None = "64:16@4") -> dict[str, Any]:
    found = judged(evidence, CONFIG, Gate(workload=workload, min_speedup=least), None)
    verdict: dict[str, Any] = found["verdict"]
    return verdict


def speedup(evidence: Mapping[str, Any], workload: str = "64:16@4", kernel: str = "own") -> float:
    found = Forecast(evidence, CONFIG).workload(parse(workload), dict.fromkeys(SHAPES, kernel))["speedup"]
    assert isinstance(found, float)
    return found


# what is missing


def without(gemm: str) -> dict[str, Any]:
    evidence = made({"own": scaled(2)})
    return evidence | {"rows": [each for each in evidence["rows"] if each["gemm"] != gemm]}


def unanswered(reason: str | None) -> dict[str, Any]:
    evidence = made({"own": scaled(2)})
    del evidence["engine"]["runs"]["mlp.down_proj"]
    if reason:
        evidence["engine"]["unknown"]["mlp.down_proj"] = reason
    return evidence


@pytest.mark.parametrize(
    ("evidence", "said"),
    [
        (made({"own": scaled(2)}, tp=2), "the shapes of several GPUs were timed"),
        (unanswered("nobody could be asked"), "nobody could be asked"),
        (unanswered(None), "no kernel is known for mlp.down_proj"),
        (made({"own": scaled(2)}, gpu="NVIDIA T4"), "NVIDIA T4 is not in the table of GPUs"),
        (made({"other": scaled(2)}), "own, which the engine would run, was not timed for every GEMM"),
        (without("self_attn.o_proj"), "own, which the engine would run, was not timed for every GEMM"),
    ],
)
def test_what_is_missing_is_said_and_nothing_is_predicted(evidence: dict[str, Any], said: str) -> None:
    found = judged(evidence, CONFIG, Gate(workload="serving", min_speedup=0.5), None)
    assert found["verdict"]["gate"] == "not proven" and found["verdict"]["reason"].startswith(said)
    assert found["workloads"] == {} and set(found) == {"workloads", "verdict"}


def test_an_unknown_architecture_is_not_proven() -> None:
    found = judged(
        made({"own": scaled(2)}), CONFIG | {"model_type": "gpt9"}, Gate(workload="serving", min_speedup=1.0), None
    )
    assert found["verdict"]["gate"] == "not proven" and "'gpt9' cannot be predicted" in found["verdict"]["reason"]
    assert found["workloads"] == {}


@pytest.mark.parametrize("gate", [Gate(), Gate(workload="serving")])
def test_a_gate_without_a_figure_or_a_workload_proves_nothing_but_predicts(gate: Gate) -> None:
    found = judged(made({"own": scaled(2)}), CONFIG, gate, None)
    assert found["verdict"]["gate"] == "not proven" and "asks for no speed" in found["verdict"]["reason"]
    assert set(found["workloads"]) == set(WORKLOADS) and found["crossover"]["all"] is None


def test_every_named_workload_is_predicted_and_the_one_asked_for() -> None:
    found = judged(made({"own": scaled(2)}), CONFIG, Gate(workload="64:16@4", min_speedup=1.0), None)
    assert set(found["workloads"]) == {*WORKLOADS, "64:16@4"}
    assert found["workloads"]["64:16@4"]["written"] == "64:16@4"


def test_a_workload_of_the_command_line_stands_in_for_the_recipes() -> None:
    gate = Gate(workload="serving", min_speedup=1.0)
    verdict = judged(made({"own": scaled(2)}), CONFIG, gate, "32:4@1")["verdict"]
    assert (verdict["gate"], verdict["workload"], verdict["min_speedup"]) == ("passed", "32:4@1", 1.0)
    verdict = judged(made({"own": scaled(2)}, tp=2), CONFIG, gate, "32:4@1")["verdict"]
    assert verdict["workload"] == "32:4@1"


def test_a_request_that_does_not_fit_is_not_proven_and_the_others_are_predicted() -> None:
    """64 key and value heads of 128 in 100 layers: 3.3 MB a token, some thousands in 24 GB."""
    config = CONFIG | {"num_hidden_layers": 100, "num_key_value_heads": 64, "num_attention_heads": 64}
    evidence = made({"own": scaled(2)}, gpu="NVIDIA L4")
    found = judged(evidence, config, Gate(workload="9000:8@1", min_speedup=0.1), None)
    assert found["verdict"]["gate"] == "not proven" and set(found["workloads"]) == set(WORKLOADS)
    for said in (found["verdict"]["reason"], found["dense_path"]["workloads"]["9000:8@1"]):
        assert said.startswith("a request of 9008 tokens does not fit")


@pytest.mark.parametrize(
    ("since", "to", "workload", "outcome"),
    [
        (1, 64, "128:2@1", "passed"),  # its prefill has M = 128, twice the largest that was measured
        (1, 64, "129:2@1", "not proven"),  # padded to 136
        (4, 64, "64:2@2", "passed"),  # its decode has M = 2
        (4, 64, "64:2@1", "not proven"),
    ],
)
def test_the_m_of_a_workload_must_have_been_measured(since: int, to: int, workload: str, outcome: str) -> None:
    verdict = asked(made({"own": scaled(2, to, since)}), 0.5, workload)
    assert verdict["gate"] == outcome
    if outcome == "not proven":
        assert f"{since} to {to} was measured" in verdict["reason"] and verdict["next"].startswith(
            "profile again without --m"
        )
        assert ("136" in verdict["reason"]) == (workload == "129:2@1")


def test_a_cpu_proves_nothing() -> None:
    found = on_cpu(Gate(workload="serving", min_speedup=0.9), ["vllm", "sglang"], None)
    assert found["gate"] == "not proven" and "vllm or sglang" in found["reason"]
    assert "0.9x in workload 'serving'" in found["reason"]
    assert (found["workload"], found["min_speedup"]) == ("serving", 0.9)
    found = on_cpu(Gate(workload="serving", min_speedup=0.9), [], "interactive")
    assert "a serving engine" in found["reason"] and "0.9x in workload 'interactive'" in found["reason"]
    assert found["workload"] == "interactive" and "asks for no figure" in on_cpu(Gate(), [], None)["reason"]


# the threshold


def test_it_passes_from_the_threshold_on() -> None:
    evidence = made({"own": scaled(2)})
    reached = speedup(evidence)
    assert reached > 1.1
    verdict = asked(evidence, reached)
    assert verdict["gate"] == "passed" and verdict["min_speedup"] == reached and "next" not in verdict
    assert (
        f"{reached:.2f}x in 64:16@4 on own, linears 2.00x; the gate asks for {reached}x; forecasts are not surer than that"
        == verdict["reason"]
    )
    assert asked(evidence, round(reached + 1e-4, 4))["gate"] == "failed"


def test_a_slower_one_fails_without_a_cure() -> None:
    evidence = made({"own": scaled(0.1)})
    verdict = asked(evidence)
    assert (verdict["gate"], verdict["min_speedup"], verdict["workload"]) == ("failed", 1.0, "64:16@4")
    assert verdict["reason"].endswith("linears 0.10x, where the gate asks for 1.0x") and "cure" not in verdict
    assert "no layout of these codes was measured to be faster" in verdict["next"]
    assert "`quantpub advise`" in verdict["next"] and "64:16@4" in verdict["next"]


def test_it_is_the_end_to_end_figure_that_counts() -> None:
    """Linears of half the time in a step that is mostly host and head."""
    evidence = made({"own": scaled(2)})
    assert asked(evidence, 1.9)["gate"] == "failed" and "linears 2.00x" in asked(evidence, 1.9)["reason"]


def test_how_sure_a_forecast_is_stands_beside_what_is_close() -> None:
    evidence = made({"own": scaled(2)})
    reached, unsure = speedup(evidence), "forecasts are not surer than that"
    for least, close in (
        (reached / 1.099, True),
        (reached / 1.12, False),
        (reached * 1.1, True),
        (reached * 1.2, False),
    ):
        assert (unsure in asked(evidence, least)["reason"]) == close


@pytest.mark.parametrize(
    ("value", "least", "text"),
    [(0.8996, 0.9, "0.8996"), (0.896, 0.9, "0.896"), (0.94, 0.9, "0.94"), (0.9, 0.9, "0.90"), (1.0004, 1.0, "1.0004")],
)
def test_a_figure_is_told_from_the_gates(value: float, least: float, text: str) -> None:
    assert shown(value, least) == text


@pytest.mark.parametrize(
    ("measured", "met", "missing"),
    [
        ([2, 8], [1, 8], None),
        ([3, 8], [1, 8], "M of 1 to 8 are met; 3 to 8 was measured"),
        ([1, 4], [1, 8], None),
        ([1, 4], [1, 9], "M of 1 to 9 are met; 1 to 4 was measured"),
        ([1, 4, 16], [1, 2, 8], None),
        ([1, 4, 17], [1, 8, 16], "M between 4 and 17 are met, and none of them was measured"),
        ([1, 4, 17], [1, 4, 17], None),  # nothing between is met
    ],
)
def test_every_m_that_is_met_has_a_measured_one_near(measured: list[int], met: list[int], missing: str | None) -> None:
    found = {"by_m": [[m, 1, m, 1.0] for m in met]}
    assert hole(dict.fromkeys(measured, 1.0), found) == missing


def test_kernels_that_only_the_tables_name_are_said_to_be_so() -> None:
    evidence = made({"own": scaled(2)})
    assert kernels_of(evidence) == "own"
    evidence["engine"]["choices"][-1]["source"] = "table of 0.25.1"
    evidence["engine"]["runs"]["mlp.down_proj"] = "another"
    assert kernels_of(evidence) == "another and own (by the kernel tables: vllm was not asked)"


def test_a_profile_for_another_engine_is_not_proven() -> None:
    evidence, gate = made({"own": scaled(2)}), Gate(workload="serving", min_speedup=0.5)
    for engines, said in (([], "made for no engine"), (["sglang", "mlx"], "made for sglang and mlx")):
        verdict = judged(evidence, CONFIG, gate, None, engines)["verdict"]
        assert verdict["gate"] == "not proven" and said in verdict["reason"] and "vllm runs" in verdict["reason"]
    assert judged(evidence, CONFIG, gate, None, ["sglang", "vllm"])["verdict"]["gate"] == "passed"


# cures


def test_a_repack_that_passes_is_the_cure() -> None:
    evidence = made(
        {"own": scaled(0.1), "better": scaled(2)}, entries=[entry("better", **repack())], repacked=["better"]
    )
    verdict, reached = asked(evidence), speedup(evidence, kernel="better")
    assert verdict["gate"] == "failed"
    assert verdict["cure"] == {"kernel": "better", "speedup": reached, **repack()["repacked"]}
    assert verdict["reason"].endswith(f"; the same codes repacked as other-quantized reach {reached:.2f}x on better")
    assert verdict["next"] == (
        f"repack it as other-quantized (other) without loss: on better it passes, with {reached:.2f}x"
    )


def test_a_cure_passes_from_the_threshold_on_and_says_when_it_does_not() -> None:
    evidence = made(
        {"own": scaled(0.1), "better": scaled(2)},
        entries=[entry("better", **repack(lossless=False, note="zeros are rounded"))],
        repacked=["better"],
    )
    reached = speedup(evidence, kernel="better")
    exactly, beyond = asked(evidence, reached), asked(evidence, reached + 1e-4)
    assert "(zeros are rounded): on better it passes" in exactly["next"]
    assert f"on better it comes nearest, though the gate asks for {reached + 1e-4}x" in beyond["next"]
    assert "without loss" not in exactly["next"] and beyond["cure"]["speedup"] == reached


def test_of_several_the_fastest_in_the_workload_is_named() -> None:
    """`small` is the fastest to M = 4 and slow beyond."""
    small = scaled(3, 4) | scaled(0.05, since=16)
    kernels = {"own": scaled(0.1), "first": scaled(1.5), "best": scaled(2), "last": scaled(1.2), "small": small}
    entries = [entry(name, **repack()) for name in kernels if name != "own"]
    evidence = made(kernels, entries=entries, repacked=["first", "best", "last", "small"])
    assert asked(evidence, 1.0, "64:2@64")["cure"]["kernel"] == "best"
    assert asked(evidence, 1.0, "4:64@1")["cure"]["kernel"] == "small"


@pytest.mark.parametrize(
    ("facts", "repacked", "to"),
    [
        (repack(), [], M[-1]),  # the engine would not run it
        ({}, ["better"], M[-1]),  # it reads the artifact's own layout: nothing is repacked for it
    ],
)
def test_what_the_engine_would_not_run_is_no_cure(facts: dict[str, Any], repacked: list[str], to: int) -> None:
    kernels = {"own": scaled(0.1), "better": scaled(2, to)}
    verdict = asked(made(kernels, entries=[entry("better", **facts)], repacked=repacked))
    assert verdict["gate"] == "failed" and "cure" not in verdict and "repack" not in verdict["reason"]


def test_what_was_not_timed_for_every_gemm_is_no_cure() -> None:
    evidence = made(
        {"own": scaled(0.1), "better": scaled(2)}, entries=[entry("better", **repack())], repacked=["better"]
    )
    del evidence["rows"][-len(M) :]  # `better` on the last GEMM
    assert evidence["rows"][-1]["kernel"] == "own" and "cure" not in asked(evidence)


@pytest.mark.parametrize("factor", [0.05, 0.1])
def test_what_is_no_faster_than_the_engines_choice_is_no_cure(factor: float) -> None:
    evidence = made(
        {"own": scaled(0.1), "better": scaled(factor)}, entries=[entry("better", **repack())], repacked=["better"]
    )
    verdict = asked(evidence)
    assert "cure" not in verdict and "no layout of these codes was measured to be faster" in verdict["next"]


def test_an_old_profile_without_cures_is_judged() -> None:
    evidence = made({"own": scaled(0.1)})
    del evidence["engine"]["repacked"]
    assert asked(evidence)["gate"] == "failed"


# kernels that the engine passes over


def passed_over(rejected: Mapping[str, str] | None = None, **facts: Any) -> list[dict[str, Any]]:
    evidence = made({"own": scaled(1.2), "quick": scaled(2)}, entries=[entry("quick", **facts)])
    evidence["engine"]["choices"][0]["rejected"] = dict(rejected or {})
    found: list[dict[str, Any]] = judged(evidence, CONFIG, Gate(workload="64:16@4"), None)["faster"]
    return found


def test_a_faster_kernel_of_the_same_layout_is_told_with_the_engines_reason() -> None:
    found = {one["workload"]: one for one in passed_over({"Quick": "it is not supported"})}
    assert set(found) == {*WORKLOADS, "64:16@4"}
    one = found["64:16@4"]
    assert (one["kernel"], one["why"]) == ("quick", "it is not supported") and "disable" not in one
    assert one["speedup"] == speedup(made({"own": scaled(1.2), "quick": scaled(2)}), kernel="quick")


def test_how_the_engine_would_choose_it_is_told() -> None:
    one = passed_over({"Another": "it is not built"})[0]
    assert "asks Own first" in one["why"] and one["disable"] == "VLLM_DISABLED_KERNELS=OwnKernel"


@pytest.mark.parametrize(
    "facts",
    [repack(), {"unavailable": "not here"}, {"package": "torch"}],
    ids=["repacked", "unavailable", "not vLLM's"],
)
def test_what_the_engine_cannot_run_on_these_bytes_is_not_told(facts: dict[str, Any]) -> None:
    assert passed_over(**facts) == []


def test_the_choice_itself_and_what_is_slower_are_not_told() -> None:
    evidence = made({"own": scaled(2), "slow": scaled(1.2), "same": scaled(2)})
    assert judged(evidence, CONFIG, Gate(), None)["faster"] == []


def test_a_kernel_takes_over_only_where_it_was_timed_at_as_many_m() -> None:
    """`quick` has no time on o_proj; on down_proj the engine named it itself."""
    evidence = made({"own": scaled(1.2), "quick": scaled(2)})
    evidence["rows"] = [
        row for row in evidence["rows"] if (row["gemm"], row["kernel"]) != ("self_attn.o_proj", "quick")
    ]
    runs = evidence["engine"]["runs"]
    runs["mlp.down_proj"] = "quick"
    it = Forecast(evidence, CONFIG)
    assert in_place(evidence, it, "quick", runs) == dict.fromkeys(SHAPES, "quick") | {"self_attn.o_proj": "own"}
    assert in_place(evidence, it, "quick", dict.fromkeys(SHAPES, "quick")) is None
    evidence["rows"] = [row for row in evidence["rows"] if row["kernel"] != "quick" or row["m"] > 1]
    assert in_place(evidence, Forecast(evidence, CONFIG), "quick", dict.fromkeys(SHAPES, "own")) is None


def test_the_reason_is_that_of_a_gemm_that_it_would_take_over() -> None:
    evidence = made({"own": scaled(1.2), "quick": scaled(2)})
    evidence["engine"]["runs"]["self_attn.qkv_proj"] = "quick"
    for choice in evidence["engine"]["choices"]:
        choice["kernel"] = "Row of " + choice["gemm"]
    found = judged(evidence, CONFIG, Gate(), None)["faster"]
    assert found and all("asks Row of self_attn.o_proj first" in one["why"] for one in found)
    evidence["kernels"][1]["row"] = "Quick Rows"
    evidence["engine"]["choices"][1]["rejected"] = {"quick": "not its row", "quick rows": "not built"}
    assert {one["why"] for one in judged(evidence, CONFIG, Gate(), None)["faster"]} == {"not built"}


def test_what_is_faster_by_noise_alone_is_not_told() -> None:
    assert judged(made({"own": scaled(2), "same": scaled(2.02)}), CONFIG, Gate(), None)["faster"] == []


# the command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """`quantpub profile` measures nothing: it finds what is given, path by path. Returns what it was asked."""

    def given(**outcomes: dict[str, Any]) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def profile(artifact: Path, **settings: Any) -> dict[str, Any]:
            calls.append(settings)
            return outcomes[artifact.name]

        monkeypatch.setattr("quantpub.artifact.Artifact.open", lambda path: path)
        monkeypatch.setattr("quantpub.profile.profile", profile)
        return calls

    return given


def finished(factor: float, workload: str = "64:16@4", gpu: str = "NVIDIA H200") -> dict[str, Any]:
    evidence = made({"own": scaled(factor)}, gpu=gpu)
    return evidence | judged(evidence, CONFIG, Gate(workload=workload, min_speedup=1.0), None)


def test_a_failed_gate_is_exit_code_3_with_the_reason_and_what_helps(command: Any, tmp_path: Path) -> None:
    calls = command(slow=finished(0.1))
    path = tmp_path / "slow"
    done = run_cli("profile", path, "--m", "1,4", "--kernels", "own,bf16", "--budget-seconds", "3", "-w", "serving",
                   "--tensor-parallel", "2", "--device", "cpu")  # fmt: skip
    assert done.code == GateError.exit_code == 3 and "gate: failed" in done.out
    assert str(path) in done.err and "where the gate asks for 1.0x" in done.err and "quantpub advise" in done.err
    (call,) = calls
    assert call.pop("progress") is not None
    assert call == {
        "m": [1, 4], "kernels": ["own", "bf16"], "budget_seconds": 3.0, "workload": "serving", "tp": 2, "device": "cpu"
    }  # fmt: skip
    done = run_cli("profile", path, "--json")
    assert done.code == 3 and done.json()["ok"] is False and done.json()["verdict"]["gate"] == "failed"
    assert run_cli("profile", path, "--format", "quiet").out.strip() == "failed"


def test_passed_and_not_proven_are_exit_code_0(command: Any, tmp_path: Path) -> None:
    command(fast=finished(2), none=finished(2, gpu="NVIDIA T4"))
    for name, gate in (("fast", "passed"), ("none", "not proven")):
        done = run_cli("profile", tmp_path / name, "--json")
        assert (done.code, done.json()["ok"], done.json()["verdict"]["gate"]) == (0, True, gate), done.err


def test_of_several_one_that_failed_is_named_after_all_were_shown(command: Any, tmp_path: Path) -> None:
    command(fast=finished(2), slow=finished(0.1))
    done = run_cli("profile", tmp_path / "fast", tmp_path / "slow", "--json")
    found = done.json()
    assert done.code == 3 and found["ok"] is False and str(tmp_path / "slow") in done.err
    assert {name: one["gate"] for name, one in found["profiles"].items()} == {"fast": "passed", "slow": "failed"}
    done = run_cli("profile", tmp_path / "fast", tmp_path / "slow", "--format", "quiet")
    assert done.out.split() == ["passed", "failed"]


def test_a_failed_profile_from_elsewhere_fails_too(command: Any, tmp_path: Path) -> None:
    command(fast=finished(2))
    carried = tmp_path / "other.json"
    carried.write_text(json.dumps(finished(0.1)))
    done = run_cli("profile", tmp_path / "fast", carried, "--json")
    assert done.code == 3 and str(carried) in done.err and len(done.json()["profiles"]) == 2


def test_one_artifact_named_twice_is_one(command: Any, tmp_path: Path) -> None:
    calls = command(fast=finished(2))
    done = run_cli("profile", tmp_path / "fast", tmp_path / "fast", "--json")
    assert done.code == 0 and len(calls) == 1 and done.json()["device_class"] == "cuda"
    assert calls[0]["m"] is None and calls[0]["kernels"] is None and calls[0]["tp"] == 1


@pytest.fixture
def another(tmp_path: Path) -> Path:
    """A Python that lacks nothing, writes down its arguments and where it looks for packages, and fails a gate."""
    path = tmp_path / "python"
    path.write_text(
        '#!/bin/sh\n[ "$3" = lacks: ] && echo lacks: && exit 0\nshift 2\n'
        'printf "%s\\n" "$PYTHONPATH" "$@" > "$0.seen"\nexit 3\n'
    )
    path.chmod(0o755)
    return path


def test_another_python_is_given_the_rest_of_the_command_line(another: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/there")
    done = run_cli("profile", "an artifact", "--engine-python", another, "--m", "1,4", "--json")
    path, *arguments = another.with_name("python.seen").read_text().splitlines()
    assert done.code == 3
    home = Path(sys.modules["quantpub"].__file__ or "").parent
    assert arguments == ["profile", "an artifact", "--m", "1,4", "--json", str(home)]
    assert path == "/there"


def test_a_python_that_says_nothing_in_time_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantpub.engines.elsewhere.PATIENCE", 0.05)
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 5\n")
    slow.chmod(0o755)
    done = run_cli("profile", "a", "--engine-python", slow)
    assert done.code == 2 and "it did not answer" in done.err
