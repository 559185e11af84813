"""The attention kernel that an engine runs over its paged KV cache, ready to be timed.

Called as vLLM 0.25.1's v1/attention/backends/flash_attn.py does: FlashAttention 3 with its schedule computed beforehand, once a
step. In steps that a CUDA graph may hold, sequences are split at most SPLITS times; in others as the kernel chooses. Without vLLM
torch's own attention stands in, over contiguous keys. Legend: T query tokens of the batch, H heads, D head_dim.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from quantpub.kernels.base import Operands
from quantpub.served import Served

PAGE = 16  # tokens of a block of the KV cache, vLLM's default
SPLITS = 32  # config/attention.py, flash_attn_max_num_splits_for_cuda_graph
CAPTURED = 512  # tokens of the largest step with a CUDA graph
STANDS_IN = "torch SDPA stands in"
Call = Callable[[Operands], torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """lengths: of every sequence (query tokens, tokens in the cache, the query's among them); queries lie one after another."""

    lengths: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        return sum(query for query, _ in self.lengths)

    @property
    def pages(self) -> int:
        """Of the longest sequence."""
        return -(-max(length for _, length in self.lengths) // PAGE)

    def nbytes(self, model: Served) -> int:
        return len(self.lengths) * self.pages * PAGE * model.kv_bytes // model.layers


@dataclass(frozen=True)
class Attention:
    """operands(batch, place): of one call, with the `place`-th copy of the cache. run(operands)."""

    name: str
    operands: Callable[[Batch, int], Operands]
    run: Callable[[Batch], Call]


def find_attention(model: Served) -> Attention:
    """vLLM's, or torch's where vLLM is missing or its kernel does not run here."""
    try:
        attention = flash_attention(model)
        batch = Batch(((1, 2 * PAGE),) * 2)
        attention.run(batch)(attention.operands(batch, 0))
        torch.cuda.synchronize()
    except (ImportError, AttributeError, AssertionError, RuntimeError, TypeError) as error:
        return torch_attention(model, f"{STANDS_IN}: {type(error).__name__} {str(error)[:160]}")
    return attention


def flash_attention(model: Served) -> Attention:
    flash = importlib.import_module("vllm.vllm_flash_attn")
    version = importlib.import_module("vllm.v1.attention.backends.fa_utils").get_flash_attn_version()
    heads, kv_heads, dim = model.heads, model.kv_heads, model.head_dim

    def splits(batch: Batch) -> int:
        return SPLITS if version == 3 and batch.tokens <= CAPTURED else 0

    def operands(batch: Batch, place: int) -> Operands:
        """(q_THD, k and v in pages, out_THD, starts, lengths, table, and FA3's schedule).

        A served cache hands out pages as requests grow: those of a sequence lie anywhere.
        """
        sequences, pages = len(batch.lengths), batch.pages
        kv = torch.randn(sequences * pages, 2, PAGE, kv_heads, dim, dtype=torch.bfloat16, device="cuda")
        q_THD = torch.randn(batch.tokens, heads, dim, dtype=torch.bfloat16, device="cuda")
        starts = torch.tensor([0, *(query for query, _ in batch.lengths)], dtype=torch.int32).cumsum(0)
        starts = starts.to(device="cuda", dtype=torch.int32)
        lengths = torch.tensor([length for _, length in batch.lengths], dtype=torch.int32, device="cuda")
        table = torch.randperm(sequences * pages, device="cuda").to(torch.int32).view(sequences, pages)
        found = (q_THD, *kv.unbind(1), torch.empty_like(q_THD), starts, lengths, table)
        return (*found, _schedule(batch, starts, lengths)) if version == 3 else found

    def _schedule(batch: Batch, starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        schedule: torch.Tensor = flash.get_scheduler_metadata(
            batch_size=len(batch.lengths), max_seqlen_q=max(query for query, _ in batch.lengths),
            max_seqlen_k=max(length for _, length in batch.lengths), num_heads_q=heads, num_heads_kv=kv_heads,
            headdim=dim, cache_seqlens=lengths, qkv_dtype=torch.bfloat16, cu_seqlens_q=starts, page_size=PAGE,
            causal=True, window_size=(-1, -1), num_splits=splits(batch),
        )  # fmt: skip
        return schedule

    def run(batch: Batch) -> Call:
        longest_query, longest = (max(column) for column in zip(*batch.lengths, strict=True))

        def call(o: Operands) -> torch.Tensor:
            result: torch.Tensor = flash.flash_attn_varlen_func(
                q=o[0], k=o[1], v=o[2], out=o[3], cu_seqlens_q=o[4], max_seqlen_q=longest_query, seqused_k=o[5],
                max_seqlen_k=longest, softmax_scale=dim**-0.5, causal=True, window_size=[-1, -1], block_table=o[6],
                scheduler_metadata=o[7] if version == 3 else None, fa_version=version, num_splits=splits(batch),
            )  # fmt: skip
            return result

        return call

    return Attention(f"vllm_flash_attn {version}", operands, run)


def torch_attention(model: Served, name: str) -> Attention:
    """Batches whose sequences are all alike: decodes, or whole prompts."""
    heads, kv_heads, dim = model.heads, model.kv_heads, model.head_dim

    def operands(batch: Batch, place: int) -> Operands:
        query, length = batch.lengths[0]
        shapes = ((heads, query), (kv_heads, length), (kv_heads, length))
        return tuple(torch.randn(len(batch.lengths), *shape, dim, device="cuda").bfloat16() for shape in shapes)

    def run(batch: Batch) -> Call:
        causal = batch.lengths[0][0] > 1
        return lambda o: scaled_dot_product_attention(o[0], o[1], o[2], is_causal=causal, enable_gqa=True)

    return Attention(name, operands, run)
