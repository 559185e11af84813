"""Timing on a CUDA device: each call captured in a graph, inputs rotated past the L2 cache, kernels taking turns.

A graph holds one call for each of several copies of the weight, more than twice the cache in all, and again until it is
long enough for the event timer; before each replay a buffer as large as the cache is overwritten. What is timed is so what
a served model meets: weights from memory, no launch gaps. The activations are one tensor, which the layer before has just
written. After the timing other activations are copied in and the graph is replayed once more: its result must be theirs, so
that what was timed is what was checked.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from quantpub.kernels.base import Operands
from quantpub.timing import Bench, Rounds, Stopwatch, interleave

LONG = 200.0  # µs: a graph this long makes the timer's half a microsecond small
SINGLE = 500.0  # µs: a call this long fills the cache by itself
MOST_CALLS = 128
CACHES = 2  # how many times the L2 cache the copies of a weight fill
MEMORY_PART = 0.25  # of the free memory, at most, for the copies of one weight
HELD_PART = 0.25  # of the device's memory, at most, that PyTorch holds without using it

Run = Callable[[Operands], torch.Tensor | Operands]


def cache_bytes() -> int:
    found: int = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return found


def unused() -> int:
    """Bytes that PyTorch holds for tensors to come; among them those of graphs that are no more."""
    return torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def tidy() -> None:
    """Gives back what PyTorch holds, where that is much. `capture` never does: see `_capturing`."""
    if unused() > HELD_PART * torch.cuda.mem_get_info()[1]:
        torch.cuda.empty_cache()


@dataclass
class Flush:
    """Overwrites more than the cache, which also gives the processor time to be ahead of the device."""

    nbytes: int
    buffer: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.buffer = torch.empty(self.nbytes, dtype=torch.uint8, device="cuda")

    def __call__(self) -> None:
        self.buffer.zero_()


def events(flush: Callable[[], None]) -> Stopwatch:
    """A stopwatch of CUDA events, in microseconds."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def stopwatch(call: Callable[[], object]) -> float:
        flush()
        start.record()
        call()
        end.record()
        end.synchronize()
        return 1e3 * float(start.elapsed_time(end))

    return stopwatch


def gpu_bench() -> Bench:
    """Waiting for a processor core does not disturb what the device does meanwhile."""
    return Bench(events(Flush(CACHES * cache_bytes())), waited=lambda: 0)


def rotated(operands: Operands, cache: int, most: int = MOST_CALLS) -> list[Operands]:
    """Copies of a weight that together exceed CACHES caches; clones keep their strides."""
    nbytes = max(1, sum(tensor.nbytes for tensor in operands))
    room = int(MEMORY_PART * (torch.cuda.mem_get_info()[0] + unused())) // nbytes
    copies = min(most, -(-CACHES * cache // nbytes), max(1, room))
    return [operands] + [tuple(tensor.clone() for tensor in operands) for _ in range(copies - 1)]


@dataclass
class Captured:
    """A graph of `calls` calls. result: what the last of them wrote. run: holds the tensors that the graph reads.

    took: µs of a replay, at most: the first one's, or those of as many calls outside of the graph.
    """

    graph: torch.cuda.CUDAGraph
    calls: int
    result: torch.Tensor | Operands
    run: Run
    took: float = 0.0

    def replay(self, _: int = 0) -> None:
        self.graph.replay()


def capture(run: Run, copies: list[Operands], stopwatch: Stopwatch) -> Captured:
    """Errors: RuntimeError when the call cannot run or be captured."""
    run(copies[0])
    run(copies[-1])
    torch.cuda.synchronize()
    once = min(stopwatch(lambda: run(copies[0])) for _ in range(2))
    calls = 1 if once > SINGLE else min(MOST_CALLS, max(len(copies), round(LONG / once)))
    graph = torch.cuda.CUDAGraph()
    with _capturing(graph):
        for call in range(calls):
            result = run(copies[call % len(copies)])
    captured = Captured(graph, calls, result, run)
    captured.took = min(stopwatch(captured.replay), calls * once)
    torch.cuda.synchronize()
    return captured


@contextlib.contextmanager
def _capturing(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """As torch.cuda.graph, without the collection of garbage and the emptying of caches that it begins with.

    Those are a tenth of a second for each of hundreds of graphs; collecting waits until the capture has ended.
    """
    stream, collecting = torch.cuda.Stream(), gc.isenabled()
    torch.cuda.synchronize()
    gc.disable()
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin()
            try:
                yield
            finally:
                graph.capture_end()
    finally:
        if collecting:
            gc.enable()


def together(graphs: Mapping[str, Captured], bench: Bench, share: float, limit: float) -> Rounds:
    """Microseconds of one call of each, round by round."""
    rounds = interleave({name: each.replay for name, each in graphs.items()}, 1, bench, share, limit)
    for name, each in graphs.items():
        rounds.times[name] = [took / each.calls for took in rounds.times[name]]
    return rounds
