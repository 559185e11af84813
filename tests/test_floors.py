"""The design's floors, held by walking the syntax tree: a module imports only from floors below it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "quantpub"
FLOORS = {
    0: ["errors", "env", "files", "memory", "registry", "stages", "output"],
    1: [
        "scheme",
        "families",
        "folds",
        "targets",
        "hardware",
        "kernel_rows",
        "kernel_rows_others",
        "kernel_tables",
        "measured",
        "workloads",
        "gpus",
        "curves",
        "pairs",
        "failures",
    ],
    2: ["qtensor", "stats", "e2m1", "transforms", "algorithms", "layouts"],
    3: [
        "recipe",
        "recipe_files",
        "smoothing",
        "checkpoint",
        "sources",
        "hub_source",
        "ranges",
        "shards",
        "actions",
        "plan",
        "plan_calibrated",
        "plan_engines",
        "plan_facts",
        "plan_files",
        "artifact",
        "evidence",
        "decode",
        "held",
        "adopt",
        "opened",
        "conversions",
        "relay",
        "repacking",
        "repack_recipe",
        "gemms",
        "experts",
        "advice",
        "treatments",
        "fused",
        "layer_store",
        "statistics",
        "solved",
        "calibrated",
        "sound",
        "merged",
        "cures",
        "findings",
        "forecast",
        "costs",
        "rivals",
        "served",
        "schedule",
        "roofline",
        "serving_costs",
        "predict",
        "stored",
        "derived",
        "expected_runs",
        "kv_cache",
        "lookup",
        "lookup_names",
        "lookup_ct",
        "lookup_others",
        "ct_config",
        "method_config",
        "kv_check",
        "tp_cut",
        "hygiene",
    ],
    4: [
        "observe",
        "samples",
        "destination",
        "claims",
        "quantize",
        "repack",
        "repack_proof",
        "verify",
        "kernels",
        "profile",
        "timing",
        "engines",
        "evaluate",
        "bench",
        "card",
        "plots",
        "publish",
        "hub",
        "forward",
        "activations",
        "cached",
        "verdict",
        "compare",
        "profile_table",
        "around",
        "whole_layer",
        "layer_ops",
        "advising",
        "candidates",
        "attention",
    ],
    5: ["release", "demo", "calibrating"],
    6: [
        "__main__",
        "cli",
        "cli_speed",
        "cli_repack",
        "cli_verify",
        "ending",
        "options",
        "show",
        "show_speed",
        "listing",
    ],
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}
# third-party packages a floor may import anywhere, and those it may never
NEVER = {
    0: {"torch", "typer", "transformers", "huggingface_hub", "safetensors", "pydantic", "yaml"},
    1: {"torch", "typer", "transformers", "huggingface_hub", "safetensors", "rich"},
    2: {"transformers", "huggingface_hub", "safetensors", "typer", "rich", "pathlib", "os", "io", "yaml", "json"},
    3: {"transformers", "typer", "rich", "jinja2", "matplotlib"},
    4: {"typer", "rich"},
    5: {"typer", "rich"},
    6: {"click"},
}
STAGES = ["quantize", "verify", "profile", "evaluate", "card", "publish", "repack", "observe", "bench"]


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py" or p.parent != PACKAGE)


def unit(path: Path) -> str:
    """The top-level name a file belongs to: `algorithms` for quantpub/algorithms/rtn.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {
                f"{node.module}.{alias.name}" if node.module == "quantpub" else str(node.module) for alias in node.names
            }
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_a_module_imports_only_from_floors_below(path: Path) -> None:
    name = unit(path)
    assert name in FLOOR_OF, f"{name} has no floor: give it one"
    for imported in imports(path):
        parts = imported.split(".")
        if parts[0] != "quantpub" or len(parts) == 1 or parts[1].startswith("__"):
            continue
        other = parts[1]
        assert other in FLOOR_OF, f"{name} imports {other}, which has no floor"
        assert FLOOR_OF[other] <= FLOOR_OF[name], (
            f"{name} (floor {FLOOR_OF[name]}) imports {other} (floor {FLOOR_OF[other]})"
        )
        if name in STAGES and other in STAGES:
            assert other == name, f"stage {name} imports stage {other}: stages meet in the artifact"


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_a_module_imports_no_forbidden_package(path: Path) -> None:
    tops = {imported.split(".")[0] for imported in imports(path)}
    assert not tops & NEVER[FLOOR_OF[unit(path)]]


@pytest.mark.parametrize("folder", ["algorithms", "layouts"])
def test_algorithms_and_layouts_do_not_import_each_other_and_touch_no_file(folder: str) -> None:
    for path in (PACKAGE / folder).glob("*.py"):
        shared = {"base", "scales", "words", "gptq_words", "torchao_parts", "__init__", path.stem}
        others = {p.stem for p in (PACKAGE / folder).glob("*.py")} - shared
        assert not {i.split(".")[-1] for i in imports(path) if i.startswith(f"quantpub.{folder}.")} & others
        calls = {
            n.func.id
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        assert not calls & {"open", "print"}
        attributes = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
        assert not attributes & {"cuda", "open", "read_bytes", "write_bytes"}


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, quantpub.cli, quantpub.listing as l; [f() for f in l.LISTS.values()]; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_floors_cover_every_module_once() -> None:
    names = [name for floor in FLOORS.values() for name in floor]
    assert len(names) == len(set(names))
