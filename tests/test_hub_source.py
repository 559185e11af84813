"""MODEL as a Hub id: the real client against the loopback Hub, at a pinned commit, headers before weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import make_artifact, run_cli, save_llama, spawn_cli, tree, use_hub

from quantpub.hub import LoopbackHub

REPO = "acme/tiny-llama"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    model = save_llama(tmp_path / "m")
    (model / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n# Tiny\n")
    with LoopbackHub() as hub:
        hub.add_repo(REPO, model, tag="v1")
        yield hub


def client(hub: LoopbackHub, tmp_path: Path, **more: str) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": hub.token,
        "HF_HOME": str(tmp_path / "hf-home"),
        "HF_HUB_OFFLINE": "0",
        **more,
    }


def fetched(hub: LoopbackHub, suffix: str) -> list[str]:
    return [entry.path for entry in hub.log if entry.method == "GET" and entry.path.endswith(suffix)]


@pytest.mark.slow
def test_quantize_from_the_hub_records_the_commit_and_equals_a_local_run(hub: LoopbackHub, tmp_path: Path) -> None:
    pinned = hub.head(REPO)
    hub.commit(REPO, {"config.json": b"{}"}, title="Somebody breaks main")
    ran = spawn_cli(
        "quantize",
        REPO,
        "--revision",
        "v1",
        "-r",
        "w4a16",
        "--engine",
        "vllm",
        "-o",
        tmp_path / "out",
        env=client(hub, tmp_path),
    )
    assert ran.code == 0, ran.err
    run = json.loads((tmp_path / "out/.quantpub/run.json").read_text())
    assert run["source"] == {
        "kind": "hub",
        "repo": REPO,
        "commit": pinned,
        "gated": False,
        "license": "apache-2.0",
        "language": ["en"],
    }
    local = tree(make_artifact(tmp_path / "m", "w4a16", tmp_path / "local"))
    ours = tree(tmp_path / "out")
    assert {n: b for n, b in ours.items() if not n.startswith(".quantpub")} == {
        n: b for n, b in local.items() if not n.startswith(".quantpub")
    }


@pytest.fixture
def near(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """The same, for the client of this process."""
    use_hub(hub, tmp_path / "hf-home", monkeypatch)
    return hub


def test_plan_reads_headers_only(near: LoopbackHub, tmp_path: Path) -> None:
    ran = run_cli("plan", REPO, "-r", "w4a16", "--json")
    assert ran.code == 0, ran.err
    local = run_cli("plan", tmp_path / "m", "-r", "w4a16", "--json").json()["plans"][0]
    found = ran.json()["plans"][0]
    assert {k: v for k, v in found.items() if k != "model"} == {k: v for k, v in local.items() if k != "model"}
    assert not list((tmp_path / "hf-home").rglob("*.safetensors"))


@pytest.mark.slow
def test_an_interrupted_run_resumes_at_the_same_commit(near: LoopbackHub, tmp_path: Path) -> None:
    env = client(near, tmp_path, QUANTPUB_CRASH_AT="journaled:2")
    killed = spawn_cli("quantize", REPO, "-r", "w4a16", "-o", tmp_path / "out", env=env)
    assert killed.code == -9
    again = run_cli("quantize", REPO, "-r", "w4a16", "-o", tmp_path / "out", "--json")
    assert again.code == 0, again.err
    assert again.json()["shards_resumed"] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((REPO, "--revision", "nowhere"), 3, "no revision 'nowhere'"),
        (("acme/other",), 4, "no such model on the Hub"),
    ],
)
def test_a_wrong_id_or_revision_is_one_line(
    near: LoopbackHub, tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    ran = run_cli("quantize", *arguments, "-r", "w4a16", "-o", tmp_path / "out")
    assert (ran.code, ran.err.count("\n")) == (code, 1), ran.err
    assert words in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_offline_and_unreachable_are_one_line(tmp_path: Path) -> None:
    offline = spawn_cli("quantize", REPO, "-r", "w4a16", "-o", tmp_path / "out", env={"HF_HUB_OFFLINE": "1"})
    assert (offline.code, offline.err.count("\n")) == (6, 1), offline.err
    assert "HF_HUB_OFFLINE is set" in offline.err
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    nobody = spawn_cli("quantize", REPO, "-r", "w4a16", "-o", tmp_path / "out", env=env)
    assert (nobody.code, nobody.err.count("\n")) == (6, 1), nobody.err


@pytest.mark.slow
def test_verify_reads_the_source_at_the_recorded_commit(near: LoopbackHub, tmp_path: Path) -> None:
    assert run_cli("quantize", REPO, "-r", "w4a16", "-o", tmp_path / "out").code == 0
    near.commit(REPO, {"config.json": b"{}"}, title="Somebody breaks main")
    ran = run_cli("verify", tmp_path / "out", "--source", REPO)
    assert ran.code == 0, ran.err
    assert "verdict: passed" in ran.out
