"""What goes wrong while a checkpoint is repacked: one line that says what and what to do, and nothing half-written."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO_MODEL, ROOT, make_artifact, run_cli, save_llama, tree
from repacks import GOLDEN, again, same_weights, weights
from safetensors.torch import load_file, save_file

from quantpub.destination import Destination
from quantpub.errors import InputError, UnavailableError

pytestmark = pytest.mark.usefixtures("unsynced")

SHARD, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def several(master: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(master, tmp_path / "several"))


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """llm-compressor's int4, that the test may damage."""
    return Path(shutil.copytree(GOLDEN / "llmcompressor-w4a16-dense", tmp_path / "theirs"))


def refused(source: Path | str, layout: str, out: Path, code: int, *words: str) -> None:
    ran = run_cli("repack", source, "--layout", layout, "-o", out)
    assert (ran.code, ran.out, ran.err.count("\n")) == (code, "", 1), ran
    for word in words:
        assert word in ran.err, (word, ran.err)
    assert not out.exists()


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))


@pytest.mark.slow
def test_killed_at_every_write_point_and_run_again_it_gives_the_same_bytes(tmp_path: Path) -> None:
    one = make_artifact(save_llama(tmp_path / "model", shards=2), "w4a16-rtn", tmp_path / "one")
    (tmp_path / "work").mkdir()
    command = [ROOT / "tests/partners/kill_repack.py", one, "gptq", tmp_path / "work", "points"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    killed = json.loads(done.stdout)["killed"]
    assert set(killed) == {"write", "rename", "renamed", "shard-open", "tensor", "journal", "journaled"}
    assert killed["journal"] == 2 and sum(killed.values()) > 100


def test_a_full_disk_keeps_finished_shards(several: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again(several, "gptq", tmp_path / "whole")
    real = Destination.add

    def full(self: Destination, shard: str, *rest: Any) -> None:
        if shard.startswith("model-00003"):
            raise UnavailableError("no space left on device", where=str(self.artifact.path), next="free some space")
        real(self, shard, *rest)

    monkeypatch.setattr(Destination, "add", full)
    with pytest.raises(UnavailableError, match="no space left"):
        again(several, "gptq", tmp_path / "out")
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert (
        left[0] == ".quantpub" and left[1:] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2)][: len(left) - 1]
    )
    assert not list((tmp_path / "out").rglob(".tmp-*"))
    monkeypatch.undo()
    again(several, "gptq", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing_leaves_nothing(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    refused(artifact, "gptq", tmp_path / "out", 6, os.strerror(number).lower())


def test_a_folder_that_is_taken(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert "something else (thesis.tex)" in run_cli("repack", artifact, "--layout", "gptq", "-o", out).err
    assert tree(out) == {"thesis.tex": b"years of work"}
    (tmp_path / "file").write_text("")
    assert run_cli("repack", artifact, "--layout", "gptq", "-o", tmp_path / "file").code == 5


def test_a_second_run_changes_nothing_and_another_layout_is_a_conflict(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_cli("repack", artifact, "--layout", "gptq", "-o", out).code == 0
    before = tree(out)
    second = run_cli("repack", artifact, "--layout", "gptq", "-o", out, "--json")
    assert second.code == 0 and second.json()["changed"] is False
    assert run_cli("repack", artifact, "--layout", "awq", "-o", out).code == 5
    assert tree(out) == before


def test_another_process_in_the_folder(artifact: Path, tmp_path: Path) -> None:
    meta = tmp_path / "out" / ".quantpub"
    meta.mkdir(parents=True)
    (tmp_path / "out/.tmp-model.safetensors").write_bytes(b"the other's")
    other = os.open(meta, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    try:
        ran = run_cli("repack", artifact, "--layout", "gptq", "-o", tmp_path / "out")
        assert ran.code == 5 and "another process" in ran.err and meta.is_dir()
        assert tree(tmp_path / "out") == {".tmp-model.safetensors": b"the other's"}
    finally:
        os.close(other)


def test_a_source_that_changes_while_it_is_read(several: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second shard loses its scales' last bit after the first was written."""
    real, calls = Destination.closed, 0

    def closed_then_changed(self: Destination, shard: str) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            path = several / "model-00003-of-00003.safetensors"
            raw = bytearray(path.read_bytes())
            raw[-1] ^= 1
            path.write_bytes(raw)
        return real(self, shard)

    monkeypatch.setattr(Destination, "closed", closed_then_changed)
    with pytest.raises(UnavailableError, match="changed"):
        again(several, "gptq", tmp_path / "out")
    assert not (tmp_path / "out/config.json").exists()


LAST = "model-00003-of-00003.safetensors"
DAMAGED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "truncated": (lambda a: os.truncate(a / LAST, 9000), [LAST, "truncated"]),
    "missing": (lambda a: (a / LAST).unlink(), [LAST, "the shard is missing"]),
    "index of another place": (
        lambda a: edit(a, INDEX, lambda v: v["weight_map"].update({"model.embed_tokens.weight": LAST})),
        ["model.embed_tokens.weight", LAST, "it is not there"],
    ),
    "index of another name": (lambda a: edit(a, INDEX, lambda v: v["weight_map"].update({"x": LAST})), ["x"]),
    "no index": (lambda a: (a / INDEX).unlink(), [INDEX, "missing"]),
    "no plan": (lambda a: (a / ".quantpub/plan.jsonl").unlink(), ["plan.jsonl"]),
    "unfinished": (lambda a: edit(a, ".quantpub/run.json", lambda v: v["stages"].clear()), ["not finished"]),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(DAMAGED))
def test_a_damaged_artifact_is_not_written_anew(several: Path, tmp_path: Path, case: str) -> None:
    damage, words = DAMAGED[case]
    damage(several)
    refused(several, "gptq", tmp_path / "out", 3, *words)


ATTENTION = "model.layers.0.self_attn"
THEIRS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "truncated": (lambda c: os.truncate(c / SHARD, 5000), ["truncated"]),
    "no weights": (lambda c: (c / SHARD).unlink(), ["no safetensors files"]),
    "no config": (lambda c: (c / "config.json").unlink(), ["no config.json"]),
    "a scale is missing": (
        lambda c: rewrite(c, lambda t: t.pop(f"{ATTENTION}.k_proj.weight_scale")),
        [f"{ATTENTION}.k_proj.weight_scale is missing"],
    ),
    "a scale of another shape": (
        lambda c: rewrite(c, lambda t: t.update({f"{ATTENTION}.k_proj.weight_scale": torch.ones(3, 1).bfloat16()})),
        [f"{ATTENTION}.k_proj.weight_scale", "[3, 1]"],
    ),
    "act order": (
        lambda c: rewrite(c, lambda t: t.update({f"{ATTENTION}.k_proj.weight_g_idx": torch.ones(128).int()})),
        ["order of their activations"],
    ),
    "not quantized": (lambda c: edit(c, "config.json", lambda v: v.pop("quantization_config")), ["is not quantized"]),
    "an unknown method": (
        lambda c: edit(c, "config.json", lambda v: v["quantization_config"].update(quant_method="exl3")),
        ["ExLlama"],
    ),
    "bits that are not read": (
        lambda c: edit(
            c, "config.json", lambda v: v["quantization_config"]["config_groups"]["group_0"]["weights"].update(num_bits=3)
        ),
        ["3 bits"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(THEIRS))
def test_anothers_checkpoint_that_does_not_bear_reading(theirs: Path, tmp_path: Path, case: str) -> None:
    damage, words = THEIRS[case]
    damage(theirs)
    refused(theirs, "gptq", tmp_path / "out", 3, *words)


@pytest.mark.parametrize(
    ("name", "layout", "words"),
    [
        ("gptqmodel-gptq-desc-act-dense", "ct-pack", ["order of their activations"]),
        ("modelopt-int4-awq-dense", "ct-pack", ["pre_quant_scale"]),
        ("torchao-fp8-weight-dense", "ct-float", ["no layout that is written holds it"]),
        ("llmcompressor-fp8-dynamic-dense", "ct-pack", ["not FP8_DYNAMIC", "ct-float, modelopt-fp8-channel"]),
        ("llmcompressor-w4a16-dense", "ct-int", ["ct-int holds", "not W4A16"]),
        ("autoawq-w4-dense", "torchao-tile", ["torchao-tile is for models in bf16, and this one is in fp16"]),
        ("modelopt-nvfp4-kv-dense", "torchao-nvfp4", ["no place for the scales of its FP8 KV cache"]),
        ("modelopt-nvfp4-moe", "torchao-nvfp4", ["no engine would load it", "experts"]),
        ("base-dense", "ct-pack", ["is not quantized"]),
    ],
)
def test_what_a_layout_does_not_hold(tmp_path: Path, name: str, layout: str, words: list[str]) -> None:
    refused(GOLDEN / name, layout, tmp_path / "out", 3, *words)


def test_layouts_that_do_not_exist_or_that_none_reads(artifact: Path, tmp_path: Path) -> None:
    refused(artifact, "gtpq", tmp_path / "out", 2, "unknown layout 'gtpq'", "gptq")
    refused(artifact, "marlin", tmp_path / "out", 2, "marlin is what a kernel eats", "ct-pack")
    refused(artifact, "gptq-zeros", tmp_path / "out", 2, "unknown layout")
    refused(tmp_path / "nowhere", "gptq", tmp_path / "out", 3)


def test_a_module_whose_tensors_lie_in_two_shards(theirs: Path, tmp_path: Path) -> None:
    again(theirs, "gptq", tmp_path / "whole")
    tensors = load_file(theirs / SHARD)
    parts = {f"model-0000{i}-of-00002.safetensors": dict[str, torch.Tensor]() for i in (1, 2)}
    one, two = parts.values()
    for name, tensor in tensors.items():
        (two if name.endswith("weight_scale") else one)[name] = tensor
    for shard, held in parts.items():
        save_file(held, theirs / shard, metadata={"format": "pt"})
    (theirs / SHARD).unlink()
    index = {"metadata": {}, "weight_map": {name: shard for shard, held in parts.items() for name in held}}
    (theirs / INDEX).write_text(json.dumps(index))
    assert again(theirs, "gptq", tmp_path / "split")["equal"] == 7
    assert same_weights(tmp_path / "whole", tmp_path / "split")
    found = json.loads((tmp_path / "split" / INDEX).read_text())["weight_map"]
    held = {name: path.name for path in (tmp_path / "split").glob("*.safetensors") for name in load_file(path)}
    assert held == found and set(held) == set(load_file(tmp_path / "whole" / SHARD))


@pytest.mark.slow
def test_smoothing_and_calibration_come_along(tmp_path: Path) -> None:
    one = make_artifact(DEMO_MODEL, "int8-smoothquant", tmp_path / "one")
    assert again(one, "ct-int", tmp_path / "two")["equal"] == 28
    for name in ("smoothing.safetensors", "calibration.json"):
        assert (tmp_path / "two/.quantpub" / name).read_bytes() == (one / ".quantpub" / name).read_bytes()
    ran = run_cli("verify", tmp_path / "two", "--source", DEMO_MODEL)
    assert ran.code == 0, ran.err
    assert run_cli("card", tmp_path / "two").code == 0
    assert "Calibrated with:" in (tmp_path / "two/README.md").read_text()


@pytest.mark.slow
def test_several_schemes_in_one_checkpoint(tmp_path: Path) -> None:
    """Layouts of one method stand side by side; another method's is refused with the first scheme that it lacks."""
    one = make_artifact(DEMO_MODEL, "w4a16-fp8-down", tmp_path / "one")
    refused(one, "gptq", tmp_path / "no", 3, "gptq holds", "not FP8_DYNAMIC")
    refused(one, "ct-nvfp4", tmp_path / "no", 3, "ct-nvfp4 holds", "not W4A16")
    proof = again(one, "ct-pack", tmp_path / "two")
    assert proof["equal"] == 28 and proof["from"]["layouts"] == ["ct-pack", "ct-float"]
    for name in (SHARD, "config.json"):
        assert (tmp_path / "two" / name).read_bytes() == (one / name).read_bytes()
    assert weights(tmp_path / "two").keys() == weights(one).keys()
    for stage in ("verify", "card"):
        ran = run_cli(stage, tmp_path / "two")
        assert ran.code == 0, ran.err


def test_a_single_scheme_is_not_written_in_a_layout_beside_the_one_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ct-pack holds"):
        again(GOLDEN / "llmcompressor-fp8-static-dense", "ct-pack", tmp_path / "out")
