"""Golden bytes of the compressed-tensors layouts, made by compressed-tensors itself on the CPU.

usage: python -P ct.py FOLDER        (whichever compressed-tensors is first on the path)
writes FOLDER/ct_VERSION.safetensors.

For each case the codes, scales and zeros are drawn with a seed and the weight is what they stand for, in float32, so
that compressed-tensors' own rounding finds the same codes; none is a minus zero, which its rounding never makes. A
torch.nn.Linear is then prepared with `initialize_module_for_quantization`, which decides names and shapes, and
compressed with `compress_module`. Per case:
    CASE.in.NAME    codes, scale, zero, global_scale, input_scale: what was drawn
    CASE.out.NAME   the state dict of the compressed module
    CASE.weight     what `decompress` makes of it, in the dtype it computes in
Of a tensor of more than 16 KiB only the SHA-256 is kept, in the header.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import sys
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compressed-tensors compiles its FP4 cast; the plain one gives the same

import torch
from compressed_tensors.compressors import BaseCompressor, compress_module
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, initialize_module_for_quantization
from safetensors.torch import save_file

SEED = 20
LARGE = 16384
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
TOKEN8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
FP8 = {"num_bits": 8, "type": "float"}
GROUPS8 = {**FP8, "strategy": "group", "group_size": 128, "dynamic": True}
FP4 = {"num_bits": 4, "type": "float"}
NVFP4 = {**FP4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
MXFP4 = {**FP4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
# name: N, K, block, weights, input activations
CASES = {
    "W4A16": (12, 32, (1, 16), INT4, None),
    "W4A16_CHANNEL": (12, 32, (1, 32), {**INT4, "strategy": "channel", "group_size": None}, None),
    "W4A16_ASYM_12": (12, 32, (1, 16), {**INT4, "symmetric": False}, None),
    "W4A16_ASYM_64": (64, 32, (1, 16), {**INT4, "symmetric": False}, None),
    "W8A16": (12, 32, (1, 32), INT8, None),
    "W8A16_GROUP": (12, 32, (1, 16), {**INT8, "strategy": "group", "group_size": 16}, None),
    "W8A8": (12, 32, (1, 32), INT8, TOKEN8),
    "FP8_DYNAMIC": (12, 32, (1, 32), {**FP8, "strategy": "channel"}, {**FP8, "strategy": "token", "dynamic": True}),
    "FP8": (12, 32, (12, 32), {**FP8, "strategy": "tensor"}, {**FP8, "strategy": "tensor"}),
    "FP8_BLOCK": (256, 384, (128, 128), {**FP8, "strategy": "block", "block_structure": [128, 128]}, GROUPS8),
    "NVFP4A16": (12, 64, (1, 16), NVFP4, None),
    "NVFP4": (12, 64, (1, 16), NVFP4, {**NVFP4, "dynamic": "local"}),
    "MXFP4A16": (12, 64, (1, 32), MXFP4, None),
}


def draw(n: int, k: int, block: tuple[int, int], weights: dict[str, object], static: bool) -> dict[str, torch.Tensor]:
    """Codes, scales and zeros of one case, as its format stores them."""
    g = torch.Generator().manual_seed(SEED)
    grid = (n // block[0], k // block[1])
    drawn = {"scale": (torch.rand(grid, generator=g) + 0.1).to(torch.bfloat16)}
    if weights["type"] == "int":
        half = 1 << (int(str(weights["num_bits"])) - 1)
        drawn["codes"] = torch.randint(-half, half, (n, k), generator=g, dtype=torch.int8)
        if weights.get("symmetric") is False:
            drawn["zero"] = torch.randint(-half, half, grid, generator=g, dtype=torch.int8)
    elif weights["num_bits"] == 8:
        index = torch.arange(n * k).view(n, k)
        drawn["codes"] = (index * 37 % 126 + 1 + index // 5 % 2 * 128).to(torch.uint8).view(torch.float8_e4m3fn)
        if block[0] != 1:
            drawn["scale"] = torch.rand(grid, generator=g) + 0.1
    else:
        codes = torch.randint(0, 16, (n, k), generator=g, dtype=torch.uint8)
        drawn["codes"] = torch.where(codes == 8, 0, codes)
        if weights["group_size"] == 16:
            drawn["scale"] = torch.randint(1, 127, grid, generator=g).to(torch.uint8).view(torch.float8_e4m3fn)
            drawn["global_scale"] = torch.tensor(2.0**-9)
        else:
            drawn["scale"] = 2.0 ** torch.randint(-20, 20, grid, generator=g)
    if static:
        drawn["input_scale"] = torch.tensor(2.0**-5)
    return drawn


def values(codes: torch.Tensor) -> torch.Tensor:
    if codes.dtype != torch.uint8:
        return codes.float()
    return E2M1[(codes & 7).int()] * torch.where(codes >= 8, -1.0, 1.0)


def spread(value: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    return value.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)


def module_of(case: str) -> tuple[torch.nn.Linear, dict[str, torch.Tensor]]:
    """A Linear as compressed-tensors prepares it, with the drawn weight and parameters in it."""
    n, k, block, weights, inputs = CASES[case]
    static = inputs is not None and inputs.get("dynamic") is not True
    drawn = draw(n, k, block, weights, static)
    zero = spread(drawn["zero"], block) if "zero" in drawn else 0.0
    weight = (values(drawn["codes"]) - zero) * spread(drawn["scale"], block) * drawn.get("global_scale", 1.0)
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=None if inputs is None else QuantizationArgs(**inputs),
    )
    linear = torch.nn.Linear(k, n, bias=False)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    initialize_module_for_quantization(linear, scheme)
    fp4 = drawn["codes"].dtype == torch.uint8
    fill(linear, "weight_scale", drawn["scale"].float() if fp4 else drawn["scale"])
    fill(linear, "weight_zero_point", drawn.get("zero"))
    fill(linear, "weight_global_scale", reciprocal(drawn.get("global_scale")))
    fill(linear, "input_scale", drawn.get("input_scale"))
    fill(linear, "input_global_scale", reciprocal(drawn.get("input_scale")))
    return linear, drawn


def reciprocal(value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else 1 / value


def fill(linear: torch.nn.Linear, name: str, value: torch.Tensor | None) -> None:
    """Put `value` into a parameter that compressed-tensors made, in its shape."""
    made = getattr(linear, name, None)
    if made is not None and value is not None:
        assert made.numel() == value.numel(), (name, made.shape, value.shape)
        setattr(linear, name, torch.nn.Parameter(value.reshape(made.shape), requires_grad=False))


def run(case: str) -> dict[str, torch.Tensor]:
    linear, drawn = module_of(case)
    compress_module(linear)
    state = {name: value.detach().clone() for name, value in linear.state_dict().items()}
    scheme = linear.quantization_scheme
    weight = BaseCompressor.get_value_from_registry(scheme.format).decompress(state, scheme)["weight"]
    found = {f"{case}.in.{name}": value for name, value in drawn.items()}
    found |= {f"{case}.out.{name}": value for name, value in state.items()}
    return found | {f"{case}.weight": weight.detach().contiguous()}


def main(folder: Path) -> None:
    version = importlib.metadata.version("compressed-tensors")
    tensors = {name: value for case in CASES for name, value in run(case).items()}
    large = {name: value for name, value in tensors.items() if value.nbytes > LARGE}
    header = {name: hashlib.sha256(v.view(torch.uint8).numpy().tobytes()).hexdigest() for name, v in large.items()}
    header |= {"package": "compressed-tensors", "version": version, "torch": torch.__version__, "seed": str(SEED)}
    header |= {
        "script": "scripts/goldens/ct.py",
        "calls": "initialize_module_for_quantization, compress_module, decompress",
    }
    small = {name: value for name, value in tensors.items() if name not in large}
    save_file(small, folder / f"ct_{version}.safetensors", {**header, "device": "cpu"})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
