"""Loaders that nobody here wrote open what we write, and find the weights that `dequantize` says are there."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO_MODEL, ROOT, make_artifact, save_llama

from quantpub.artifact import Artifact
from quantpub.decode import Decoder
from quantpub.qtensor import dequantize
from quantpub.recipe import load_recipe
from quantpub.recipe_files import recipe_files

NEWEST = Path(sys.prefix) / "ct-newest"


def our_digests(folder: Path) -> dict[str, str]:
    decoder = Decoder(Artifact.open(folder))
    weights = {module: dequantize(decoder.qtensor(module)).bfloat16() for module, _ in decoder.modules()}
    return {
        m: hashlib.sha256(w.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest() for m, w in weights.items()
    }


def their_digests(folder: Path, site: Path | None) -> dict[str, Any]:
    return decompressed([folder], site)[0]


def decompressed(folders: Sequence[Path], site: Path | None) -> list[dict[str, Any]]:
    """What compressed-tensors makes of each artifact, in one process."""
    path = {"PYTHONPATH": str(site)} if site else {}
    done = subprocess.run(
        [sys.executable, ROOT / "tests/partners/ct_decompress.py", *folders],
        env={**os.environ, **path},
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="session")
def ct_artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An artifact of the demo model by every recipe that has a compressed-tensors layout for it. Read only."""
    found, folder = {}, tmp_path_factory.mktemp("ct")
    for name in recipe_files():
        layout = next((layout for layout in load_recipe(name).layouts([], []) if layout.startswith("ct-")), None)
        if layout:
            found[name] = make_artifact(DEMO_MODEL, name, folder / name, layout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("site", [None, NEWEST], ids=["pinned by the engines", "newest"])
def test_compressed_tensors_decompresses_every_module_to_our_weights(
    ct_artifacts: dict[str, Path], site: Path | None
) -> None:
    assert site is None or site.is_dir(), "`make venv` installs the newest compressed-tensors there"
    assert len(ct_artifacts) >= 10
    for (name, folder), theirs in zip(
        ct_artifacts.items(), decompressed(list(ct_artifacts.values()), site), strict=True
    ):
        assert theirs["version"] == "0.17.0" if site is None else theirs["version"] != "0.17.0"
        assert theirs["digests"] == our_digests(folder), name
        assert len(theirs["digests"]) == 28


@pytest.mark.slow
def test_transformers_opens_every_artifact_to_our_weights(ct_artifacts: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    for recipe, folder in ct_artifacts.items():
        if "transformers" not in load_recipe(recipe).engines:
            assert load_recipe(recipe).rules, "transformers opens one scheme a checkpoint"
            continue
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(run_compressed=False)
        )
        found, decoder = dict(model.named_parameters()), Decoder(Artifact.open(folder))
        for module, _ in decoder.modules():
            assert torch.equal(found[f"{module}.weight"], dequantize(decoder.qtensor(module)).bfloat16()), (
                recipe,
                module,
            )
        for name in decoder.copied():
            assert torch.equal(found[name], decoder.tensor(name)), (recipe, name)


@pytest.mark.slow
def test_transformers_and_torchao_open_a_tile_packed_artifact_of_several_shards(tmp_path: Path) -> None:
    """Every linear becomes torchao's own tensor with our tiles, scales and zeros; nothing is missing or left over."""
    from transformers import AutoModelForCausalLM

    artifact = make_artifact(save_llama(tmp_path / "m"), "int4-hqq-tile", tmp_path / "tiles")
    model, info = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    decoder = Decoder(Artifact.open(artifact))
    assert len(decoder.modules()) == 21
    for module, shape in decoder.modules():
        weight, packed = model.get_submodule(module).weight, decoder.packed(module)
        assert type(weight.data).__name__ == "Int4TilePackedTo4dTensor" and tuple(weight.shape) == shape
        assert torch.equal(weight.data.qdata, packed["_weight_qdata"])
        assert torch.equal(weight.data.scale_and_zero, packed["_weight_scale_and_zero"])
        assert list(weight.data.block_size) == [1, 128]


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
