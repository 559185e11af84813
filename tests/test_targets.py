"""The engines' tables against each other, the evidence, the recipes and README; alignment and notes by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO_MODEL, ROOT, make_artifact, run_cli, save_llama

from quantpub import advice
from quantpub.advice import Case, Weight, notes, refusal, weights
from quantpub.checkpoint import open_checkpoint
from quantpub.errors import InputError
from quantpub.families import FAMILIES
from quantpub.hardware import EFFECTS, GENERATIONS, NEXT, TILES, misfit
from quantpub.kernel_tables import (
    ROWS,
    SEEN,
    UNKNOWN,
    Seen,
    basis,
    by_outcome,
    engine_table,
    expected,
    hardware_rows,
    loaded,
)
from quantpub.layouts import LAYOUTS
from quantpub.measured import INT4_DEVICE, INT4_EVIDENCE, INT4_H200, KERNELS, pays_up_to, table
from quantpub.plan import make_plan, require_runnable
from quantpub.plan_engines import engines_of
from quantpub.plan_facts import summary
from quantpub.recipe import Recipe, load_recipe
from quantpub.registry import load
from quantpub.scheme import PRESETS, preset
from quantpub.targets import TARGETS, VERSIONS, unloadable
from quantpub.treatments import make_treatments

CELLS = [
    (engine, version, layout, scheme, generation, experts)
    for engine, target in TARGETS.items()
    for version in VERSIONS[engine]
    for layout in target.loads
    for scheme in PRESETS
    for generation in GENERATIONS
    for experts in (False, True)
]


def holds(layout: str, scheme: str) -> bool:
    """Whether the layout can hold the scheme at all."""
    return load(LAYOUTS, "layout", layout).reject(PRESETS[scheme], 1024, 1024, "BF16") is None


@pytest.mark.parametrize("engine", TARGETS)
def test_every_layout_is_loaded_or_refused_with_a_reason_and_a_source(engine: str) -> None:
    target = TARGETS[engine]
    assert set(target.loads) | set(target.refuses) == set(LAYOUTS)
    assert not set(target.loads) & set(target.refuses)
    assert all(loads.versions and loads.source.startswith("read: ") for loads in target.loads.values())
    assert all(refusal.reason and refusal.source.startswith("read: ") for refusal in target.refuses.values())


def test_every_layout_is_loaded_by_some_engine() -> None:
    assert {layout for target in TARGETS.values() for layout in target.loads} == set(LAYOUTS)


def test_an_engine_loads_no_scheme_that_its_layout_cannot_hold() -> None:
    for target in TARGETS.values():
        for layout, loads in target.loads.items():
            assert all(holds(layout, scheme) for scheme in loads.schemes or ()), layout


@pytest.mark.parametrize(
    ("engine", "layout", "scheme", "reason"),
    [
        ("vllm", "ct-pack", "W4A16", None),
        ("tensorrt-llm", "ct-float", "FP8_DYNAMIC", None),
        ("tensorrt-llm", "ct-float", "FP8_BLOCK", None),
        ("tensorrt-llm", "ct-float", "FP8", "loads ct-float for FP8_DYNAMIC, FP8_BLOCK only, not for FP8"),
        ("tensorrt-llm", "ct-int", "W8A8", "cast to FP8 in silence"),
        ("tensorrt-llm", "ct-nvfp4", "NVFP4", "take modelopt-nvfp4"),
        ("sglang", "torchao-tile", "W4A16_FLOAT_ZERO", "torchao was removed"),
        ("transformers", "modelopt-nvfp4", "NVFP4", "does not know ModelOpt"),
        ("vllm", "gptq-v2", "W4A16", None),
        ("vllm", "gptq-v2", "W4A16_ASYM", "loads gptq-v2 for W4A16, W8A16 only, not for W4A16_ASYM"),
        ("transformers", "gptq-v2", "W4A16_ASYM", None),
        ("sglang", "modelopt-fp8-channel", "FP8_DYNAMIC", "take ct-float"),
        ("sglang", "modelopt-fp8-block", "FP8_BLOCK", "take hf-fp8"),
        ("tensorrt-llm", "modelopt-fp8-block", "FP8_BLOCK", None),
        ("sglang", "torchao-nvfp4", "NVFP4A16", "torchao was removed"),
        ("vllm", "no-such-layout", "W4A16", UNKNOWN),
    ],
)
def test_what_loads_by_hand(engine: str, layout: str, scheme: str, reason: str | None) -> None:
    found = unloadable(engine, layout, scheme)
    assert found is None if reason is None else reason in str(found)


def test_experts_are_refused_where_a_loader_skips_them() -> None:
    assert unloadable("vllm", "torchao-tile", "W4A16_FLOAT_ZERO") is None
    assert "neither experts nor lm_head" in str(unloadable("vllm", "torchao-tile", "W4A16_FLOAT_ZERO", experts=True))
    assert "NPU" in str(unloadable("sglang", "ct-int", "W8A8", experts=True))
    assert "a scale a tensor only" in str(unloadable("vllm", "modelopt-fp8-block", "FP8_BLOCK", experts=True))
    assert unloadable("vllm", "gptq-v2", "W4A16", experts=True) is None


def test_experts_that_stay_are_refused_where_a_loader_takes_them_for_quantized() -> None:
    """Seen on an H200: NotImplementedError; and in transformers 5.23: an error of its conversions."""
    assert "quantized or not" in str(unloadable("vllm", "bnb-int8", "LLM_INT8", kept=True))
    assert "for quantized" in str(unloadable("sglang", "gptq", "W4A16", kept=True))
    assert "rest is packed" in str(unloadable("transformers", "ct-pack", "W4A16", kept=True))
    for engine, layout, scheme in [("vllm", "gptq", "W4A16"), ("transformers", "ct-float", "FP8")]:
        assert unloadable(engine, layout, scheme, kept=True) is None


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_names_engines_that_load_its_scheme(path: Path) -> None:
    recipe = load_recipe(str(path))
    for engine, layout in recipe.engines.items():
        assert unloadable(engine, layout, recipe.resolved_scheme().name) is None, f"{engine} {layout}"


def test_readme_holds_the_table() -> None:
    assert engine_table() in (ROOT / "README.md").read_text("utf-8")


def test_rows_name_known_things_and_no_cell_twice() -> None:
    told: dict[tuple[Any, ...], str] = {}
    for row in ROWS:
        assert set(row.versions) <= set(VERSIONS[row.engine]) and row.source.startswith("read: ")
        for generations, what in (row.kernels | row.refused).items():
            assert what and set(generations.split()) <= set(GENERATIONS)
            for scheme in row.schemes:
                for layout in row.layouts:
                    assert scheme in PRESETS and layout in LAYOUTS
                    assert unloadable(row.engine, layout) is None
                    for version in row.versions:
                        for generation in generations.split():
                            cell = (row.engine, version, layout, scheme, generation, row.experts)
                            assert told.setdefault(cell, what) == what, cell


def test_every_cell_is_a_kernel_or_a_refusal_or_open_never_two_of_them() -> None:
    for engine, version, layout, scheme, generation, experts in CELLS:
        cell = expected(engine, version, layout, scheme, generation, experts)
        assert cell.kernel is None or cell.refused is None
        assert (cell.source == UNKNOWN) == (cell.kernel is None and cell.refused is None)


def test_every_layout_and_scheme_that_an_engine_loads_has_a_kernel_somewhere() -> None:
    for engine, target in TARGETS.items():
        for layout, loads in target.loads.items():
            for scheme in PRESETS:
                if holds(layout, scheme) and (loads.schemes is None or scheme in loads.schemes):
                    cells = [expected(engine, v, layout, scheme, g) for v in VERSIONS[engine] for g in GENERATIONS]
                    assert any(cell.kernel for cell in cells), f"{engine} {layout} {scheme}"


RUNS = [run for run in SEEN if run.engine == "vllm" and "canary" not in run.evidence]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.checkpoint}-{run.scheme}{'-experts' * run.experts}")
def test_what_was_seen_is_in_the_evidence(run: Any) -> None:
    """The evidence has the very checkpoint, of a recipe that makes weights of that scheme in that layout."""
    evidence = json.loads((ROOT / run.evidence).read_text())
    said = evidence["checkpoints"][run.checkpoint]["kernels"]
    assert evidence["checkpoints"][run.checkpoint]["perplexity"] < 6 and ("moe" in run.evidence) >= run.experts
    assert (run.layout, run.scheme) in kinds_of(run.checkpoint)
    assert evidence["versions"][run.engine] == run.version and "H200" in evidence["gpu"] and run.generation == "sm90"
    if run.kernel:
        assert any(line.startswith(run.said) for line in said)
        cell = expected(run.engine, run.version, run.layout, run.scheme, run.generation, run.experts)
        assert cell.seen and cell.kernel == run.kernel


def kinds_of(checkpoint: str) -> set[tuple[str, str]]:
    """(layout, scheme) of what a recipe's treatments make, of a checkpoint named by recipe and layout."""
    layout = next(name for name in sorted(LAYOUTS, key=len, reverse=True) if checkpoint.endswith(f"-{name}"))
    treatments = make_treatments(load_recipe(checkpoint.removesuffix(f"-{layout}")), layout)
    return {(treatment.layout.name, treatment.scheme.name) for treatment in treatments}


@pytest.mark.parametrize("evidence", sorted({run.evidence for run in RUNS}))
def test_every_checkpoint_of_the_evidence_is_seen(evidence: str) -> None:
    for checkpoint in json.loads((ROOT / evidence).read_text())["checkpoints"]:
        for kind in kinds_of(checkpoint) if checkpoint != "bf16" else ():
            assert loaded("vllm", [(*kind, "moe" in evidence)]), (checkpoint, kind)


CANARIES = [
    (name, found)
    for file in ("h200-canary-dense-28m", "h200-canary-moe-27m", "h200-canary-moe-27m-parts")
    for name, found in json.loads((ROOT / f"docs/evidence/{file}.json").read_text())["checkpoints"].items()
    if "kl" in found
]
BF16 = 0.0012  # nats per token that computing in bf16 adds to either side


@pytest.mark.parametrize(("name", "found"), CANARIES, ids=[name for name, _ in CANARIES])
def test_the_engine_computes_what_our_evaluation_computes(name: str, found: dict[str, Any]) -> None:
    """FP4 activations apart: a Hopper serves nvfp4 weight-only, and our evaluation rounds them as a Blackwell does."""
    if name == "nvfp4-modelopt-nvfp4":
        assert found["kl"]["mean"] < found["own_kl"]["mean"] / 2
        return
    noise = 3 * max(found["kl"]["stderr"], found["own_kl"]["stderr"]) + BF16
    assert abs(found["kl"]["mean"] - found["own_kl"]["mean"]) < noise


@pytest.mark.parametrize("run", [run for run in SEEN if "canary" in run.evidence], ids=lambda run: run.checkpoint)
def test_what_was_seen_beside_its_base_passed(run: Seen) -> None:
    evidence = json.loads((ROOT / run.evidence).read_text())
    assert evidence["checkpoints"][run.checkpoint]["verdict"] == "passed"
    assert evidence["made_by"]["versions"]["vllm"] == run.version


def test_what_transformers_opened_is_what_the_tests_open() -> None:
    partners = {
        (layout, load_recipe(path.stem).scheme)
        for path in (ROOT / "recipes").glob("*.yaml")
        if (layout := load_recipe(path.stem).engines.get("transformers", "")).startswith("ct-")
    }
    runs = [run for run in SEEN if run.engine == "transformers"]
    assert {(run.layout, run.scheme) for run in runs if run.evidence == "tests/test_partners.py"} == partners
    assert all((ROOT / run.evidence).is_file() for run in runs)
    tile = json.loads((ROOT / "docs/evidence/h200-torchao-pycode-llama-28m.json").read_text())
    (torchao,) = [run for run in runs if run.layout == "torchao-tile"]
    assert f"dense-{torchao.checkpoint}" in tile["rows"]
    assert tile["made_by"]["versions"]["transformers"] == torchao.version and "H200" in tile["made_by"]["gpu"]


@pytest.mark.parametrize(
    ("engine", "kind", "seen"),
    [
        ("vllm", ("torchao-tile", "W4A16_FLOAT_ZERO", False), True),
        ("vllm", ("torchao-tile", "W4A16", False), False),
        ("vllm", ("gptq", "W4A16", False), True),
        ("vllm", ("gptq", "W8A16", False), False),
        ("vllm", ("awq", "W4A16", False), False),
        ("vllm", ("modelopt-nvfp4", "NVFP4A16", False), True),
        ("vllm", ("ct-nvfp4", "NVFP4", False), False),
        ("vllm", ("ct-float", "FP8_BLOCK", False), True),
        ("vllm", ("ct-float", "FP8", False), False),
        ("vllm", ("hf-fp8", "FP8_BLOCK", True), False),
        ("vllm", ("ct-pack", "W8A16", True), False),
        ("transformers", ("ct-float", "FP8_BLOCK", False), False),
        ("transformers", ("ct-pack", "W4A16", True), True),
        ("sglang", ("ct-pack", "W4A16", False), False),
    ],
)
def test_seen_is_said_of_one_kind_of_weights(engine: str, kind: tuple[str, str, bool], seen: bool) -> None:
    assert bool(loaded(engine, [kind])) is seen
    assert basis(engine, kind).startswith("seen: " if seen else "read: ")


def test_fp8_blocks_were_seen_without_deepgemm() -> None:
    """The engine's own choice was switched off: the run is no word on which kernel it takes."""
    for layout in ("hf-fp8", "ct-float"):
        assert "with DeepGEMM, its own choice, switched off" in basis("vllm", (layout, "FP8_BLOCK", False))
        assert expected("vllm", "0.25.1", layout, "FP8_BLOCK", "sm90").source.startswith("read: ")


def test_a_mixture_was_seen_where_one_checkpoint_held_it() -> None:
    int4, fp8, fp4 = ("ct-pack", "W4A16", False), ("ct-float", "FP8_DYNAMIC", False), ("ct-nvfp4", "NVFP4A16", False)
    assert {run.checkpoint for run in loaded("vllm", [int4, fp8])} == {"w4a16-fp8-down-ct-pack"}
    assert loaded("vllm", [int4, ("ct-pack", "W4A16", True)])
    assert loaded("vllm", [int4]) and loaded("vllm", [fp4]) and not loaded("vllm", [int4, fp4])


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (("vllm", "0.25.1", "ct-pack", "W4A16", "sm90"), "Machete"),
        (("vllm", "0.25.1", "ct-pack", "W8A16", "sm80"), "AllSpark"),
        (("vllm", "0.33.0", "ct-pack", "W8A16", "sm80"), "Marlin"),
        (("vllm", "0.25.1", "hf-fp8", "FP8_BLOCK", "sm89"), "Triton FP8 blocks"),
        (("vllm", "0.33.0", "hf-fp8", "FP8_BLOCK", "sm89"), "Marlin FP8 W8A16"),
        (("vllm", "0.33.0", "ct-nvfp4", "NVFP4", "sm90"), "Humming NVFP4 W4A16"),
        (("vllm", "0.25.1", "ct-mxfp4", "MXFP4A16", "sm100"), "FlashInfer MXFP4 W4A4"),
        (("vllm", "0.33.0", "torchao-tile", "W4A16_FLOAT_ZERO", "sm100"), UNKNOWN),
        (("sglang", "0.5.23", "ct-float", "FP8", "sm100"), UNKNOWN),
        (("vllm", "0.25.1", "modelopt-fp8-block", "FP8_BLOCK", "sm90"), UNKNOWN),
        (("vllm", "0.33.0", "modelopt-fp8-block", "FP8_BLOCK", "sm90"), "DeepGEMM"),
        (("sglang", "0.5.23", "gptq-v2", "W4A16", "cpu"), "refused: its AMX kernels refuse gptq_v2"),
    ],
)
def test_kernels_by_hand(cell: tuple[str, str, str, str, str], words: str) -> None:
    assert expected(*cell).words == words


@pytest.mark.parametrize("generation", ["sm100", "sm120"])
@pytest.mark.parametrize(("engine", "version"), [("vllm", "0.25.1"), ("vllm", "0.33.0"), ("sglang", "0.5.23")])
def test_int8_is_refused_on_blackwell(engine: str, version: str, generation: str) -> None:
    assert "Blackwell" in str(expected(engine, version, "ct-int", "W8A8", generation).refused)


def test_bitsandbytes_left_vllm() -> None:
    assert expected("vllm", "0.25.1", "bnb-int8", "LLM_INT8", "sm90").kernel
    assert "plugin" in str(expected("vllm", "0.33.0", "bnb-int8", "LLM_INT8", "sm90").refused)


def test_outcomes_of_a_layout_cover_every_generation_once() -> None:
    for engine, layout, scheme in (("vllm", "ct-pack", "W4A16"), ("transformers", "hf-fp8", "FP8_BLOCK")):
        for version in VERSIONS[engine]:
            rows = [row for row in hardware_rows(engine, layout, scheme) if row[0] == version]
            assert sorted(g for row in rows for g in row[1].split(", ")) == sorted(GENERATIONS)
    assert by_outcome([]) == []


@pytest.mark.parametrize(
    ("kernel", "n", "k", "group", "fits"),
    [
        ("Marlin", 64, 128, 128, True),
        ("Marlin", 128, 64, 32, True),
        ("Marlin", 64, 64, 32, False),
        ("Marlin", 192, 192, 64, False),
        ("Marlin", 128, 128, 256, False),
        ("Marlin", 128, 128, -1, True),
        ("Machete", 128, 64, 64, True),
        ("Machete", 64, 128, 128, False),
        ("Machete", 128, 128, 32, False),
        ("CUTLASS INT8", 48, 16, -1, True),
        ("CUTLASS INT8", 40, 16, -1, False),
        ("CUTLASS FP8", 16, 24, -1, False),
        ("FlashInfer CUTLASS NVFP4", 32, 48, 16, False),
        ("FlashInfer CUTLASS NVFP4", 96, 64, 16, True),
        ("DeepGEMM", 64, 128, 128, True),
        ("DeepGEMM", 32, 128, 128, False),
        ("tinygemm", 8, 1024, 128, True),
        ("tinygemm", 4096, 1536, 128, False),
        ("a kernel without tiles", 1, 1, 3, True),
    ],
)
def test_alignment_by_hand(kernel: str, n: int, k: int, group: int, fits: bool) -> None:
    assert (misfit(kernel, n, k, group, "vllm", "0.25.1") is None) is fits


def test_what_happens_to_a_shape_that_does_not_fit() -> None:
    """Machete leaves [64, 128] to Marlin, which takes it; [64, 64] Marlin takes with padding, in vLLM only."""
    old, new = (misfit("Machete", 64, 128, 64, "vllm", version) for version in VERSIONS["vllm"])
    assert old and old.effect == "Marlin runs it"
    assert new and new.effect == "Humming runs it"
    small = misfit("Machete", 64, 64, 64, "vllm", "0.25.1")
    assert small and small.effect == "Marlin runs it; vLLM pads activations or outputs in every forward"
    marlin = misfit("Marlin", 64, 64, 64, "sglang", "0.5.23")
    assert marlin and "does not pad" in marlin.effect
    odd = misfit("CUTLASS INT8", 40, 16, -1, "vllm", "0.33.0")
    assert odd and odd.effect == "Triton INT8 runs it"


def test_tiles_effects_and_successors_name_kernels_of_the_rows() -> None:
    named = {kernel for row in ROWS for kernel in row.kernels.values()}
    assert set(TILES) <= named
    assert {kernel for _, kernel in EFFECTS} | {kernel for *_, kernel in NEXT} <= set(TILES)


def test_measured_tables_are_the_evidence() -> None:
    evidence = json.loads((ROOT / INT4_EVIDENCE).read_text())
    rows = {row["m"]: row for row in evidence["rows"]}
    assert {row.m for row in INT4_H200} == set(rows) and evidence["made_by"]["gpu"] == INT4_DEVICE
    for row in INT4_H200:
        assert row.bf16_us == rows[row.m]["bf16_us"]
        for kernel in KERNELS:
            found = rows[row.m][f"{kernel.lower()}_us"], rows[row.m][f"{kernel.lower()}_speedup"]
            assert row.of(kernel) == found


def test_where_a_kernel_stops_paying_is_the_last_m_before_it_first_lost() -> None:
    for kernel in KERNELS:
        last, speeds = pays_up_to(kernel), dict(table(kernel))
        assert all(speed > 1 for m, speed in speeds.items() if m <= last)
        assert speeds[min(m for m in speeds if m > last)] <= 1


def about(layout: str, scheme: str, *engines: str, algorithm: str = "rtn", tuned: bool = False) -> set[str]:
    case = Case(frozenset({layout}), frozenset({scheme}), frozenset({algorithm}), engines, tuned)
    return {note["id"] for note in notes(case)}


@pytest.mark.parametrize(
    ("layout", "scheme", "expected_ids"),
    [
        ("torchao-tile", "W4A16_FLOAT_ZERO", {"tile-packed-batch", "tile-packed-limits"}),
        ("ct-pack", "W4A16", {"int4-large-batch"}),
        ("gptq", "W4A16", {"int4-large-batch"}),
        ("gptq-v2", "W4A16", {"int4-large-batch"}),
        ("modelopt-fp8-channel", "FP8_DYNAMIC", {"online-fp8"}),
        ("torchao-nvfp4", "NVFP4A16", {"torchao-nvfp4"}),
        ("ct-pack", "W4A16_ASYM", {"int4-large-batch", "machete-zero"}),
        ("ct-pack", "W8A16", set()),
        ("ct-float", "FP8_DYNAMIC", {"online-fp8"}),
        ("hf-fp8", "FP8_BLOCK", {"online-fp8"}),
        ("ct-float", "FP8", set()),
        ("ct-int", "W8A8", {"int8-blackwell"}),
        ("ct-nvfp4", "NVFP4", {"fp4-before-blackwell"}),
        ("modelopt-nvfp4", "NVFP4A16", {"fp4-before-blackwell"}),
        ("ct-mxfp4", "MXFP4A16", {"mxfp4-engines"}),
        ("bnb-int8", "LLM_INT8", {"bitsandbytes-vllm"}),
    ],
)
def test_notes_appear_where_they_must_and_nowhere_else(layout: str, scheme: str, expected_ids: set[str]) -> None:
    assert about(layout, scheme, "vllm", algorithm="fp8" if "FP8" in scheme else "rtn") == expected_ids


def test_notes_that_hang_on_engine_or_algorithm() -> None:
    assert about("ct-float", "FP8_DYNAMIC", "tensorrt-llm", algorithm="fp8") == set()
    assert about("ct-float", "FP8_DYNAMIC", "vllm", algorithm="gptq") == set()
    assert about("bnb-int8", "LLM_INT8", "transformers") == set()
    assert about("ct-float", "FP8_DYNAMIC", "vllm", algorithm="fp8", tuned=True) == set()
    assert about("ct-pack", "W4A16_ASYM", "sglang") == {"int4-large-batch"}


@pytest.mark.parametrize("schemes", [{"FP8_DYNAMIC", "W4A16"}, {"FP8_DYNAMIC", "FP8_BLOCK"}])
def test_no_flag_makes_two_schemes(schemes: set[str]) -> None:
    case = Case(frozenset({"ct-float"}), frozenset(schemes), frozenset({"fp8"}), ("vllm",))
    assert "online-fp8" not in {note["id"] for note in notes(case)}


def test_the_online_note_claims_the_format_not_the_weights() -> None:
    source, plain = open_checkpoint(str(DEMO_MODEL)), load_recipe("fp8-dynamic")
    said = {note["id"]: note["note"] for note in summary(make_plan(source, plain, "ct-float"))["notes"]}
    assert "weights of the same format" in said["online-fp8"] and "the same weights" not in said["online-fp8"]
    tuned = plain.model_copy(update={"algorithm": {"name": "fp8", "row_search": True}})
    assert "online-fp8" not in {note["id"] for note in summary(make_plan(source, tuned, "ct-float"))["notes"]}


def test_the_note_on_machetes_zero_is_what_was_measured() -> None:
    rows = json.loads((ROOT / "docs/evidence/h200-kernels-pycode-llama-28m.json").read_text())["rows"]
    worst = {
        kernel: max(
            r["largest_difference_bf16_ulp"] for r in rows if (r["scheme"], r["kernel"]) == ("W4A16_ASYM", kernel)
        )
        for kernel in ("machete", "marlin")
    }
    assert worst == {"machete": 1, "marlin": 0}


def half_blocks(tmp_path: Path) -> Any:
    """k_proj has 64 rows, half a block of FP8, and v_proj follows it."""
    return open_checkpoint(str(save_llama(tmp_path / "m")))


def test_an_engine_that_merges_within_a_block_is_refused(tmp_path: Path) -> None:
    plan = make_plan(half_blocks(tmp_path), load_recipe("fp8-block"), "hf-fp8")
    found = engines_of(plan)
    assert found["transformers"] is None and not plan.rejections
    for engine in ("vllm", "sglang", "tensorrt-llm"):
        assert "self_attn.k_proj: 64 out_features end within a block of 128" in str(found[engine])
    facts = summary(plan)
    assert {entry["engine"] for entry in facts["kernels"]} == {"transformers"}
    assert facts["engines"]["transformers"] == "ok" and "64 out_features" in facts["engines"]["vllm"]


def test_a_checkpoint_that_no_engine_in_question_loads_is_rejected(tmp_path: Path) -> None:
    recipe = load_recipe("fp8-block").model_copy(update={"engines": {"vllm": "hf-fp8"}})
    plan = make_plan(half_blocks(tmp_path), recipe, "hf-fp8")
    assert len(plan.rejections) == 3 * 7
    with pytest.raises(InputError, match="64 out_features end within a block of 128"):
        require_runnable(plan)


def test_padding_of_tiles_keeps_no_engine_from_one_gpu() -> None:
    """vLLM loaded tiles of 512 and 1408 columns here: only over several GPUs must they be multiples of 1024."""
    plan = make_plan(open_checkpoint(str(DEMO_MODEL)), load_recipe("int4-hqq-tile"), "torchao-tile")
    assert engines_of(plan) == {"transformers": None, "vllm": None}


@pytest.mark.parametrize(
    ("recipe", "layout", "loading"),
    [
        ("w4a16", "gptq", {"vllm", "sglang", "transformers"}),
        ("w4a16", "torchao-tile", {"vllm", "transformers"}),
        ("w8a16", "gptq", {"vllm", "sglang", "transformers"}),
        ("nvfp4a16", "modelopt-nvfp4", {"tensorrt-llm"}),
        ("w4a16-fp8-down", "ct-pack", {"vllm", "sglang"}),
    ],
)
def test_engines_of_a_plan(recipe: str, layout: str, loading: set[str]) -> None:
    """The recipe's own for the layout; all that load it where the recipe names none."""
    found = engines_of(make_plan(open_checkpoint(str(DEMO_MODEL)), load_recipe(recipe), layout))
    assert {engine for engine, reason in found.items() if reason is None} == loading


def test_each_scheme_in_use_is_asked_about() -> None:
    """TensorRT-LLM loads the recipe's own FP8, not the int4 of its rule; of transformers only one scheme can be."""
    rules = [{"match": r"re:.*down_proj", "scheme": "W4A16", "algorithm": {"name": "rtn"}}]
    engines = {"vllm": "ct-float", "tensorrt-llm": "ct-float"}
    recipe = Recipe.model_validate(load_recipe("fp8-dynamic").model_dump() | {"rules": rules, "engines": engines})
    found = engines_of(make_plan(open_checkpoint(str(DEMO_MODEL)), recipe, "ct-float"))
    assert found["vllm"] is None and "weight-only int4 has none" in str(found["tensorrt-llm"])
    weights_ = [
        Weight("a", 128, 128, preset(s), layout) for s, layout in (("FP8_DYNAMIC", "ct-float"), ("W4A16", "ct-pack"))
    ]
    assert "by the first group" in str(refusal("transformers", weights_, None))
    assert refusal("transformers", weights_[:1], None) is None


def test_an_engine_asked_for_that_cannot_load_it_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "m")
    for command in (["plan", model], ["quantize", model, "-o", tmp_path / "a"]):
        ran = run_cli(*command, "-r", "fp8-block", "--engine", "vllm")
        assert ran.code == 3 and "vllm cannot load it" in ran.err and "64 out_features" in ran.err
        assert ran.err.count("\n") == 1 and "without --engine vllm it is written for transformers; or" in ran.err
    assert not (tmp_path / "a").exists()
    assert run_cli("plan", model, "-r", "fp8-block", "--engine", "transformers").code == 0
    shown = run_cli("plan", model, "-r", "fp8-block").out
    assert "engines          transformers\n" in shown and "engines          not vllm: " in shown


def test_the_plan_names_every_scheme() -> None:
    shown = run_cli("plan", DEMO_MODEL, "-r", "w4a16-fp8-down").out
    assert "w4a16-fp8-down (W4A16 and FP8_DYNAMIC) as ct-pack" in shown


def test_the_tile_packed_note_has_the_measured_figures() -> None:
    text = next(n["note"] for n in notes(Case(frozenset({"torchao-tile"}), frozenset(), frozenset(), ())))
    assert f"up to {pays_up_to('tinygemm')} tokens" in text and INT4_DEVICE in text
    assert f"{dict(table('tinygemm'))[4096]:.2f}× at 4096" in text


def test_merged_weights_and_their_alignment() -> None:
    """q/k/v become one weight of 96 rows, which Machete refuses; o_proj of 128 rows fits."""
    at = "model.layers.0.self_attn."
    shapes = {at + "q_proj": (64, 128), at + "k_proj": (16, 128), at + "v_proj": (16, 128), at + "o_proj": (128, 128)}
    found = weights(shapes, dict.fromkeys(shapes, (preset("W4A16"), "ct-pack")), FAMILIES["llama"])
    assert [(w.module, w.n, w.k) for w in found] == [(at + "qkv_proj", 96, 128), (at + "o_proj", 128, 128)]
    entry = next(e for e in advice.kernels(found, ["vllm"]) if e["gpu"] == "sm90")
    assert (entry["version"], entry["kernel"], entry["gemms"], entry["aligned"]) == ("0.25.1", "Machete", 2, 1)
    assert entry["misaligned"]["gemm"] == at + "qkv_proj" and entry["misaligned"]["n"] == 96
    assert entry["misaligned"]["effect"].startswith("Marlin runs it; vLLM pads")


def test_the_plan_says_kernels_and_notes(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "m")
    facts = run_cli("plan", model, "-r", "w4a16", "--json").json()["plans"][0]
    hopper = [e for e in facts["kernels"] if (e["engine"], e["gpu"]) == ("vllm", "sm90")]
    assert [e["kernel"] for e in hopper] == ["Machete", "Machete"]
    assert hopper[0]["source"].startswith("seen: docs/evidence/") and hopper[0]["gemms"] == 3 * 4
    assert [note["id"] for note in facts["notes"]] == ["int4-large-batch"]
    text = run_cli("plan", model, "-r", "w4a16").out
    assert "Machete on sm90*" in text and "[int4-large-batch]" in text and "every merged weight fits" in text


def test_the_plan_says_what_is_refused() -> None:
    entries = [
        {"engine": "vllm", "version": "0.25.1", "gpu": gpu, "scheme": "W8A8", "experts": False, "source": "read: x"}
        | ({"kernel": None, "refused": "it dies"} if gpu == "sm100" else {"kernel": "CUTLASS INT8", "refused": None})
        for gpu in ("sm90", "sm100")
    ]
    from quantpub.show import kernel_lines

    assert kernel_lines(entries) == ["vllm 0.25.1, W8A8: CUTLASS INT8 on sm90; refused (it dies) on sm100"]


def test_the_card_has_a_snippet_and_kernels_for_every_engine_it_names(tmp_path: Path) -> None:
    from quantpub.artifact import Artifact
    from quantpub.card import render
    from quantpub.card.facts import facts

    card = render(facts(Artifact.open(make_artifact(DEMO_MODEL, "fp8-dynamic", tmp_path / "a")), "me/model"))
    for words in ("vllm serve me/model", "sglang.launch_server --model-path me/model", "trtllm-serve me/model"):
        assert words in card
    assert 'AutoModelForCausalLM.from_pretrained("me/model")' in card
    assert "needs: pip install compressed-tensors accelerate" in card
    assert "| vLLM | 0.25.1 | sm90 | CUTLASS FP8 | seen |" in card
    assert "| TensorRT-LLM, PyTorch backend | main, mid-2026 | sm90 | fp8_rowwise_gemm | read |" in card


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "layout"), [("int8-dynamic", "ct-int"), ("nvfp4a16", "ct-nvfp4"), ("mxfp4", "ct-mxfp4")]
)
def test_transformers_opens_what_its_table_calls_seen(recipe: str, layout: str, tmp_path: Path) -> None:
    """Decompressed by the loader of others, each weight is the one that our own decoding gives."""
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    from quantpub.artifact import Artifact
    from quantpub.decode import Decoder
    from quantpub.qtensor import dequantize

    folder = make_artifact(DEMO_MODEL, recipe, tmp_path / "a", layout)
    assert loaded("transformers", [(layout, load_recipe(recipe).scheme, False)])
    plain = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=plain)
    decoder, weights = Decoder(Artifact.open(folder)), model.state_dict()
    assert len(decoder.modules()) == 28
    for module, _ in decoder.modules():
        assert torch.equal(weights[f"{module}.weight"], dequantize(decoder.qtensor(module)).bfloat16()), module
