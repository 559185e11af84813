"""Verify: sound artifacts pass without a false alarm; one planted failure for every rule, caught by that rule."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import DEMO_MODEL, make_artifact, run_cli, save_llama
from plants import FURTHER, ROWS
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantpub.artifact import Artifact
from quantpub.errors import InputError
from quantpub.files import sha256_file
from quantpub.verify import RULES
from quantpub.verify.run import verify

SHARD = "model.safetensors"
DOWN = "model.layers.1.mlp.down_proj"


def statuses(folder: Path, source: str | None = str(DEMO_MODEL)) -> dict[str, str]:
    return {check["id"]: check["status"] for check in verify(Artifact.open(folder), source)["checks"]}


def failing(folder: Path, source: str | None = str(DEMO_MODEL)) -> set[str]:
    return {name for name, status in statuses(folder, source).items() if status == "failed"}


def reseal(folder: Path) -> None:
    """As a tool that wrote wrong bytes with right checksums would leave it."""
    journal = folder / ".quantpub/journal.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    text = "".join(json.dumps(line | {"sha256": sha256_file(folder / line["shard"])}) + "\n" for line in lines)
    journal.write_text(text)
    (folder / ".quantpub/SHA256SUMS").unlink()
    Artifact(folder).seal()


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})
    reseal(folder)


def edit_json(folder: Path, name: str, change: Callable[[dict[str, object]], object]) -> None:
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))
    reseal(folder)


def swap_nibbles(t: dict[str, torch.Tensor]) -> None:
    words = t[f"{DOWN}.weight_packed"].view(torch.uint8)
    t[f"{DOWN}.weight_packed"] = ((words >> 4) | (words << 4)).view(torch.int32)


def shift_scales(t: dict[str, torch.Tensor]) -> None:
    t[f"{DOWN}.weight_scale"] = t[f"{DOWN}.weight_scale"].roll(1, 1).contiguous()


def test_every_recipe_passes_without_a_false_alarm(any_artifact: Path) -> None:
    assert set(statuses(any_artifact).values()) == {"passed"}


def test_a_sharded_artifact_passes(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "m")
    assert failing(make_artifact(model, "w4a16", tmp_path / "out"), str(model)) == set()


PLANTED: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "a byte of a shard flipped": (
        lambda a: (a / SHARD).write_bytes((a / SHARD).read_bytes()[:-1] + b"\x11"),
        {"files", "copies"},
    ),
    "a pickle beside it": (lambda a: ((a / "extra.bin").write_bytes(b""), reseal(a)), {"safe-files"}),
    "code beside it": (lambda a: ((a / "modeling.py").write_text(""), reseal(a)), {"safe-files"}),
    "nibbles swapped": (lambda a: rewrite(a, swap_nibbles), {"values"}),
    "scales off by one group": (lambda a: rewrite(a, shift_scales), {"values"}),
    "a scale of zero": (lambda a: rewrite(a, lambda t: t[f"{DOWN}.weight_scale"].view(-1)[0].zero_()), {"scales"}),
    "half a tensor of zeros": (
        lambda a: rewrite(a, lambda t: t[f"{DOWN}.weight_packed"][64:].fill_(-0x77777778)),
        {"values"},
    ),
    "a copied tensor touched": (lambda a: rewrite(a, lambda t: t["model.norm.weight"].mul_(1.01)), {"copies"}),
    "a scale missing": (lambda a: rewrite(a, lambda t: t.pop(f"{DOWN}.weight_scale")), {"tensors"}),
    "an extra tensor": (lambda a: rewrite(a, lambda t: t.update({"model.extra": torch.zeros(2)})), {"tensors"}),
    "a scale in another dtype": (
        lambda a: rewrite(a, lambda t: t.update({f"{DOWN}.weight_scale": t[f"{DOWN}.weight_scale"].float()})),
        {"tensors"},
    ),
    "an unknown key in the config": (
        lambda a: edit_json(
            a, "config.json", lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(zap=1)
        ),
        {"parses"},
    ),
    "a quantized module in ignore": (
        lambda a: edit_json(a, "config.json", lambda c: c["quantization_config"]["ignore"].append(DOWN)),
        {"config"},
    ),
    "a local path in the config": (
        lambda a: edit_json(a, "config.json", lambda c: c.update(_name_or_path="/home/me/model")),
        {"private"},
    ),
    "another tokenizer": (lambda a: ((a / "tokenizer_config.json").write_text("{}"), reseal(a)), {"coverage"}),
    "declared bits that are not there": (
        lambda a: edit_json(
            a, ".quantpub/run.json", lambda r: r["stages"]["quantize"].update(bits_per_quantized_weight=3.9)
        ),
        {"bits"},
    ),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_failure_is_caught_by_its_rule(case: str, artifact: Path) -> None:
    plant, rules = PLANTED[case]
    plant(artifact)
    assert failing(artifact) == rules


def test_every_rule_has_a_planted_failure() -> None:
    """Here, and in test_firewall, which plants those of plants.py. `readable` never fails: it leaves a verdict incomplete."""
    planted = {plant.rule for plant in [*FURTHER.values(), *(p for plants in ROWS.values() for p in plants.values())]}
    assert set().union(*(rules for _, rules in PLANTED.values())) | planted == set(RULES) - {"readable"}


def test_an_index_that_lies_is_caught(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "m")
    out = make_artifact(model, "w4a16", tmp_path / "out")
    edit_json(
        out,
        "model.safetensors.index.json",
        lambda i: i["weight_map"].update({"model.norm.weight": "model-00001-of-00003.safetensors"}),
    )
    assert failing(out, str(model)) == {"index"}


def test_damage_is_not_sealed_away(artifact: Path) -> None:
    """A stage that writes evidence must not make a checksum of what someone else changed."""
    (artifact / "generation_config.json").write_text("{}")
    (artifact / "stray.txt").write_text("")
    for _ in range(2):
        assert failing(artifact, None) == {"files"}
    assert Artifact(artifact).damage() == ["generation_config.json", "stray.txt"]


def test_without_the_source_the_verdict_is_incomplete(artifact: Path) -> None:
    evidence = verify(Artifact.open(artifact))
    assert evidence["verdict"] == "incomplete"
    skipped = {check["id"]: check["detail"] for check in evidence["checks"] if check["status"] == "skipped"}
    assert set(skipped) == {"coverage", "copies"}
    assert all("no --source" in detail for detail in skipped.values())


def test_another_model_as_source_is_refused(artifact: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    save_file({"model.layers.9.mlp.up_proj.weight": torch.zeros(128, 128)}, other / SHARD)
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(InputError, match="another model"):
        verify(Artifact.open(artifact), str(other))


def test_the_sqnr_is_that_of_the_definition(artifact: Path) -> None:
    """Recomputed from the files by compressed-tensors' unpacker and numpy-like float64 arithmetic."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    evidence = verify(Artifact.open(artifact), str(DEMO_MODEL))
    found = {entry["module"]: entry["sqnr_db"] for entry in evidence["per_tensor"]}
    t = load_file(artifact / SHARD)
    with safe_open(DEMO_MODEL / SHARD, "pt") as f:
        w = f.get_tensor(f"{DOWN}.weight").double()
    codes = unpack_from_int32(t[f"{DOWN}.weight_packed"], 4, w.shape).double()
    off = codes * t[f"{DOWN}.weight_scale"].double().repeat_interleave(128, 1) - w
    expected = 10 * torch.log10(w.square().sum() / off.square().sum()).item()
    assert found[DOWN] == pytest.approx(expected, abs=1e-3)


def test_the_command_exits_3_with_the_reason(artifact: Path) -> None:
    rewrite(artifact, swap_nibbles)
    ran = run_cli("verify", artifact, "--source", DEMO_MODEL)
    assert ran.code == 3
    assert f"values: {DOWN}: SQNR" in ran.err and ran.err.count("\n") == 1
    assert "verdict: failed" in ran.out
