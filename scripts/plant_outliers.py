"""Gives a Llama-shaped checkpoint activation outliers in a few channels without changing what it computes.

usage: python scripts/plant_outliers.py MODEL OUT_DIR [--factor 100] [--channels 4] [--seed 0]

In every layer the weights of both norms are multiplied by FACTOR in a few channels, and the columns of q/k/v and gate/up
that read them divided by it: what the linears put out is the same but for bf16's rounding, while their inputs have
outliers as large models have them. Written anew with the safetensors package; every other file is copied.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def plant(tensors: dict[str, torch.Tensor], channels: torch.Tensor, factor: float) -> int:
    """Changes `tensors` in place; the number of norms that got outliers."""
    planted = 0
    for name in sorted(tensors):
        layer, _, norm = name.removesuffix(".weight").rpartition(".")
        if norm not in READERS:
            continue
        planted += 1
        tensors[name][channels] *= factor
        for reader in READERS[norm]:
            tensors[f"{layer}.{reader}.weight"][:, channels] /= factor
    return planted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--factor", type=float, default=100.0)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.out.mkdir(parents=True)
    shards = sorted(given.model.glob("*.safetensors"))
    files = {shard.name: load_file(shard) for shard in shards}
    tensors = {name: tensor for content in files.values() for name, tensor in content.items()}
    hidden = tensors["model.norm.weight"].numel()
    generator = torch.Generator().manual_seed(given.seed)
    channels = torch.randperm(hidden, generator=generator)[: given.channels]
    count = plant(tensors, channels, given.factor)
    for name, content in files.items():
        save_file(content, given.out / name, {"format": "pt"})
    for path in given.model.iterdir():
        if path.is_file() and path.name not in files:
            shutil.copy(path, given.out / path.name)
    print(f"{count} norms, channels {sorted(channels.tolist())}, factor {given.factor:g}")


if __name__ == "__main__":
    main()
