"""The checkpoints made by other tools (tests/golden/checkpoints): that the manifest, the folders and the references agree.

What quantpub makes of them is tested where it reads them; scripts/goldens/checkpoints.py says how they are made.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from quantpub.scheme import PRESETS

HERE = Path(__file__).parent / "golden" / "checkpoints"
MANIFEST: dict[str, dict[str, Any]] = json.loads((HERE / "manifest.json").read_text())
BASES = ("base-dense", "base-moe")
KB = 1000
LIMIT, LIMIT_OF_ALL = 300 * KB, 9000 * KB
# bf16 sources; experts left in bf16; K padded from 128 to 1024
LARGER = {"base-dense": 360, "base-moe": 530, "torchao-int8-moe": 500, "torchao-int4-tile-packed-dense": 700}
KEYS = {
    "tool",
    "packages",
    "model",
    "call",
    "device",
    "holds",
    "broken",
    "note",
    "edited",
    "dequantized_by",
    "dequantized",
}
ABSOLUTE = re.compile(r'"(/|[A-Za-z]:\\\\|~/)')
PERHAPS = ("hf_quant_config.json", "quantize_config.json", "quantization_config.json", "recipe.yaml")


def folders() -> list[str]:
    return sorted(path.name for path in HERE.iterdir() if path.is_dir())


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_each_folder_is_in_the_manifest_and_the_other_way_round() -> None:
    assert folders() == sorted([*MANIFEST, *BASES])


def test_the_folder_stays_small() -> None:
    assert size(HERE) < LIMIT_OF_ALL


@pytest.mark.parametrize("name", folders())
def test_a_checkpoint_is_small_and_holds_only_weights_and_configurations(name: str) -> None:
    assert size(HERE / name) < LARGER.get(name, LIMIT // KB) * KB
    for path in (HERE / name).iterdir():
        assert path.name == "config.json" or path.name in PERHAPS or ".safetensors" in path.name


@pytest.mark.parametrize("name", folders())
def test_the_safetensors_library_reads_each_tensor(name: str) -> None:
    files = sorted((HERE / name).glob("*.safetensors"))
    assert files
    for path in files:
        with safe_open(path, "pt") as held:
            assert all(held.get_tensor(key).numel() for key in held.keys())  # noqa: SIM118


@pytest.mark.parametrize("path", sorted(HERE.rglob("*.json")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_json_names_a_path_of_the_machine_that_made_it(path: Path) -> None:
    text = path.read_text()
    json.loads(text)
    assert not ABSOLUTE.search(text)
    assert "/tmp" not in text


@pytest.mark.parametrize("name", sorted(MANIFEST))
def test_an_entry_says_what_made_it_and_what_it_holds(name: str) -> None:
    entry = MANIFEST[name]
    assert entry.keys() == KEYS
    assert entry["tool"] in entry["packages"]
    assert name.endswith(entry["model"])
    assert entry["holds"]["scheme"] in PRESETS
    everything = {"dense": 7, "moe": 16}[entry["model"]]
    assert entry["broken"] or entry["holds"]["quantized_modules"] == everything


@pytest.mark.parametrize("name", sorted(MANIFEST))
def test_the_references_are_near_the_weights_of_the_base(name: str) -> None:
    """A transposed, shuffled or wrongly scaled reference would be off by more than half of the weight."""
    entry = MANIFEST[name]
    base = load_file(HERE / f"base-{entry['model']}" / "model.safetensors")
    kept = load_file(HERE / "references.safetensors")
    for module, said in entry["dequantized"].items():
        rows, source = kept[f"{name}/{module}"], base[f"{module}.weight"]
        assert str(rows.dtype) == f"torch.{said['dtype']}"
        assert list(source.shape) == said["shape"]
        wanted = source[::8].float()
        assert (rows.float() - wanted).norm() < 0.25 * wanted.norm()


def test_no_reference_belongs_to_nothing() -> None:
    said = {f"{name}/{module}" for name, entry in MANIFEST.items() for module in entry["dequantized"]}
    assert set(load_file(HERE / "references.safetensors")) == said


def test_the_projections_that_an_engine_fuses_differ_in_scale() -> None:
    held = load_file(HERE / "modelopt-fp8-dense" / "model.safetensors")
    scales = torch.stack([held[f"model.layers.0.self_attn.{p}_proj.weight_scale"] for p in "qkv"])
    assert len(scales.unique()) == 3
