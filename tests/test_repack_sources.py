"""What a repack is made from and where it goes: a source that is damaged, edited, half-quantized, or in the output's way."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO_MODEL, make_artifact, run_cli, tree
from plants import one_scale
from repacks import GOLDEN, again, weight_files
from safetensors.torch import load_file, save_file

from quantpub.artifact import Artifact
from quantpub.cli_repack import _require_sound
from quantpub.decode import Decoder
from quantpub.destination import Destination
from quantpub.errors import UnavailableError
from quantpub.opened import open_quantized
from quantpub.recipe import load_recipe
from quantpub.recipe_files import recipe_files
from quantpub.repack import _require_unchanged
from quantpub.repack_recipe import REPACKED
from quantpub.sources import LocalSource

pytestmark = pytest.mark.usefixtures("unsynced")

SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
HALF = "torchao-int8-moe"  # its experts were left in bf16


@pytest.fixture(scope="module")
def repacked(master: Path) -> Path:
    """The same as gptq. Read only."""
    again(master, "gptq", master.parent / "gptq")
    return master.parent / "gptq"


@pytest.fixture
def several(master: Path) -> Path:
    """A copy of it that the test may damage, of the same name: that goes into what is made of it."""
    folder = master.parent / "copies" / "artifact"
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(master, folder))


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def refused(source: Path, layout: str, out: Path, code: int, *words: str) -> None:
    ran = run_cli("repack", source, "--layout", layout, "-o", out)
    assert (ran.code, ran.out, ran.err.count("\n")) == (code, "", 1), ran
    assert all(word in ran.err for word in words), ran.err


def stopped_at(shard: str, monkeypatch: pytest.MonkeyPatch, source: Path, out: Path) -> None:
    """Repack to the disk's end, which the first tensor of that shard meets."""
    real = Destination.add

    def full(self: Destination, name: str, *rest: Any) -> None:
        if name == shard:
            raise UnavailableError("no space left on device", where=str(out), next="free some space")
        real(self, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Destination, "add", full)
        with pytest.raises(UnavailableError, match="no space left"):
            again(source, "gptq", out)


# ---- damage


@pytest.mark.parametrize(("shard", "place"), [(SHARDS[0], -1), (SHARDS[1], -9), (SHARDS[2], -20_000)])
def test_a_shard_that_is_not_as_it_was_sealed_is_not_written_anew(
    several: Path, tmp_path: Path, shard: str, place: int
) -> None:
    """Also where it is only copied, as the embedding is."""
    flip(several / shard, place)
    refused(several, "gptq", tmp_path / "out", 3, shard, "SHA256SUMS", "download or copy the checkpoint again")
    assert not (tmp_path / "out").exists()


def test_without_sums_the_journal_tells(several: Path, tmp_path: Path) -> None:
    (several / ".quantpub/SHA256SUMS").unlink()
    flip(several / SHARDS[1], -9)
    refused(several, "gptq", tmp_path / "out", 3, SHARDS[1], "its journal")
    assert not (tmp_path / "out").exists()


def test_damage_between_two_runs_leaves_what_the_first_finished(
    several: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage that no sampled block shows."""
    monkeypatch.setattr(LocalSource, "fingerprint", lambda self, shard: str(self.files[shard]))
    stopped_at(SHARDS[2], monkeypatch, several, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    flip(several / SHARDS[2], -1)
    refused(several, "gptq", tmp_path / "out", 3, SHARDS[2], "SHA256SUMS")
    assert SHARDS[0] in before and SHARDS[2] not in before
    left = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert before.items() <= left.items() and left.keys() <= {*SHARDS[:2]}


def test_a_shard_that_is_another_file_now_changed_while_it_was_read(several: Path) -> None:
    source = LocalSource(several)
    state = source.state(SHARDS[0])
    _require_unchanged(source, SHARDS[0], state)
    flip(several / SHARDS[0], -1)
    with pytest.raises(UnavailableError, match=f"{SHARDS[0]}: the file changed while it was read"):
        _require_unchanged(source, SHARDS[0], state)


@pytest.mark.parametrize("ours", [True, False])
def test_an_edit_is_seen_when_the_same_command_runs_again(ours: bool, artifact: Path, tmp_path: Path) -> None:
    """Of one of ours wherever it is. As another tool's nothing states what the file was: in the blocks that are sampled."""
    if not ours:
        shutil.rmtree(artifact / ".quantpub")
        (artifact / "README.md").unlink(missing_ok=True)
    shard, out = artifact / "model.safetensors", tmp_path / "out"
    again(artifact, "gptq", out)
    before, sampled = tree(out), LocalSource(artifact).fingerprint(shard.name)
    assert run_cli("repack", artifact, "--layout", "gptq", "-o", out, "--json").json()["changed"] is False
    second = (shard.stat().st_size - (64 << 10)) // 15  # where the second block begins
    flip(shard, second + (-2000 if ours else 2000))
    assert (LocalSource(artifact).fingerprint(shard.name) == sampled) is ours
    says = "the source it was made from is not the same any more" if ours else "an older state of the same source"
    refused(artifact, "gptq", out, 5, says)
    assert tree(out) == before


# ---- a run that goes on where another stopped


@pytest.mark.parametrize("lost", ["proofs", "a proof", "a byte of a finished shard", "the digest of its source"])
def test_what_of_a_finished_shard_is_lost_is_made_again(
    master: Path, repacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    out = tmp_path / "out"
    stopped_at(SHARDS[2], monkeypatch, master, out)
    journal, proofs = out / ".quantpub/journal.jsonl", out / ".quantpub/repack.jsonl"
    assert journal.is_file() and proofs.is_file()
    if lost == "proofs":
        proofs.unlink()
    elif lost == "a proof":
        lines = [json.loads(line) for line in proofs.read_text().splitlines()]
        next(line["modules"] for line in lines if line["modules"]).pop()
        proofs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif lost == "a byte of a finished shard":
        flip(out / SHARDS[0], -1)
    else:
        entry = json.loads(journal.read_text().splitlines()[0]) | {"source_sha256": "0" * 64}
        journal.write_text(json.dumps(entry) + "\n")
    again(master, "gptq", out)
    assert tree(out) == tree(repacked)


def test_a_finished_artifact_without_its_proofs_is_damaged(repacked: Path, master: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(repacked, tmp_path / "out"))
    (out / ".quantpub/repack.jsonl").unlink()
    refused(master, "gptq", out, 5, "repack.jsonl is missing")


def test_who_finds_the_folder_locked_leaves_what_the_other_writes(
    master: Path, repacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command, given again while the first has a shard half-written."""
    out, real, seen = tmp_path / "out", Destination.closed, list[set[str]]()

    def beside(self: Destination, shard: str) -> Any:
        if not seen:
            before = {path.name for path in out.iterdir()}
            seen.append(before)
            refused(master, "gptq", out, 5, "another process")
            assert before <= {path.name for path in out.iterdir()}
        return real(self, shard)

    monkeypatch.setattr(Destination, "closed", beside)
    again(master, "gptq", out)
    assert f".tmp-{SHARDS[0]}" in seen[0]
    assert tree(out) == tree(repacked)


# ---- where it goes


def test_the_output_is_not_within_the_checkpoint(master: Path, tmp_path: Path) -> None:
    before = tree(master)
    refused(master, "gptq", master, 5, "the output folder is the checkpoint itself", "choose another folder")
    refused(master, "gptq", master / "deep" / "gptq", 5, "lies in the checkpoint's own")
    (tmp_path / "link").symlink_to(master)
    refused(master, "gptq", tmp_path / "link" / "gptq", 5, "lies in the checkpoint's own")
    inside = Path(shutil.copytree(master, tmp_path / "above" / "artifact"))
    refused(inside, "gptq", tmp_path / "above", 5, "something else")
    assert tree(master) == before and not (master / "deep").exists()


def test_the_same_layout_is_a_copy_with_a_proof(master: Path, tmp_path: Path) -> None:
    proof = again(master, "ct-pack", tmp_path / "out")
    assert proof["equal"] == proof["modules"] and proof["from"]["layouts"] == ["ct-pack"]
    assert weight_files(tmp_path / "out") == weight_files(master)


def test_a_source_that_cannot_be_written_to(several: Path, repacked: Path, tmp_path: Path) -> None:
    folders = [several, *(path for path in several.rglob("*") if path.is_dir())]
    before = tree(several), [path.stat().st_mtime_ns for path in folders]
    for path in several.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    several.chmod(0o555)
    try:
        again(several, "gptq", tmp_path / "out")
    finally:
        for path in folders:
            path.chmod(0o755)
    assert (tree(several), [path.stat().st_mtime_ns for path in folders]) == before
    assert tree(tmp_path / "out") == tree(repacked)
    assert os.access(tmp_path / "out" / "LICENSE", os.W_OK)


# ---- what it says of itself


MIXED = [name for name in recipe_files() if load_recipe(name).rules]


def layouts_of(folder: Path) -> list[str]:
    return [treatment["layout"] for treatment in Artifact.open(folder).run()["treatments"]]


@pytest.mark.parametrize("asked", ["ct-pack", "ct-float"])
@pytest.mark.parametrize("name", MIXED)
def test_the_recipe_of_several_schemes_is_read_back(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, name: str, asked: str
) -> None:
    one = tmp_path_factory.getbasetemp() / f"mixed-{name}"
    if not one.exists():
        make_artifact(DEMO_MODEL, name, one)
    out = tmp_path / "out"
    again(one, asked, out)
    own, found = load_recipe(name), Artifact.open(out).recipe()
    assert found.rules == own.rules and found.scheme == own.scheme and found.algorithm == own.algorithm
    assert set(found.engines.values()) == {Artifact.open(out).run()["layout"]} and set(own.engines) <= set(
        found.engines
    )
    assert "transformers" not in found.engines, "it decompresses by the first group alone"
    assert found.description == f"{own.description}{REPACKED}{' and '.join(dict.fromkeys(layouts_of(out)))}"


# ---- half of it


def test_a_model_whose_experts_were_left_out_is_not_made_ours(tmp_path: Path) -> None:
    refused(GOLDEN / HALF, "ct-int", tmp_path / "out", 3, "bits:", "stand in high precision", "quantize again")
    assert not (tmp_path / "out").exists()


def test_a_layer_that_is_missing_is_told(tmp_path: Path) -> None:
    theirs = Path(shutil.copytree(GOLDEN / "llmcompressor-w4a16-dense", tmp_path / "theirs"))
    tensors = load_file(theirs / "model.safetensors")
    gone = [name for name in tensors if ".mlp.up_proj." in name]
    save_file({k: t for k, t in tensors.items() if k not in gone}, theirs / "model.safetensors", {"format": "pt"})
    refused(theirs, "gptq", tmp_path / "out", 3, "complete:", "up_proj is missing")
    assert not (tmp_path / "out").exists() and gone


def test_what_other_tools_made_whole_passes() -> None:
    names = [path.name for path in GOLDEN.iterdir() if path.is_dir() and path.name.endswith("-moe")]
    for name in sorted({*names, "autoawq-w4-dense", "modelopt-nvfp4-kv-dense"} - {HALF, "base-moe"}):
        _require_sound(open_quantized(str(GOLDEN / name)))


def test_one_scale_of_keys_and_values_is_written_as_two(tmp_path: Path) -> None:
    """As AutoFP8 stores them: what the layouts here hold are scales of keys and of values."""
    theirs = Path(shutil.copytree(GOLDEN / "llmcompressor-fp8-dynamic-kv-dense", tmp_path / "theirs"))
    tensors = load_file(theirs / "model.safetensors")
    one_scale(tensors)
    save_file(tensors, theirs / "model.safetensors", {"format": "pt"})
    assert run_cli("repack", theirs, "--layout", "ct-float", "-o", tmp_path / "out").code == 0
    found = Decoder(Artifact.open(tmp_path / "out")).kv_scales()
    assert found and all(keys == values for keys, values in found.values())
    assert run_cli("verify", tmp_path / "out").code == 0
