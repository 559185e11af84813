"""FlashInfer's NVFP4 by NVFP4: `fp4_quantize`, then `mm_fp4`, on Blackwell. Legend: M, N, K; G = K/16 groups.

    flashinfer-fp4            CUTLASS; activations' scales written in the GEMM's tiles of 128 × 4 at once
    flashinfer-fp4-linear     CUTLASS; scales written row by row, as they travel between GPUs, and then put in tiles
    flashinfer-fp4-cute-dsl   CuTe DSL, compute capability 10.x only
Operands: see `fp4.operands`. `mm_fp4` knows no other order of scales than tiles for these backends, so what the second
costs beyond the first is the price of linear scales. The ops are compiled when they are first called.
vLLM runs the same GEMMs after its own quantizing op. Source: FlashInfer's fp4_quantization and gemm modules.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from quantpub.kernels import fp4
from quantpub.kernels.base import Kernel, Operands, Split
from quantpub.kernels.vllm_common import Capability, absent, incapable
from quantpub.scheme import Scheme

CUTLASS_ROW, CUTE_ROW = "FlashInfer CUTLASS NVFP4", "FlashInfer CuTe-DSL NVFP4"


@cache
def flashinfer() -> Any:
    return importlib.import_module("flashinfer")


def unavailable(backend: str, below: Capability | None = None) -> str | None:
    return absent("flashinfer", "FlashInfer") or incapable((10, 0), below) or _unsupported(backend)


def _unsupported(backend: str) -> str | None:
    try:
        multiply = flashinfer().mm_fp4
    except Exception as error:  # whatever a package that does not fit this machine says
        return f"FlashInfer cannot be imported: {type(error).__name__}: {str(error).strip().splitlines()[0]:.200}"
    major, minor = torch.cuda.get_device_capability()
    supported = getattr(multiply, "is_backend_supported", lambda *_: True)(backend, 10 * major + minor)
    return None if supported else f"FlashInfer has no {backend} FP4 for compute capability {major}.{minor}"


def reject(scheme: Scheme, n: int, k: int) -> str | None:
    return fp4.reject(scheme, n, k, CUTLASS_ROW)


def _tiled(x_MK: torch.Tensor, divisor_1: torch.Tensor, act_1: torch.Tensor) -> Operands:
    codes_MB, tiles = flashinfer().fp4_quantize(x_MK, divisor_1)
    return codes_MB, tiles, act_1


def _linear(x_MK: torch.Tensor, divisor_1: torch.Tensor, act_1: torch.Tensor) -> Operands:
    codes_MB, scale_MG = flashinfer().fp4_quantize(x_MK, divisor_1, is_sf_swizzled_layout=False)
    groups = x_MK.shape[1] // fp4.GROUP
    tiles = flashinfer().nvfp4_block_scale_interleave(scale_MG.view(torch.uint8).reshape(-1, groups))
    return codes_MB, tiles.reshape(-1, -(-groups // 4) * 4), act_1


def gemm(activations: Operands, operands: Operands, backend: str) -> torch.Tensor:
    (codes_MB, tiles_a, _), (codes_NB, tiles_b, alpha_1) = activations, operands[:3]
    y_MN: torch.Tensor = flashinfer().mm_fp4(
        codes_MB,
        codes_NB.t(),
        tiles_a.view(torch.uint8),
        tiles_b.view(torch.uint8).t(),
        alpha_1,
        torch.bfloat16,
        block_size=fp4.GROUP,
        use_8x4_sf_layout=False,
        backend=backend,
    )
    return y_MN


def _split(linear: bool, backend: str) -> Split:
    quantize = _linear if linear else _tiled
    return Split(
        fp4.NUM,
        lambda x_MK: quantize(x_MK, *fp4.nominal(x_MK.device)),
        fp4.dequantize,
        partial(gemm, backend=backend),
        lambda x_MK, operands: quantize(x_MK, operands[3], operands[4]),
    )


def _kernel(name: str, linear: bool, backend: str, row: str, below: Capability | None = None) -> Kernel:
    quantize = _linear if linear else _tiled
    return Kernel(
        name,
        "nvfp4-swizzled",
        ("cuda",),
        partial(unavailable, backend, below),
        reject,
        fp4.operands,
        lambda x_MK, operands: gemm(quantize(x_MK, operands[3], operands[4]), operands, backend),
        _split(linear, backend),
        reads=fp4.LAYOUTS,
        package="flashinfer",
        row=row,
        symbol="cutlass|gemm|cute",
    )


KERNEL = _kernel("flashinfer-fp4", False, "cutlass", CUTLASS_ROW)
LINEAR = replace(_kernel("flashinfer-fp4-linear", True, "cutlass", CUTLASS_ROW), row="")
CUTE_DSL = _kernel("flashinfer-fp4-cute-dsl", False, "cute-dsl", CUTE_ROW, (11, 0))
