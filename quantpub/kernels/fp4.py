"""NVFP4 as kernels with FP4 arithmetic see it: the parts of a checkpoint, swizzled scales, activations read back.

Legend: R rows (N or M), G = K/16 groups, B = K/2 bytes; R' = R up to 128, G' = G up to 4.

Tensor cores take scales in tiles of 128 × 4, one after another along G': in a tile, the scale of row r and group g is at
16·(r mod 32) + 4·(r div 32) + g. Padding is zero.
A value is E2M1(code) · scale · global scale. Global scales are multipliers here: compressed-tensors stores their inverses.
Activations (codes uint8 [M, B], swizzled scales, multiplier float32 [1]) take the calibrated multiplier of the checkpoint.
Source: PTX ISA, tcgen05.mma block scaling; vLLM's nvfp4_utils.py and compressed_tensors_w4a4_nvfp4.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from quantpub.hardware import misfit
from quantpub.kernels.base import Operands, Weight
from quantpub.layouts.words import unpack_nibbles
from quantpub.qtensor import code_values
from quantpub.scheme import Scheme

NUM, GROUP = "fp4_e2m1", 16
LAYOUTS = ("ct-nvfp4", "modelopt-nvfp4")
NOMINAL = 2.0**-8  # a global scale that takes activations up to 10.5


@dataclass(frozen=True, eq=False)
class Parts:
    """codes uint8 [N, B]; scale float8_e4m3fn [N, G]; multipliers float32 (): of the weight, and of activations or None."""

    codes_NB: torch.Tensor
    scale_NG: torch.Tensor
    weight: torch.Tensor
    act: torch.Tensor | None


def parts(weight: Weight) -> Parts:
    """Merged members have one global scale each, all the same; engines take the largest."""
    packed = weight.packed
    if weight.layout == "modelopt-nvfp4":
        act = packed["input_scale"].max() if "input_scale" in packed else None
        return Parts(packed["weight"], packed["weight_scale"], packed["weight_scale_2"].max(), act)
    act = 1 / packed["input_global_scale"].max() if "input_global_scale" in packed else None
    return Parts(packed["weight_packed"], packed["weight_scale"], 1 / packed["weight_global_scale"].max(), act)


def reject(scheme: Scheme, n: int, k: int, row: str) -> str | None:
    weight, act = scheme.weight, scheme.act
    if weight.num != NUM or not weight.global_scale or scheme.group_size != GROUP:
        return f"it multiplies NVFP4 weights, not {scheme.name}"
    if act is None or act.num != NUM:
        return f"it multiplies by NVFP4 activations, not those of {scheme.name}"
    found = misfit(row, n, k, GROUP, "vllm", "0.25.1")
    return f"{found.reason}; {found.effect}" if found else None


def swizzle(scale_RG: torch.Tensor) -> torch.Tensor:
    """Any 8-bit dtype [R, G] → the same [R', G'], in the order of tiles."""
    rows, groups = scale_RG.shape
    bytes_RG = scale_RG.contiguous().view(torch.uint8)
    padded = torch.nn.functional.pad(bytes_RG, (0, -groups % 4, 0, -rows % 128))
    tiles = padded.view(padded.shape[0] // 128, 4, 32, padded.shape[1] // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(padded.shape).view(scale_RG.dtype)


def unswizzle(tiles: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """The inverse of `swizzle`, for tiles of any shape: [R, G]."""
    high, wide = -(-rows // 128), -(-groups // 4)
    found = tiles.contiguous().view(torch.uint8).reshape(high, wide, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return found.reshape(128 * high, 4 * wide)[:rows, :groups].contiguous().view(torch.float8_e4m3fn)


def operands(weight: Weight) -> Operands:
    """codes, swizzled scales, alpha = the product of both multipliers, the divisor and the multiplier of activations."""
    found = parts(weight)
    assert found.act is not None, "the scale of activations is calibrated"
    act_1 = found.act.float().reshape(1)
    alpha_1 = act_1 * found.weight.float()
    return found.codes_NB.contiguous(), swizzle(found.scale_NG), alpha_1, act_1.reciprocal(), act_1


@cache
def nominal(device: torch.device) -> Operands:
    """(divisor, multiplier), float32 [1]."""
    return torch.full((1,), 1 / NOMINAL, device=device), torch.full((1,), NOMINAL, device=device)


def dequantize(activations: Operands) -> torch.Tensor:
    codes_MB, tiles, act_1 = activations
    values_MK = code_values(unpack_nibbles(codes_MB.view(torch.uint8)), NUM)
    scale_MG = unswizzle(tiles, len(values_MK), values_MK.shape[1] // GROUP).float() * act_1
    x_MK: torch.Tensor = (values_MK.unflatten(1, (-1, GROUP)) * scale_MG.unsqueeze(-1)).flatten(1)
    return x_MK
