"""Checkpoints of torchao, through transformers, on the CPU.

usage: python -P scripts/goldens/checkpoints_ao.py BASE_DENSE BASE_MOE OUT [NAME ...]   (torchao 0.18, transformers)

`from_pretrained(quantization_config=TorchAoConfig(...))`, then `save_pretrained`. What is dequantized is read back:
the checkpoint is loaded again, and `weight.dequantize()` is torchao's own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    IntxWeightOnlyConfig,
    PerGroup,
)
from transformers import AutoModelForCausalLM, TorchAoConfig

sys.path.append(str(Path(__file__).parent))
import checkpoints as common

sys.path.pop()

INT8 = ("Int8DynamicActivationInt8WeightConfig()", Int8DynamicActivationInt8WeightConfig(), "W8A8", None)
INTX4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(128))
# name: call, configuration, the nearest of quantpub's schemes, group size
MADE = {
    "torchao-int8-dynamic-dense": INT8,
    "torchao-nvfp4-weight-dense": ("NVFP4WeightOnlyConfig()", NVFP4WeightOnlyConfig(), "NVFP4A16", 16),
    "torchao-fp8-weight-dense": ("Float8WeightOnlyConfig()", Float8WeightOnlyConfig(), "FP8_DYNAMIC", None),
    "torchao-intx4-dense": ("IntxWeightOnlyConfig(torch.int4, PerGroup(128))", INTX4, "W4A16", 128),
    "torchao-int8-moe": INT8,
}
BROKEN = {
    "torchao-int8-moe": "the experts are one parameter in transformers and not Linears: torchao leaves all of them in "
    "bf16 and says nothing; only the attention is int8. The header's tensor_names name the fused experts, "
    "which the file holds one by one",
}
NOTES = {
    "torchao-fp8-weight-dense": "weights only: activations stay in 16 bits, which no scheme of quantpub says",
    "torchao-intx4-dense": "codes of 4 bits, one a byte (int8)",
}


def quantize(base: Path, folder: Path, config: object) -> None:
    stated = TorchAoConfig(config, modules_to_not_convert=["lm_head"])
    kwargs = {"dtype": torch.bfloat16, "quantization_config": stated, "device_map": "cpu"}
    AutoModelForCausalLM.from_pretrained(base, **kwargs).save_pretrained(folder)


def dequantized(folder: Path, modules: tuple[str, ...]) -> common.Tensors:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu")
    return {module: model.get_submodule(module).weight.dequantize() for module in modules}


def main(bases: dict[str, Path], out: Path, names: list[str]) -> None:
    for name, (call, config, scheme, group) in MADE.items():
        if names and name not in names:
            continue
        model = name.rsplit("-", 1)[1]
        quantize(bases[model], out / name, config)
        modules = common.MODULES[model] if model == "dense" else common.MODULES[model][:1]
        common.record(
            out,
            name,
            "torchao",
            (),
            f"from_pretrained(quantization_config=TorchAoConfig({call}, modules_to_not_convert=['lm_head'])); save_pretrained",
            {"scheme": scheme, "group_size": group, "kv_cache": None},
            dequantized(out / name, modules),
            "from_pretrained; weight.dequantize()",
            broken=BROKEN.get(name),
            note=NOTES.get(name),
        )


if __name__ == "__main__":
    main({"dense": Path(sys.argv[1]), "moe": Path(sys.argv[2])}, Path(sys.argv[3]), sys.argv[4:])
