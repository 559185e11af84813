"""Law 5: the same inputs give the same bytes, also after kill -9 at any point and a rerun."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEMO_MODEL, ROOT, make_artifact, run_cli, save_llama, tree

from quantpub.errors import ConflictError, UnavailableError
from quantpub.files import TEMPORARY


def kill(model: Path, recipe: str, work: Path, *mode: str) -> dict[str, dict[str, int]]:
    work.mkdir()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, ROOT / "tests/partners/kill.py", model, recipe, work, *mode],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    value: dict[str, dict[str, int]] = json.loads(done.stdout)
    return value


@pytest.mark.slow
def test_killed_at_every_write_point(tmp_path: Path) -> None:
    found = kill(save_llama(tmp_path / "m", shards=2), "w4a16-rtn", tmp_path / "work", "points")
    assert set(found["killed"]) == {"write", "rename", "renamed", "shard-open", "tensor", "journal", "journaled"}
    assert found["killed"]["journal"] == 2
    assert sum(found["killed"].values()) > 80


@pytest.mark.slow
def test_killed_thirty_times_at_random(tmp_path: Path) -> None:
    found = kill(save_llama(tmp_path / "m", shards=4), "w4a16", tmp_path / "work", "random", "30")
    assert found["killed"]["random"] == 30


@pytest.mark.parametrize("recipe", ["w4a16", "fp8-dynamic"])
def test_two_runs_give_the_same_bytes(tmp_path: Path, recipe: str) -> None:
    model = save_llama(tmp_path / "m")
    assert tree(make_artifact(model, recipe, tmp_path / "a")) == tree(make_artifact(model, recipe, tmp_path / "b"))


def test_finished_shards_are_not_made_again(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "m")
    whole = make_artifact(model, "w4a16", tmp_path / "whole")
    part = Path(shutil.copytree(whole, tmp_path / "part"))
    for name in (
        "config.json",
        "model.safetensors.index.json",
        ".quantpub/SHA256SUMS",
        "model-00003-of-00003.safetensors",
    ):
        (part / name).unlink()
    journal = part / ".quantpub/journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:2]) + lines[2][:20])  # the third line was being written
    (part / f"{TEMPORARY}model-00003-of-00003.safetensors").write_bytes(b"half")
    kept = {
        name: (part / name).stat().st_ino
        for name in ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors")
    }
    make_artifact(model, "w4a16", part)
    assert tree(part) == tree(whole)
    assert {name: (part / name).stat().st_ino for name in kept} == kept


def test_a_corrupted_finished_shard_is_made_again(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "m")
    whole = make_artifact(model, "w4a16", tmp_path / "whole")
    part = Path(shutil.copytree(whole, tmp_path / "part"))
    (part / ".quantpub/SHA256SUMS").unlink()
    shard = part / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    make_artifact(model, "w4a16", part)
    assert tree(part) == tree(whole)


def test_a_second_run_changes_nothing_and_says_so(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_cli("quantize", DEMO_MODEL, "-r", "w4a16", "--engine", "vllm", "-o", out).code == 0
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob("*") if p.is_file()}
    again = run_cli("quantize", DEMO_MODEL, "-r", "w4a16", "--engine", "vllm", "-o", out)
    assert again.code == 0
    assert "nothing to do" in again.out
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob("*") if p.is_file()} == before
    assert (
        run_cli("quantize", DEMO_MODEL, "-r", "w4a16", "--engine", "vllm", "-o", out, "--json").json()["changed"]
        is False
    )


def test_a_directory_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConflictError, match=r"something else \(thesis.tex\)"):
        make_artifact(DEMO_MODEL, "w4a16", tmp_path / "out")
    assert tree(tmp_path / "out") == {"thesis.tex": b"years of work"}


def test_another_artifact_in_the_directory_is_refused(tmp_path: Path) -> None:
    out = make_artifact(DEMO_MODEL, "w4a16", tmp_path / "out")
    before = tree(out)
    with pytest.raises(ConflictError, match="recipe w4a16, layout ct-pack"):
        make_artifact(DEMO_MODEL, "fp8-dynamic", out)
    other = save_llama(tmp_path / "m")
    with pytest.raises(ConflictError, match="another artifact"):
        make_artifact(other, "w4a16", out)
    assert tree(out) == before


def test_retrained_weights_of_the_same_shapes_are_another_source(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "m")
    out = make_artifact(model, "w4a16", tmp_path / "out")
    (out / ".quantpub/SHA256SUMS").unlink()  # interrupted at the very end
    shutil.rmtree(model)
    save_llama(model, seed=1)
    with pytest.raises(ConflictError, match="older state"):
        make_artifact(model, "w4a16", out)


def test_a_full_disk_keeps_finished_shards_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    model = save_llama(tmp_path / "m")
    whole = make_artifact(model, "w4a16", tmp_path / "whole")
    real, calls = os.pwrite, 0

    def filling_up(fd: int, data: bytes, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 25:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", filling_up)
    with pytest.raises(UnavailableError, match="no space left on device"):
        make_artifact(model, "w4a16", tmp_path / "out")
    left = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert left == [".quantpub", "model-00001-of-00003.safetensors"]
    assert not list((tmp_path / "out").rglob(TEMPORARY + "*"))
    monkeypatch.undo()
    make_artifact(model, "w4a16", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(whole)


def test_two_processes_never_write_into_one_folder(tmp_path: Path) -> None:
    import fcntl

    model = save_llama(tmp_path / "m")
    meta = tmp_path / "out" / ".quantpub"
    meta.mkdir(parents=True)
    other = os.open(meta, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)  # as a run that has just begun holds it
    try:
        with pytest.raises(ConflictError, match="another process"):
            make_artifact(model, "w4a16", tmp_path / "out")
        assert meta.is_dir()
    finally:
        os.close(other)
    make_artifact(model, "w4a16", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(make_artifact(model, "w4a16", tmp_path / "again"))
