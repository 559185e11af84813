"""Tiny source checkpoints, and what the scripts that quantize them with other tools share.

usage: python -P scripts/goldens/checkpoints.py OUT        (torch, safetensors)
       python -P scripts/goldens/checkpoints.py --merge FROM OUT

The first writes OUT/base-dense (Llama) and OUT/base-moe (Qwen3-MoE): one layer, random bf16, as a tool expects to find a
model. The second adds the folders, the entries and the references of FROM to those of OUT.

Then, each in the environment of its tool, `python -P scripts/goldens/checkpoints_TOOL.py BASE_DENSE BASE_MOE OUT [NAME ...]`
writes OUT/TOOL-RECIPE-MODEL/, an entry of OUT/manifest.json and rows of OUT/references.safetensors; NAME limits the run.
Some tools leave logs in the current folder.

manifest.json says of each folder
    tool, packages, call, device    what made it
    holds         scheme in quantpub's words, group size, count of quantized modules, the cache's format; `smoothed`: channel
                  scales were moved between tensors, so that a weight is not that of the base
    broken        why it cannot be adopted as it is, or null
    edited        what `tidy` took out of the tool's JSON: absolute paths; nothing else is changed
    dequantized   per module of MODULES the SHA-256 of the weight as the tool's own code dequantizes it, over contiguous
                  little-endian float32, N by K, and the dtype in which the tool computed it
references.safetensors: FOLDER/MODULE, each eighth row of that weight (rows 0, 8, ...), in the tool's dtype.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SEED = 41
VOCAB, HIDDEN, INTERMEDIATE, EXPERT, EXPERTS, HEAD = 32, 128, 256, 128, 4, 64
STEP = 8
LAYER = "model.layers.0."
MODULES = {
    "dense": (f"{LAYER}self_attn.k_proj", f"{LAYER}mlp.down_proj"),
    "moe": (f"{LAYER}self_attn.k_proj", f"{LAYER}mlp.experts.1.down_proj"),
}
# Standard deviations that differ, so that the scales of projections that an engine fuses differ too.
SPREAD = {"q_proj": 0.05, "k_proj": 0.11, "v_proj": 0.02, "gate_proj": 0.09, "up_proj": 0.03}
KEPT = ("config.json", "hf_quant_config.json", "quantize_config.json", "quantization_config.json", "recipe.yaml")
MARKS = ("weight_scale", "weight_scale_inv", "weight_packed", "qweight", "_weight_qdata")  # last parts of tensor names
COMMON = {
    "hidden_size": HIDDEN,
    "vocab_size": VOCAB,
    "head_dim": HEAD,
    "hidden_act": "silu",
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "bfloat16",
    "use_cache": True,
}
CONFIGS = {
    "dense": COMMON
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "intermediate_size": INTERMEDIATE,
        "num_key_value_heads": 2,
        "mlp_bias": False,
    },
    "moe": COMMON
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "intermediate_size": INTERMEDIATE,
        "moe_intermediate_size": EXPERT,
        "num_key_value_heads": 1,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.001,
    },
}
Tensors = dict[str, torch.Tensor]


def shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes as transformers writes them for the published models of these families."""
    kv = HEAD * int(str(CONFIGS[model]["num_key_value_heads"]))
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    found |= {
        f"{LAYER}self_attn.{p}_proj.weight": (n, HIDDEN) for p, n in zip("qkvo", (HIDDEN, kv, kv, HIDDEN), strict=True)
    }
    if model == "dense":
        found |= mlp(f"{LAYER}mlp.", INTERMEDIATE)
    else:
        found |= {f"{LAYER}mlp.gate.weight": (EXPERTS, HIDDEN)}
        found |= {f"{LAYER}self_attn.{p}_norm.weight": (HEAD,) for p in "qk"}
        for expert in range(EXPERTS):
            found |= mlp(f"{LAYER}mlp.experts.{expert}.", EXPERT)
    norms = ("model.norm.weight", f"{LAYER}input_layernorm.weight", f"{LAYER}post_attention_layernorm.weight")
    return found | dict.fromkeys(norms, (HIDDEN,))


def mlp(prefix: str, n: int) -> dict[str, tuple[int, ...]]:
    sides = {"gate_proj": (n, HIDDEN), "up_proj": (n, HIDDEN), "down_proj": (HIDDEN, n)}
    return {f"{prefix}{name}.weight": side for name, side in sides.items()}


def drawn(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Normal weights, each row with its own magnitude within a factor of four; norms near 1."""
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return (1 + 0.1 * noise).to(torch.bfloat16)
    row = torch.exp2(2 * torch.rand(shape[0], 1, generator=generator) - 1)
    return (noise * row * SPREAD.get(name.split(".")[-2], 0.04)).to(torch.bfloat16)


def write_base(folder: Path, model: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(SEED)
    tensors = {name: drawn(name, shape, generator) for name, shape in sorted(shapes(model).items())}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIGS[model], indent=2) + "\n")


def token_rows(count: int = 8, length: int = 64) -> list[list[int]]:
    """Random token ids: calibration data for a model of random weights."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, VOCAB, (count, length), generator=generator).tolist()


def tokenizer() -> object:
    """A tokenizer whose words are t0, t1, ...: for tools that do not run without one. It is not kept."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="t0", eos_token="t1", pad_token="t1")


def tidy(folder: Path) -> list[str]:
    """Leave the weights, their index and the configurations; take out paths of the machine. Says what it changed."""
    for path in folder.iterdir():
        if path.name not in KEPT and not path.name.endswith((".safetensors", ".safetensors.index.json")):
            path.unlink() if path.is_file() else shutil.rmtree(path)
    edits = []
    for path in sorted(folder.glob("*.json")):
        tree = json.loads(path.read_text())
        removed = without_paths(tree)
        if removed:
            path.write_text(json.dumps(tree, indent=2) + "\n")
            edits += [f"{path.name}: {key} removed, an absolute path" for key in removed]
    return edits


def without_paths(tree: object) -> list[str]:
    """Delete, in place, the keys whose value is an absolute path; returns their names."""
    removed: list[str] = []
    if isinstance(tree, dict):
        for key in [k for k, v in tree.items() if isinstance(v, str) and v.startswith("/")]:
            del tree[key]
            removed.append(key)
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        removed += without_paths(child)
    return removed


def tensors_of(folder: Path) -> Tensors:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def fingerprint(weight: torch.Tensor) -> str:
    return hashlib.sha256(weight.detach().float().contiguous().numpy().tobytes()).hexdigest()


def quantized_modules(folder: Path) -> int:
    """Modules that hold a tensor that only a quantized one has."""
    names = [n for path in sorted(folder.glob("*.safetensors")) for n in safe_open(path, "pt").keys()]  # noqa: SIM118
    return len({n.rpartition(".")[0] for n in names if n.endswith(MARKS)})


def update(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    manifest = json.loads(path.read_text()) if path.exists() else {}
    change(manifest)
    path.write_text(json.dumps(dict(sorted(manifest.items())), indent=1, ensure_ascii=False) + "\n")


def record(
    out: Path,
    name: str,
    tool: str,
    packages: Iterable[str],
    call: str,
    holds: dict[str, object],
    weights: Tensors,
    by: str,
    broken: str | None = None,
    device: str = "cpu",
    note: str | None = None,
    versions: dict[str, str] | None = None,
) -> None:
    """Tidy OUT/NAME and write it down: `weights` are what the tool itself dequantized, by module, and `by` is how."""
    edited = tidy(out / name)
    quantized = {"quantized_modules": quantized_modules(out / name), "smoothed": False} | holds
    rows = {f"{name}/{module}": w.detach()[::STEP].contiguous() for module, w in weights.items()}
    hashes = {m: {"sha256": fingerprint(w), "dtype": dtype(w), "shape": list(w.shape)} for m, w in weights.items()}
    versions = {p: version(p) for p in ("torch", "transformers", *packages)} | (versions or {tool: version(tool)})
    entry = {
        "tool": tool,
        "packages": versions,
        "model": name.rsplit("-", 1)[1],
        "call": call,
        "device": device,
        "holds": quantized,
        "broken": broken,
        "note": note,
        "edited": edited,
        "dequantized_by": by,
        "dequantized": hashes,
    }
    update(out / "manifest.json", lambda manifest: manifest.update({name: entry}))
    add_references(out / "references.safetensors", rows, (name,))
    print(name, quantized, edited, {m: h["sha256"][:8] for m, h in hashes.items()}, flush=True)


def add_references(path: Path, rows: Tensors, names: tuple[str, ...]) -> None:
    others = {k: v for k, v in load_file(path).items() if k.split("/")[0] not in names} if path.exists() else {}
    save_file(dict(sorted((others | rows).items())), path, metadata={"rows": f"each {STEP}th, from 0"})


def dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def merge(source: Path, out: Path) -> None:
    """Add what another machine made in `source`."""
    entries = json.loads((source / "manifest.json").read_text())
    for name in entries:
        shutil.copytree(source / name, out / name, dirs_exist_ok=True)
    update(out / "manifest.json", lambda manifest: manifest.update(entries))
    add_references(out / "references.safetensors", load_file(source / "references.safetensors"), tuple(entries))


def main(out: Path) -> None:
    for model in ("dense", "moe"):
        write_base(out / f"base-{model}", model)


if __name__ == "__main__":
    if sys.argv[1] == "--merge":
        merge(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main(Path(sys.argv[1]))
