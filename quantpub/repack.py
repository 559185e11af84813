"""Repacking: a quantized checkpoint in another layout, without quantizing again, and the proof that nothing changed.

    read → unpack (one layout) → convert, where the other does not hold the scheme → pack → unpack again and compare

A worker takes one module at a time through all of it, from the source's file into the shard; shards are committed in a thread
of its own, while workers are at the next. Every module's proof is a line of `.quantpub/repack.jsonl`: `equal` says that what
was written reads back as the very codes, scales and zeros that were read, so that the weights are the same bits (law 1);
`rounded` that a number was not expressible to float32's last bit; `lost` how much of the weight's norm a conversion took.
Every shard of the source is hashed meanwhile: what is not what its makers sealed is not written anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantpub.actions import QUANTIZE, Action
from quantpub.artifact import CALIBRATION, META
from quantpub.calibrated import Calibrated
from quantpub.claims import require_apart
from quantpub.destination import Destination
from quantpub.errors import GateError, InputError, QuantpubError, UnavailableError
from quantpub.files import dump_json
from quantpub.kv_cache import letter_of
from quantpub.memory import give_back, keep_freed_memory
from quantpub.plan_facts import WORKERS
from quantpub.relay import Side, Unlike, relay
from quantpub.repack_proof import Proof, Proofs, Sums, Tally
from quantpub.repacking import Repack
from quantpub.shards import raw_bytes
from quantpub.sources import Source
from quantpub.stages import concurrently

PIECE = 64 << 20  # tensors that are only copied travel in pieces of this many bytes
SAMPLED = 16  # modules whose loss is measured before it is accepted
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Done:
    """What a worker wrote of one action: so many bytes, and the proof of a weight. action None: the end of a shard."""

    shard: str
    action: Action | None
    nbytes: int = 0
    proof: Proof | None = None


def repack(repack: Repack, out: Path, accept_loss: bool = False, progress: Progress = lambda _: None) -> dict[str, Any]:
    """Write the artifact, or finish the one begun there; returns a report. The source is read only.

    Errors: GateError when weights would change and that was not accepted, with how much; InputError (the checkpoint),
    ConflictError (the folder holds something else), UnavailableError (disk; a rerun resumes).
    """
    require_apart(repack.opened.held.source, out)
    destination = Destination(repack.plan, out)
    if not destination.complete:
        if repack.conversions and not accept_loss:
            require_lossless(repack)
        _make(repack, destination, progress)
    report = destination.report(changed=not destination.complete)
    return report | {"repack": destination.artifact.run()["stages"]["repack"]}


def _make(repack: Repack, destination: Destination, progress: Progress) -> None:
    try:
        destination.begin()
        if not destination.complete:
            _run(repack, destination, progress)
    except InputError:
        destination.remove()
        raise
    except QuantpubError:
        destination.undo_if_empty()
        raise
    finally:
        destination.unlock()


def _run(repack: Repack, destination: Destination, progress: Progress) -> None:
    give_back()
    keep_freed_memory()
    proofs = Proofs(destination)
    destination.finished &= proofs.shards  # what has no proof any more is made again
    states = {shard: repack.opened.held.source.state(shard) for shard in repack.plan.shards}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(1) as closing, ThreadPoolExecutor(1) as hashing:
            sums = Sums(repack.opened, hashing)
            actions = _actions(repack, destination, sums)
            done = concurrently(actions, lambda item: _worked(repack, destination, *item), WORKERS + 1)
            with contextlib.closing(done):
                _commit(repack, destination, done, Behind(closing), states, sums, proofs, progress)
    finally:
        destination.abandon()
        torch.set_num_threads(threads)
    run = destination.artifact.run()
    stages = {"stages": {**run["stages"], "repack": proofs.summary(repack)}}  # before the folder counts as finished
    destination.artifact.write(f"{META}/run.json", dump_json(run | stages))
    destination.end("cpu", Carried.of(repack))


def _actions(
    repack: Repack, destination: Destination, sums: Sums
) -> Generator[tuple[str, Action | None, int], None, None]:
    """(shard, action, offset): copies in pieces, and at the end of a shard no action."""
    for shard, actions in repack.plan.shards.items():
        if destination.needs(shard):
            sums.begin(shard)
            for action in actions:
                size = 1 if action.kind == QUANTIZE else max(1, action.part.info.nbytes)
                yield from ((shard, action, offset) for offset in range(0, size, PIECE))
            yield shard, None, 0


@torch.inference_mode()
def _worked(repack: Repack, destination: Destination, shard: str, action: Action | None, offset: int) -> Done:
    """One module, or a piece of a tensor that is only copied, from the source's file into the shard."""
    if action is None:
        return Done(shard, None)
    if offset == 0:
        destination.add(shard, _kv(repack, action), 0)
    if action.kind == QUANTIZE:
        tensors, proof = _repacked(repack, action)
        destination.add(shard, tensors, 0)
        return Done(shard, action, sum(view.nbytes for view in tensors.values()), proof)
    info, path = action.part.info, repack.opened.held.source.path(action.part.shard)
    nbytes = min(PIECE, info.nbytes - offset)
    destination.copy(shard, action.part.name, path, info.start + offset, nbytes, offset)
    return Done(shard, action, nbytes)


def _repacked(repack: Repack, action: Action) -> tuple[dict[str, memoryview], Proof]:
    assert action.treatment is not None
    module, route, decoder = action.module, repack.routes[action.treatment], repack.decoder
    treatment, (n, k) = decoder.treated(module), action.part.info.shape
    spec = {name.removeprefix(f"{module}."): each for name, each in action.outputs.items()}
    tally = Tally(module, route)
    sides = Side(treatment.layout, treatment.scheme), Side(route.layout, route.scheme)
    try:
        tensors = relay(decoder.packed(module), *sides, (n, k), spec, tally.through, route.conversion is not None)
    except Unlike:
        what, where = f"{module} does not read back as it was written", repack.opened.held.source.label
        raise InputError(what, where=where, next="run `quantpub verify` on it; please report this") from None
    return {f"{module}.{suffix}": raw_bytes(tensor) for suffix, tensor in tensors.items()}, tally.proof()


def _kv(repack: Repack, action: Action) -> dict[str, memoryview]:
    if not action.kv:
        return {}
    keys, values = repack.kv_scales[action.module.rpartition(".")[0]]
    scales = {"k": keys, "v": values}
    return {name: raw_bytes(scales[letter_of(name)].float().reshape(shape)) for name, (_, shape) in action.kv.items()}


def _commit(
    repack: Repack,
    destination: Destination,
    done: Generator[Done, None, None],
    behind: Behind,
    states: Mapping[str, str],
    sums: Sums,
    proofs: Proofs,
    progress: Progress,
) -> None:
    """Shard by shard, once all of it is written; meanwhile workers are at the next."""
    source = repack.opened.held.source
    for item in done:
        if item.action is None:
            proofs.keep(item.shard)
            unchanged = partial(_require_unchanged, source, item.shard, states[item.shard])
            behind.end(partial(_end, destination, item.shard, sums, unchanged))
        if item.proof is not None:
            proofs.add(item.proof)
        progress(item.nbytes)
    behind.wait()


def _end(destination: Destination, shard: str, sums: Sums, require_unchanged: Callable[[], None]) -> None:
    """Commit a shard, once its source is known to be sound."""
    digest = sums.end(shard, require_unchanged)
    destination.closed(shard)(digest)


def _require_unchanged(source: Source, shard: str, state: str) -> None:
    """Errors: UnavailableError when a shard that was read is not what it was before."""
    if source.state(shard) != state:
        advice = "keep it unchanged and run the same command again"
        raise UnavailableError("the file changed while it was read", where=source.where(shard), next=advice)


class Behind:
    """Committing a shard while the next one is written. One at a time: two of them are then in the page cache, unwritten."""

    def __init__(self, closing: Executor) -> None:
        self._closing = closing
        self._closed: list[Future[None]] = []

    def end(self, commit: Callable[[], None]) -> None:
        self.wait()
        self._closed.append(self._closing.submit(commit))

    def wait(self) -> None:
        """Errors: whatever committing raised."""
        while self._closed:
            self._closed.pop().result()


class Carried(Calibrated):
    """What an artifact of ours knew of its calibration, taken over as it stands."""

    record: dict[str, Any]

    @staticmethod
    def of(repack: Repack) -> Calibrated:
        artifact = repack.opened.artifact
        if artifact is None or not repack.plan.calibration:
            return Calibrated()
        found = Carried(smoothing=repack.smoothing)
        object.__setattr__(found, "record", artifact.read_json(CALIBRATION))
        return found

    def evidence(self) -> dict[str, Any]:
        return self.record


def require_lossless(repack: Repack) -> None:
    """Measure what conversions would lose, on some modules spread over the model. Errors: GateError when they lose anything."""
    places = [a for a in repack.plan.actions if a.treatment is not None and repack.routes[a.treatment].conversion]
    step = max(1, len(places) // SAMPLED)
    found = [(a.module, _lost(repack, a)) for a in places[::step][:SAMPLED]]
    if all(lost == 0 for _, lost in found) and not all(conversion.exact for conversion in repack.conversions):
        found = _until_lost(repack, places)
    module, worst = max(found, key=lambda each: each[1])
    if worst == 0:
        return
    notes = "; ".join(dict.fromkeys(c.note for c in repack.conversions))
    mean = sum(lost for _, lost in found) / len(found)
    raise GateError(
        f"the weights would change: {notes}; of their norm {100 * mean:.2g} % on average and {100 * worst:.2g} % at most "
        f"({module}) in {len(found)} of {len(places)} linears measured",
        where=repack.opened.held.source.label,
        next="add --accept-loss to write it all the same, and evaluate it; or quantize again from the full-precision model",
    )


def _until_lost(repack: Repack, places: Sequence[Action]) -> list[tuple[str, float]]:
    """Every linear in turn, to the first that would change: samples that lose nothing prove nothing of the others."""
    found = []
    for action in places:
        found.append((action.module, _lost(repack, action)))
        if found[-1][1]:
            break
    return found


def _lost(repack: Repack, action: Action) -> float:
    assert action.treatment is not None
    with torch.inference_mode():
        tally = Tally(action.module, repack.routes[action.treatment])
        tally.through(repack.decoder.qtensor(action.module))
        return tally.proof().lost
