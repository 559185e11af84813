"""Checkpoints of NVIDIA ModelOpt.

usage: python -P scripts/goldens/checkpoints_mo.py BASE_DENSE BASE_MOE OUT [NAME ...]   (nvidia-modelopt 0.47)

`mtq.quantize` with a preset, random token ids where the preset is calibrated, then `export_hf_checkpoint`. What is
dequantized is read back from the file with ModelOpt's QTensors, in float32. ModelOpt has no code that reads its own
exported INT4 (two rows a byte): for it, `unpacked_int4` reverses `pack_int4_in_uint8`, and is asserted to do so.
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.export.quant_utils import pack_int4_in_uint8
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor
from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant
from transformers import AutoModelForCausalLM

sys.path.append(str(Path(__file__).parent))
import checkpoints as common

sys.path.pop()

# recipe: preset, quantpub's scheme, group size, whether the preset is calibrated, FP8 cache
RECIPES = {
    "fp8": ("FP8_DEFAULT_CFG", "FP8", None, True, False),
    "nvfp4": ("NVFP4_DEFAULT_CFG", "NVFP4", 16, True, False),
    "nvfp4-weight": ("W4A16_NVFP4_CFG", "NVFP4A16", 16, False, False),
    "fp8-per-channel": ("FP8_PER_CHANNEL_PER_TOKEN_CFG", "FP8_DYNAMIC", None, False, False),
    "int4-awq": ("INT4_AWQ_CFG", "W4A16", 128, True, False),
    "nvfp4-kv": ("NVFP4_DEFAULT_CFG", "NVFP4", 16, True, True),
}
MADE = [(r, "dense") for r in RECIPES] + [("nvfp4", "moe")]
NOTES = {
    "int4-awq": "AWQ's channel scales are in the norms, and for o_proj and down_proj in pre_quant_scale, which "
    "multiplies the activations",
}


def run(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model(input_ids=torch.tensor(common.token_rows()), use_cache=False)


def quantize(base: Path, folder: Path, recipe: str) -> None:
    preset, _, _, calibrated, kv = RECIPES[recipe]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
    config = copy.deepcopy(getattr(mtq, preset))
    if kv:
        config = update_quant_cfg_with_kv_cache_quant(config, copy.deepcopy(mtq.FP8_KV_CFG)["quant_cfg"])
    model = mtq.quantize(model, config, run if calibrated else None)
    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=str(folder))


def dequantized(folder: Path, model: str, recipe: str) -> common.Tensors:
    tensors = common.tensors_of(folder)
    read = nvfp4 if "nvfp4" in recipe else int4 if recipe == "int4-awq" else fp8
    return {
        m: read({n.rsplit(".", 1)[1]: t for n, t in tensors.items() if n.startswith(f"{m}.")})
        for m in common.MODULES[model]
    }


def fp8(state: common.Tensors) -> torch.Tensor:
    weight, scale = state["weight"], state["weight_scale"].float()
    scale = scale[:, None] if scale.numel() == len(weight) else scale
    return FP8QTensor(weight.shape, torch.float32, weight).dequantize(torch.float32, scale=scale)


def nvfp4(state: common.Tensors) -> torch.Tensor:
    weight = state["weight"]
    held = NVFP4QTensor(torch.Size((len(weight), 2 * weight.shape[1])), torch.float32, weight)
    scales = {"scale": state["weight_scale"], "double_scale": state["weight_scale_2"]}
    return held.dequantize(torch.float32, **scales, block_sizes={-1: 16})


def int4(state: common.Tensors) -> torch.Tensor:
    scale = state["weight_scale"].float()
    weight = unpacked_int4(state["weight"]) * scale.repeat_interleave(128, 1)
    assert torch.equal(pack_int4_in_uint8(weight, scale, 128), state["weight"])
    return weight


def unpacked_int4(packed: torch.Tensor) -> torch.Tensor:
    """Two rows a byte, the even row in the low nibble, two's complement: [N/2, K] to [N, K]."""
    nibbles = torch.stack((packed & 15, packed >> 4), 1).reshape(-1, packed.shape[1]).int()
    return torch.where(nibbles > 7, nibbles - 16, nibbles).float()


def main(bases: dict[str, Path], out: Path, names: list[str]) -> None:
    for recipe, model in MADE:
        name = f"modelopt-{recipe}-{model}"
        if names and name not in names:
            continue
        preset, scheme, group, calibrated, kv = RECIPES[recipe]
        quantize(bases[model], out / name, recipe)
        seen = "random token ids" if calibrated else "None"
        config = f"mtq.{preset} with FP8_KV_CFG" if kv else f"mtq.{preset}"
        common.record(
            out,
            name,
            "nvidia-modelopt",
            (),
            f"mtq.quantize(model, {config}, {seen}); export_hf_checkpoint",
            {"scheme": scheme, "group_size": group, "kv_cache": "FP8" if kv else None, "smoothed": "awq" in recipe},
            dequantized(out / name, model, recipe),
            "codes times scales, asserted against pack_int4_in_uint8"
            if recipe == "int4-awq"
            else "modelopt QTensor.dequantize",
            note=NOTES.get(recipe),
        )


if __name__ == "__main__":
    main({"dense": Path(sys.argv[1]), "moe": Path(sys.argv[2])}, Path(sys.argv[3]), sys.argv[4:])
