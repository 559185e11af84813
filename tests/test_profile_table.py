"""Profiles as people read them: the tables of a CPU's and of a GPU's evidence, comparisons, and what is said beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_verdict import BASE, CONFIG, asked, entry, finished, made, repack, scaled

from quantpub.compare import comparison, labels, machine, read, shown_kernel
from quantpub.compare import tables as compared
from quantpub.errors import InputError
from quantpub.output import Output
from quantpub.profile_table import gemm_table, percent, tables, times, total_table, usable, workload_table
from quantpub.recipe import Gate
from quantpub.show_speed import show_comparison, show_profile, unavailable
from quantpub.verdict import judged

LEAVES = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
SMALL = {1: 400.0, 64: 400.0}


def on_cpu() -> dict[str, Any]:
    """Two kernels at two M; the second has no time for one GEMM at M = 64."""
    evidence = made({"one": {1: 200.0, 64: 800.0}, "two": {1: 100.0, 64: 300.0}}, base=SMALL)
    evidence["rows"] = [
        row for row in evidence["rows"] if (row["gemm"], row["kernel"], row["m"]) != ("mlp.down_proj", "two", 64)
    ]
    evidence["totals"] = [
        {"kernel": "one", "m": 1, "speedup": 2.0}, {"kernel": "one", "m": 64, "speedup": 0.5},
        {"kernel": "two", "m": 1, "speedup": 4.0},
    ]  # fmt: skip
    evidence["kernels"].append(entry("three", unavailable="it runs on cuda"))
    device = {"cpu": "a CPU", "gpu": None}
    made_by = {"settings": {"m": [1, 64]}, "device": device}
    more = {"device_class": "cpu", "made_by": made_by, "verdict": {"gate": "not proven", "reason": "a CPU"}}
    return {key: value for key, value in evidence.items() if key not in ("engine", "around")} | more


def on_gpu(workload: str = "64:16@4", **facts: Any) -> dict[str, Any]:
    evidence = made({"own": scaled(2), "other": scaled(0.5)}, **facts)
    return evidence | judged(evidence, CONFIG, Gate(workload=workload, min_speedup=1.0), None)


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setenv("COLUMNS", "200")

    def text(evidence: dict[str, Any], show: Callable[..., None] = show_profile) -> str:
        show(Output(), evidence)
        return capsys.readouterr().out

    return text


# tables


def test_figures_as_they_are_written() -> None:
    assert (times(None), times(1.234), times(0.5)) == ("–", "1.23×", "0.50×")
    assert (percent(None), percent(0.126), percent(0.0)) == ("–", "13 %", "0 %")


def test_of_a_cpu_every_kernel_with_every_gemm() -> None:
    ((title, columns, rows),) = tables(on_cpu())
    assert title == "speedup over bf16" and columns == ["kernel", "M", *LEAVES, "all"]
    assert rows == [
        ["one", "1", "2.00×", "2.00×", "2.00×", "2.00×", "2.00×"],
        ["one", "64", "0.50×", "0.50×", "0.50×", "0.50×", "0.50×"],
        ["two", "1", "4.00×", "4.00×", "4.00×", "4.00×", "4.00×"],
        ["two", "64", "1.33×", "1.33×", "1.33×", "–", "–"],
    ]


def test_columns_are_whole_names_where_their_ends_are_alike() -> None:
    evidence = on_cpu()
    for gemm, name in zip(evidence["gemms"], ("a.x", "b.x", "c", "d"), strict=True):
        for row in evidence["rows"]:
            row["gemm"] = name if row["gemm"] == gemm["name"] else row["gemm"]
        gemm["name"] = name
    _, columns, rows = gemm_table(evidence, ["two"])
    assert columns == ["kernel", "M", "a.x", "b.x", "c", "d", "all"] and rows[0][2:4] == ["4.00×", "4.00×"]


def test_of_a_gpu_the_totals_of_all_and_the_gemms_of_the_engines_choice() -> None:
    evidence = on_gpu()
    total, gemms, workloads = tables(evidence)
    assert total[0] == "all GEMMs, speedup over bf16 (* the engine's choice)" and total[1] == ["M", "own*", "other"]
    assert total[2] == [[str(m), "2.00×", "0.50×"] for m in BASE]
    assert gemms[1] == ["kernel", "M", *LEAVES, "all"] and gemms[2] == [["own", str(m), *["2.00×"] * 5] for m in BASE]
    assert workloads[0] == "predicted for workloads"


def test_where_the_engines_choice_is_not_known_nothing_is_marked() -> None:
    evidence = on_gpu()
    engines: list[Any] = [None, {"runs": {}}]
    for engine in engines:
        total, gemms, _ = tables(evidence | {"engine": engine})
        assert total[0] == "all GEMMs, speedup over bf16" and total[1] == ["M", "own", "other"]
        assert {row[0] for row in gemms[2]} == {"own"}  # the first that was usable


def test_a_profile_that_was_not_judged_has_no_workloads() -> None:
    evidence = made({"own": scaled(2)}, gpu="NVIDIA T4")
    assert len(tables(evidence)) == 2 and len(tables(evidence | {"workloads": {}})) == 2


def test_several_kernels_that_the_engine_runs_are_all_marked_and_listed() -> None:
    evidence = on_gpu()
    evidence["engine"]["runs"]["mlp.down_proj"] = "other"
    total, gemms, _ = tables(evidence)
    assert total[1] == ["M", "own*", "other*"] and {row[0] for row in gemms[2]} == {"own", "other"}


def test_what_is_unavailable_has_no_column() -> None:
    evidence = on_gpu(entries=[entry("other", unavailable="no such GPU")])
    assert usable(evidence) == ["own"] and total_table(evidence)[1] == ["M", "own*"]


def test_a_workload_by_hand() -> None:
    one = {"linear_speedup": 1.5, "speedup": 1.25, "shares": {"attention": 0.111}}
    found = {"serving": one | {"baseline_tokens_per_s": 12345.6, "tokens_per_s": 15432.1}, "a": one | {
        "shares": {}, "baseline_tokens_per_s": 10.4, "tokens_per_s": 10.6}}  # fmt: skip
    _, columns, rows = workload_table({"workloads": found})
    assert columns == ["workload", "linears", "end to end", "attention", "bf16 tokens/s", "tokens/s"]
    assert rows == [
        ["serving", "1.50×", "1.25×", "11 %", "12,346", "15,432"],
        ["a", "1.50×", "1.25×", "–", "10", "11"],
    ]


# the whole


def test_a_profile_shows_tables_what_is_missing_and_the_gate(shown: Callable[..., str]) -> None:
    evidence = on_gpu()
    evidence["kernels"] += [entry(name, unavailable="it runs on Blackwell") for name in ("fp4", "fp4-linear")]
    evidence["not_measured"] = [{"gemm": "down_proj", "kernel": "other", "m": [1, 64], "reason": "no room"}]
    text = shown(evidence)
    assert "own*" in text and "64:16@4" in text and "decode-heavy" in text
    assert "not measured     fp4, fp4-linear: it runs on Blackwell\n" in text
    assert "not measured     other on down_proj, M = 1, 64: no room\n" in text
    assert f"gate: passed: {evidence['verdict']['reason']}" in text


def test_a_failed_gate_shows_what_helps(shown: Callable[..., str]) -> None:
    evidence = made(
        {"own": scaled(0.1), "better": scaled(2)}, entries=[entry("better", **repack())], repacked=["better"]
    )
    verdict = asked(evidence)
    text = shown(evidence | {"verdict": verdict})
    assert f"gate: failed: {verdict['reason']}\n  {verdict['next']}\n" in text and "repack it as" in text
    del verdict["next"]
    assert text.count("repack it as") == 1 and "repack it as" not in shown(evidence | {"verdict": verdict})


def test_one_line_for_each_reason() -> None:
    kernels = [entry("a", unavailable="x"), entry("b"), entry("c", unavailable="y"), entry("d", unavailable="x")]
    assert unavailable(kernels) == ["a, d: x", "c: y"] and unavailable([entry("b")]) == []


def test_what_the_engine_runs_and_why_is_said_once_for_gemms_alike(shown: Callable[..., str]) -> None:
    evidence = on_gpu()
    first, last = evidence["engine"]["choices"][0], evidence["engine"]["choices"][-1]
    first["rejected"] = {"Fast": "no such GPU", "Faster": "not built"}
    last |= {"kernel": None, "source": "table", "error": "nobody could be asked"}
    text = shown(evidence)
    assert "the engine runs  Own (asked), not Fast: no such GPU; Faster: not built; for self_attn.qkv_proj\n" in text
    assert "the engine runs  Own (asked); for self_attn.o_proj, mlp.gate_up_proj\n" in text
    assert "the engine runs  no kernel (table); nobody could be asked; for mlp.down_proj\n" in text


def test_what_was_seen_to_run_and_what_was_not(shown: Callable[..., str]) -> None:
    evidence = on_gpu()
    said = {"gemm": "g", "m": 1, "seen": []}
    evidence["symbols"] = [
        {"kernel": "own", "unconfirmed": None} | said, {"kernel": "own", "unconfirmed": None} | said,
        {"kernel": "odd", "unconfirmed": "odd should run a kernel like x"} | said,
    ]  # fmt: skip
    text = shown(evidence)
    assert "seen on the GPU  own\n" in text and text.count("not confirmed    odd should run") == 1


@pytest.mark.parametrize(
    ("end", "said"), [(6.1, "faster than bf16 up to M ≈ 6.1\n"), (0.0, "faster than bf16 nowhere\n")]
)
def test_how_far_it_is_faster(end: float, said: str, shown: Callable[..., str]) -> None:
    assert said in shown(on_gpu() | {"crossover": {"all": end}})


def test_the_part_of_the_roofline_and_the_dense_copy(shown: Callable[..., str]) -> None:
    evidence = on_gpu()
    parts = [(1, 0.25), (1, 0.506), (4, 0.9), (64, 0.8), (64, 0.8)]
    evidence["roofline"] = [{"m": m, "part": part} for m, part in parts]
    evidence["dense_path"] = {"copy_bytes": 13_891_534_848, "workloads": {"serving": 1.0, "interactive": 1.39}}
    text = shown(evidence)
    assert "of the roofline  25–51 % at M = 1, 80 % at M = 64\n" in text
    assert "with a bf16 copy for large batches, 13.9 GB more: serving 1.00×, interactive 1.39×\n" in text


def test_faster_kernels_that_the_engine_passes_over(shown: Callable[..., str]) -> None:
    one = {"kernel": "quick", "speedup": 1.234, "workload": "serving", "why": "not built"}
    two = one | {"workload": "interactive", "disable": "VLLM_DISABLED_KERNELS=Own"}
    text = shown(on_gpu() | {"faster": [one, two]})
    assert "not chosen       quick, 1.23× in serving: not built\n" in text
    assert "1.23× in interactive: not built; VLLM_DISABLED_KERNELS=Own would make it the choice\n" in text


def test_a_cpus_profile_says_nothing_of_engines(shown: Callable[..., str]) -> None:
    text = shown(on_cpu())
    assert "the engine" not in text and "roofline" not in text and "gate: not proven: a CPU" in text
    assert "not measured     three: it runs on cuda" in text


# side by side


def test_two_gpus_stand_side_by_side(shown: Callable[..., str]) -> None:
    one, two = on_gpu(), on_gpu(gpu="NVIDIA H100 80GB HBM3")
    two["totals"] = [total for total in two["totals"] if total["m"] != 1]
    facts = comparison({"a": one, "b": two})
    assert [each["machine"] for each in facts.values()] == ["NVIDIA H200", "NVIDIA H100 80GB HBM3"]
    totals, workloads, gates = compared(facts)
    assert totals[0] == "all GEMMs, speedup over each machine's own bf16"
    assert totals[1] == ["M", "a (own, NVIDIA H200)", "b (own, NVIDIA H100 80GB HBM3)"]
    assert totals[2][:2] == [["1", "2.00×", "–"], ["4", "2.00×", "2.00×"]]
    assert [row[0] for row in totals[2]] == [str(m) for m in BASE]
    row = next(row for row in workloads[2] if row[0] == "serving")
    for said, evidence in zip(row[1:], (one, two), strict=True):
        found = evidence["workloads"]["serving"]
        assert said == f"{found['speedup']:.2f}×, {found['tokens_per_s']:,.0f} tokens/s"
    assert gates == ("", ["", "a", "b"], [["gate", "passed", "passed"]])
    text = shown(facts, show_comparison)
    assert "a (own, NVIDIA H200)" in text and "tokens/s" in text and "passed" in text


def test_a_profile_without_workloads_beside_one_with(shown: Callable[..., str]) -> None:
    one, two = on_cpu(), on_gpu("32:4@1")
    facts = comparison({"cpu": one, "gpu": two})
    assert facts["cpu"] == {
        "machine": "a CPU", "kernel": "two", "speedup": {"1": 4.0}, "workloads": {}, "gate": "not proven"
    }  # fmt: skip
    assert set(facts["gpu"]["workloads"]["32:4@1"]) == {"speedup", "linear_speedup", "tokens_per_s"}
    _, workloads, gates = compared(facts)
    assert all(row[1] == "–" for row in workloads[2]) and gates[2] == [["gate", "not proven", "passed"]]
    assert len(compared(comparison({"x": one, "y": one}))) == 2


def test_the_kernel_that_stands_for_an_artifact() -> None:
    evidence = on_cpu()
    assert shown_kernel(evidence) == "two"  # the fastest at the smallest M, whatever the largest says
    assert shown_kernel(evidence | {"engine": {"runs": {"a": "one", "b": "one"}}}) == "one"
    assert shown_kernel(evidence | {"engine": {"runs": {"a": "one", "b": "two"}}}) == "two"
    assert shown_kernel(evidence | {"engine": {"runs": {"a": "not measured"}}}) == "two"
    assert shown_kernel(evidence | {"totals": []}) is None
    others = [{"kernel": name, "m": 1, "speedup": 9.0} for name in ("three", "dequantized")]
    control = [*evidence["kernels"], entry("dequantized")]
    assert shown_kernel(evidence | {"totals": evidence["totals"] + others, "kernels": control}) == "two"
    heads = compared(comparison({"x": evidence | {"totals": []}}))[0]
    assert heads[1] == ["M", "x (no kernel, a CPU)"] and heads[2] == []


def test_a_cpus_profile_of_a_machine_with_a_gpu_is_the_cpus() -> None:
    device = {"cpu": "a CPU", "gpu": {"name": "NVIDIA H200"}}
    evidence = {"made_by": {"device": device}, "device_class": "cpu"}
    assert machine(evidence) == "a CPU" and machine(evidence | {"device_class": "cuda"}) == "NVIDIA H200"


def test_a_profile_is_read_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(finished(2)))
    assert read(path) == json.loads(json.dumps(finished(2)))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"[1]", "it is not a profile"), (b'"text"', "it is not a profile"), (b"{", "it is not JSON"),
        (b"\xff\xfe", "it is not JSON"), (None, "no such file"),
    ],
)  # fmt: skip
def test_what_is_no_profile_is_said(data: bytes | None, said: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / "p.json").write_bytes(data)
    with pytest.raises(InputError) as stopped:
        read(tmp_path / "p.json")
    assert said in stopped.value.what.lower() + stopped.value.what and stopped.value.where == str(tmp_path / "p.json")


@pytest.mark.parametrize("key", ["device_class", "rows", "totals", "kernels", "gemms", "verdict", "made_by"])
def test_a_profile_that_lacks_a_part_is_none(key: str, tmp_path: Path) -> None:
    evidence = finished(2)
    del evidence[key]
    (tmp_path / "p.json").write_text(json.dumps(evidence))
    with pytest.raises(InputError, match="not a profile"):
        read(tmp_path / "p.json")


def test_labels_tell_paths_apart(tmp_path: Path) -> None:
    paths = [tmp_path / host / "m" / ".quantpub" / "profile.json" for host in ("h100", "h200")]
    assert labels(paths) == ["h100/m", "h200/m"] and labels([paths[0]]) == ["m"]
    assert labels([Path("/a/m"), Path("/b/m")]) == ["a/m", "b/m"] and labels([]) == []
