"""Experts in torch alone. `bf16-loop`: expert after expert, each on its own tokens. `torch-grouped`: `torch._grouped_mm`.

The loop is no grouped kernel: it is what plain PyTorch models do, and the baseline on CPUs. It reads back which tokens an
expert has, so no CUDA graph can hold it. `_grouped_mm` takes tokens sorted by expert, and where each expert's end:
    sorted  x by expert            [M·T, K]
    offs    int32 [E], row after the last of each expert
    w       [E, K, N], seen from [E, N, K], which is never moved
Its rows must be multiples of 16 bytes. Source: aten's `_grouped_mm`; on CUDA a CUTLASS kernel from Hopper on.
"""

from __future__ import annotations

import torch

from quantpub.kernels.base import Operands, attempt
from quantpub.kernels.moe_base import MoeKernel, any_experts, dense
from quantpub.scheme import Scheme

ALIGN = 8  # bf16 numbers in 16 bytes


def available() -> str | None:
    return None


def run_loop(x_MK: torch.Tensor, weights_MT: torch.Tensor, ids_MT: torch.Tensor, operands: Operands) -> torch.Tensor:
    w13, w2 = operands
    y_MK = torch.zeros_like(x_MK, dtype=torch.float32)
    for e in torch.unique(ids_MT).tolist():
        row, slot = (ids_MT == e).nonzero(as_tuple=True)
        h = _gated(torch.nn.functional.linear(x_MK[row], w13[e]))
        y_MK.index_add_(0, row, torch.nn.functional.linear(h, w2[e]).float() * weights_MT[row, slot, None])
    return y_MK.to(x_MK.dtype)


def _gated(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def ungrouped() -> str | None:
    def tiny() -> torch.Tensor:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        x, w = torch.zeros(2, 16, dtype=torch.bfloat16), torch.zeros(1, 16, 16, dtype=torch.bfloat16)
        ids, ones = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1)
        w13 = torch.zeros(1, 32, 16, dtype=torch.bfloat16)
        return run_grouped(x.to(device), ones.to(device), ids.to(device), (w13.to(device), w.to(device)))

    return attempt(tiny)


def reject_grouped(scheme: Scheme, experts: int, hidden: int, intermediate: int) -> str | None:
    for name, size in (("hidden", hidden), ("intermediate", intermediate)):
        if size % ALIGN:
            return f"{name} size {size} is not a multiple of {ALIGN}"
    return None


def run_grouped(x_MK: torch.Tensor, weights_MT: torch.Tensor, ids_MT: torch.Tensor, operands: Operands) -> torch.Tensor:
    w13, w2 = operands
    m, t = ids_MT.shape
    sorted_ids, order = ids_MT.flatten().sort(stable=True)
    every = torch.arange(len(w13), dtype=sorted_ids.dtype, device=x_MK.device)
    offs = torch.searchsorted(sorted_ids, every, right=True).to(torch.int32)
    h = _gated(torch._grouped_mm(x_MK[order // t], w13.transpose(1, 2), offs=offs))
    y = torch._grouped_mm(h, w2.transpose(1, 2), offs=offs)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(m * t, device=x_MK.device))
    return (y[back].view(m, t, -1) * weights_MT[..., None]).sum(1).to(x_MK.dtype)


LOOP = MoeKernel("bf16-loop", "dense", ("cpu",), available, any_experts, dense, run_loop)
GROUPED = MoeKernel("torch-grouped", "dense", ("cpu", "cuda"), ungrouped, reject_grouped, dense, run_grouped)
