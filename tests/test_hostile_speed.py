"""What a hostile file, option or Python does to `profile` and `advise`: one line, its exit code, nothing timed in vain."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from conftest import OFFLINE, ROOT, run_cli

from quantpub.advising import advise, budget
from quantpub.checkpoint import open_config
from quantpub.compare import read
from quantpub.engines.elsewhere import again
from quantpub.errors import InputError, UnavailableError, UsageError
from quantpub.gpus import GPUS
from quantpub.options import integers
from quantpub.served import LARGEST, MOST, served
from quantpub.workloads import parse

ANSWERS = '[ "$3" = lacks: ] && echo lacks:'  # as a Python does that lacks nothing
EVIDENCE = ROOT / "docs" / "evidence" / "h200-qwen3-8b"
CONFIG = json.loads((EVIDENCE / "config.json").read_text())
MOE = CONFIG | {
    "model_type": "qwen3_moe", "num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 768,
}  # fmt: skip
WHOLE = json.loads((EVIDENCE / "w4a16-rtn.json").read_text())


def edited(*path: str | int, value: Any = ...) -> dict[str, Any]:
    """The committed profile with one entry replaced, or taken out."""
    found = copy.deepcopy(WHOLE)
    place = found
    for key in path[:-1]:
        place = place[key]  # type: ignore[index]
    if value is ...:
        del place[path[-1]]  # type: ignore[arg-type]
    else:
        place[path[-1]] = value  # type: ignore[index]
    return found


DAMAGED = {
    "no device": edited("made_by", "device"),
    "device is null": edited("made_by", "device", value=None),
    "no gate": edited("verdict", "gate"),
    "a gate of another kind": edited("verdict", "gate", value=5),
    "no reason": edited("verdict", "reason"),
    "totals is null": edited("totals", value=None),
    "a total is a number": edited("totals", 0, value=5),
    "a total without kernel": edited("totals", 0, "kernel"),
    "engine is text": edited("engine", value="x"),
    "runs is null": edited("engine", "runs", value=None),
    "a run is a mapping": edited("engine", "runs", value={"a": {}}),
    "workloads is a number": edited("workloads", value=3),
    "an empty workload": edited("workloads", "serving", value={}),
    "tokens are text": edited("workloads", "serving", "tokens_per_s", value="x"),
    "tokens are NaN": edited("workloads", "serving", "tokens_per_s", value=float("nan")),
    "speed below zero": edited("workloads", "serving", "speedup", value=-1.0),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_profile_is_an_input_error_with_its_path(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(DAMAGED[kind]))
    for other in ([], ["--json"]):
        done = run_cli("profile", EVIDENCE / "fp8-dynamic.json", path, *other)
        assert done.code == 3 and str(path) in done.err and done.err.count("\n") == 1 and " | " in done.err, done.err


@pytest.mark.parametrize("text", ["", "[" * 100_000, "\xff", "3", json.dumps(WHOLE)[:5000]], ids=range(5))
def test_what_is_no_profile_is_said(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text, "latin-1")
    with pytest.raises(InputError):
        read(path)


def test_every_committed_profile_is_read() -> None:
    for name in ("fp8-block", "fp8-dynamic", "int4-hqq-tile", "int8-dynamic", "nvfp4a16", "w4a16-rtn"):
        assert read(EVIDENCE / f"{name}.json")["device_class"] == "cuda"


def test_nothing_is_timed_before_all_that_was_named_is_there(artifact: Path, tmp_path: Path) -> None:
    for wrong in (tmp_path / "nowhere", tmp_path / "none.json"):
        done = run_cli("profile", artifact, wrong, "--m", "1", "--budget-seconds", "1")
        assert done.code == 3 and str(wrong) in done.err
    assert not (artifact / ".quantpub" / "profile.json").exists()


def test_one_profile_named_twice_is_still_no_artifact() -> None:
    path = EVIDENCE / "w4a16-rtn.json"
    assert run_cli("profile", path, path).code == 2


@pytest.mark.parametrize("text", ["1024:1023@500000", "1:1@1048576", "1:1@" + "9" * 5000, "1:1023@65536"])
def test_a_workload_that_would_be_simulated_for_minutes_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"too large|digits"):
        parse(text)


@pytest.mark.parametrize("text", ["0", "-1", "1e30GB", "lots", "", "9" * 400 + "GB", "nan", "0." + "1" * 400, "80TB"])
def test_a_memory_that_is_no_size_is_said(text: str) -> None:
    with pytest.raises(UsageError, match="--memory") as caught:
        budget(text, GPUS["H200"])
    assert caught.value.next and len(str(caught.value)) < 200


@pytest.fixture
def python(tmp_path: Path) -> Callable[[str], str]:
    def write(script: str) -> str:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return str(path)

    return write


@pytest.mark.parametrize(
    "script", ["echo some words", r"printf '\301\302'", "echo torch and more", "exit 0", "echo lacks: all"]
)
def test_a_program_that_is_no_python_is_said(python: Callable[[str], str], script: str) -> None:
    with pytest.raises(UsageError, match="does not answer as one"):
        again(python(script), [])


def test_words_before_the_answer_are_no_matter(python: Callable[[str], str]) -> None:
    assert again(python(f'echo "welcome to torch"\n{ANSWERS} && exit 0\nexit 5'), []) == 5


def test_an_empty_name_of_a_python_is_no_default(artifact: Path) -> None:
    done = run_cli("profile", artifact, "--m", "1", "--budget-seconds", "1", "--engine-python", "")
    assert done.code == 2 and "not a Python" in done.err


def test_a_python_that_is_killed_is_unavailable(python: Callable[[str], str]) -> None:
    with pytest.raises(UnavailableError, match="signal 9"):
        again(python(f"{ANSWERS} && exit 0\nkill -9 $$"), [])


def test_another_python_takes_nothing_from_the_working_folder(tmp_path: Path) -> None:
    (tmp_path / "yaml.py").write_text("raise SystemExit(99)")
    script = (
        "import sys; from quantpub.engines.elsewhere import again; sys.exit(again(sys.executable, ['list', 'engines']))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", **OFFLINE}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, check=False)
    assert done.returncode == 0 and b"vllm" in done.stdout


def test_an_interrupt_is_passed_on_and_waited_for(python: Callable[[str], str], tmp_path: Path) -> None:
    child = python(
        f'{ANSWERS} && exit 0\ntrap "echo ended > {tmp_path}/ended; exit 130" INT\n'
        f"touch {tmp_path}/started\nwhile :; do sleep 0.05; done"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), **OFFLINE}
    command = [sys.executable, "-m", "quantpub.cli", "profile", "x", "--engine-python", child]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and (tmp_path / "ended").exists() and said == ""


@pytest.mark.slow
def test_another_python_is_shown_nothing_else_that_lies_beside_our_package(tmp_path: Path) -> None:
    """As when installed: a package that stands beside quantpub is not the other Python's."""
    site = tmp_path / "site-packages"
    shutil.copytree(ROOT / "quantpub", site / "quantpub", ignore=shutil.ignore_patterns("__pycache__"))
    (site / "yaml.py").write_text("raise SystemExit(99)")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from quantpub.engines.elsewhere import HOME, again\n"
        "assert str(HOME).startswith(sys.argv[1])\n"
        "sys.exit(again(sys.executable, ['list', 'engines']))"
    )
    env = {**os.environ, "PYTHONSAFEPATH": "1", **OFFLINE}
    command = [sys.executable, "-c", script, str(site)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, check=False)
    assert done.returncode == 0 and b"vllm" in done.stdout, done.stderr


# options


@pytest.mark.parametrize("text", ["0", "1,x", "", "-1", "1,,2", "1048577", "1e3", "9" * 5000, "0.5", "nan"])
def test_numbers_out_of_range_are_said_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="--m takes whole numbers from 1 to 1048576") as caught:
        integers("--m", text)
    assert caught.value.next == "write it like --m 1,16,256" and len(str(caught.value)) < 250


@pytest.mark.parametrize("text", ["", ",", "marlin,", " "])
def test_a_kernel_without_a_name_is_said(text: str, artifact: Path) -> None:
    done = run_cli("profile", artifact, "--m", "1", "--budget-seconds", "1", "--kernels", text)
    assert done.code == 2 and done.err.count("\n") == 1 and "--kernels" in done.err and "list kernels" in done.err


def test_more_gpus_than_there_are_is_one_line() -> None:
    done = run_cli("profile", "x", "--tensor-parallel", 1 << 40)
    assert done.code == 2 and done.err.count("\n") == 1


def test_a_folder_of_several_layouts_is_said_with_their_names(artifact: Path, tmp_path: Path) -> None:
    parent = tmp_path / "out"
    for layout in ("ct-pack", "awq"):
        shutil.copytree(artifact, parent / layout)
    done = run_cli("profile", parent, "--m", "1", "--budget-seconds", "1")
    assert done.code == 3 and done.err.count("\n") == 1
    assert f"{parent}: it is no artifact" in done.err and f"{parent / 'awq'}, {parent / 'ct-pack'}" in done.err


# a model's config.json


def advised(model: Path) -> Any:
    return run_cli("advise", model, "--gpu", "H200", "--workload", "interactive", "--json")


def test_advice_needs_no_weights() -> None:
    done = advised(EVIDENCE)
    assert done.code == 0 and done.json()["choices"], done.err


def test_advice_of_a_hub_model_asks_for_its_config_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fetched: list[str] = []

    def download(repo: str, name: str, **_: Any) -> str:
        fetched.append(name)
        return str(EVIDENCE / name)

    siblings = [SimpleNamespace(rfilename=name, size=9) for name in ("config.json", "model.safetensors")]
    info = SimpleNamespace(sha="0" * 40, siblings=siblings)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert open_config("owner/name") == CONFIG and fetched == ["config.json"]


@pytest.mark.parametrize("text", ["", "[" * 100_000, "[]", "{"], ids=range(4))
def test_a_config_that_is_none_is_said(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    done = advised(tmp_path)
    assert done.code == 3 and str(tmp_path) in done.err and done.err.count("\n") == 1


def test_experts_by_either_name_are_the_same_model() -> None:
    """transformers 5 saves Qwen3-MoE with Mixtral's name."""
    old = {key: value for key, value in MOE.items() if key != "num_experts"}
    for config in (old | {"num_local_experts": 8}, old | {"num_experts": None, "num_local_experts": 8}):
        assert served(config) == served(MOE)
    mixtral = MOE | {"model_type": "mixtral"}
    assert served(mixtral) == served({**mixtral, "num_local_experts": 8, "num_experts": None})


COUNTS = ("x", float("nan"), 0.5, -1, 0, True, [1], 10**9, 10**400, -(10**5000), {})
BAD = {
    **dict.fromkeys(("head_dim", "num_key_value_heads", "num_hidden_layers", "decoder_sparse_step"), COUNTS),
    **dict.fromkeys(("num_experts", "num_experts_per_tok", "moe_intermediate_size", "sliding_window"), COUNTS),
    **dict.fromkeys(("hidden_size", "vocab_size", "num_attention_heads"), (*COUNTS, None)),
    "mlp_only_layers": (5, [[1]], "x", [-1], [0.5], [True], [None], {"a": 1}, [0, 1, 2, 3]),
    "use_sliding_window": ("x", 1, "false", [], 10**5000),
    "tie_word_embeddings": ("no", 0),
    "model_type": (None, 5, ["qwen3"], "x" * 5000, {}),
}


@pytest.mark.parametrize("key", BAD)
def test_a_config_of_nonsense_is_one_line_with_its_file(key: str) -> None:
    for value in BAD[key]:
        with pytest.raises(InputError) as caught:
            served(MOE | {key: value}, "there/config.json")
        line = str(caught.value)
        assert line.startswith("there/config.json: ") and "\n" not in line and len(line) < 250 and key in line


def test_more_heads_than_numbers_are_said() -> None:
    with pytest.raises(InputError, match="hidden_size 16 is less than num_attention_heads 32"):
        served(MOE | {"hidden_size": 16, "head_dim": None, "num_attention_heads": 32})


def test_what_transformers_writes_as_none_is_its_default() -> None:
    none = dict.fromkeys(("sliding_window", "use_sliding_window", "mlp_only_layers", "decoder_sparse_step"))
    assert served(MOE | none) == served(MOE)
    assert served(MOE | {"num_key_value_heads": None}).kv_heads == MOE["num_attention_heads"]
    assert served(MOE | {"mlp_only_layers": [1, 99]}) == served(MOE | {"mlp_only_layers": [1]})


def test_the_command_names_the_file_of_a_config_of_nonsense(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"head_dim": "x"}))
    done = advised(tmp_path)
    assert done.code == 3 and f"{tmp_path / 'config.json'}: head_dim is 'x'" in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize("edge", ["least", "most"])
def test_a_model_at_its_bounds_is_advised_or_refused(edge: str) -> None:
    """No size that is let through ends in a bug."""
    sizes = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size")
    few = ("num_hidden_layers", "num_experts", "num_experts_per_tok")
    bounds = {"least": (1, 1), "most": (LARGEST, MOST)}[edge]
    config = MOE | dict.fromkeys((*sizes, "moe_intermediate_size"), bounds[0]) | dict.fromkeys(few, bounds[1])
    for one in (config, config | {"model_type": "qwen3"}):
        advice = advise(one, "m", "H200", "128:8@1", None, "vllm")
        assert bool(advice["choices"]) == (edge == "least")
