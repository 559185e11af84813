"""Golden codes of the FP4 algorithms, made by torchao and by NVIDIA ModelOpt on the CPU.

usage: python -P scripts/goldens/fp4.py torchao|modelopt FOLDER
writes FOLDER/fp4_torchao.safetensors (torchao 0.18) or FOLDER/fp4_modelopt.safetensors (nvidia-modelopt 0.47); nothing
of quantpub is used.

torchao
    e2m1.x, e2m1.codes   float32, and its E2M1 patterns: values, ties, their float32 neighbours, random ones of both signs
    mx.w, .scale, .codes   bf16 [12, 96], E8M0 bytes of the floor rule and patterns by `to_mx`
modelopt
    nvfp4.w, .global_scale   bf16 [12, 64], a power of two
    nvfp4.scale, .codes      E4M3 of ModelOpt's own rule, and patterns by `NVFP4QTensor.quantize`
    nvfp4.given, .given_codes   E4M3 scales drawn between half and twice that, and the patterns for them
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

SEED = 41
Tensors = dict[str, torch.Tensor]


def weights(n: int, k: int, group: int) -> torch.Tensor:
    """Normal weights whose groups differ in size by a few powers of two."""
    generator = torch.Generator().manual_seed(SEED)
    w = torch.randn(n, k // group, group, generator=generator)
    return (w * torch.exp2(torch.randint(-9, -3, (n, k // group, 1), generator=generator))).view(n, k).bfloat16()


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """Two patterns a byte, the first in the low bits."""
    packed = packed.view(torch.uint8)
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def torchao() -> Tensors:
    from torchao.prototype.mx_formats.kernels import f32_to_f4_unpacked
    from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx

    edges = torch.tensor([0.0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 1000, 1e-20])
    near = torch.cat([edges, *(torch.nextafter(edges, torch.tensor(end)) for end in (0.0, torch.inf))])
    x = torch.cat([near, torch.rand(400, generator=torch.Generator().manual_seed(SEED)) * 8])
    x = torch.cat([x, -x[x > 0]])
    w = weights(12, 96, 32)
    scale, data = to_mx(w, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.FLOOR)
    mx = {"mx.w": w, "mx.scale": scale.view(torch.uint8), "mx.codes": unpacked(data)}
    return {"e2m1.x": x, "e2m1.codes": f32_to_f4_unpacked(x)} | mx


def modelopt() -> Tensors:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    w, global_scale = weights(12, 64, 16), torch.tensor(2.0**-13)
    scale, _ = NVFP4QTensor.get_weights_scaling_factor(w.float(), 16, global_scale)
    drawn = torch.empty(scale.shape).uniform_(0.5, 2, generator=torch.Generator().manual_seed(SEED))
    given = (scale.float() * drawn).clamp(max=448).to(torch.float8_e4m3fn)
    codes, given_codes = (
        unpacked(NVFP4QTensor.quantize(w.float(), 16, s, global_scale)[0]._quantized_data) for s in (scale, given)
    )
    named = {"w": w, "global_scale": global_scale, "scale": scale, "codes": codes, "given": given}
    return {f"nvfp4.{name}": tensor for name, tensor in (named | {"given_codes": given_codes}).items()}


def main(peer: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    make, package = {"torchao": (torchao, "torchao"), "modelopt": (modelopt, "nvidia-modelopt")}[peer]
    tensors = {name: tensor.contiguous() for name, tensor in make().items()}
    provenance = {"made by": "scripts/goldens/fp4.py", "seed": str(SEED), "device": "cpu"}
    versions = {name: version(name) for name in (package, "torch")}
    save_file(tensors, folder / f"fp4_{peer}.safetensors", metadata=provenance | versions)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
