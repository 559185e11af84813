"""Checkpoints of torchao that only a CUDA device makes, through transformers.

usage: python -P scripts/goldens/checkpoints_torchao_gpu.py BASE_DENSE OUT     (torchao, transformers, a GPU of sm_89 or newer)

As checkpoints_ao: `from_pretrained(quantization_config=TorchAoConfig(...))`, `save_pretrained`, then the folder is loaded again.
A tile-packed tensor has no `dequantize`: it is multiplied with the identity by torchao's own linear (its kernel dequantizes
into bf16, and a sum of one product is exact). `checkpoints.py --merge OUT tests/golden/checkpoints` brings the results home.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Int4WeightOnlyConfig, PerRow
from transformers import AutoModelForCausalLM, TorchAoConfig

sys.path.append(str(Path(__file__).parent))
import checkpoints as common

sys.path.pop()

DEVICE = "cuda"
TILES = {"group_size": 128, "int4_packing_format": "tile_packed_to_4d", "int4_choose_qparams_algorithm": "hqq"}
# name: call, configuration, quantpub's scheme, group size
MADE = {
    "torchao-int4-tile-packed-dense": (
        f"Int4WeightOnlyConfig(**{TILES})",
        Int4WeightOnlyConfig(**TILES),
        "W4A16_FLOAT_ZERO",
        128,
    ),
    "torchao-fp8-dynamic-dense": (
        "Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())",
        Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
        "FP8_DYNAMIC",
        None,
    ),
}


def loaded(folder: Path, **kwargs: object) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=DEVICE, **kwargs)


def dequantized(linear: torch.nn.Linear) -> torch.Tensor:
    if hasattr(type(linear.weight), "dequantize") and "TilePacked" not in type(linear.weight).__name__:
        return linear.weight.dequantize().cpu()
    identity = torch.eye(linear.in_features, dtype=torch.bfloat16, device=DEVICE)
    return torch.nn.functional.linear(identity, linear.weight).t().contiguous().cpu()


@torch.no_grad()
def main(base: Path, out: Path) -> None:
    for name, (call, config, scheme, group) in MADE.items():
        stated = TorchAoConfig(config, modules_to_not_convert=["lm_head"])
        loaded(base, quantization_config=stated).save_pretrained(out / name)
        model = loaded(out / name)
        common.record(
            out,
            name,
            "torchao",
            (),
            f"from_pretrained(quantization_config=TorchAoConfig({call}, modules_to_not_convert=['lm_head'])); save_pretrained",
            {"scheme": scheme, "group_size": group, "kv_cache": None},
            {module: dequantized(model.get_submodule(module)) for module in common.MODULES["dense"]},
            "from_pretrained; weight.dequantize(), or linear(identity, weight) where it is tile-packed",
            device=torch.cuda.get_device_name(),
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
