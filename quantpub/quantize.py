"""Quantizing, shard by shard: the page that everyone reads.

Three stages overlap, each a bounded number of bytes ahead of the next: a thread reads tensors in file order, a thread
computes each once and packs it once per layout, and the caller writes the results to their places and commits the shard.
A source shard becomes one output shard of the same name in every destination.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantpub.algorithms.base import Algorithm
from quantpub.checkpoint import ShardReader
from quantpub.destination import Destination
from quantpub.errors import InputError, QuantpubError, UsageError
from quantpub.files import sha256_json
from quantpub.fused import fused_amax
from quantpub.memory import keep_freed_memory
from quantpub.plan import COPY, Action, Plan, require_runnable
from quantpub.plan_facts import WORKERS
from quantpub.qtensor import QTensor
from quantpub.shards import raw_bytes
from quantpub.sound import require_as_found, require_sound
from quantpub.stages import background, concurrently
from quantpub.stats import Stats

AHEAD = 32 << 20  # bytes that a stage may be ahead of the next
Progress = Callable[[int], None]  # called with the number of source bytes finished


@dataclass(frozen=True)
class Piece:
    """On its way: a whole tensor to quantize, a piece of one to copy, or (action None) the end of a shard.

    outputs: for every destination, the bytes made of it, tensor by tensor, from `offset` on.
    """

    shard: str
    action: Action | None
    data: torch.Tensor | None = None
    offset: int = 0
    source_sha256: str = ""
    outputs: tuple[tuple[Destination, dict[str, memoryview]], ...] = ()
    source_bytes: int = 0

    @property
    def nbytes(self) -> int:
        made = sum(view.nbytes for _, tensors in self.outputs for view in tensors.values())
        return made + (0 if self.data is None else self.data.nbytes)


def quantize(
    plans: Sequence[Plan], out: Path, device: str = "cpu", progress: Progress = lambda _: None
) -> list[dict[str, Any]]:
    """Write the artifacts of `plans` (one recipe and source, one layout each), or finish those begun there.

    One plan goes into `out` itself, several into `out/<layout>`. Returns a report for each.
    Errors: InputError (source), ConflictError (a folder holds something else), UnavailableError (disk; rerun resumes).
    """
    for plan in plans:
        require_runnable(plan)
    destinations = [Destination(plan, out if len(plans) == 1 else out / plan.layout.name) for plan in plans]
    todo = [destination for destination in destinations if not destination.complete]
    amax = fused_amax(plans[0]) if todo else {}
    try:
        for destination in todo:
            destination.begin(sha256_json(amax) if amax else None)
        if unfinished := [destination for destination in todo if not destination.complete]:
            _run(unfinished, device, amax, progress)
    except InputError:
        for destination in todo:
            destination.remove()
        raise
    except QuantpubError:
        for destination in todo:
            destination.undo_if_empty()
        raise
    finally:
        for destination in todo:
            destination.unlock()
    return [destination.report(changed=destination in todo) for destination in destinations]


def _run(todo: Sequence[Destination], device: str, amax: Mapping[str, float], progress: Progress) -> None:
    """The straight line: read → compute → write, then everything that is not weights."""
    keep_freed_memory()
    read = background(_read(todo), lambda piece: piece.nbytes, AHEAD)
    made = background(_compute(todo, read, device, amax), lambda piece: piece.nbytes, AHEAD)
    with contextlib.closing(made):  # each stage closes the one before it, in its own thread
        _write(todo, made, progress)
    for destination in todo:
        destination.end(device)


def _read(todo: Sequence[Destination]) -> Generator[Piece, None, None]:
    plan = todo[0].plan
    for shard in [shard for shard in plan.shards if any(destination.needs(shard) for destination in todo)]:
        reader = ShardReader(plan.checkpoint, shard)
        for action in plan.shards[shard]:
            if action.kind == COPY:
                for offset, data in reader.pieces(action.part):
                    yield Piece(shard, action, data, offset)
            else:
                yield Piece(shard, action, reader.tensor(action.part))
        yield Piece(shard, None, source_sha256=reader.finish())


def _compute(
    todo: Sequence[Destination], pieces: Iterable[Piece], device: str, amax: Mapping[str, float]
) -> Generator[Piece, None, None]:
    """Several tensors at a time, one thread each: threads on one tensor lose at every barrier while other stages run."""
    plan = todo[0].plan
    bound = [plan.recipe.bind(treatment.algorithm, treatment.scheme) for treatment in plan.treatments]
    workers, threads = (WORKERS if device == "cpu" else 1), torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))
    try:
        yield from concurrently(pieces, lambda piece: _made(todo, piece, device, bound, amax), workers)
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def _made(
    todo: Sequence[Destination],
    piece: Piece,
    device: str,
    bound: Sequence[tuple[Algorithm, Any]],
    amax: Mapping[str, float],
) -> Piece:
    """One piece with its outputs: quantized once, packed once per layout; or copied. bound: algorithms by treatment."""
    if piece.action is None or piece.data is None:
        return piece
    plan, action = todo[0].plan, piece.action
    require_sound(plan, piece.shard, action, piece.data)
    needing = [destination for destination in todo if destination.needs(piece.shard)]
    if action.kind == COPY:
        copied = {action.part.name: raw_bytes(piece.data)}
        outputs = tuple((destination, copied) for destination in needing)
    else:
        assert action.treatment is not None
        algorithm, params = bound[action.treatment]
        stats = Stats(group_amax=amax.get(action.module))
        require_as_found(plan, piece.shard, piece.data, stats)
        q = algorithm.quantize(piece.data.to(device), stats, plan.treatments[action.treatment].scheme, params)
        outputs = tuple((destination, _packed(destination, action, q)) for destination in needing)
    return replace(piece, data=None, outputs=outputs, source_bytes=piece.data.nbytes)


def _packed(destination: Destination, action: Action, q: QTensor) -> dict[str, memoryview]:
    assert action.treatment is not None
    layout = destination.plan.treatments[action.treatment].layout
    return {f"{action.module}.{suffix}": raw_bytes(tensor) for suffix, tensor in layout.pack(q).items()}


def _write(todo: Sequence[Destination], pieces: Iterable[Piece], progress: Progress) -> None:
    try:
        for piece in pieces:
            if piece.action is None:
                for destination in todo:
                    if destination.needs(piece.shard):
                        destination.commit(piece.shard, piece.source_sha256)
            for destination, outputs in piece.outputs:
                destination.add(piece.shard, outputs, piece.offset)
            progress(piece.source_bytes)
    finally:
        for destination in todo:
            destination.abandon()


def require_device(device: str) -> None:
    """Errors: UsageError when torch does not know the device or this machine has none."""
    if device not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {device!r}", next="use cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("this machine has no CUDA device that torch can use", next="leave --device out")
