"""Checkpoints of GPTQModel: GPTQ in its variants, and AWQ.

usage: python -P scripts/goldens/checkpoints_gq.py BASE_DENSE BASE_MOE OUT [NAME ...]   (gptqmodel 7.6)

`GPTQModel.load(...).quantize(random token ids).save(...)` on the CPU. It asks for a tokenizer beside the model, so it gets a
copy of the base with one. What is dequantized is read back from the file: a TorchLinear of GPTQModel holds the tensors of
one module, becomes v2 through GPTQModel's own conversion where the file is v1, and `dequantize_weight` is called; for AWQ
it is `dequantize_gemm`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

sys.path.append(str(Path(__file__).parent))
import checkpoints as common

sys.path.pop()

GROUP = 128
# name: what QuantizeConfig is told beside bits=4, group_size=128; quantpub's scheme
MADE: dict[str, tuple[dict[str, object], str]] = {
    "gptqmodel-gptq-dense": ({}, "W4A16"),
    "gptqmodel-gptq-v2-dense": ({"format": "gptq_v2"}, "W4A16"),
    "gptqmodel-gptq-asym-dense": ({"sym": False}, "W4A16_ASYM"),
    "gptqmodel-gptq-desc-act-dense": ({"desc_act": True}, "W4A16"),
    "gptqmodel-awq-dense": ({"method": "awq", "format": "gemm", "sym": False}, "W4A16_ASYM"),
    "gptqmodel-gptq-moe": ({}, "W4A16"),
}
NOTES = {
    "gptqmodel-gptq-asym-dense": "GPTQ v1, each zero stored less one",
    "gptqmodel-gptq-desc-act-dense": "g_idx of down_proj is not sorted: the columns of a group are scattered",
    "gptqmodel-awq-dense": "AWQ's channel scales are in the norms and in the rows of v_proj and up_proj",
}


def quantize(base: Path, folder: Path, told: dict[str, object]) -> None:
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in common.token_rows(32)]
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(shutil.copytree(base, Path(scratch) / "base"))
        common.tokenizer().save_pretrained(copy)
        model = GPTQModel.load(str(copy), QuantizeConfig(bits=4, group_size=GROUP, device="cpu", **told))
        model.quantize(rows, batch_size=4, backend=BACKEND.AWQ_TORCH if "method" in told else BACKEND.GPTQ_TORCH)
        model.save(str(folder))


def dequantized(folder: Path, modules: tuple[str, ...]) -> common.Tensors:
    tensors = common.tensors_of(folder)
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]
    read = awq if stated["quant_method"] == "awq" else gptq
    states = {m: {n.rsplit(".", 1)[1]: t for n, t in tensors.items() if n.startswith(f"{m}.")} for m in modules}
    return {module: read(state, stated).t().contiguous() for module, state in states.items()}


def awq(state: common.Tensors, stated: dict[str, object]) -> torch.Tensor:
    return dequantize_gemm(state["qweight"], state["qzeros"], state["scales"], bits=4, group_size=GROUP)


def gptq(state: common.Tensors, stated: dict[str, object]) -> torch.Tensor:
    sides = {"in_features": len(state["g_idx"]), "out_features": state["scales"].shape[1], "register_buffers": True}
    module = TorchLinear(bits=4, group_size=GROUP, sym=stated["sym"], desc_act=stated["desc_act"], **sides)
    for name, tensor in state.items():
        setattr(module, name, tensor.clone())
    if stated["checkpoint_format"] == "gptq":
        convert_gptq_v1_to_v2_format_module(module, bits=4, pack_dtype=torch.int32)
    return module.eval().dequantize_weight()


def main(bases: dict[str, Path], out: Path, names: list[str]) -> None:
    for name, (told, scheme) in MADE.items():
        if names and name not in names:
            continue
        model = name.rsplit("-", 1)[1]
        quantize(bases[model], out / name, told)
        said = "".join(f", {key}={value!r}" for key, value in told.items())
        common.record(
            out,
            name,
            "gptqmodel",
            (),
            f"GPTQModel.load(base, QuantizeConfig(bits=4, group_size=128{said})).quantize(random token ids).save",
            {"scheme": scheme, "group_size": GROUP, "kv_cache": None, "smoothed": "method" in told},
            dequantized(out / name, common.MODULES[model]),
            "gptqmodel dequantize_gemm" if "awq" in name else "gptqmodel TorchLinear.dequantize_weight",
            note=NOTES.get(name),
        )


if __name__ == "__main__":
    main({"dense": Path(sys.argv[1]), "moe": Path(sys.argv[2])}, Path(sys.argv[3]), sys.argv[4:])
