"""Merged weights of every layout: whatever way an artifact lies on disk, its GEMMs stack."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import DEMO_MODEL, make_artifact

from quantpub.artifact import Artifact
from quantpub.decode import Decoder
from quantpub.families import FAMILIES
from quantpub.gemms import engine_gemms, group
from quantpub.merged import load as load_merged
from quantpub.qtensor import dequantize


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [
        ("w4a16", "gptq"),
        ("w4a16-asym", "awq"),
        ("w8a16", "gptq"),
        ("nvfp4a16", "modelopt-nvfp4"),
        ("fp8-block", "hf-fp8"),
    ],
)
def test_members_stack_to_the_weight_an_engine_multiplies_by(recipe: str, layout: str, tmp_path: Path) -> None:
    """down_proj's K of 384 gives several groups, the others' 128 one: scales of a single column too."""
    decoder = Decoder(Artifact.open(make_artifact(DEMO_MODEL, recipe, tmp_path / "a", layout)))
    for gemm in engine_gemms(decoder.artifact, decoder):
        parts = [dequantize(decoder.qtensor(member)) for member in gemm.members]
        assert torch.equal(dequantize(load_merged(decoder, gemm)[0]), torch.cat(parts)) and gemm.n == sum(
            map(len, parts)
        )


def test_members_stay_apart_where_a_block_would_hold_rows_of_two() -> None:
    at = "model.layers.0.self_attn."
    shapes = {at + "q_proj": (256, 128), at + "k_proj": (64, 128), at + "v_proj": (64, 128)}
    rows = dict.fromkeys(shapes, 128)
    assert [(gemm.name, gemm.n) for gemm in group(shapes, FAMILIES["llama"])] == [("self_attn.qkv_proj", 384)]
    apart = group(shapes, FAMILIES["llama"], 0, rows)
    assert [(gemm.name, gemm.n) for gemm in apart] == [
        ("self_attn.q_proj", 256), ("self_attn.k_proj", 64), ("self_attn.v_proj", 64)
    ]  # fmt: skip
    whole = shapes | {at + "k_proj": (128, 128)}
    assert len(group(whole, FAMILIES["llama"], 0, rows)) == 1, "the last member may end in a part of a block"
