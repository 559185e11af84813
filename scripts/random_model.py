"""Writes a checkpoint of random weights with the shapes of a known model: its quality means nothing, its kernels do.

usage: python scripts/random_model.py OUT_DIR [--config qwen3-8b | qwen3-30b-a3b-2-layers | tiny] [--layers N] [--device cuda]

Names, shapes and config.json are those of Qwen/Qwen3-8B and Qwen/Qwen3-30B-A3B (two layers of it), bf16, without a
tokenizer. Weights are normal with a deviation of 0.02, norms are 1. Each tensor has a seed of its own, its name's CRC, so
that shards are made side by side and the bytes hang on the device class alone. No fsync: it is made to be thrown away.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
from quantpub.shards import build_header, raw_bytes

DEVIATION = 0.02
SHARD = 5_000_000_000  # bytes
PIECE = 32 << 20  # elements that go to the disk at a time
WRITERS = 4  # shards at a time
METADATA = {"format": "pt"}

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": DEVIATION,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3-8b": QWEN3,
    "qwen3-30b-a3b-2-layers": QWEN3
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_window_layers": 2,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    },
    "tiny": QWEN3
    | {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 64,
        "hidden_size": 256,
        "intermediate_size": 512,
        "max_position_embeddings": 4096,
        "max_window_layers": 2,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
Shape = tuple[int, ...]


def shapes(config: dict[str, Any]) -> dict[str, Shape]:
    """Every tensor of the checkpoint by its name, in the order of a forward pass."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    found: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer(config)}
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def layer(config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, size = config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    yield from (("input_layernorm", (hidden,)), ("post_attention_layernorm", (hidden,)))
    yield from (("self_attn.q_norm", (size,)), ("self_attn.k_norm", (size,)))
    yield from (("self_attn.q_proj", (q, hidden)), ("self_attn.k_proj", (kv, hidden)))
    yield from (("self_attn.v_proj", (kv, hidden)), ("self_attn.o_proj", (hidden, q)))
    if experts := config.get("num_experts"):
        yield "mlp.gate", (experts, hidden)
        for e in range(experts):
            yield from mlp(f"mlp.experts.{e}", config["moe_intermediate_size"], hidden)
    else:
        yield from mlp("mlp", config["intermediate_size"], hidden)


def mlp(prefix: str, width: int, hidden: int) -> Iterator[tuple[str, Shape]]:
    yield from ((f"{prefix}.gate_proj", (width, hidden)), (f"{prefix}.up_proj", (width, hidden)))
    yield f"{prefix}.down_proj", (hidden, width)


def shards(tensors: dict[str, Shape], limit: int) -> list[dict[str, Shape]]:
    """Tensors in order, each shard at most `limit` bytes unless one tensor is larger."""
    found: list[dict[str, Shape]] = [{}]
    size = 0
    for name, shape in tensors.items():
        nbytes = 2 * math.prod(shape)
        if found[-1] and size + nbytes > limit:
            found.append({})
            size = 0
        found[-1][name] = shape
        size += nbytes
    return found


def filled(name: str, shape: Shape, device: str) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, DEVIATION, generator=generator)


def write_shard(path: Path, tensors: dict[str, Shape], device: str) -> None:
    """The bytes that the safetensors library would write. Pinned memory in between: pageable copies are ten times slower."""
    header, places = build_header({name: ("BF16", shape) for name, shape in tensors.items()}, METADATA)
    pinned = torch.empty(PIECE, dtype=torch.bfloat16, pin_memory=True) if device == "cuda" else None
    with path.open("wb", buffering=0) as f:
        f.write(header)
        for name, info in places.items():
            assert f.tell() == info.start, name
            for piece in filled(name, info.shape, device).view(-1).split(PIECE):
                here = piece if pinned is None else pinned[: len(piece)].copy_(piece)
                rest = raw_bytes(here)
                while rest:
                    rest = rest[f.write(rest) :]


def make(out: Path, config: dict[str, Any], device: str, limit: int = SHARD) -> int:
    """Write the checkpoint; returns the bytes of its weights."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = shapes(config)
    parts = shards(tensors, limit)
    names = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    if device == "cuda":
        torch.cuda.init()
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(lambda name, part: write_shard(out / name, part, device), names, parts))
    total = sum(2 * math.prod(shape) for shape in tensors.values())
    weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    save(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    save(out / "config.json", config)
    save(out / "generation_config.json", {"do_sample": False})
    return total


def save(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", choices=CONFIGS, default="qwen3-8b")
    parser.add_argument("--layers", type=int, help="Another number of layers.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    begun = time.monotonic()
    config = CONFIGS[given.config] | ({"num_hidden_layers": given.layers} if given.layers else {})
    total = make(given.out, config, given.device)
    print(f"{given.config}: {total / 1e9:.2f} GB in {time.monotonic() - begun:.1f} s -> {given.out}")


if __name__ == "__main__":
    main()
