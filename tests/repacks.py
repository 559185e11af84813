"""Shared by the tests of repacking: models to quantize, and one artifact written in another layout by the pipeline itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from conftest import DEMO_MODEL, make_artifact, save_llama
from safetensors.torch import save_file

from quantpub.artifact import Artifact
from quantpub.decode import Decoder
from quantpub.opened import open_quantized
from quantpub.qtensor import dequantize
from quantpub.repack import repack
from quantpub.repacking import make_repack
from quantpub.targets import TARGETS, unloadable

GOLDEN = Path(__file__).parent / "golden" / "checkpoints"
# What makes weights of a scheme, without data where that can be
MAKERS = {
    "W4A16": "{name: search, grid: 2, shrink: 0.9, refine: 0}",
    "W4A16_ASYM": "{name: search, grid: 2, shrink: 0.9, refine: 0}",
    "W4A16_FLOAT_ZERO": "{name: hqq, iters: 2}",
    "W8A16": "{name: rtn}",
    "W8A8": "{name: rtn}",
    "LLM_INT8": "{name: rtn}",
    "FP8": "{name: fp8}",
    "FP8_DYNAMIC": "{name: fp8}",
    "FP8_BLOCK": "{name: fp8}",
    "NVFP4": "{name: nvfp4}",
    "NVFP4A16": "{name: nvfp4}",
    "MXFP4A16": "{name: mxfp4}",
}


def again(folder: Path, layout: str, out: Path, accept_loss: bool = False) -> dict[str, Any]:
    """Repack; the record of the stage."""
    found: dict[str, Any] = repack(make_repack(open_quantized(str(folder)), layout), out, accept_loss)["repack"]
    return found


def made(model: Path, scheme: str, layout: str, out: Path, group_size: int | None = None, rest: str = "") -> Path:
    """An artifact of `model` by a recipe of one scheme."""
    recipe = out.parent / f"{out.name}.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    size = f"group_size: {group_size}\n" if group_size is not None else ""
    engines = ", ".join(f"{name}: {layout}" for name in TARGETS if unloadable(name, layout, scheme) is None)
    recipe.write_text(
        f"description: d\nscheme: {scheme}\n{size}algorithm: {MAKERS[scheme]}\n"
        f"engines: {{{engines}}}\n"
        f"ignore: [lm_head]\n{rest}"
    )
    return make_artifact(model, str(recipe), out, layout)


def wide(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """One layer of sides that every layout takes: multiples of 128, and of 256 where columns are. No tokenizer."""
    config = json.loads((DEMO_MODEL / "config.json").read_text()) | {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 64,
        "dtype": str(dtype).removeprefix("torch."),
    }
    at = "model.layers.0."
    shapes = {"model.embed_tokens.weight": (64, 256), "model.norm.weight": (256,)}
    shapes |= {at + "input_layernorm.weight": (256,), at + "post_attention_layernorm.weight": (256,)}
    shapes |= {f"{at}self_attn.{p}_proj.weight": (128 if p in "kv" else 256, 256) for p in "qkvo"}
    shapes |= {f"{at}mlp.{p}_proj.weight": (256, 512) if p == "down" else (512, 256) for p in ("gate", "up", "down")}
    return _save(folder, config, shapes, dtype)


def moe(folder: Path) -> Path:
    """A Qwen3-MoE of one layer with four experts."""
    config = {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "dtype": "bfloat16",
        "hidden_size": 128,
        "intermediate_size": 128,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 64,
        "tie_word_embeddings": True,
    }
    at = "model.layers.0."
    shapes = {"model.embed_tokens.weight": (64, 128), "model.norm.weight": (128,), f"{at}mlp.gate.weight": (4, 128)}
    shapes |= {at + "input_layernorm.weight": (128,), at + "post_attention_layernorm.weight": (128,)}
    shapes |= {f"{at}self_attn.{p}_norm.weight": (64,) for p in "qk"}
    shapes |= {f"{at}self_attn.{p}_proj.weight": (64 if p in "kv" else 128, 128) for p in "qkvo"}
    experts = (f"{at}mlp.experts.{i}.{p}_proj.weight" for i in range(4) for p in ("gate", "up", "down"))
    return _save(folder, config, shapes | dict.fromkeys(experts, (128, 128)), torch.bfloat16)


def _save(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> Path:
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    tensors = {name: torch.randn(shape, generator=generator).mul_(0.02).to(dtype) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def sharded(folder: Path) -> Path:
    return save_llama(folder)


def weight_files(folder: Path) -> dict[str, bytes]:
    """What an engine reads: every file that is not ours alone."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file() and p.name != "README.md"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    decoder = Decoder(Artifact.open(folder))
    return {module: dequantize(decoder.qtensor(module)) for module, _ in decoder.modules()}


def same_weights(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
