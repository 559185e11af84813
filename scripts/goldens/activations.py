"""Golden activations under a calibrated scale, rounded by NVIDIA ModelOpt on the CPU.

usage: python -P scripts/goldens/activations.py FOLDER
writes FOLDER/activations_modelopt.safetensors (nvidia-modelopt 0.47); nothing of quantpub is used.

    x            float32 [8, 64]: normal, its groups of 16 apart by powers of two, and beyond what the scales hold
    fp8.scale    float32 (): a calibrated largest magnitude / 448
    fp8.out      x as `tensor_quant.fp8_eager` leaves it for that magnitude
    nvfp4.scale  float32 (): a power of two
    nvfp4.out    x as `NVFP4QTensor.quantize` and `dequantize` leave it under that scale
Groups whose E4M3 scale would be below 2^-9 are left out: ModelOpt raises it to that, kernels make zeros of such a group.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from modelopt.torch.quantization.tensor_quant import fp8_eager
from safetensors.torch import save_file

SEED = 43


def drawn() -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(8, 4, 16, generator=generator)
    return (x * torch.exp2(torch.randint(-6, 5, (8, 4, 1), generator=generator))).view(8, 64)


def main(folder: Path) -> None:
    x, amax, scale = drawn(), torch.tensor(20.0), torch.tensor(2.0**-7)
    q, scale_8G, _ = NVFP4QTensor.quantize(x, 16, None, scale)
    rounded = q.dequantize(dtype=torch.float32, scale=scale_8G, double_scale=scale, block_sizes={-1: 16})
    tensors = {
        "x": x,
        "fp8.scale": amax / 448,
        "fp8.out": fp8_eager(x, amax),
        "nvfp4.scale": scale,
        "nvfp4.out": rounded,
    }
    header = {"package": "nvidia-modelopt", "version": version("nvidia-modelopt"), "torch": torch.__version__}
    header |= {"seed": str(SEED), "device": "cpu", "script": "scripts/goldens/activations.py"}
    header |= {"calls": "fp8_eager, NVFP4QTensor.quantize, NVFP4QTensor.dequantize"}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "activations_modelopt.safetensors", header)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
