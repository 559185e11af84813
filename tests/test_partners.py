"""Loaders that nobody here wrote open what we write, and find the weights that `dequantize` says are there."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEMO_MODEL, ROOT, make_artifact

from quantpub.artifact import Artifact
from quantpub.decode import Decoder
from quantpub.qtensor import dequantize

NEWEST = Path(sys.prefix) / "ct-newest"


def our_digests(folder: Path) -> dict[str, str]:
    decoder = Decoder(Artifact.open(folder))
    weights = {module: dequantize(decoder.qtensor(module)).bfloat16() for module, _ in decoder.modules()}
    return {
        m: hashlib.sha256(w.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest() for m, w in weights.items()
    }


def their_digests(folder: Path, site: Path | None) -> dict[str, object]:
    path = {"PYTHONPATH": str(site)} if site else {}
    done = subprocess.run(
        [sys.executable, ROOT / "tests/partners/ct_decompress.py", folder],
        env={**os.environ, **path},
        capture_output=True,
        text=True,
        check=True,
    )
    value: dict[str, object] = json.loads(done.stdout)
    return value


@pytest.mark.slow
@pytest.mark.parametrize("site", [None, NEWEST], ids=["pinned by the engines", "newest"])
def test_compressed_tensors_decompresses_every_module_to_our_weights(any_artifact: Path, site: Path | None) -> None:
    assert site is None or site.is_dir(), "`make venv` installs the newest compressed-tensors there"
    theirs = their_digests(any_artifact, site)
    assert theirs["version"] == "0.17.0" if site is None else theirs["version"] != "0.17.0"
    assert theirs["digests"] == our_digests(any_artifact)
    assert len(our_digests(any_artifact)) == 28


@pytest.mark.slow
def test_transformers_opens_the_artifact_to_our_weights(any_artifact: Path) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    model = AutoModelForCausalLM.from_pretrained(
        any_artifact, dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(run_compressed=False)
    )
    found, decoder = dict(model.named_parameters()), Decoder(Artifact.open(any_artifact))
    for module, _ in decoder.modules():
        assert torch.equal(found[f"{module}.weight"], dequantize(decoder.qtensor(module)).bfloat16()), module
    for name in decoder.copied():
        assert torch.equal(found[name], decoder.tensor(name)), name


@pytest.mark.slow
def test_every_expert_is_quantized_and_the_router_is_not(tmp_path: Path) -> None:
    """A Qwen3-MoE written by transformers: per-expert linears, all of them packed; compressed-tensors unpacks each."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        num_experts=4,
        num_experts_per_tok=2,
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "moe")
    artifact = make_artifact(tmp_path / "moe", "w4a16", tmp_path / "out")
    modules = [module for module, _ in Decoder(Artifact.open(artifact)).modules()]
    assert sum(".experts." in module for module in modules) == 2 * 4 * 3
    assert not any(module.endswith("mlp.gate") for module in modules)
    ignore = json.loads((artifact / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignore == ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert their_digests(artifact, None)["digests"] == our_digests(artifact)


def test_the_tokenizer_comes_along_byte_for_byte(any_artifact: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (any_artifact / name).read_bytes() == (DEMO_MODEL / name).read_bytes()
