"""Faults that an engine loads without a word: what is on record of them on an H200, and each planted here for the rules."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO_MODEL, ROOT, make_artifact

sys.path.insert(0, str(ROOT / "scripts"))
import silent_faults as script

EVIDENCE: dict[str, Any] = json.loads((ROOT / "docs/evidence/h200-silent-faults.json").read_text())
RECORDED = {kind: {each["name"]: each for each in results} for kind, results in EVIDENCE["models"].items()}
MOE = ROOT / "tests/golden/checkpoints/base-moe"
LAYOUTS = {"w4a16": "ct-pack", "nvfp4a16": "ct-nvfp4", "fp8-dynamic": "ct-float"}
BASES = {"dense": DEMO_MODEL, "moe": MOE}
FAULTS = {"dense": script.dense(), "moe": script.moe(MOE)}
CASES = [(kind, name) for kind, faults in FAULTS.items() for name in faults]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("sound")
    return {
        kind: {
            recipe: script.stranger(
                make_artifact(BASES[kind], recipe, folder / kind / recipe, LAYOUTS[recipe]), folder / kind
            )
            for recipe in sorted({fault.of for fault in faults.values()})
        }
        for kind, faults in FAULTS.items()
    }


@pytest.mark.slow
def test_what_is_sound_is_not_alarmed_about(sound: dict[str, dict[str, Path]]) -> None:
    assert not any(script.rules(folder, BASES[kind]) for kind, made in sound.items() for folder in made.values())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), CASES, ids=[name for _, name in CASES])
def test_each_is_caught_by_the_rules_of_record(
    kind: str, name: str, sound: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    folder = script.planted(name, FAULTS[kind][name], sound[kind], tmp_path)
    assert set(script.rules(folder, BASES[kind])) == set(RECORDED[kind][name]["rules"]) != set()


def test_the_record_is_whole_and_says_what_we_say() -> None:
    each = [result for results in RECORDED.values() for result in results.values()]
    planted = [result for result in each if result["row"] != 0]
    assert {(kind, name) for kind, found in RECORDED.items() for name in found if found[name]["row"] != 0} == set(CASES)
    assert len(planted) == 24 and sum(result["silent"] for result in planted) == 18
    assert sum(result["canary"]["verdict"] == "failed" for result in planted) == 19
    assert script.wrong(each) == EVIDENCE["wrong"] == []
    assert EVIDENCE["made_by"]["versions"]["vllm"] == "0.25.1" and "H200" in EVIDENCE["made_by"]["gpu"]


def test_the_documents_table_is_the_record() -> None:
    lines = (ROOT / "docs/verify.md").read_text("utf-8").splitlines()
    for kind, name in CASES:
        (line,) = [line for line in lines if line.startswith(f"| {name} |")]
        found = RECORDED[kind][name]
        assert ("**silent**" in line) == found["silent"] and ("passes" in line) == (
            found["canary"]["verdict"] == "passed"
        )


def test_what_nothing_saw_is_wrong_and_so_is_an_alarm_about_what_is_sound() -> None:
    def result(row: int | None, rules: dict[str, str], verdict: str) -> dict[str, Any]:
        return {"name": f"{row}", "row": row, "rules": rules, "canary": {"verdict": verdict}}

    assert script.wrong([result(0, {}, "passed"), result(None, {"bits": ""}, "passed"), result(7, {}, "failed")]) == []
    assert script.wrong([result(0, {"bits": ""}, "passed"), result(5, {}, "passed")]) == ["0", "5"]
