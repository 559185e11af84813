"""The command line as a user meets it: fast to start, one JSON object, help, lists, and a plan that is checked by the run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import DEMO_MODEL, DEMO_TEXT, ROOT, run_cli, spawn_cli

from quantpub import __version__


def test_help_is_fast() -> None:
    """Best of ten: the machine may be busy, the code may not."""
    times = []
    for _ in range(10):
        started = time.perf_counter()
        assert spawn_cli("--help").code == 0
        times.append(time.perf_counter() - started)
    assert min(times) < 0.3


def test_version_and_help_name_every_command() -> None:
    assert run_cli("--version").out.strip() == __version__
    text = run_cli("-h").out
    for command in ("plan", "quantize", "verify", "profile", "eval", "card", "publish", "list", "demo"):
        assert re.search(rf"^  {command} ", text, re.M)
        assert "--json" in run_cli(command, "--help").out


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("recipes", "fp8-dynamic"),
        ("schemes", "FP8_DYNAMIC"),
        ("algorithms", "search"),
        ("layouts", "ct-pack"),
        ("kernels", "bf16"),
        ("engines", "sglang"),
        ("rules", "tensor-parallel"),
        ("failures", "27"),
    ],
)
def test_lists(what: str, name: str) -> None:
    assert re.search(rf"^{name}\s+\S", run_cli("list", what).out, re.M)
    assert name in run_cli("list", what, "--json").json()[what]
    assert name in run_cli("list", what, "--format", "quiet").out.split("\n")


def test_a_recipe_of_the_users_own_folder_comes_first(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    text = (ROOT / "recipes/w4a16-rtn.yaml").read_text()
    (tmp_path / "recipes/w4a16.yaml").write_text(text.replace("plain rounding", "MY OWN rounding"))
    ran = run_cli("list", "recipes", cwd=tmp_path)
    assert "MY OWN" in ran.out and "fp8-dynamic" in ran.out


def test_the_console_script_is_the_same_program() -> None:
    assert spawn_cli("list", "schemes").out == run_cli("list", "schemes").out


def test_every_recipe_is_valid_and_says_what_it_is() -> None:
    from quantpub.recipe import load_recipe
    from quantpub.recipe_files import recipe_files

    assert len(recipe_files()) >= 3
    for name in recipe_files():
        recipe = load_recipe(name)
        recipe.require_bindable()
        assert recipe.layouts([], []) and len(recipe.description) > 20


@pytest.mark.slow
def test_every_command_prints_exactly_one_json_object(tmp_path: Path) -> None:
    out = tmp_path / "out"
    commands = [
        ("plan", DEMO_MODEL, "-r", "fp8-dynamic"),
        ("quantize", DEMO_MODEL, "-r", "fp8-dynamic", "--engine", "vllm", "-o", out),
        ("verify", out, "--source", DEMO_MODEL),
        ("profile", out, "--m", "1,8", "--budget-seconds", "2"),
        ("eval", out, "--baseline", DEMO_MODEL, "--data", DEMO_TEXT, "--windows", "4", "--window", "128"),
        ("card", out, "--repo-id", "acme/tiny"),
        ("card", out, "--check"),
        ("publish", "acme/tiny", out, "--rehearse"),
        ("list", "recipes"),
    ]
    for command in commands:
        ran = run_cli(*command, "--json")
        assert ran.code == 0, (command[0], ran.err)
        assert ran.json()["ok"] is True
        assert ran.out.count("\n") == 1
        assert not re.search(r"/(tmp|home|root)/", "" if command[0] in ("quantize", "card") else ran.out), command[0]


def test_nothing_local_is_in_an_artifact(any_artifact: Path) -> None:
    for path in any_artifact.rglob("*.json*"):
        if path.name != "tokenizer.json":
            assert str(ROOT.parent) not in path.read_text(), path
            assert "/tmp" not in path.read_text(), path


@pytest.mark.slow
def test_the_plans_figures_are_those_of_the_run(tmp_path: Path) -> None:
    plan = run_cli("plan", DEMO_MODEL, "-r", "w4a16", "--json").json()["plans"][0]
    code = (
        "import sys, atexit, quantpub.cli as c;"
        "atexit.register(lambda: sys.stderr.write(next(l for l in open('/proc/self/status') if l.startswith('VmHWM'))));"
        "c.main()"
    )
    command = [sys.executable, "-c", code, "quantize", DEMO_MODEL, "-r", "w4a16", "-o", tmp_path / "out", "--json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=env)
    report, peak = json.loads(done.stdout), int(done.stderr.split()[-2]) * 1024
    assert report["output_bytes"] == plan["output_bytes"] == (tmp_path / "out/model.safetensors").stat().st_size
    assert 0.5 * plan["peak_memory_bytes"] < peak < plan["peak_memory_bytes"]


def test_talk_goes_to_stderr_and_data_to_stdout(tmp_path: Path) -> None:
    ran = run_cli("quantize", DEMO_MODEL, "-r", "w4a16", "-o", tmp_path / "out", "--format", "quiet")
    assert ran.out == f"{tmp_path / 'out'}\n"
    assert ran.err == ""


def test_several_layouts_are_computed_once_and_written_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second layout registered here: the same codes, another name. Each folder is an artifact of its own."""
    import dataclasses

    from quantpub import layouts
    from quantpub.algorithms import search
    from quantpub.checkpoint import open_checkpoint
    from quantpub.layouts import ct_pack
    from quantpub.plan import make_plan
    from quantpub.quantize import quantize
    from quantpub.recipe import load_recipe
    from quantpub.registry import Entry

    calls = 0
    real = search.quantize

    def counting(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(search, "ALGORITHM", dataclasses.replace(search.ALGORITHM, quantize=counting))
    monkeypatch.setattr(ct_pack, "TWIN", dataclasses.replace(ct_pack.LAYOUT, name="twin"), raising=False)
    monkeypatch.setitem(layouts.LAYOUTS, "twin", Entry("quantpub.layouts.ct_pack:TWIN", "a twin"))
    recipe, checkpoint = load_recipe("w4a16"), open_checkpoint(str(DEMO_MODEL))
    reports = quantize([make_plan(checkpoint, recipe, name) for name in ("ct-pack", "twin")], tmp_path / "out")
    assert [report["layout"] for report in reports] == ["ct-pack", "twin"]
    assert calls == 28
    a, b = (tmp_path / "out" / name / "model.safetensors" for name in ("ct-pack", "twin"))
    assert a.read_bytes() == b.read_bytes()


def test_whole_numbers_are_read_or_refused() -> None:
    from quantpub.errors import UsageError
    from quantpub.options import integers

    assert integers("--m", "1,16,256") == [1, 16, 256]
    assert integers("--m", None) is None
    for wrong in ("1,x", "0", "", "-1"):
        with pytest.raises(UsageError, match="--m takes whole numbers"):
            integers("--m", wrong)
