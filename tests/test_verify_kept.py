"""The evidence that `verify` keeps: never weakened, replaced by a failure, the same each time, and told where it cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO_MODEL, make_artifact, run_cli, tree

from quantpub.artifact import Artifact
from quantpub.engines.canary import TOLD
from quantpub.publish.refuse import failed_gates
from quantpub.verify.engine import TIMES
from quantpub.verify.kept import narrower, weaker
from quantpub.verify.run import verify


def kept(folder: Path) -> dict[str, Any]:
    return Artifact.open(folder).read_json("verify.json")


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose kept evidence passed every rule, with its source. Read only."""
    made = make_artifact(DEMO_MODEL, "w4a16-rtn", tmp_path_factory.mktemp("proven") / "tiny")
    assert run_cli("verify", made, "--source", DEMO_MODEL).code == 0
    assert kept(made)["verdict"] == "passed"
    return made


@pytest.fixture
def proven(master: Path, tmp_path: Path) -> Path:
    """The same, that the test may damage."""
    return Path(shutil.copytree(master, tmp_path / "proven"))


def spoil(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes() + b" ")


def test_a_run_without_the_source_is_told_and_not_kept(proven: Path) -> None:
    before = tree(proven)
    ran = run_cli("verify", proven)
    assert ran.code == 0 and ran.out.endswith("verdict: incomplete\n")
    assert ran.err == "not kept as evidence: what is there of these files says more, with coverage, copies\n"
    quiet = run_cli("verify", proven, "--json")
    assert quiet.err == "" and quiet.json()["not_kept"] in ran.err
    assert tree(proven) == before


@pytest.mark.parametrize("tp", [1, 8])
def test_a_run_for_some_gpus_is_told_and_not_kept(proven: Path, tp: int) -> None:
    before = tree(proven)
    ran = run_cli("verify", proven, "--source", DEMO_MODEL, "--tp", tp)
    assert ran.code == (3 if tp == 8 else 0)
    assert f"not kept as evidence: it says only whether {tp} GPUs can share it\n" in ran.err
    assert tree(proven) == before


def test_what_fails_is_kept_and_what_mends_it_too(proven: Path) -> None:
    good = (proven / "tokenizer.json").read_bytes()
    spoil(proven)
    assert run_cli("verify", proven, "--tp", "2").code == 3
    assert kept(proven)["verdict"] == "failed"
    (proven / "tokenizer.json").write_bytes(good)
    assert run_cli("verify", proven).code == 0
    assert kept(proven)["verdict"] == "incomplete" and "not_kept" not in kept(proven)


def test_of_other_files_less_is_kept_too(proven: Path) -> None:
    (proven / "generation_config.json").unlink()
    Artifact(proven).remove("generation_config.json")
    artifact = Artifact.open(proven)
    artifact.remove("generation_config.json")
    artifact.seal()
    verify(Artifact.open(proven))
    assert kept(proven)["verdict"] == "incomplete"


CHECKS = [{"id": "files", "status": "passed"}, {"id": "values", "status": "passed"}]
KEPT = {"checks": CHECKS, "verdict": "passed", "files_sha256": "a"}
VLLM = {"engine": {"engine": "vllm", "verdict": "passed"}}


@pytest.mark.parametrize(
    ("former", "now", "why"),
    [
        (KEPT | VLLM, KEPT, "with its run in vllm"),
        (KEPT | VLLM, KEPT | {"engine": {"engine": "vllm", "verdict": "not compared"}}, "with its run in vllm"),
        (KEPT | VLLM, KEPT | {"files_sha256": "b"}, None),
        (KEPT | VLLM, KEPT | {"verdict": "failed"}, None),
        (KEPT, KEPT | VLLM, None),
        (KEPT, KEPT | {"checks": CHECKS[:1]}, "with values"),
        (KEPT | {"verdict": "failed"}, KEPT | {"checks": CHECKS[:1]}, None),
        ({}, KEPT, None),
    ],
)
def test_what_says_more_stays(former: dict[str, Any], now: dict[str, Any], why: str | None) -> None:
    found = weaker(now, former)
    assert found is None if why is None else why in str(found)


def test_an_engine_that_it_was_not_made_for_says_nothing_of_it() -> None:
    refused = {"engine": {"engine": "transformers", "verdict": "failed", "ran": False}}
    assert "transformers is not what it was made for" in str(narrower(KEPT | refused | {"verdict": "failed"}, None))
    bad = KEPT | refused | {"checks": [{"id": "files", "status": "failed"}]}
    assert narrower(bad, None) is None and narrower(KEPT, None) is None


def not_json(folder: Path) -> None:
    (folder / ".quantpub/verify.json").write_text("{")


def of_odd_checks(folder: Path) -> None:
    (folder / ".quantpub/verify.json").write_text('{"checks": [1], "verdict": "passed"}')


@pytest.mark.parametrize("damage", [not_json, of_odd_checks])
def test_evidence_that_is_damaged_is_replaced(proven: Path, damage: Callable[[Path], None]) -> None:
    damage(proven)
    assert run_cli("verify", proven, "--source", DEMO_MODEL).code == 3  # SHA256SUMS has another
    assert kept(proven)["verdict"] == "failed"
    assert run_cli("verify", proven, "--source", DEMO_MODEL).code == 0


def test_where_nothing_can_be_written_the_result_is_told(artifact: Path) -> None:
    """A folder by the name of the draft stands for a folder that cannot be written to: root may write anywhere."""
    (artifact / ".quantpub/.tmp-verify.json").mkdir()
    before = tree(artifact)
    ran = run_cli("verify", artifact, "--source", DEMO_MODEL)
    assert ran.code == 0 and ran.out.endswith("verdict: passed\n")
    assert ran.err == "the evidence could not be kept: cannot write: is a directory\n"
    assert run_cli("verify", artifact, "--json").json()["not_kept"].startswith("the evidence could not be kept")
    assert tree(artifact) == before


def test_evidence_with_an_engine_is_the_same_each_time(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(99))
    said = {"engine": "transformers", "verdict": "passed", "reason": "KL 0", "kernels": {}, "warnings": []}

    def canary(engine: str, folder: Path, base: Path, **more: Any) -> dict[str, Any]:
        return said | {name: next(clock) for name in TIMES}

    monkeypatch.setattr("quantpub.verify.engine.canary", canary)
    found = []
    for _ in range(3):
        ran = run_cli("verify", artifact, "--source", DEMO_MODEL, "--engine", "transformers")
        assert ran.code == 0 and ran.err == ""
        found.append(tree(artifact))  # the first run adds a file, and rule `files` counts it from the second on
    assert found[1] == found[2] and kept(artifact)["engine"] == said
    assert set(TIMES) == {name for name in TOLD if "seconds" in name}


# ---- the publish gate


def test_the_publish_gate_names_the_rule_that_failed(proven: Path) -> None:
    assert failed_gates(Artifact.open(proven)) == []
    spoil(proven)
    run_cli("verify", proven)
    (line,) = failed_gates(Artifact.open(proven))
    assert line.startswith("verify.json: files: ") and "tokenizer.json" in line


@pytest.mark.parametrize(
    ("evidence", "line"),
    [
        ({"checks": [], "engine": {"engine": "vllm", "verdict": "failed", "reason": "KL 3"}}, "in vllm: KL 3"),
        ({"checks": [{"id": f"r{i}", "status": "failed", "detail": "x"} for i in range(3)]}, "r0: x (and 2 more)"),
        ({}, "see its checks"),
    ],
)
def test_the_publish_gate_names_what_there_is(artifact: Path, evidence: dict[str, Any], line: str) -> None:
    text = json.dumps({**evidence, "verdict": "failed"})
    (artifact / ".quantpub/verify.json").write_text(text)
    assert failed_gates(Artifact.open(artifact)) == [f"verify.json: {line}"]
