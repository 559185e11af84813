"""Golden bytes of the ModelOpt layouts, made by NVIDIA ModelOpt itself on the CPU.

usage: python -P scripts/goldens/modelopt.py FOLDER        (nvidia-modelopt 0.47, transformers)
writes FOLDER/modelopt_cases.safetensors and FOLDER/modelopt_export.safetensors; nothing of quantpub is used.

cases: codes and scales are drawn with a seed, and the weight is what they stand for, so that ModelOpt's own rounding,
given the scales, finds the same codes.
    CASE.in.NAME    codes, scale, global_scale: what was drawn
    CASE.weight     ModelOpt's bytes (`to_quantized_weight`)
    CASE.dequantized   float32, what FP8QTensor or NVFP4QTensor makes of these bytes and scales
`every` holds each pair of E2M1 codes, −0 among them, and each positive E4M3 scale; there it is only dequantized.

export: a Llama of one layer with random weights, quantized by `mtq.quantize` and written by `export_hf_checkpoint`.
    ALGORITHM.NAME  tensors of two of its modules; of all of it, names, dtypes and shapes are in the header, with
                    `quantization_config` and hf_quant_config.json
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.export.quant_utils import to_quantized_weight
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 35
PACKAGES = ("nvidia-modelopt", "torch", "transformers")
PROVENANCE = {"made by": "scripts/goldens/modelopt.py", "seed": str(SEED), "device": "cpu"} | {
    name: version(name) for name in PACKAGES
}
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
PRESETS = {
    "FP8": mtq.FP8_DEFAULT_CFG,
    "NVFP4": mtq.NVFP4_DEFAULT_CFG,
    "W4A16_NVFP4": mtq.W4A16_NVFP4_CFG,
}
KEPT = ("model.layers.0.self_attn.k_proj.", "model.layers.0.mlp.down_proj.")
Tensors = dict[str, torch.Tensor]


def fp8_case(n: int = 12, k: int = 40) -> Tensors:
    """Every finite E4M3 code, and a scale a tensor."""
    codes = torch.arange(n * k).remainder(256)
    codes = torch.where(codes & 0x7F == 0x7F, 0, codes).to(torch.uint8).view(torch.float8_e4m3fn).view(n, k)
    scale = torch.tensor(0.0123456789)
    weight = to_quantized_weight(codes.float() * scale, scale, "fp8")
    dequantized = FP8QTensor(torch.Size((n, k)), torch.float32, weight).dequantize(torch.float32, scale=scale)
    return {"in.codes": codes, "in.scale": scale, "weight": weight, "dequantized": dequantized}


def nvfp4_case(n: int = 12, k: int = 64) -> Tensors:
    """Codes but −0, which ModelOpt writes as 0; a power of two for the tensor."""
    generator = torch.Generator().manual_seed(SEED)
    codes = torch.randint(0, 15, (n, k), generator=generator, dtype=torch.uint8)
    codes += (codes >= 8).to(torch.uint8)
    scale = torch.empty(n, k // 16).uniform_(0.02, 448, generator=generator).to(torch.float8_e4m3fn)
    global_scale = torch.tensor(2.0**-11)
    sign = torch.where(codes >= 8, -1.0, 1.0)
    w = sign * E2M1[(codes & 7).int()] * scale.float().repeat_interleave(16, 1) * global_scale
    weight = to_quantized_weight(w, scale, "nvfp4", global_scale, 16)
    drawn = {"in.codes": codes, "in.scale": scale, "in.global_scale": global_scale}
    return drawn | {"weight": weight, "dequantized": dequantized_nvfp4(weight, scale, global_scale)}


def every_case() -> Tensors:
    weight = torch.arange(1024).remainder(256).to(torch.uint8).view(64, 16)
    patterns = torch.arange(128).clamp(1, 126).to(torch.uint8)  # 0x7F is NaN, 0 no scale
    scale, global_scale = patterns.view(torch.float8_e4m3fn).view(64, 2), torch.tensor(2.0**-14)
    drawn = {"in.scale": scale, "in.global_scale": global_scale}
    return drawn | {"weight": weight, "dequantized": dequantized_nvfp4(weight, scale, global_scale)}


def dequantized_nvfp4(weight: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    shape = torch.Size((len(weight), 2 * weight.shape[1]))
    return NVFP4QTensor(shape, torch.float32, weight).dequantize(
        torch.float32, scale=scale, double_scale=global_scale, block_sizes={-1: 16}
    )


def exported(algorithm: str) -> tuple[Tensors, dict[str, str]]:
    """The tensors of KEPT, and what the header says of the whole checkpoint."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    model = LlamaForCausalLM(config).bfloat16().eval()
    tokens = torch.randint(0, 32, (2, 16))
    model = mtq.quantize(model, copy.deepcopy(PRESETS[algorithm]), lambda m: m(tokens))
    with tempfile.TemporaryDirectory() as folder:
        export_hf_checkpoint(model, export_dir=folder)
        tensors = load_file(Path(folder) / "model.safetensors")
        stated = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
        nested = json.loads((Path(folder) / "hf_quant_config.json").read_text())
    listing = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in sorted(tensors.items())}
    header = {"listing": listing, "quantization_config": stated, "hf_quant_config.json": nested}
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith(KEPT)}
    return kept, {key: json.dumps(value) for key, value in header.items()}


def write(path: Path, parts: dict[str, Tensors], header: dict[str, str]) -> None:
    named = {f"{part}.{name}": tensor.contiguous() for part, kept in parts.items() for name, tensor in kept.items()}
    save_file(named, path, metadata=PROVENANCE | header)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    cases = {"FP8": fp8_case(), "NVFP4": nvfp4_case(), "every": every_case()}
    write(folder / "modelopt_cases.safetensors", cases, {})
    exports = {algorithm: exported(algorithm) for algorithm in PRESETS}
    headers = {f"{a}.{key}": value for a, (_, header) in exports.items() for key, value in header.items()}
    write(folder / "modelopt_export.safetensors", {a: kept for a, (kept, _) in exports.items()}, headers)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
