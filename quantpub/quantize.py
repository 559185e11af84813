"""Quantizing, shard by shard: the page that everyone reads.

Three stages overlap, each a bounded number of bytes ahead of the next: a thread reads tensors in file order, a thread
computes each once and packs it once per layout, and the caller writes the results to their places and commits the shard.
A source shard becomes one output shard of the same name in every destination.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantpub.actions import COPY, QUANTIZE, Action
from quantpub.algorithms.base import Algorithm
from quantpub.calibrated import Calibrated, calibrated
from quantpub.checkpoint import ShardReader
from quantpub.claims import folders
from quantpub.destination import Destination
from quantpub.errors import InputError, QuantpubError, UsageError
from quantpub.memory import give_back, keep_freed_memory
from quantpub.plan import Plan, require_runnable
from quantpub.plan_facts import WORKERS
from quantpub.qtensor import QTensor
from quantpub.shards import raw_bytes
from quantpub.solved import Solved
from quantpub.sound import require_as_found, require_sound
from quantpub.stages import background, concurrently
from quantpub.statistics import Statistics

AHEAD = 32 << 20  # bytes that a stage may be ahead of the next
Progress = Callable[[int], None]  # called with the number of source bytes finished


@dataclass(frozen=True)
class Piece:
    """On its way: a whole tensor to quantize or to fold into, a piece of one to copy, or (action None) the end of a shard.

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
    plans: Sequence[Plan],
    out: Path,
    device: str = "cpu",
    progress: Progress = lambda _: None,
    statistics: Statistics | None = None,
    solved: Solved | None = None,
) -> list[dict[str, Any]]:
    """Write the artifacts of `plans` (one recipe and source, one layout each), or finish those begun there.

    One plan goes into `out` itself, several into `out/<layout>`. Returns a report for each. statistics, solved: what
    calibration found, where the plans need it (`Plan.calibrates`).
    Errors: InputError (source), ConflictError (a folder holds something else), UnavailableError (disk; rerun resumes).
    """
    for plan in plans:
        require_runnable(plan)
    destinations = [Destination(plan, folder) for plan, folder in zip(plans, folders(plans, out), strict=True)]
    todo = [destination for destination in destinations if not destination.complete]
    found = calibrated(plans[0], statistics, solved, device) if todo else Calibrated()
    try:
        for destination in todo:
            destination.begin(found.shared())
        if unfinished := [destination for destination in todo if not destination.complete]:
            _run(unfinished, device, found, progress)
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


def _run(todo: Sequence[Destination], device: str, found: Calibrated, progress: Progress) -> None:
    """The straight line: read → compute → write, then everything that is not weights."""
    give_back()
    keep_freed_memory()
    read = background(_read(todo), lambda piece: piece.nbytes, AHEAD)
    made = background(_compute(todo, read, device, found), lambda piece: piece.nbytes, AHEAD)
    with contextlib.closing(made):  # each stage closes the one before it, in its own thread
        _write(todo, made, progress)
    for destination in todo:
        destination.end(device, found)


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
    todo: Sequence[Destination], pieces: Iterable[Piece], device: str, found: Calibrated
) -> Generator[Piece, None, None]:
    """Several tensors at a time, one thread each: threads on one tensor lose at every barrier while other stages run."""
    plan = todo[0].plan
    bound = [plan.recipe.bind(treatment.algorithm, treatment.scheme) for treatment in plan.treatments]
    workers, threads = (WORKERS if device == "cpu" else 1), torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))
    try:
        yield from concurrently(pieces, lambda piece: _made(todo, piece, device, bound, found), workers)
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def _made(
    todo: Sequence[Destination],
    piece: Piece,
    device: str,
    bound: Sequence[tuple[Algorithm, Any]],
    found: Calibrated,
) -> Piece:
    """One piece with its outputs: quantized once, packed once per layout; or copied. bound: algorithms by treatment."""
    if piece.action is None or piece.data is None:
        return piece
    plan, action = todo[0].plan, piece.action
    require_sound(plan, piece.shard, action, piece.data)
    needing = [destination for destination in todo if destination.needs(piece.shard)]
    if action.kind == QUANTIZE:
        q = _quantized(plan, piece, action, device, bound, found)
        made = [_packed(destination, action, q) for destination in needing]
    else:
        data = piece.data if action.kind == COPY else found.weight(action.part.name, piece.data)
        made = [{action.part.name: raw_bytes(data)} for _ in needing]
    if piece.offset == 0:
        made = [each | _scales(destination, action, found) for each, destination in zip(made, needing, strict=True)]
    outputs = tuple(zip(needing, made, strict=True))
    return replace(piece, data=None, outputs=outputs, source_bytes=piece.data.nbytes)


def _quantized(
    plan: Plan,
    piece: Piece,
    action: Action,
    device: str,
    bound: Sequence[tuple[Algorithm, Any]],
    found: Calibrated,
) -> QTensor:
    assert action.treatment is not None and piece.data is not None
    if (solution := found.solution(action)) is not None:
        return solution
    algorithm, params = bound[action.treatment]
    w_NK, stats = found.weight(action.part.name, piece.data), found.stats(action.module)
    require_as_found(plan, piece.shard, w_NK, stats)
    return algorithm.quantize(w_NK.to(device), stats, plan.treatments[action.treatment].scheme, params)


def _packed(destination: Destination, action: Action, q: QTensor) -> dict[str, memoryview]:
    assert action.treatment is not None
    layout = destination.plan.treatments[action.treatment].layout
    return {f"{action.module}.{suffix}": raw_bytes(tensor) for suffix, tensor in layout.pack(q).items()}


def _scales(destination: Destination, action: Action, found: Calibrated) -> dict[str, memoryview]:
    """Those of the KV cache that are written along with a projection of keys or values."""
    return {name: raw_bytes(scale) for name, scale in found.kv(destination.plan, action.module).items()}


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
