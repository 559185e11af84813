"""Golden bytes of the bnb-int8 layout, made by bitsandbytes and transformers on the CPU.

usage: python -P scripts/goldens/bnb.py FOLDER [ARTIFACT]        (bitsandbytes 0.50, transformers)
writes FOLDER/bnb_int8.safetensors; nothing of quantpub is used.

A Llama of one layer with random bf16 weights is quantized to LLM.int8() while it is loaded, saved, and opened again.
    source.NAME     one Linear of it, before
    MODULE.weight, .SCB, .weight_format   that Linear and one more as they were saved; of the whole checkpoint, names,
                    dtypes and shapes are in the header, with `quantization_config`
    MODULE.multiplied    float32: the weights that the Linear multiplies with (MatMul8bitFp), taken by giving it an
                    identity matrix
    MODULE.dequantized   float32: `int8_vectorwise_dequant`, which rounds once more

With ARTIFACT, a checkpoint in this layout, it is opened with transformers instead, and FOLDER/bnb_opened.safetensors
holds MODULE.multiplied of every Linear8bitLt in it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from bitsandbytes.functional import int8_vectorwise_dequant
from bitsandbytes.nn import Linear8bitLt
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

SEED = 8
PACKAGES = ("bitsandbytes", "torch", "transformers")
PROVENANCE = {"made by": "scripts/goldens/bnb.py", "seed": str(SEED), "device": "cpu"} | {
    name: version(name) for name in PACKAGES
}
KEPT = ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj")
Tensors = dict[str, torch.Tensor]


def source(folder: str) -> Tensors:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    return {f"source.{KEPT[0]}": model.get_submodule(KEPT[0]).weight.detach()}


def opened(folder: str) -> dict[str, Linear8bitLt]:
    """Its LLM.int8() modules. Training: in evaluation the activations would be rounded to int8 too."""
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32).train()
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear8bitLt)}


@torch.no_grad()
def multiplied(module: Linear8bitLt) -> torch.Tensor:
    return module(torch.eye(module.in_features)).t().contiguous()


def quantized(before: str, after: str) -> tuple[Tensors, dict[str, str]]:
    asked = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(
        before, quantization_config=asked, device_map="cpu", dtype=torch.bfloat16
    )
    model.save_pretrained(after)
    tensors = load_file(Path(after) / "model.safetensors")
    listing = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in sorted(tensors.items())}
    stated = json.loads((Path(after) / "config.json").read_text())["quantization_config"]
    header = {"listing": json.dumps(listing), "quantization_config": json.dumps(stated)}
    return {name: tensor for name, tensor in tensors.items() if name.rsplit(".", 1)[0] in KEPT}, header


def make(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as before, tempfile.TemporaryDirectory() as after:
        found = source(before)
        kept, header = quantized(before, after)
        modules = opened(after)
    for name in KEPT:
        kept[f"{name}.multiplied"] = multiplied(modules[name])
        kept[f"{name}.dequantized"] = int8_vectorwise_dequant(kept[f"{name}.weight"], kept[f"{name}.SCB"])
    save_file(found | kept, folder / "bnb_int8.safetensors", metadata=PROVENANCE | header)


def main(folder: Path, artifact: str | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if artifact is None:
        make(folder)
    else:
        weights = {f"{name}.multiplied": multiplied(module) for name, module in opened(artifact).items()}
        save_file(weights, folder / "bnb_opened.safetensors", metadata=PROVENANCE)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
