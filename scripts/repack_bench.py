"""Repack against copying: an 8B-shaped quantized checkpoint, whole processes in turn, wall time and peak memory.

usage: repack_bench.py WORK OUT.json FROM:TO ... [--layers N] [--rounds N]

WORK is a folder on the disk to measure, with room for three checkpoints. Shapes are those of Qwen3-8B; codes and scales are
random, the same in every layer. Copying is `cp -r` and then `sync` of what it wrote; repack syncs what it writes itself.
Before each the source is dropped from the page cache where that is allowed, and said so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quantpub.evidence import made_by
from quantpub.layouts import LAYOUTS
from quantpub.layouts.base import Layout
from quantpub.qtensor import CODE_DTYPES, QTensor, scale_dtype
from quantpub.registry import load
from quantpub.scheme import Scheme, preset

HIDDEN, INTER, KV, VOCAB = 4096, 12288, 1024, 151936
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTER, HIDDEN),
    "mlp.up_proj": (INTER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTER),
}
SCHEMES = {
    "ct-pack": "W4A16",
    "torchao-tile": "W4A16_FLOAT_ZERO",
    "ct-nvfp4": "NVFP4A16",
    "ct-float": "FP8_DYNAMIC",
    "hf-fp8": "FP8_BLOCK",
}
PER_SHARD = 9  # layers


def random_q(scheme: Scheme, n: int, k: int) -> QTensor:
    weight = scheme.weight
    dtype = CODE_DTYPES[weight.num]
    low, high = {"int4": (-8, 8), "fp4_e2m1": (0, 16)}.get(weight.num, (-100, 100))
    codes = torch.randint(low, high, (n, k), dtype=torch.int8)
    scale = (torch.rand(weight.scale_shape(n, k)) * 0.01 + 0.01).to(scale_dtype(scheme, torch.bfloat16))
    zero = None
    if weight.zero_domain != "none":
        steps = torch.randint(-3, 4, scale.shape)
        zero = (steps * scale.float()).to(scale.dtype) if weight.zero_domain == "float" else steps.to(torch.int8)
    glob = torch.tensor(2.0**-11) if weight.global_scale else None
    return QTensor(scheme, codes.to(dtype), scale, zero, glob)


def tensors(layout: Layout, scheme: Scheme, layers: int) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """(shard, tensors): the embedding and the head in shards of their own, as large as they are."""
    torch.manual_seed(0)
    yield "embed", {"model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN, dtype=torch.bfloat16)}
    packed = {name: layout.pack(random_q(scheme, n, k)) for name, (n, k) in LINEARS.items()}
    norm = torch.ones(HIDDEN, dtype=torch.bfloat16)
    for start in range(0, layers, PER_SHARD):
        found: dict[str, torch.Tensor] = {}
        for layer in range(start, min(layers, start + PER_SHARD)):
            prefix = f"model.layers.{layer}"
            found |= {f"{prefix}.{m}.{suffix}": t.clone() for m, parts in packed.items() for suffix, t in parts.items()}
            found |= {
                f"{prefix}.{name}.weight": norm.clone() for name in ("input_layernorm", "post_attention_layernorm")
            }
            found |= {f"{prefix}.self_attn.{name}.weight": norm[:128].clone() for name in ("q_norm", "k_norm")}
        yield f"layers-{start:02d}", found
    head = torch.randn(VOCAB, HIDDEN, dtype=torch.bfloat16)
    yield "head", {"model.norm.weight": norm, "lm_head.weight": head}


def make(folder: Path, name: str, layers: int) -> None:
    layout: Layout = load(LAYOUTS, "layout", name)
    scheme = preset(SCHEMES[name])
    folder.mkdir(parents=True)
    modules = {f"model.layers.{i}.{m}": (scheme, shape) for i in range(layers) for m, shape in LINEARS.items()}
    copied = ["lm_head.weight"]
    metadata = {"format": "pt", **layout.metadata(modules, copied)}
    where = {}
    for shard, found in tensors(layout, scheme, layers):
        file = f"model-{shard}.safetensors"
        save_file(found, folder / file, metadata=metadata)
        where |= dict.fromkeys(found, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": INTER,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": VOCAB, "tie_word_embeddings": False, "dtype": "bfloat16",
        "quantization_config": layout.config(scheme, ["lm_head"]),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def drop(folder: Path) -> bool:
    """Out of the page cache: what was just written or read is not what a user's disk has at hand."""
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    return True


# A small process that starts the one to measure: the kernel counts what a parent holds when it forks as the child's peak
LAUNCH = """
import json, os, resource, subprocess, sys, time
started = time.monotonic()
code = subprocess.call(sys.argv[1:], stdout=2)
print(json.dumps([code, time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024]))
"""


def timed(command: list[str]) -> tuple[float, int]:
    """(seconds, peak bytes of the process)."""
    said = subprocess.run([sys.executable, "-c", LAUNCH, *command], stdout=subprocess.PIPE, text=True, check=True)
    code, seconds, peak = json.loads(said.stdout)
    if code:
        raise SystemExit(f"{command[0]} ended with {code}")
    return seconds, peak


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def measure(work: Path, pair: str, layers: int, rounds: int) -> dict[str, Any]:
    before, _, after = pair.partition(":")
    source = work / f"from-{before}"
    if not source.exists():
        make(source, before, layers)
    size = sum(path.stat().st_size for path in source.iterdir())
    largest = max(path.stat().st_size for path in source.iterdir())
    copies, repacks, peaks = [], [], []
    for _ in range(rounds):
        for kind in ("copy", "repack"):
            out = work / "out"
            shutil.rmtree(out, ignore_errors=True)
            drop(source)
            if kind == "copy":
                copies.append(timed(["sh", "-c", f"cp -r {source} {out} && sync {out}/*"])[0])
            else:
                flags = ["--layout", after, "-o", str(out), "--accept-loss", "--format", "quiet"]
                seconds, peak = timed([sys.executable, "-m", "quantpub.cli", "repack", str(source), *flags])
                repacks.append(seconds)
                peaks.append(peak)
            print(pair, kind, (copies if kind == "copy" else repacks)[-1], flush=True)
    shutil.rmtree(work / "out", ignore_errors=True)
    ratio = [repack / copy for repack, copy in zip(repacks, copies, strict=True)]
    return {
        "bytes": size, "largest_shard": largest, "copy_s": spread(copies), "repack_s": spread(repacks),
        "ratio": spread(ratio), "peak_bytes": max(peaks),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("pairs", nargs="+")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    found = {pair: measure(asked.work, pair, asked.layers, asked.rounds) for pair in asked.pairs}
    settings = {"layers": asked.layers, "rounds": asked.rounds, "cores": len(os.sched_getaffinity(0))}
    evidence = {"made_by": made_by("repack_bench", settings, ("torch", "safetensors")), "pairs": found}
    asked.out.write_text(json.dumps(evidence, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
