"""Repacking from the Hub: the real client against the loopback Hub, a pinned commit, and bytes that are not those it states."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import run_cli, tree, use_hub
from repacks import GOLDEN

from quantpub.hub import LoopbackHub

REPO, NAME = "acme/theirs", "llmcompressor-w4a16-dense"
SHARD = "model.safetensors"


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """What the Hub serves, by reference."""
    return Path(shutil.copytree(GOLDEN / NAME, tmp_path / "theirs"))


@pytest.fixture
def hub(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        use_hub(running, tmp_path / "cache", monkeypatch)
        running.add_repo(REPO, theirs, tag="v1")
        yield running


def weights(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in tree(folder).items() if not name.startswith(".quantpub")}


def test_it_is_what_the_folder_gives_and_remembers_the_commit(hub: LoopbackHub, tmp_path: Path) -> None:
    pinned = hub.head(REPO)
    hub.commit(REPO, {"config.json": b"{}"}, title="Somebody breaks main")
    there = run_cli("repack", REPO, "--revision", "v1", "--layout", "gptq", "-o", tmp_path / "there")
    here = run_cli("repack", GOLDEN / NAME, "--layout", "gptq", "-o", tmp_path / "here")
    assert (there.code, here.code) == (0, 0), there.err + here.err
    assert weights(tmp_path / "there") == weights(tmp_path / "here")
    run = json.loads((tmp_path / "there" / ".quantpub" / "run.json").read_text())
    assert pinned in json.dumps(run) and json.dumps(run).count(REPO)
    again = run_cli("repack", REPO, "--revision", "v1", "--layout", "gptq", "-o", tmp_path / "there", "--json")
    assert again.code == 0 and again.json()["changed"] is False


def test_bytes_that_are_not_those_it_states_are_not_written_anew(
    hub: LoopbackHub, theirs: Path, tmp_path: Path
) -> None:
    """The client looks at sizes alone."""
    with (theirs / SHARD).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    ran = run_cli("repack", REPO, "--layout", "gptq", "-o", tmp_path / "out")
    assert ran.code == 3 and ran.err.count("\n") == 1, ran.err
    assert f"{SHARD}: the shard is damaged: it has not the sha256 that the Hub states" in ran.err
    assert not (tmp_path / "out").exists()
