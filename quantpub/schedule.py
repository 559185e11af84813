"""The steps an engine runs for a workload: vLLM 0.25.1's continuous batching, simulated. No times here, only what a step holds.

A step computes at most `batched` tokens. Running requests come first, each with one token, or with the next chunk of a
prompt that did not fit; what is left of the budget prefills waiting requests in order, the last one cut where it ends
(v1/core/sched/scheduler.py, schedule). A request that has its prompt computed samples a token in the same step, so P:O takes
the prefill and O-1 decodes. When the KV cache is full the request that came last is preempted and computed again later.
Defaults are those of the offline `LLM` class (engine/arg_utils.py, get_batch_defaults). Every request's length is known to
the scheduler, so asynchronous scheduling runs no step in vain (v1/core/sched/async_scheduler.py). Prompts share no prefix.

M of a step is padded to a captured size where a CUDA graph runs: a whole graph for decodes alone, one a layer piece for
mixed steps; beyond the largest size neither (config/vllm.py, _set_cudagraph_sizes; v1/worker/gpu/cudagraph_utils.py).
"""

from __future__ import annotations

import bisect
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from quantpub.errors import InputError
from quantpub.gpus import GIB, Gpu
from quantpub.served import BF16_BYTES, Served
from quantpub.workloads import Workload

SPAN = 128  # steps that one entry stands for at most: over those, times are near to linear in the context
FULL, PIECES, EAGER = "full graph", "graph pieces", "no graph"


@dataclass(frozen=True)
class Limits:
    """batched: tokens of a step. seqs: requests of a step. capture: batch sizes with a CUDA graph, ascending.

    kv_tokens: tokens that the KV cache holds, None for any number. block: tokens of one of its blocks.
    """

    batched: int
    seqs: int
    capture: tuple[int, ...]
    kv_tokens: int | None = None
    block: int = 16

    def __post_init__(self) -> None:
        assert min(self.batched, self.seqs, self.block) > 0 and all(a < b for a, b in pairwise(self.capture))

    def padded(self, tokens: int) -> int:
        """Rows that the GEMMs of a step run with."""
        place = bisect.bisect_left(self.capture, tokens)
        return self.capture[place] if place < len(self.capture) else tokens


@dataclass(frozen=True)
class Chunk:
    """`count` pieces of prompts, each of `tokens` tokens that follow `before` tokens in the cache."""

    tokens: int
    before: int
    count: int


@dataclass(frozen=True)
class Step:
    """`repeat` steps alike. tokens: computed in one. m: the same, padded. graph: FULL, PIECES or EAGER.

    decodes: sequences with one token each; context: tokens each of them attends to, on average, itself among them.
    rows: of the head, one for each sequence of the step.
    """

    repeat: int
    tokens: int
    m: int
    chunks: tuple[Chunk, ...]
    decodes: int
    context: float
    graph: str

    @property
    def rows(self) -> int:
        return self.decodes + sum(chunk.count for chunk in self.chunks)


def capture_sizes(batched: int, seqs: int) -> tuple[int, ...]:
    """config/vllm.py, _set_cudagraph_sizes: 1, 2, 4, by 8 below 256, then by 16 up to 512 or twice `seqs`."""
    top = min(batched, 2 * seqs, 512)
    sizes = [*(1, 2, 4), *range(8, 256, 8), *range(256, 513, 16)]
    return tuple(sorted({size for size in sizes if size <= top} | ({batched} if batched <= top else set())))


def vllm_limits(gpu: Gpu, kv_tokens: int | None = None) -> Limits:
    """engine/arg_utils.py, get_batch_defaults, LLM_CLASS: larger steps from 70 GiB on, but not on an A100."""
    large = gpu.memory >= 70 * GIB and "A100" not in gpu.name
    batched, seqs = (16384, 1024) if large else (8192, 256)
    return Limits(batched, seqs, capture_sizes(batched, seqs), kv_tokens)


UTILIZATION = 0.92  # config/cache.py: the part of the memory that vLLM takes
OUTSIDE = 1.5 * GIB  # CUDA context, CUDA graphs and the allocator's rounding


def cache_tokens(model: Served, gpu: Gpu, limits: Limits, weight_bytes: float) -> int:
    """Tokens that the KV cache holds when weights and the largest step's activations are in memory. At least 0.

    Activations: a layer's widest, twice, and the sampler's logits in bf16 and float32 (v1/worker/gpu_worker.py,
    determine_available_memory, measures them in a dummy step).
    """
    width = max(linear.n for linear in model.linears) + 4 * model.hidden
    layer = limits.batched * max(1, model.top_k) * width * BF16_BYTES * 3 / 2
    logits = limits.seqs * model.vocab * (BF16_BYTES + 4)
    left = UTILIZATION * gpu.memory - weight_bytes - max(layer, logits) - OUTSIDE
    return max(0, int(left / model.kv_bytes))


@dataclass(slots=True)
class _Request:
    """known: tokens so far, prompt and sampled. cached: those whose keys and values are computed. left: tokens to sample."""

    known: int
    left: int
    cached: int = 0
    prompt: int = 0  # tokens to compute before it may sample

    @property
    def decoding(self) -> bool:
        return self.cached >= self.prompt


def steps(workload: Workload, limits: Limits) -> list[Step]:
    """Every step of a workload of one level of concurrency. Errors: InputError when a request outgrows the KV cache."""
    assert len(workload.concurrency) == 1, "one level at a time: workload.runs()"
    longest = workload.prompt + workload.output
    if limits.kv_tokens is not None and _blocks(longest, limits) > limits.kv_tokens // limits.block:
        raise InputError(
            f"a request of {longest} tokens does not fit: the KV cache holds {limits.kv_tokens}",
            where=f"workload {workload.name}", next="take a shorter workload, a larger GPU or fewer bits",
        )  # fmt: skip
    return list(_Engine(workload, limits).run())


def _blocks(tokens: int, limits: Limits) -> int:
    return -(-tokens // limits.block)


class _Engine:
    def __init__(self, workload: Workload, limits: Limits) -> None:
        self.workload, self.limits = workload, limits
        self.running: list[_Request] = []
        self.waiting: deque[_Request] = deque()
        self.unsent = workload.requests
        self.free = None if limits.kv_tokens is None else limits.kv_tokens // limits.block

    def run(self) -> Iterator[Step]:
        self._send()
        while self.running or self.waiting:
            still = self._steps_alike()
            yield self._decode(still) if still else self._mixed()
            self._finish()
            self._send()

    def _send(self) -> None:
        """The client keeps as many requests in flight as it may."""
        room = self.workload.concurrency[0] - len(self.running) - len(self.waiting)
        for _ in range(min(room, self.unsent)):
            self.waiting.append(_Request(self.workload.prompt, self.workload.output, prompt=self.workload.prompt))
            self.unsent -= 1

    def _steps_alike(self) -> int:
        """How many steps from here on hold the same decodes and nothing else; 0 when something changes in the next."""
        if not self.running or len(self.running) > self.limits.batched or not all(r.decoding for r in self.running):
            return 0
        if self.waiting and len(self.running) < self.limits.seqs and self._fits(self.waiting[0]):
            return 0
        most = min(SPAN, *(request.left for request in self.running))
        if self.free is None or self._grown(most) <= self.free:
            return most
        return bisect.bisect_right(range(1, most), self.free, key=self._grown)

    def _grown(self, ahead: int) -> int:
        """Blocks that the running requests take on in so many decodes."""
        return sum(_blocks(r.cached + ahead, self.limits) - _blocks(r.cached, self.limits) for r in self.running)

    def _fits(self, request: _Request) -> bool:
        """Whether the whole of what is known of it has room (scheduler_reserve_full_isl)."""
        return self.free is None or _blocks(request.known, self.limits) <= self.free

    def _decode(self, repeat: int) -> Step:
        context = sum(request.cached for request in self.running) / len(self.running) + (repeat + 1) / 2
        for request in self.running:
            self._advance(request, repeat)
        return self._step(repeat, [], len(self.running), context)

    def _advance(self, request: _Request, tokens: int) -> None:
        if self.free is not None:
            self.free -= _blocks(request.cached + tokens, self.limits) - _blocks(request.cached, self.limits)
        decoded = tokens if request.decoding else 0
        request.cached += tokens
        sampled = decoded or int(request.decoding)
        request.known, request.left = request.known + sampled, request.left - sampled

    def _mixed(self) -> Step:
        budget, chunks, contexts = self.limits.batched, list[tuple[int, int]](), list[int]()
        preempted, place = False, 0
        while place < len(self.running) and budget:
            request = self.running[place]
            tokens = min(request.known - request.cached, budget)
            preempted |= self._make_room(request, tokens)
            if place >= len(self.running):
                break  # it was itself the last one, and is preempted
            budget -= self._take(request, tokens, chunks, contexts)
            place += 1
        if not preempted:
            self._admit(budget, chunks, contexts)
        return self._step(1, chunks, len(contexts), sum(contexts) / len(contexts) if contexts else 0.0)

    def _make_room(self, request: _Request, tokens: int) -> bool:
        """Preempts from the end until the request has its blocks, or is gone itself."""
        if self.free is None:
            return False
        needed, preempted = _blocks(request.cached + tokens, self.limits) - _blocks(request.cached, self.limits), False
        while needed > self.free:
            victim, preempted = self.running.pop(), True
            self.free += _blocks(victim.cached, self.limits)
            victim.cached, victim.prompt = 0, victim.known
            self.waiting.appendleft(victim)
            if victim is request:
                break
        return preempted

    def _admit(self, budget: int, chunks: list[tuple[int, int]], contexts: list[int]) -> None:
        while self.waiting and budget and len(self.running) < self.limits.seqs and self._fits(self.waiting[0]):
            request = self.waiting.popleft()
            self.running.append(request)
            budget -= self._take(request, min(request.known, budget), chunks, contexts)

    def _take(self, request: _Request, tokens: int, chunks: list[tuple[int, int]], contexts: list[int]) -> int:
        """Puts the request into the step; the tokens it used."""
        if request.decoding:
            contexts.append(request.cached + 1)
        else:
            chunks.append((tokens, request.cached))
        self._advance(request, tokens)
        return tokens

    def _finish(self) -> None:
        if self.free is not None:
            self.free += sum(_blocks(request.cached, self.limits) for request in self.running if not request.left)
        self.running = [request for request in self.running if request.left]

    def _step(self, repeat: int, chunks: Sequence[tuple[int, int]], decodes: int, context: float) -> Step:
        tokens = sum(tokens for tokens, _ in chunks) + decodes
        counted = tuple(Chunk(*chunk, count) for chunk, count in Counter(chunks).items())
        captured = bool(self.limits.capture) and tokens <= self.limits.capture[-1]
        graph = (PIECES if chunks else FULL) if captured else EAGER
        return Step(repeat, tokens, self.limits.padded(tokens), counted, decodes, context, graph)
