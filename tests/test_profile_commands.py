"""`quantpub profile` as a command: several artifacts, another Python, wrong use."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import DEMO_MODEL, make_artifact, run_cli, spawn_cli

from quantpub.compare import comparison, labels, shown_kernel
from quantpub.engines.elsewhere import again, without
from quantpub.errors import UsageError
from quantpub.timing import MINIMUM, Bench

QUICK = ["--m", "1,16", "--budget-seconds", "5"]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("profiled")
    for recipe in ("w4a16-rtn", "fp8-dynamic"):
        make_artifact(DEMO_MODEL, recipe, folder / recipe)
    return [folder / "w4a16-rtn", folder / "fp8-dynamic"]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every round counts, whatever else this machine does."""
    monkeypatch.setattr("quantpub.timing.MAXIMUM", MINIMUM)
    monkeypatch.setattr("quantpub.kernels.work.Bench", lambda stopwatch: Bench(stopwatch, waited=lambda: 0))


@pytest.mark.slow
@pytest.mark.usefixtures("quiet")
def test_two_artifacts_and_a_profile_from_elsewhere_stand_side_by_side(artifacts: list[Path], tmp_path: Path) -> None:
    first = run_cli("profile", str(artifacts[0]), *QUICK, "--json")
    assert first.code == 0, first.err
    carried = tmp_path / "other" / ".quantpub" / "profile.json"
    carried.parent.mkdir(parents=True)
    carried.write_text(first.out)
    done = run_cli("profile", *map(str, artifacts), str(carried), *QUICK, "--json")
    assert done.code == 0, done.err
    found = done.json()["profiles"]
    assert list(found) == ["w4a16-rtn", "fp8-dynamic", "other"]
    assert [one["kernel"] for one in found.values()] == ["torch-int4", "torch-fp8", "torch-int4"]
    assert all(set(one["speedup"]) <= {"1", "16"} and one["gate"] == "not proven" for one in found.values())
    shown = run_cli("profile", str(artifacts[0]), str(carried), *QUICK)
    assert "other (torch-int4" in shown.out and "not proven" in shown.out


def test_one_profile_alone_is_no_artifact(artifacts: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text("{}")
    done = run_cli("profile", str(path))
    assert done.code == 2 and "is a profile already" in done.err
    done = run_cli("profile", str(artifacts[0]), str(path), *QUICK)
    assert done.code == 3 and "not a profile" in done.err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--device", "cuda"], "no CUDA device"),
        (["--workload", "serbing"], "did you mean serving?"),
        (["--kernels", "marlyn"], "marlin"),
        (["--budget-seconds", "0"], "measures nothing"),
    ],
)
def test_wrong_use_is_one_line(artifacts: list[Path], arguments: list[str], word: str) -> None:
    done = run_cli("profile", str(artifacts[0]), *QUICK, *arguments)
    assert done.code == 2 and word in done.err and done.err.strip().count("\n") == 0


def test_a_model_that_cannot_be_shared_is_said(artifacts: list[Path]) -> None:
    done = run_cli("profile", str(artifacts[0]), *QUICK, "--tensor-parallel", "7")
    assert done.code == 3 and "7 GPUs" in done.err


@pytest.mark.slow
def test_another_python_runs_the_same_command(artifacts: list[Path]) -> None:
    done = spawn_cli("profile", str(artifacts[0]), *QUICK, "--engine-python", sys.executable, "--json")
    assert done.code == 0, done.err
    assert done.json()["device_class"] == "cpu"


def test_a_python_that_is_none_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a Python that can be run"):
        again(str(tmp_path / "python"), [])
    lacking = tmp_path / "lacking"
    lacking.write_text("#!/bin/sh\necho lacks: torch typer\n")
    lacking.chmod(0o755)
    with pytest.raises(UsageError, match="lacks torch, typer"):
        again(str(lacking), [])


def test_the_option_is_taken_out_of_the_command_line() -> None:
    assert without(["profile", "a", "--engine-python", "py", "--json"]) == ["profile", "a", "--json"]
    assert without(["profile", "--engine-python=py", "a"]) == ["profile", "a"]


def test_labels_are_short_and_each_once(tmp_path: Path) -> None:
    one, two = tmp_path / "h100" / "m", tmp_path / "h200" / "m"
    assert labels([one, two]) == ["h100/m", "h200/m"]
    assert labels([one / ".quantpub" / "profile.json"]) == ["m"]
    assert labels([one, one]) == ["1: m", "2: m"]


def test_the_engines_kernel_stands_for_the_artifact() -> None:
    totals = [{"kernel": name, "m": 1, "speedup": s} for name, s in (("a", 2.0), ("b", 1.0), ("dequantized", 9.0))]
    kernels = [{"name": name, "unavailable": None} for name in ("a", "b", "dequantized")]
    made = {"device": {"cpu": "c", "gpu": None}}
    evidence = {"totals": totals, "kernels": kernels, "device_class": "cpu", "made_by": made, "verdict": {}}
    assert shown_kernel(evidence) == "a"
    assert shown_kernel(evidence | {"engine": {"runs": {"g": "b"}}}) == "b"
    assert comparison({"x": evidence})["x"]["speedup"] == {"1": 2.0}
