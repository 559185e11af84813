"""vLLM's elementwise kernels of a decoder layer, called as its layers call them: norms, rotary embedding, KV cache write.

Legend: M tokens, H hidden features; qkv is what the merged projection gives, [M, (heads + 2 kv_heads) · head_dim] in bf16.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from quantpub.served import Served

EPSILON = 1e-6


def has(op: str) -> bool:
    """Whether vLLM is here and was built with it."""
    try:
        importlib.import_module("vllm._custom_ops")
    except (ImportError, RuntimeError):
        return False
    return hasattr(torch.ops._C, op)


class LayerOps:
    """What the kernels read beside activations, for M tokens at positions and cache slots one after another."""

    def __init__(self, model: Served, m: int) -> None:
        like: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
        self.model, self.m = model, m
        self.residual_MH, self.norm = torch.zeros(m, model.hidden, **like), torch.ones(model.hidden, **like)
        self.per_head, self.turns = torch.ones(model.head_dim, **like), torch.randn(m, model.head_dim, **like)
        self.positions, self.slots = torch.arange(m, device="cuda"), torch.arange(m, device="cuda")
        self.one = torch.ones((), device="cuda")

    def add_norm(self, x_MH: torch.Tensor) -> None:
        """In place, with the residual."""
        torch.ops._C.fused_add_rms_norm(x_MH, self.residual_MH, self.norm, EPSILON)

    def rotate_and_store(self, qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """q_MHD, a view of qkv after rotation, and after its norm in models that have one; k and v go to their pages."""
        model, m = self.model, self.m
        heads, kv_heads, dim = model.heads, model.kv_heads, model.head_dim
        q, k, v = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
        if model.qk_norm:
            torch.ops._C.fused_qk_norm_rope(
                qkv, heads, kv_heads, kv_heads, dim, EPSILON, self.per_head, self.per_head, self.turns, True,
                self.positions, -1,
            )  # fmt: skip
        else:
            torch.ops._C.rotary_embedding(self.positions, q, k, dim, self.turns, True)
        torch.ops._C_cache_ops.reshape_and_cache_flash(
            k.view(m, kv_heads, dim), v.view(m, kv_heads, dim), keys, values, self.slots, "auto", self.one, self.one
        )
        q_MHD: torch.Tensor = q.view(m, heads, dim)
        return q_MHD

    def gate(self, gate_up: torch.Tensor, gated: torch.Tensor) -> None:
        torch.ops._C.silu_and_mul(gated, gate_up)
