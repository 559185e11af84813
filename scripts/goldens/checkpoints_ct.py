"""Checkpoints of llm-compressor, in the layouts of compressed-tensors.

usage: python -P scripts/goldens/checkpoints_ct.py BASE_DENSE BASE_MOE OUT [NAME ...]   (llmcompressor 0.14)

`oneshot` with a QuantizationModifier, then `save_pretrained(save_compressed=True)`; schemes with static activations or
caches see random token ids. What is dequantized is read back from the file: `BaseCompressor.decompress` on the tensors
of one module, under the scheme that config.json states.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compressed-tensors compiles its FP4 cast; the plain one gives the same
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM

sys.path.append(str(Path(__file__).parent))
import checkpoints as common

sys.path.pop()

FP8_KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
# recipe: scheme, whether it is calibrated, a cache's scheme, quantpub's scheme and group size
RECIPES = {
    "w4a16": ("W4A16", False, None, 128),
    "w4a16-asym": ("W4A16_ASYM", False, None, 128),
    "fp8-dynamic": ("FP8_DYNAMIC", False, None, None),
    "fp8-static": ("FP8", True, None, None),
    "nvfp4": ("NVFP4", True, None, 16),
    "int8": ("W8A8", False, None, None),
    "nvfp4a16": ("NVFP4A16", False, None, 16),
    "fp8-block": ("FP8_BLOCK", False, None, 128),
    "w8a16": ("W8A16", False, None, 128),
    "fp8-dynamic-kv": ("FP8_DYNAMIC", True, FP8_KV, None),
}
MADE = [(r, "dense") for r in RECIPES] + [(r, "moe") for r in ("w4a16", "fp8-dynamic", "nvfp4a16")]
IGNORED = ["lm_head", "re:.*mlp.gate$"]


def quantize(base: Path, folder: Path, recipe: str) -> None:
    scheme, calibrated, kv, _ = RECIPES[recipe]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    rows = common.token_rows()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    seen = {"dataset": data, "num_calibration_samples": len(rows), "max_seq_length": len(rows[0])}
    seen = seen | {"processor": common.tokenizer()} if calibrated else {}
    caches = {"kv_cache_scheme": kv} if kv else {}
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme=scheme, ignore=IGNORED, **caches), **seen)
    model.save_pretrained(folder, save_compressed=True)


def dequantized(folder: Path, model: str) -> common.Tensors:
    tensors = common.tensors_of(folder)
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(stated).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    found = {}
    for module in common.MODULES[model]:
        state = {n.removeprefix(f"{module}."): t for n, t in tensors.items() if n.startswith(f"{module}.")}
        caches = [state.pop(name, None) for name in ("k_scale", "v_scale")]
        assert state, (module, caches)
        found[module] = compressor.decompress(state, scheme)["weight"]
    return found


def main(bases: dict[str, Path], out: Path, names: list[str]) -> None:
    for recipe, model in MADE:
        name = f"llmcompressor-{recipe}-{model}"
        if names and name not in names:
            continue
        scheme, calibrated, kv, group = RECIPES[recipe]
        quantize(bases[model], out / name, recipe)
        seen = f", kv_cache_scheme={kv}" if kv else ""
        common.record(
            out,
            name,
            "llmcompressor",
            ("compressed-tensors",),
            f"oneshot(model, QuantizationModifier('Linear', {scheme!r}, ignore={IGNORED}{seen})"
            f"{', random token ids' if calibrated else ''}); save_pretrained(save_compressed=True)",
            {"scheme": scheme, "group_size": group, "kv_cache": "FP8" if kv else None},
            dequantized(out / name, model),
            "compressed_tensors BaseCompressor.decompress",
        )


if __name__ == "__main__":
    main({"dense": Path(sys.argv[1]), "moe": Path(sys.argv[2])}, Path(sys.argv[3]), sys.argv[4:])
