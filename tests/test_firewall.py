"""The firewall: every known failure is planted and caught by its rule and by no other, and nothing sound is alarmed about."""

from __future__ import annotations

import ast
import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO_MODEL, ROOT, make_artifact, run_cli
from plants import FURTHER, GOLDEN, ROWS, SOUND, Plant, Stable
from test_families import FAMILIES, Tiny, tiny  # noqa: F401

from quantpub.artifact import Artifact
from quantpub.checkpoint import open_checkpoint
from quantpub.failures import FAILURES, caught_by
from quantpub.opened import open_quantized
from quantpub.plan import make_plan
from quantpub.recipe import load_recipe
from quantpub.recipe_files import recipe_files
from quantpub.verify import CHECKS, whole
from quantpub.verify.computed import THETA, stray_ids
from quantpub.verify.language import lost_norms
from quantpub.verify.run import remedy, verify

HERE = Path(__file__).parent
DOCUMENT = (ROOT / "docs/verify.md").read_text("utf-8")
MANIFEST: dict[str, dict[str, Any]] = json.loads((GOLDEN / "manifest.json").read_text())
# What is not read, by the words of the rule that says so
UNREAD = {"gptqmodel-gptq-desc-act-dense": "desc_act", "modelopt-int4-awq-dense": "pre_quant_scale"}
CASES = [(f"row {row}: {name}", plant) for row, plants in ROWS.items() for name, plant in plants.items()]
CASES += list(FURTHER.items())

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def stable(tmp_path_factory: pytest.TempPathFactory) -> Stable:
    return Stable(tmp_path_factory.mktemp("stable"))


def judged(plant: Plant, stable: Stable, folder: Path) -> dict[str, Any]:
    checkpoint, source = Path(shutil.copytree(stable(plant.of), folder / "it")), stable.base(plant.of)
    plant.edit(checkpoint)
    if plant.base:
        source = Path(shutil.copytree(source, folder / "base"))
        plant.base(source)
    return verify(open_quantized(str(checkpoint)), str(source) if plant.source else None, tp=plant.tp)


def failed(evidence: dict[str, Any]) -> dict[str, str]:
    return {check["id"]: check["detail"] for check in evidence["checks"] if check["status"] == "failed"}


@pytest.mark.parametrize(("name", "plant"), CASES, ids=[name for name, _ in CASES])
def test_a_planted_failure_is_caught_by_its_rule_alone(name: str, plant: Plant, stable: Stable, tmp_path: Path) -> None:
    evidence = judged(plant, stable, tmp_path)
    found = failed(evidence)
    assert set(found) == {plant.rule}, found
    assert evidence["verdict"] == "failed" and remedy(evidence)
    assert "could not be carried out" not in found[str(plant.rule)]


@pytest.mark.parametrize("name", SOUND)
def test_what_looks_odd_and_is_right_passes(name: str, stable: Stable, tmp_path: Path) -> None:
    evidence = judged(SOUND[name], stable, tmp_path)
    assert evidence["verdict"] == "passed", failed(evidence)


# ---- the rows


@pytest.mark.parametrize("row", FAILURES)
def test_every_row_says_what_catches_it_and_is_planted(row: int) -> None:
    failure = FAILURES[row]
    rules = {rule for stage, rule in failure.caught if stage == "verify"}
    assert rules == {plant.rule for plant in ROWS.get(row, {}).values()} and rules <= set(CHECKS)
    assert all(name in functions(file) for file, name in (test.split("::") for test in failure.tests))
    assert failure.tests or rules or failure.unseen
    assert not {stage for stage, _ in failure.caught} - {"verify"} or failure.tests
    assert failure.what and failure.next and caught_by(failure)
    assert all(thread.count("/") == 1 and thread.rpartition("#")[2].isdigit() for thread in failure.threads)


@cache
def functions(file: str) -> set[str]:
    tree = ast.parse((HERE / f"{file}.py").read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_the_rows_are_those_that_are_known() -> None:
    assert list(FAILURES) == list(range(1, 28))


def test_every_rule_says_what_to_do() -> None:
    assert all(rule.next and rule.entry.summary for rule in CHECKS.values())


def test_a_quantized_source_is_one_line_that_offers_repack() -> None:
    for command in (("plan",), ("quantize", "-o", "/nonexistent/out")):
        ran = run_cli(command[0], GOLDEN / "llmcompressor-w4a16-dense", "-r", "fp8-dynamic", *command[1:])
        assert ran.code == 3 and ran.err.count("\n") == 1
        assert "quantized already (compressed-tensors)" in ran.err and "quantpub repack" in ran.err


def test_the_lists_of_rules_and_failures() -> None:
    assert set(run_cli("list", "rules", "--json").json()["rules"]) == set(CHECKS)
    rows = run_cli("list", "failures", "--json").json()["failures"]
    assert rows["6"].endswith(": verify merged") and "not caught" in rows["23"] and len(rows) == 27


# ---- no false alarm


@pytest.mark.parametrize("name", MANIFEST)
def test_what_other_tools_wrote_passes(name: str) -> None:
    broken, base = MANIFEST[name]["broken"], GOLDEN / f"base-{MANIFEST[name]['model']}"
    for source in (str(base), None):
        evidence = verify(open_quantized(str(GOLDEN / name)), source)
        found = {check["id"]: check for check in evidence["checks"]}
        if broken:
            assert set(failed(evidence)) == {"bits"}
        elif name in UNREAD:
            assert evidence["verdict"] == "incomplete" and not failed(evidence)
            assert found["readable"]["status"] == "skipped" and UNREAD[name] in found["readable"]["detail"]
        else:
            skipped = {name for name, check in found.items() if check["status"] == "skipped"}
            assert not failed(evidence), failed(evidence)
            assert skipped == (set() if source else {"coverage", "copies"})


def layouts() -> list[tuple[str, str]]:
    return [(name, layout) for name in recipe_files() for layout in load_recipe(name).layouts([], [])]


# 64 rows of k and of v, which engines merge within a block of 128
MERGED_WITHIN = {("fp8-block", "hf-fp8")}


def require_sound(model: Path, recipe: str, layout: str, folder: Path) -> None:
    """As ours by its records, and as a stranger's without them."""
    artifact = make_artifact(model, recipe, folder / "a", layout)
    expected = {"tensor-parallel"} if (recipe, layout) in MERGED_WITHIN and model.name != "base-dense" else set()
    evidence = verify(Artifact.open(artifact), str(model))
    assert not failed(evidence) and evidence["verdict"] == "passed"  # it is for transformers, which merges nothing
    shutil.rmtree(artifact / ".quantpub")
    evidence = verify(open_quantized(str(artifact)), str(model))
    assert set(failed(evidence)) == expected and evidence["verdict"] == ("failed" if expected else "passed")


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "layout"), layouts())
def test_ours_pass_in_every_layout_with_their_records_and_without(recipe: str, layout: str, tmp_path: Path) -> None:
    require_sound(DEMO_MODEL, recipe, layout, tmp_path)


def uncalibrated() -> list[tuple[str, str]]:
    base = open_checkpoint(str(GOLDEN / "base-dense"))
    return [(name, layout) for name, layout in layouts() if not make_plan(base, load_recipe(name), layout).calibrates]


NO_EXPERTS = {"torchao-tile", "bnb-int8"}


@pytest.mark.parametrize("base", ["base-dense", "base-moe"])
@pytest.mark.parametrize(("recipe", "layout"), uncalibrated())
def test_ours_of_tiny_models_pass(base: str, recipe: str, layout: str, tmp_path: Path) -> None:
    if base == "base-dense" or layout not in NO_EXPERTS:
        require_sound(GOLDEN / base, recipe, layout, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(FAMILIES)[::4])
def test_what_transformers_saves_is_complete_and_of_the_sizes_that_its_config_states(
    model_type: str,
    tiny: Tiny,  # noqa: F811
) -> None:
    folder, _, _ = tiny(model_type)
    family, checkpoint = FAMILIES[model_type], open_checkpoint(str(folder))
    shapes = {part.name: part.info.shape for shard in checkpoint.shards for part in checkpoint.slices(shard, family)}
    config, layers = checkpoint.config, whole._layers(shapes)
    assert not whole.wrong_sizes(shapes, config) + whole.lost_biases(shapes, config) + whole._alone(shapes)
    assert not whole._count(layers, config) + whole._incomplete(layers) + whole._experts(shapes, family, config)
    assert not lost_norms(layers, shapes, model_type) and not stray_ids(config, None)


def test_a_layer_that_predicts_further_tokens_is_no_measure_of_the_others() -> None:
    parts = frozenset({"mlp.up_proj.weight", "mlp.down_proj.weight"})
    layers = {0: parts, 1: parts, 2: parts | {whole.JOINS, "enorm.weight"}}
    config = {"num_hidden_layers": 2}
    assert not whole._count(layers, config) + whole._incomplete(layers)
    assert whole._count(layers, config | {"num_hidden_layers": 1}) == [
        "layer 1 is there, and num_hidden_layers is 1: engines leave it out"
    ]


@pytest.mark.slow
def test_what_architectures_do_where_they_say_nothing_is_what_transformers_does() -> None:
    from transformers import AutoConfig

    configs = {name: AutoConfig.for_model(name) for name in FAMILIES}
    assert {name for name, config in configs.items() if getattr(config, "tie_word_embeddings", False)} == whole.TIED
    turned = {name: config.rope_parameters for name, config in configs.items()}
    plain = {name: found["rope_theta"] for name, found in turned.items() if found.get("rope_type") == "default"}
    assert plain == THETA
    sides = {"hidden_size": 192, "num_attention_heads": 8, "num_key_value_heads": 8, "layer_types": None}
    heads = {name: getattr(AutoConfig.for_model(name, **sides), "head_dim", None) for name in FAMILIES}
    own = {name: size for name, size in heads.items() if size not in (None, 192 // 8)}
    assert {name: size for name, size in own.items() if FAMILIES[name].name != "deepseek"} == whole.HEAD_DIMS


# ---- the document


def test_the_document_holds_the_tables() -> None:
    for name, rule in CHECKS.items():
        assert f"| `{name}` | {rule.entry.summary} | {rule.next} |" in DOCUMENT, name
    for row, failure in FAILURES.items():
        threads = ", ".join(failure.threads) or "seen here, or known of many"
        assert f"| {row} | {failure.what} | {threads} | {caught_by(failure)} |" in DOCUMENT, row


@pytest.mark.parametrize(
    "example", re.findall(r"```\n\$ quantpub (verify .*)\n([^`]*)```", DOCUMENT), ids=lambda e: e[0]
)
def test_the_examples_are_what_is_printed(example: tuple[str, str]) -> None:
    command, shown = example
    ran = run_cli(*command.split(), cwd=GOLDEN)
    assert ran.out + ran.err == shown


def test_there_are_examples_of_every_verdict() -> None:
    assert {"passed", "failed", "incomplete"} == set(re.findall(r"\nverdict: (\w+)\n", DOCUMENT))
