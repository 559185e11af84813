"""Golden bytes of GPTQModel: what its packers make of known codes, and what it makes of its own bytes again.

usage: python scripts/goldens/int4_gptqmodel.py OUT_DIR      (an environment with gptqmodel; a CPU is enough)

Writes gptq_gptqmodel and awq_gptqmodel .safetensors with `<case>.<tensor>`: the tensors of the format, and `weight`
[N, K] in the dtype of the scales, by GPTQModel's own dequantization. The weights that are packed are exact products of the
codes and scales of `int4_cuda` (of both signs), so rounding has nothing to decide. GPTQModel packs fp16 scales; bf16 ones
are put into the module afterwards, as a checkpoint that has them would.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.quantization.config import QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from int4_cuda import codes, scales
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
N, K = 32, 128
KEPT = 8  # rows of a dequantized weight


def linear(codes_NK: torch.Tensor, zero_NG: torch.Tensor, scale_NG: torch.Tensor) -> torch.nn.Linear:
    """A Linear whose float32 weight is exactly (codes − zero) · scale."""
    width = codes_NK.shape[1] // scale_NG.shape[1]
    module = torch.nn.Linear(codes_NK.shape[1], codes_NK.shape[0], bias=False)
    wide = (codes_NK - zero_NG.repeat_interleave(width, 1)) * scale_NG.float().repeat_interleave(width, 1)
    module.weight.data = wide.float()
    return module


def gptq(bits: int, group: int, dtype: torch.dtype) -> Tensors:
    groups = 1 if group == -1 else K // group
    scale_NG, zero_NG = scales(groups, N, dtype).t(), torch.full((N, groups), 1 << bits - 1)
    module = TorchLinear(
        bits=bits, group_size=group, sym=True, desc_act=False, in_features=K, out_features=N, register_buffers=True
    )
    g_idx = (torch.arange(K) // (K // groups)).to(torch.int32)
    module.pack_original(linear(codes(N, K, bits), zero_NG, scale_NG), scale_NG.float(), zero_NG, g_idx)
    module.scales = scale_NG.t().contiguous()
    module.eval()
    weight_KN = TorchLinear._dequantize_weight_cached_248(module, num_itr=1)
    convert_gptq_v2_to_v1_format_module(module, QuantizeConfig(bits=bits, group_size=group))
    names = ("qweight", "qzeros", "scales", "g_idx")
    return {name: getattr(module, name) for name in names} | {"weight": weight_KN.t()[:KEPT]}


def awq(group: int, dtype: torch.dtype) -> Tensors:
    groups = 1 if group == -1 else K // group
    scale_NG, zero_NG = scales(groups, N, dtype).t(), codes(groups, N, 4, 3).t()
    module = AwqTorchLinear(bits=4, group_size=group, sym=False, desc_act=False, in_features=K, out_features=N)
    module.pack(linear(codes(N, K, 4), zero_NG, scale_NG), scale_NG.float(), zero_NG)
    module.scales = scale_NG.t().contiguous()
    weight_KN = dequantize_gemm(module.qweight, module.qzeros, module.scales, 4, module.group_size)
    return {name: getattr(module, name) for name in ("qweight", "qzeros", "scales")} | {"weight": weight_KN.t()[:KEPT]}


def write(path: Path, cases: dict[str, Tensors], calls: str) -> None:
    provenance = {"made by": "scripts/goldens/int4_gptqmodel.py", "calls": calls, "device": "cpu", "seed": "hashed()"}
    versions = {package: version(package) for package in ("gptqmodel", "torch")}
    tensors = {f"{case}.{name}": t.contiguous() for case, found in cases.items() for name, t in found.items()}
    save_file(tensors, path, provenance | versions)
    print(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size} bytes")


def main(folder: Path) -> None:
    kinds = [(4, 32, torch.bfloat16), (4, -1, torch.float16), (8, 32, torch.float16), (8, -1, torch.bfloat16)]
    gptqs = {f"b{bits}_n{N}_k{K}_g{group}": gptq(bits, group, dtype) for bits, group, dtype in kinds}
    write(folder / "gptq_gptqmodel.safetensors", gptqs, "TorchLinear.pack_original, v2 to v1, dequantize_weight")
    awqs = {f"b4_n{N}_k{K}_g{group}": awq(group, dtype) for group, dtype in ((32, torch.bfloat16), (-1, torch.float16))}
    write(folder / "awq_gptqmodel.safetensors", awqs, "AwqTorchLinear.pack, dequantize_gemm")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/goldens/int4_gptqmodel.py OUT_DIR")
    main(Path(sys.argv[1]))
