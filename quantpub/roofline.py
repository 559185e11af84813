"""Floors of time: the bytes that must move and the operations that must be done, over the rates that a GPU reaches.

Legend: M tokens of a step, N out_features, K in_features. Bytes are those of memory, each operand read once and each result
written once, as kernels do whose working set fits. Times in microseconds. A measured time stands above its floor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantpub.gpus import BF16, FP4, FP8, INT8, Gpu
from quantpub.schedule import Chunk
from quantpub.scheme import Scheme
from quantpub.served import BF16_BYTES, Linear, Served

TENSOR_CORE = {"fp8_e4m3": FP8, "int8": INT8, "fp4_e2m1": FP4}
SCALE_BYTES = {"model": 2, "float32": 4, "absmax127": 4, "fp8_e4m3": 1, "e8m0": 1}


@dataclass(frozen=True)
class Machine:
    """bandwidth: bytes/s and compute: number format → operations/s that are reached, measured where they were."""

    gpu: Gpu
    bandwidth: float
    compute: Mapping[str, float]
    measured: bool = False

    def rate(self, num: str) -> float:
        return self.compute.get(num, self.compute[BF16])


def machine(gpu: Gpu, bandwidth: float | None = None, compute: Mapping[str, float] | None = None) -> Machine:
    """The rates that were measured, and for the others the fractions of the data sheet that are reached.

    An int8 rate in older evidence is that of torch._int_mm, which is no peak: it is left aside (around.rates).
    """
    expected = {num: peak * gpu.achieved.compute for num, peak in gpu.peak.items()}
    reached = bandwidth or gpu.bandwidth * gpu.achieved.bandwidth
    return Machine(
        gpu,
        reached,
        expected | {num: rate for num, rate in (compute or {}).items() if num != INT8},
        bandwidth is not None,
    )


@dataclass(frozen=True)
class Work:
    bytes: float
    ops: float
    num: str = BF16

    def us(self, on: Machine) -> float:
        return 1e6 * max(self.bytes / on.bandwidth, self.ops / on.rate(self.num))


def computes_in(scheme: Scheme | None) -> str:
    """The number format that the tensor cores multiply: that of the activations."""
    return BF16 if scheme is None or scheme.act is None else TENSOR_CORE.get(scheme.act.num, BF16)


def weight_bits(scheme: Scheme | None, n: int, k: int) -> float:
    """Bits of one weight as a kernel reads it, with its share of scales and zeros. None: bf16."""
    if scheme is None:
        return 8 * BF16_BYTES
    rows, columns = scheme.weight.scale_shape(n, k)
    scale = 8 * SCALE_BYTES[scheme.weight.scale_dtype]
    zero = {"none": 0, "int": scheme.weight.number.bits, "float": 8 * BF16_BYTES}[scheme.weight.zero_domain]
    return scheme.weight.number.bits + (scale + zero) * rows * columns / (n * k)


def touched(linear: Linear, m: int, top_k: int) -> float:
    """Weights of a layer that M tokens read: of experts, the expected number that at least one token chose."""
    if not linear.experts:
        return 1
    return linear.experts * (1 - (1 - min(1.0, top_k / linear.experts)) ** m)


def gemm(linear: Linear, m: int, scheme: Scheme | None = None, top_k: int = 0) -> Work:
    """All occurrences of a merged linear in a forward pass. Activations come in bf16 and are quantized in between."""
    n, k = linear.n, linear.k
    rows = m * (linear.count / linear.layers)
    weights = touched(linear, m, top_k) * n * k * weight_bits(scheme, n, k) / 8
    again = 0.0 if scheme is None or scheme.act is None else 2 * rows * k * _act_bytes(scheme)
    moved = weights + again + rows * (k + n) * BF16_BYTES
    return Work(linear.layers * moved, linear.layers * 2 * rows * n * k, computes_in(scheme))


def _act_bytes(scheme: Scheme) -> float:
    """Bytes of a quantized activation; 4-bit ones take half."""
    return 0.5 if scheme.act is not None and scheme.act.num == "fp4_e2m1" else 1


def linears_us(model: Served, m: int, on: Machine, scheme: Scheme | None = None) -> float:
    """The floor of all quantized linears of a forward pass."""
    return sum(gemm(linear, m, scheme, model.top_k).us(on) for linear in model.linears)


def head(model: Served, rows: int) -> Work:
    """The head's GEMM, its logits copied to float32, and their largest found."""
    logits = rows * model.vocab
    work = gemm(model.head, rows)
    return Work(work.bytes + logits * (BF16_BYTES + 4 + 4), work.ops)


def seen(model: Served, context: float) -> float:
    """Tokens that attention looks at."""
    return context if model.window is None else min(context, model.window)


def decode_attention(model: Served, sequences: int, context: float) -> Work:
    """One layer, one new token a sequence: its keys and values are read once."""
    tokens = sequences * seen(model, context)
    return Work(tokens * model.kv_bytes / model.layers, 4 * tokens * model.heads * model.head_dim)


def pairs(model: Served, chunk: Chunk) -> float:
    """Query and key pairs under the causal mask, of all `count` pieces."""
    return chunk.count * (_pairs_to(model, chunk.before + chunk.tokens) - _pairs_to(model, chunk.before))


def _pairs_to(model: Served, end: int) -> float:
    """Of the first `end` tokens: each one more than the one before, until the window is full."""
    growing = end if model.window is None else min(end, model.window)
    return growing * (growing + 1) / 2 + (end - growing) * growing


def prefill_attention(model: Served, chunk: Chunk) -> Work:
    """One layer. Two GEMMs of head_dim for every pair; keys and values are read once."""
    tokens = chunk.count * (chunk.tokens + chunk.before)
    moved = tokens * model.kv_bytes / model.layers + 2 * chunk.count * chunk.tokens * model.heads * model.head_dim * 2
    return Work(moved, 4 * pairs(model, chunk) * model.heads * model.head_dim)


def elementwise(model: Served, m: int) -> Work:
    """What a layer does beside linears and attention, in the kernels that a compiled graph fuses it into.

    Two norms that add the residual, q/k norm with rotary embedding, the write to the KV cache, and the gated activation.
    """
    qk, kv = (model.heads + model.kv_heads) * model.head_dim, 2 * model.kv_heads * model.head_dim
    width = model.intermediate * max(1, model.top_k)
    return Work(m * BF16_BYTES * (2 * 4 * model.hidden + 2 * qk + 2 * kv + 3 * width), 0)
