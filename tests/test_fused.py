"""What merged linears share, found before any of them is quantized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import DEMO_MODEL, make_artifact, save_llama
from safetensors.torch import load_file

from quantpub.artifact import Artifact
from quantpub.checkpoint import open_checkpoint
from quantpub.decode import Decoder
from quantpub.families import FAMILIES
from quantpub.fused import fused_amax, shares
from quantpub.gemms import engine_gemms, fuse, stack, weight
from quantpub.plan import make_plan
from quantpub.qtensor import dequantize, same_bits
from quantpub.recipe import load_recipe
from quantpub.scheme import PRESETS


def test_the_largest_magnitude_of_each_set(tmp_path: Path) -> None:
    """Members of one set lie in several shards; the amax is that of the stacked weight, negative side included."""
    model = save_llama(tmp_path / "m")
    weights = {name: w for shard in model.glob("*.safetensors") for name, w in load_file(shard).items()}
    found = fused_amax(make_plan(open_checkpoint(str(model)), load_recipe("nvfp4a16"), "ct-nvfp4"))
    shapes = {module: tuple(weights[f"{module}.weight"].shape) for module in found}
    assert len(found) == 21
    for members in fuse(shapes, FAMILIES["llama"]).values():
        due = torch.cat([weights[f"{member}.weight"] for member in members]).abs().max().item()
        assert {found[member] for member in members} == {due}


def test_schemes_that_share_nothing_read_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("quantpub.fused.read_slice", forbidden)
    assert fused_amax(make_plan(open_checkpoint(str(DEMO_MODEL)), load_recipe("w4a16"), "ct-pack")) == {}
    assert [name for name, scheme in PRESETS.items() if shares(scheme)] == ["FP8", "NVFP4A16", "NVFP4"]


def test_merged_members_have_one_global_scale_bit_for_bit(tmp_path: Path) -> None:
    decoder = Decoder(Artifact.open(make_artifact(save_llama(tmp_path / "m"), "nvfp4a16", tmp_path / "a", "ct-nvfp4")))
    sets = [members for members in fuse(dict(decoder.modules()), FAMILIES["llama"]).values() if len(members) > 1]
    assert len(sets) == 6
    for members in sets:
        parts = [decoder.qtensor(member) for member in members]
        assert all(same_bits(part.global_scale, parts[0].global_scale) for part in parts)
        stacked = stack(parts)
        assert torch.equal(dequantize(stacked), torch.cat([dequantize(part) for part in parts]))
    gemms = engine_gemms(decoder.artifact, decoder)
    assert weight(decoder, gemms[0]).shape == (gemms[0].n, gemms[0].k)


def test_the_artifact_is_the_same_after_an_interruption(tmp_path: Path) -> None:
    """What is shared is found again on a rerun: half an artifact is finished to the same bytes."""
    model = save_llama(tmp_path / "m")
    whole = make_artifact(model, "nvfp4a16", tmp_path / "whole", "ct-nvfp4")
    half = make_artifact(model, "nvfp4a16", tmp_path / "half", "ct-nvfp4")
    journal = half / ".quantpub" / "journal.jsonl"
    first = journal.read_text().splitlines(keepends=True)[0]
    journal.write_text(first)
    for shard in sorted(half.glob("*.safetensors"))[1:]:
        shard.unlink()
    for name in ("config.json", "SHA256SUMS"):
        (half / name).unlink(missing_ok=True)
        (half / ".quantpub" / name).unlink(missing_ok=True)
    make_artifact(model, "nvfp4a16", half, "ct-nvfp4")
    for shard in whole.glob("*.safetensors"):
        assert (half / shard.name).read_bytes() == shard.read_bytes()
