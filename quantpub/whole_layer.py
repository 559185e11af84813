"""Whole layers as an engine runs them, so that what their kernels do to each other is measured and not only their sum.

A kernel timed alone finds a cool GPU, its own caches, and nothing that waits for its last block. One layer after another, each
with weights and a KV cache of its own, for a second: prompts that fill a step, launched one by one as an engine launches what is
too large for a CUDA graph; and decodes, in a graph. bf16 linears; needs vLLM's ops. Legend: M tokens, H hidden features.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from quantpub.attention import STANDS_IN, Attention, Batch
from quantpub.kernels.base import Operands
from quantpub.layer_ops import LayerOps, has
from quantpub.served import Served

LAYERS = 3  # with weights and caches of their own
SECONDS = 1.5
PROMPT = 2048  # tokens
DECODES = ((1, 192), (104, 576), (256, 1152))  # (sequences, tokens in the cache of each)
Call = Callable[[], object]


def whole_layers(model: Served, batched: int, attention: Attention) -> dict[str, Any]:
    """prompts: (tokens of a prompt, M, µs of a layer), launched one by one. decodes: [(sequences, context, µs), …], in a graph.

    Empty for experts, and where the engine's kernels are missing.
    """
    if model.experts or STANDS_IN in attention.name or not has("fused_qk_norm_rope"):
        return {}
    count = max(1, batched // PROMPT)
    prompts = Batch(((PROMPT, PROMPT),) * count)
    launched = [_layer(model, prompts, attention, place) for place in range(LAYERS)]
    found: dict[str, Any] = {"prompts": [PROMPT, prompts.tokens, round(_steady(launched), 1)]}
    del launched
    found["decodes"] = [[b, c, _captured(model, Batch(((1, c),) * b), attention)] for b, c in DECODES]
    return found


def _captured(model: Served, batch: Batch, attention: Attention) -> float:
    layers = [_layer(model, batch, attention, place) for place in range(LAYERS)]
    for layer in layers:
        layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            layer()
    return round(_steady([graph.replay]) / LAYERS, 1)


def _steady(calls: Sequence[Call]) -> float:
    """Microseconds of one call, the median of the second half of SECONDS."""
    once = max(1e-3, passes_ms(calls, 3)[-1])
    took = passes_ms(calls, max(6, round(1e3 * SECONDS / once)))
    return 1e3 * statistics.median(took[len(took) // 2 :]) / len(calls)


def passes_ms(calls: Sequence[Call], passes: int) -> list[float]:
    """Milliseconds of every pass through all calls, one after another without a pause."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(passes + 1)]
    marks[0].record()
    for mark in marks[1:]:
        for call in calls:
            call()
        mark.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(marks)]


def _layer(model: Served, batch: Batch, attention: Attention, place: int) -> Call:
    """Every kernel of a layer over tensors of the right shapes; what one writes the next reads."""
    m, linear = batch.tokens, torch.nn.functional.linear
    like: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    shapes = {name: (one.n, one.k) for one in model.linears for name in [one.name.rpartition(".")[2]]}
    w = {name: torch.randn(shape, device="cuda").mul_(0.02).bfloat16() for name, shape in shapes.items()}
    ops, x_MH = LayerOps(model, m), torch.randn(m, model.hidden, **like)
    gated = torch.empty(m, model.intermediate, **like)
    operands: Operands = attention.operands(batch, place)
    keys, values, out = operands[1:4]
    attend = attention.run(batch)

    def layer() -> None:
        ops.add_norm(x_MH)
        q_MHD = ops.rotate_and_store(linear(x_MH, w["qkv_proj"]), keys, values)
        attend((q_MHD, *operands[1:]))
        hidden_MH = linear(out.view(m, model.heads * model.head_dim), w["o_proj"])
        ops.add_norm(hidden_MH)
        ops.gate(linear(hidden_MH, w["gate_up_proj"]), gated)
        linear(gated, w["down_proj"])

    return layer
