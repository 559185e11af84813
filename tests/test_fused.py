"""What merged linears share, found before any of them is quantized."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import DEMO_MODEL, make_artifact, save_llama
from safetensors.torch import load_file, save_file

from quantpub.artifact import Artifact
from quantpub.checkpoint import open_checkpoint
from quantpub.decode import Decoder
from quantpub.families import FAMILIES
from quantpub.fused import fused_amax, shares
from quantpub.gemms import engine_gemms, fuse, stack
from quantpub.merged import load as load_merged
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
    assert load_merged(decoder, gemms[0])[0].shape == (gemms[0].n, gemms[0].k)


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


def test_a_resumed_run_does_not_keep_a_shard_that_shared_another_scale(tmp_path: Path) -> None:
    """q changes, beyond what sampled blocks see, after the shard with k and v was finished: that shard is made again."""
    model = save_llama(tmp_path / "m", shards=1)
    (model / "model.safetensors.index.json").unlink()
    tensors = load_file(next(model.glob("*.safetensors")))
    next(model.glob("*.safetensors")).unlink()
    q = "model.layers.0.self_attn.q_proj.weight"
    shards = {"a.safetensors": {n: t for n, t in tensors.items() if n != q}, "b.safetensors": {q: tensors[q]}}
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for shard, held in shards.items():
        save_file(held, model / shard, metadata={"format": "pt"})
    part = make_artifact(model, "nvfp4a16", tmp_path / "part", "ct-nvfp4")
    journal, run = part / ".quantpub" / "journal.jsonl", part / ".quantpub" / "run.json"
    journal.write_text(journal.read_text().splitlines(keepends=True)[0])  # interrupted after a.safetensors
    for name in ("b.safetensors", "config.json", ".quantpub/SHA256SUMS"):
        (part / name).unlink()
    tensors[q][77, 33] = 8.0
    save_file({q: tensors[q]}, model / "b.safetensors", metadata={"format": "pt"})
    plan = make_plan(open_checkpoint(str(model)), load_recipe("nvfp4a16"), "ct-nvfp4")
    run.write_text(
        json.dumps(json.loads(run.read_text()) | {"digest": plan.digest()})
    )  # as sampled blocks would have it
    make_artifact(model, "nvfp4a16", part, "ct-nvfp4")
    whole = make_artifact(model, "nvfp4a16", tmp_path / "whole", "ct-nvfp4")
    for made in whole.glob("*.safetensors"):
        assert (part / made.name).read_bytes() == made.read_bytes(), made.name


def test_a_weight_that_grew_since_the_first_look_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantpub.errors import UnavailableError

    found = fused_amax(make_plan(open_checkpoint(str(DEMO_MODEL)), load_recipe("nvfp4a16"), "ct-nvfp4"))
    monkeypatch.setattr(
        "quantpub.calibrated.fused_amax", lambda plan: {name: value / 2 for name, value in found.items()}
    )
    with pytest.raises(UnavailableError, match="changed while it was read"):
        make_artifact(DEMO_MODEL, "nvfp4a16", tmp_path / "a", "ct-nvfp4")
