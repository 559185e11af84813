"""Checkpoints of auto-round, in the formats it exports.

usage: python -P scripts/goldens/checkpoints_ar.py BASE_DENSE BASE_MOE OUT [NAME ...]   (auto-round 0.16; the last of MADE
needs compressed-tensors beside it)

`AutoRound(iters=0, disable_opt_rtn=True).quantize_and_save(format=...)`: round to nearest, which sees no data. What is
dequantized is read back from the file: auto-round's own QuantLinear of that packing holds the tensors of one module, and
its forward is given the identity; AWQ goes through its `dequantize_gemm`, compressed-tensors through that package.
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

import torch
from auto_round import AutoRound
from auto_round.export.export_to_awq.utils import dequantize_gemm
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

sys.path.append(str(Path(__file__).parent))
import checkpoints as common

sys.path.pop()

GROUP = 128
# name: scheme of auto-round, more of its arguments, format, quantpub's scheme, group size
MADE: dict[str, tuple[str, dict[str, object], str, str, int | None]] = {
    "autoround-w4a16-dense": ("W4A16", {}, "auto_round", "W4A16", GROUP),
    "autoround-w4a16-asym-dense": ("W4A16", {"sym": False}, "auto_round", "W4A16_ASYM", GROUP),
    "autoround-gptq-dense": ("W4A16", {}, "auto_gptq", "W4A16", GROUP),
    "autoround-awq-dense": ("W4A16", {"sym": False}, "auto_awq", "W4A16_ASYM", GROUP),
    "autoround-w4a16-moe": ("W4A16", {}, "auto_round", "W4A16", GROUP),
    "autoround-nvfp4-dense": ("NVFP4", {}, "llm_compressor", "NVFP4", 16),
}


def quantize(base: Path, folder: Path, name: str) -> None:
    scheme, more, form, _, _ = MADE[name]
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(shutil.copytree(base, Path(scratch) / "base"))
        common.tokenizer().save_pretrained(copy)
        data = [torch.tensor([row]) for row in common.token_rows()]
        seen = {"dataset": data, "nsamples": len(data), "seqlen": data[0].shape[1]}
        quiet = {"device_map": "cpu", "enable_torch_compile": False, "iters": 0, "disable_opt_rtn": True}
        AutoRound(str(copy), scheme=scheme, **seen, **quiet, **more).quantize_and_save(f"{scratch}/out", format=form)
        (written,) = Path(scratch, "out").rglob("config.json")  # some formats go into a folder below
        shutil.copytree(written.parent, folder, dirs_exist_ok=True)


def dequantized(folder: Path, modules: tuple[str, ...]) -> common.Tensors:
    tensors = common.tensors_of(folder)
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]
    states = {m: {n.rsplit(".", 1)[1]: t for n, t in tensors.items() if n.startswith(f"{m}.")} for m in modules}
    if stated["quant_method"] == "compressed-tensors":
        return {module: compressed(state, stated) for module, state in states.items()}
    awq = "awq" in stated.get("packing_format", stated["quant_method"])
    zeros_less_one = "gptq" in stated.get("packing_format", stated["quant_method"])
    packing = qlinear_torch_zp if zeros_less_one else qlinear_torch
    return {m: gemm(state) if awq else gptq(state, packing.QuantLinear) for m, state in states.items()}


def gemm(state: common.Tensors) -> torch.Tensor:
    return dequantize_gemm(state["qweight"], state["qzeros"], state["scales"], 4, GROUP).t().contiguous()


def gptq(state: common.Tensors, packing: type[torch.nn.Module]) -> torch.Tensor:
    k, n = 8 * len(state["qweight"]), state["scales"].shape[1]
    module = packing(4, GROUP, k, n, False)
    for name, tensor in state.items():
        setattr(module, name, tensor.clone())
    return module(torch.eye(k)).to(state["scales"].dtype).t().contiguous()


def compressed(state: common.Tensors, stated: dict[str, object]) -> torch.Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    scheme = QuantizationConfig.model_validate(stated).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(scheme.format or stated["format"])
    return compressor.decompress(state, scheme)["weight"]


def main(bases: dict[str, Path], out: Path, names: list[str]) -> None:
    for name, (scheme, more, form, held, group) in MADE.items():
        if names and name not in names:
            continue
        model = name.rsplit("-", 1)[1]
        quantize(bases[model], out / name, name)
        said = "".join(f", {key}={value!r}" for key, value in more.items())
        compressed_tensors = form == "llm_compressor"
        common.record(
            out,
            name,
            "auto-round",
            ("compressed-tensors",) if compressed_tensors else (),
            f"AutoRound(base, scheme={scheme!r}, iters=0, disable_opt_rtn=True{said}).quantize_and_save(format={form!r})",
            {"scheme": held, "group_size": group, "kv_cache": None},
            dequantized(out / name, common.MODULES[model]),
            "compressed_tensors BaseCompressor.decompress"
            if compressed_tensors
            else "auto-round dequantize_gemm"
            if "awq" in name
            else "auto-round QuantLinear, applied to the identity",
        )


if __name__ == "__main__":
    main({"dense": Path(sys.argv[1]), "moe": Path(sys.argv[2])}, Path(sys.argv[3]), sys.argv[4:])
