"""Verify in every layout: what `unpack` does not read but engines do, merged scales, headers, damaged records."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO_MODEL, make_artifact, run_cli
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_verify import SHARD, failing, reseal

UP, DOWN, Q = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


def change(folder: Path, edit: Callable[[Tensors], object], keep_header: bool = True) -> None:
    with safe_open(folder / SHARD, "pt") as f:
        metadata = f.metadata()
    tensors = load_file(folder / SHARD)
    edit(tensors)
    save_file(tensors, folder / SHARD, metadata=metadata if keep_header else {"format": "pt"})
    reseal(folder)


def double(name: str) -> Callable[[Tensors], object]:
    return lambda t: t.update({name: t[name] * 2})


PLANTED: dict[str, tuple[str, str, Callable[[Tensors], object]]] = {
    "order of groups": (
        "w4a16",
        "gptq",
        lambda t: t.update({f"{DOWN}.g_idx": t[f"{DOWN}.g_idx"].flip(0).contiguous()}),
    ),
    "zeros of gptq": ("w4a16", "gptq", lambda t: t[f"{UP}.qzeros"].add_(1)),
    "zeros of awq": ("w4a16", "awq", lambda t: t[f"{UP}.qzeros"].add_(1)),
    "shape": (
        "w4a16",
        "ct-pack",
        lambda t: t.update({f"{UP}.weight_shape": t[f"{UP}.weight_shape"].flip(0).contiguous()}),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", PLANTED)
def test_bytes_that_engines_read_and_unpack_does_not(fault: str, tmp_path: Path) -> None:
    recipe, layout, edit = PLANTED[fault]
    artifact = make_artifact(DEMO_MODEL, recipe, tmp_path / "a", layout)
    assert not failing(artifact)
    change(artifact, edit)
    assert failing(artifact) == {"values"}
    assert failing(artifact, None) == {"values"}, "the source is not needed to see it"


@pytest.mark.parametrize("layout", ["ct-nvfp4", "modelopt-nvfp4"])
def test_merged_linears_with_different_global_scales(layout: str, tmp_path: Path) -> None:
    artifact = make_artifact(DEMO_MODEL, "nvfp4a16", tmp_path / "a", layout)
    name = f"{Q}.weight_global_scale" if layout == "ct-nvfp4" else f"{Q}.weight_scale_2"
    change(artifact, double(name))
    assert "merged" in failing(artifact, None)


def test_a_header_that_loaders_need(tmp_path: Path) -> None:
    artifact = make_artifact(DEMO_MODEL, "int4-hqq-tile", tmp_path / "a", "torchao-tile")
    assert not failing(artifact)
    change(artifact, lambda t: None, keep_header=False)
    assert "tensors" in failing(artifact)


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(DEMO_MODEL, "w4a16", tmp_path_factory.mktemp("master") / "a")


@pytest.mark.parametrize("value", [[], [{}], "x", [{"scheme": 1, "layout": "ct-pack", "algorithm": {}}]])
@pytest.mark.parametrize("command", ["verify", "profile", "card"])
def test_damaged_treatments_are_one_line(master: Path, value: Any, command: str, tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(master, tmp_path / "a"))
    run = json.loads((artifact / ".quantpub/run.json").read_text())
    (artifact / ".quantpub/run.json").write_text(json.dumps(run | {"treatments": value}))
    ran = run_cli(command, artifact)
    assert ran.code == 3 and "bug" not in ran.err and "treatment" in ran.out + ran.err


def test_an_artifact_of_an_older_quantpub_says_so(master: Path, tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(master, tmp_path / "a"))
    run = json.loads((artifact / ".quantpub/run.json").read_text())
    del run["treatments"]
    (artifact / ".quantpub/run.json").write_text(json.dumps(run))
    ran = run_cli("profile", artifact)
    assert ran.code == 3 and "made by an older quantpub" in ran.err


@pytest.mark.parametrize("place", [None, -1, 7, "a"])
def test_a_quantized_tensor_without_a_treatment_is_one_line(master: Path, place: object, tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(master, tmp_path / "a"))
    path = artifact / ".quantpub/plan.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    next(line for line in lines if line["action"] == "quantize")["treatment"] = place
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ran = run_cli("card", artifact)
    assert ran.code == 3 and "names no treatment of the run" in ran.err
