"""What a served model runs around its quantized linears, measured on a CUDA device in a few seconds, for `predict`.

Attention with the engine's own kernel; the head with greedy sampling; the elementwise kernels of a layer; and what the device
reaches: bandwidth, the rate of large GEMMs in a burst, and the part of it that stays when they run on and its clock falls to
keep the power limit. Without vLLM torch's own attention and copies of as many bytes stand in, and the evidence says so. What
fails, for want of memory for one, costs the rest nothing.

Times in microseconds of one call, medians of ROUNDS replays of a CUDA graph. Legend: B sequences, T tokens, H heads, D head_dim.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear as bf16_gemm

from quantpub.attention import PAGE, STANDS_IN, Attention, Batch, Call, find_attention
from quantpub.kernels.base import Operands
from quantpub.kernels.cuda import cache_bytes, capture, gpu_bench
from quantpub.layer_ops import LayerOps, has
from quantpub.schedule import Limits
from quantpub.served import BF16_BYTES, Served
from quantpub.whole_layer import passes_ms, whole_layers

ROUNDS = 7
SEQUENCES, CONTEXTS = (1, 4, 8, 32, 64, 128, 256), (128, 512, 1024, 2304)
PROMPTS = (128, 512, 2048, 4096)
ROWS = (1, 8, 64, 128, 256, 512)
BATCH = (1, 16, 64, 256, 1024, 4096, 16384)
SIDE = 8192  # of the square GEMM whose rate is taken
ROWS_STEADY = 8192  # M of the linears that run on and on
COPY = 2 << 30  # bytes
SUSTAIN = 1.5  # seconds of GEMMs without a pause
FUSED = "fused_add_rms_norm"  # of vLLM's ops, one that every build has
MEMORY_PART = 0.3  # of the free memory, at most, for one measurement
FAILURES = (RuntimeError, AttributeError, AssertionError, ImportError, LookupError, TypeError, ValueError)
Found = dict[str, Any]
Timer = Callable[[Batch], float | None]  # µs of a batch's attention; None: no room for it


def around(model: Served, limits: Limits) -> Found:
    """`machine` and `rest` as `roofline.machine` and `serving_costs.Rest.from_json` take them, and what was run for them.

    failed: part → why nothing of it is there. limits: of the engine's steps. Errors: RuntimeError when the device is unusable.
    """
    torch.cuda.empty_cache()  # what other measurements left counts as taken otherwise
    started, stopwatch, attention = time.perf_counter(), Stopwatch(), find_attention(model)
    parts, batched = Parts(), limits.batched
    machine = {
        **parts.take("bandwidth", lambda: {"bandwidth": bandwidth(stopwatch)}),
        **parts.take("compute", lambda: {"compute": rates(stopwatch)}),
    }
    rest = {
        **attention_times(model, batched, attention, stopwatch, parts),
        **parts.take("head", lambda: {"head": head_times(model, stopwatch)}),
        **parts.take("elementwise", lambda: {"elementwise": elementwise_times(model, batched, stopwatch)}),
        **parts.take("sustained", lambda: sustained(model)),
        **parts.take("whole layers", lambda: whole_layers(model, batched, attention)),
    }
    rest |= stood_in(rest, attention)
    ran = {"attention": attention.name, "elementwise": elementwise_name(), "head": "torch linear, copy, argmax"}
    found: Found = {"machine": machine, "rest": rest, "ran": ran, **({"failed": parts.failed} if parts.failed else {})}
    return found | {"seconds": round(time.perf_counter() - started, 2)}


@dataclass(frozen=True)
class Parts:
    """failed: part → what it said."""

    failed: dict[str, str] = field(default_factory=dict)

    def take(self, part: str, measure: Callable[[], Found]) -> Found:
        """What `measure` found; nothing when it fails. What it allocated is given back."""
        found: Found = {}
        try:
            found = measure()
        except FAILURES as error:
            self.failed[part] = f"{type(error).__name__} {' '.join(str(error).split())}"[:200].strip()
        with contextlib.suppress(RuntimeError):  # of a device that failed for good
            torch.cuda.empty_cache()
        return found


def stood_in(rest: Found, attention: Attention) -> Found:
    """`stood_in`: the parts of `rest` that other kernels than the engine's were timed for; nothing when there are none."""
    others = (
        *(("decode", "prefill") if STANDS_IN in attention.name else ()),
        *(() if has(FUSED) else ("elementwise",)),
    )
    found = [part for part in others if rest.get(part)]
    return {"stood_in": found} if found else {}


class Stopwatch:
    """us(run, copies): one call, the copies taking turns so that none is found in the cache."""

    def __init__(self) -> None:
        self.cache, self.watch = cache_bytes(), gpu_bench().stopwatch

    def us(self, run: Call, copies: Sequence[Operands]) -> float:
        captured = capture(run, list(copies), self.watch)
        return round(statistics.median(self.watch(captured.replay) for _ in range(ROUNDS)) / captured.calls, 3)


def bandwidth(stopwatch: Stopwatch) -> float:
    """Bytes/s of a long stream, read and written, by a kernel: the driver's own copy is much slower in a graph."""
    source = torch.zeros(COPY // 2, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY / stopwatch.us(lambda pair: torch.neg(pair[0], out=pair[1]), [(source, target)]) * 1e6


def rates(stopwatch: Stopwatch) -> dict[str, float]:
    """Operations/s of a square GEMM by number format; a format that torch cannot multiply here is left out.

    int8, too: torch._int_mm runs kernels made for an older generation, and CUTLASS was half as fast again on an H200. Its
    peak is the data sheet's, by the fraction that other formats reach (roofline.machine).
    """
    x, w = (torch.randn(SIDE, SIDE, device="cuda").bfloat16() for _ in range(2))
    one = torch.ones((), device="cuda")
    fp8 = tuple(t.to(torch.float8_e4m3fn) for t in (x, w))
    calls: dict[str, tuple[Call, Operands]] = {
        "bf16": (lambda o: bf16_gemm(o[0], o[1]), (x, w)),
        "fp8": (
            lambda o: torch._scaled_mm(o[0], o[1].t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True),
            fp8,
        ),
    }
    found = {}
    for num, (run, operands) in calls.items():
        try:
            found[num] = 2 * SIDE**3 / stopwatch.us(run, [operands]) * 1e6
        except RuntimeError:
            continue  # no such tensor cores, or no such kernel in this torch
    return found


def sustained(model: Served) -> dict[str, Any]:
    """bf16 linears of the model, ROWS_STEADY rows, for SUSTAIN seconds and nothing else.

    sustained: their rate in the second half over that of the first after a rest. steady: (M, µs of a forward pass in the
    second half); of a model with experts it is left out, and the linears of attention stand for all.
    """
    linears = [linear for linear in model.linears if not linear.experts]
    xs = {k: torch.randn(ROWS_STEADY, k, device="cuda").bfloat16() for k in {linear.k for linear in linears}}
    ws = [torch.randn(linear.n, linear.k, device="cuda").mul_(0.02).bfloat16() for linear in linears]
    calls = [partial(bf16_gemm, xs[linear.k], w_NK) for linear, w_NK in zip(linears, ws, strict=True)]
    once = min(passes_ms(calls, 3))
    torch.cuda.synchronize()
    time.sleep(0.3)
    took = passes_ms(calls, max(4, round(1e3 * SUSTAIN / once)))
    first, last = min(took[:4]), statistics.median(took[len(took) // 2 :])
    found: dict[str, Any] = {"sustained": round(min(1.0, first / last), 4)}
    return found if model.experts else found | {"steady": [ROWS_STEADY, round(1e3 * last * model.layers, 1)]}


def attention_times(model: Served, batched: int, attention: Attention, stopwatch: Stopwatch, parts: Parts) -> Found:
    """`decode`, `prefill` and, with the engine's kernel, `mixed`, as serving_costs.Rest has them. A layer's µs."""

    def us(batch: Batch) -> float | None:
        if 3 * batch.nbytes(model) > MEMORY_PART * torch.cuda.mem_get_info()[0]:
            return None
        copies = min(64, max(1, -(-2 * stopwatch.cache // batch.nbytes(model))))
        return stopwatch.us(attention.run(batch), [attention.operands(batch, place) for place in range(copies)])

    found = parts.take("decode", lambda: decode_times(us)) | parts.take("prefill", lambda: prefill_times(us, batched))
    if STANDS_IN in attention.name:
        return found
    return found | parts.take("mixed", lambda: mixed_ratio(us, batched, found))


def decode_times(us: Timer) -> Found:
    took = {(b, c): us(Batch(((1, c),) * b)) for b in SEQUENCES for c in CONTEXTS}
    return {"decode": [[b, c, each] for (b, c), each in took.items() if each]}


def prefill_times(us: Timer, batched: int) -> Found:
    """Of one prompt of a full step."""
    took = {p: us(Batch(((p, p),) * many(batched, p))) for p in PROMPTS if p <= batched}
    return {"prefill": [[p, round(each / many(batched, p), 3)] for p, each in took.items() if each]}


def mixed_ratio(us: Timer, batched: int, found: Found) -> Found:
    """Decodes and prompts in one batch, over what was found for each alone."""
    prompt, sequences, context = 2048, 128, 2304
    count = many(batched, prompt) - 1
    decode = {(b, c): took for b, c, took in found.get("decode", ())}.get((sequences, context))
    prefill = dict(found.get("prefill", ())).get(prompt)
    if not (decode and prefill and count > 0):
        return {}
    both = us(Batch(((1, context),) * sequences + ((prompt, prompt),) * count))
    return {"mixed": round(both / (decode + prefill * count), 4)} if both else {}


def many(batched: int, prompt: int) -> int:
    """Prompts that fill a step."""
    return max(1, batched // prompt)


def head_times(model: Served, stopwatch: Stopwatch) -> list[list[float]]:
    """(rows, µs): logits in bf16, copied to float32, the largest of each row (v1/worker/gpu/sample/sampler.py)."""
    w_NK = torch.randn(model.vocab, model.hidden, dtype=torch.bfloat16, device="cuda")

    def run(operands: Operands) -> torch.Tensor:
        logits = bf16_gemm(operands[0], w_NK)
        return torch.empty_like(logits, dtype=torch.float32).copy_(logits).argmax(dim=-1)

    inputs = {rows: torch.randn(rows, model.hidden, device="cuda").bfloat16() for rows in ROWS}
    return [[rows, stopwatch.us(run, [(x_MK,)])] for rows, x_MK in inputs.items()]


def elementwise_name() -> str:
    """vLLM's compiled graph fuses these ops itself; its own CUDA ops stand for them, as many kernels over the same bytes."""
    return "vLLM's CUDA ops" if has(FUSED) else "torch copies of as many bytes stand in"


def elementwise_times(model: Served, batched: int, stopwatch: Stopwatch) -> list[list[float]]:
    """(M, µs) of a layer. Activations were just written by the kernel before, so they are not rotated."""
    layer = vllm_layer if has(FUSED) else copied_layer
    found = []
    for m in BATCH:
        if m <= batched:
            found.append([m, stopwatch.us(*layer(model, m))])
    return found


def vllm_layer(model: Served, m: int) -> tuple[Call, list[Operands]]:
    """Norm with residual, q/k norm with rotary embedding, KV cache write, norm with residual, gated activation."""
    ops, rows = LayerOps(model, m), m * max(1, model.top_k)
    like: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    width = (model.heads + 2 * model.kv_heads) * model.head_dim
    x_MH, qkv = torch.randn(m, model.hidden, **like), torch.randn(m, width, **like)
    keys, values = torch.empty(-(-m // PAGE), 2, PAGE, model.kv_heads, model.head_dim, **like).unbind(1)
    gate_up, gated = torch.randn(rows, 2 * model.intermediate, **like), torch.empty(rows, model.intermediate, **like)

    def run(_: Operands) -> torch.Tensor:
        ops.add_norm(x_MH)
        ops.rotate_and_store(qkv, keys, values)
        ops.add_norm(x_MH)
        ops.gate(gate_up, gated)
        return gated

    return run, [()]


def copied_layer(model: Served, m: int) -> tuple[Call, list[Operands]]:
    """Five copies that move the bytes of the five kernels (roofline.elementwise)."""
    qk, kv = (model.heads + model.kv_heads) * model.head_dim, 2 * model.kv_heads * model.head_dim
    moved = (4 * model.hidden, 2 * qk, 2 * kv, 4 * model.hidden, 3 * model.intermediate * max(1, model.top_k))
    sizes = [m * elements * BF16_BYTES // 2 for elements in moved]
    source, target = (torch.empty(max(sizes), dtype=torch.uint8, device="cuda") for _ in range(2))

    def run(_: Operands) -> torch.Tensor:
        for size in sizes:
            target[:size].copy_(source[:size])
        return target

    return run, [()]
