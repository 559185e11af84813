"""Errors under --json: one object on stdout with what, where and next, whatever went wrong, also before anything is parsed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO_MODEL, run_cli

from quantpub import ending
from quantpub.options import out


def error_of(*command: object) -> dict[str, Any]:
    """The one object's error; stderr says the same in one line."""
    ran = run_cli(*command)
    assert ran.out.count("\n") == 1 and ran.err.count("\n") == 1 and ran.err.startswith("error: ")
    found = ran.json()
    assert found["ok"] is False and found["error"]["exit"] == ran.code
    assert found["error"].keys() == {"code", "exit", "what", "where", "next"} and found["error"]["next"]
    return dict(found["error"])


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("verify", "--json"), "Missing argument"),
        (("verify", "x", "--bogus", "--json"), "No such option"),
        (("verify", "x", "--json", "--bogus"), "No such option"),
        (("verify", "x", "--bogus", "--format", "json"), "No such option"),
        (("verify", "x", "--bogus", "--format=json"), "No such option"),
        (("--json", "verify", "x"), "No such option"),
        (("verfy", "--json"), "No such command"),
        (("verify", "x", "--tp", "three", "--json"), "Invalid value for '--tp'"),
        (("plan", DEMO_MODEL, "--json"), "Missing option"),
        (("quantize", "x", "--num-samples", "0", "--json"), "Invalid value"),
        (("list", "nothing", "--json"), "cannot list"),
        (("verify", "x", "--engine-python", "y", "--json"), "--engine-python goes with --engine"),
    ],
)
def test_a_usage_error_is_one_object(command: tuple[object, ...], words: str) -> None:
    found = error_of(*command)
    assert (found["code"], found["exit"]) == ("usage", 2) and words in found["what"]


def test_where_a_usage_error_is_the_command() -> None:
    found = error_of("verify", "x", "--bogus", "--json")
    assert (found["where"], found["next"]) == ("quantpub verify", "see `quantpub verify --help`")


@pytest.mark.parametrize("tp", [0, 3, 16, -1])
def test_gpus_that_no_engine_shares_a_model_among_are_a_usage_error(tp: int) -> None:
    found = error_of("verify", "nowhere", "--tp", tp, "--json")
    assert (found["exit"], found["where"], found["next"]) == (2, "--tp", "known: 1, 2, 4, 8")


def test_an_engine_that_is_not_there_is_told_before_anything_is_read() -> None:
    assert error_of("verify", "nowhere", "--engine", "tgi", "--json")["what"] == "no engine 'tgi'"
    found = error_of("verify", "nowhere", "--engine", "vllm", "--engine-python", "/nowhere/python", "--json")
    assert (found["exit"], found["where"]) == (2, "--engine-python /nowhere/python")


def test_bad_input_is_one_object(tmp_path: Path) -> None:
    assert error_of("verify", tmp_path / "absent", "--json")["exit"] == 3


@pytest.mark.parametrize(
    ("raised", "code", "exit"), [(ending.Interrupted(), "interrupted", 130), (KeyError("x"), "bug", 1)]
)
def test_an_interruption_and_a_bug_are_one_object(
    raised: BaseException, code: str, exit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise raised

    monkeypatch.setattr("quantpub.cli_verify._opened", stop)
    found = error_of("verify", DEMO_MODEL, "--json")
    assert (found["code"], found["exit"]) == (code, exit) and found["what"]


def test_a_failed_check_is_in_the_results_own_object(artifact: Path) -> None:
    (artifact / "LICENSE.txt").write_text("another")
    ran = run_cli("verify", artifact, "--json")
    found = ran.json()
    assert ran.code == found["error"]["exit"] == 3 and ran.out.count("\n") == 1
    assert found["ok"] is False and found["verdict"] == "failed" and found["checks"]
    assert found["error"]["what"].startswith("files: ") and found["error"]["where"] == str(artifact)
    assert found["error"]["next"] and "error" not in json.loads((artifact / ".quantpub/verify.json").read_text())


def test_a_plan_that_is_refused_is_in_the_plans_own_object(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    ran = run_cli("plan", model, "-r", "w4a16", "--json")
    assert ran.out.count("\n") == 1 and ran.code == ran.json()["error"]["exit"] == 3 and ran.json()["error"]["next"]


def test_a_card_that_differs_is_in_the_results_own_object(artifact: Path) -> None:
    (artifact / "README.md").write_text("mine")
    ran = run_cli("card", artifact, "--check", "--json")
    found = ran.json()
    assert ran.code == found["error"]["exit"] == 3 and found["ok"] is False and found["differences"]
    assert found["error"]["next"] == "run `quantpub card` again"


def test_the_next_command_is_for_people_again() -> None:
    assert run_cli("verify", "nowhere", "--json").out and run_cli("verify", "nowhere").out == ""
    assert out.format == "human"
