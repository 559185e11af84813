"""Repacking: a quantized checkpoint in another layout, without quantizing again, and the proof that nothing changed.

    read → unpack (one layout) → convert, where the other does not hold the scheme → pack → unpack again and compare

A worker takes one module at a time through all of it; the caller writes and commits shard after shard, while another thread
hashes the source. Every module's proof is a line of `.quantpub/repack.jsonl`: `equal` says that what was written reads back
as the very codes, scales and zeros that were read, so that the weights are the same bits (law 1); `rounded` that a number
was not expressible to float32's last bit; `lost` how much of the weight's norm a conversion took.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantpub.actions import QUANTIZE, Action
from quantpub.artifact import CALIBRATION, META
from quantpub.calibrated import Calibrated
from quantpub.conversions import convert, loss
from quantpub.destination import Destination
from quantpub.errors import GateError, InputError, QuantpubError
from quantpub.files import disk_errors
from quantpub.kv_cache import letter_of
from quantpub.memory import give_back, keep_freed_memory
from quantpub.plan_facts import WORKERS
from quantpub.qtensor import QTensor, same
from quantpub.repacking import Repack, Route
from quantpub.shards import raw_bytes
from quantpub.stages import background, concurrently

AHEAD = 64 << 20  # bytes that workers may be ahead of the writer
PIECE = 32 << 20  # tensors that are only copied travel in pieces of this many bytes
SAMPLED = 16  # modules whose loss is measured before it is accepted
PROOFS = "repack.jsonl"
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Proof:
    """Of one module. equal: bit for bit. rounded, lost: relative norms of what changed."""

    module: str
    equal: bool
    rounded: float = 0.0
    lost: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return {"module": self.module, "equal": self.equal, "rounded": self.rounded, "lost": self.lost}


@dataclass
class Made:
    """What a worker made of one action, from `offset` on: tensors by name. action None: the end of a shard."""

    shard: str
    action: Action | None
    offset: int = 0
    outputs: dict[str, memoryview] = field(default_factory=dict)
    proof: Proof | None = None

    @property
    def nbytes(self) -> int:
        return sum(view.nbytes for view in self.outputs.values())


def repack(repack: Repack, out: Path, accept_loss: bool = False, progress: Progress = lambda _: None) -> dict[str, Any]:
    """Write the artifact, or finish the one begun there; returns a report.

    Errors: GateError when weights would change and that was not accepted, with how much; InputError (the checkpoint),
    ConflictError (the folder holds something else), UnavailableError (disk; a rerun resumes).
    """
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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = background(
        concurrently(_actions(repack, destination), lambda item: _worked(repack, *item), WORKERS),
        lambda m: m.nbytes,
        AHEAD,
    )
    try:
        with contextlib.closing(made), ThreadPoolExecutor(1) as pool:
            _write(repack, destination, made, pool, proofs, progress)
    finally:
        destination.abandon()
        torch.set_num_threads(threads)
    destination.end("cpu", Carried.of(repack))
    destination.artifact.record("repack", proofs.summary(repack))


def _actions(repack: Repack, destination: Destination) -> Generator[tuple[str, Action | None, int], None, None]:
    """(shard, action, offset): copies in pieces, and at the end of a shard no action."""
    for shard, actions in repack.plan.shards.items():
        if destination.needs(shard):
            for action in actions:
                size = 1 if action.kind == QUANTIZE else max(1, action.part.info.nbytes)
                yield from ((shard, action, offset) for offset in range(0, size, PIECE))
            yield shard, None, 0


@torch.inference_mode()
def _worked(repack: Repack, shard: str, action: Action | None, offset: int) -> Made:
    if action is None:
        return Made(shard, None)
    scales = _kv(repack, action) if offset == 0 else {}
    if action.kind == QUANTIZE:
        tensors, proof = _repacked(repack, action)
        return Made(shard, action, 0, tensors | scales, proof)
    info = action.part.info
    data = repack.opened.held.source.span(shard, info.start + offset, min(PIECE, info.nbytes - offset))
    return Made(shard, action, offset, {action.part.name: data} | scales)


def _repacked(repack: Repack, action: Action) -> tuple[dict[str, memoryview], Proof]:
    assert action.treatment is not None
    module, route = action.module, repack.routes[action.treatment]
    before = repack.decoder.qtensor(module)
    after, proof = _through(module, before, route)
    tensors = route.layout.pack(after)
    back = route.layout.unpack(tensors, route.scheme, after.shape)
    if not same(back, after):
        what = f"{module} does not read back as it was written in {route.layout.name}"
        raise InputError(
            what, where=repack.opened.held.source.label, next="run `quantpub verify` on it; please report this"
        )
    return {f"{module}.{suffix}": raw_bytes(tensor) for suffix, tensor in tensors.items()}, proof


def _through(module: str, before: QTensor, route: Route) -> tuple[QTensor, Proof]:
    """The weight as the layout will hold it. Errors: InputError when its numbers have no place in the other scheme."""
    after, lost = before, 0.0
    if route.conversion is not None:
        try:
            after = convert(before, route.conversion, route.scheme)
        except ValueError as reason:
            what = f"{reason}, and {route.layout.name} has no place for them"
            raise InputError(what, where=module, next="choose a layout that holds zeros, as ct-pack or awq") from None
        lost = loss(before, after)
    held = route.layout.nearest(after)
    rounded = 0.0 if held is after else _change(after, held)
    return held, Proof(module, lost == 0 and rounded == 0, rounded, lost)


def _change(before: QTensor, after: QTensor) -> float:
    """By how much global scales moved, the largest relative change."""
    pairs = [(before.global_scale, after.global_scale), (before.input_scale, after.input_scale)]
    return max(
        (float(((a.double() - b.double()) / a.double()).abs()) for a, b in pairs if a is not None and b is not None),
        default=0.0,
    )


def _kv(repack: Repack, action: Action) -> dict[str, memoryview]:
    if not action.kv:
        return {}
    keys, values = repack.kv_scales[action.module.rpartition(".")[0]]
    scales = {"k": keys, "v": values}
    return {name: raw_bytes(scales[letter_of(name)].float().reshape(shape)) for name, (_, shape) in action.kv.items()}


def _write(
    repack: Repack,
    destination: Destination,
    made: Generator[Made, None, None],
    pool: ThreadPoolExecutor,
    proofs: Proofs,
    progress: Progress,
) -> None:
    """Beside it the source shard is hashed, once, in a thread of its own."""
    source = repack.opened.held.source
    hashed: dict[str, Future[str]] = {}
    for item in made:
        if item.shard not in hashed:
            hashed[item.shard] = pool.submit(source.sha256, item.shard)
        if item.action is None:
            proofs.keep(item.shard)
            destination.commit(item.shard, hashed[item.shard].result())
            continue
        destination.add(item.shard, item.outputs, item.offset)
        if item.proof is not None:
            proofs.add(item.proof)
        progress(item.nbytes)


class Proofs:
    """The lines of repack.jsonl: written before the shard they speak of, so that a rerun finds those of finished ones."""

    def __init__(self, destination: Destination) -> None:
        self._destination, self._open = destination, list[Proof]()
        self._by_shard = {shard: lines for shard, lines in self._read().items() if shard in destination.finished}

    def _read(self) -> dict[str, list[dict[str, Any]]]:
        path = self._destination.artifact.meta / PROOFS
        if not path.is_file():
            return {}
        try:
            lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            return {line["shard"]: line["modules"] for line in lines}
        except (ValueError, KeyError, TypeError):
            return {}

    def add(self, proof: Proof) -> None:
        self._open.append(proof)

    def keep(self, shard: str) -> None:
        self._by_shard[shard] = [proof.as_json() for proof in self._open]
        self._open = []
        order = [name for name in self._destination.plan.shards if name in self._by_shard]
        text = "".join(json.dumps({"shard": name, "modules": self._by_shard[name]}) + "\n" for name in order)
        with disk_errors(self._destination.artifact.meta / PROOFS):
            self._destination.artifact.write(f"{META}/{PROOFS}", text.encode())

    def summary(self, repack: Repack) -> dict[str, Any]:
        """What run.json says of the whole repack."""
        proofs = [proof for lines in self._by_shard.values() for proof in lines]
        worst = max(proofs, key=lambda proof: float(proof["lost"]), default=None)
        lossy = [{"name": c.name, "note": c.note} for c in repack.conversions]
        return {
            "from": {
                "layouts": sorted({t.layout.name for t in repack.decoder.treatments}),
                **repack.opened.held.source.identity(),
            },
            "modules": len(proofs),
            "equal": sum(proof["equal"] for proof in proofs),
            "rounded": max((proof["rounded"] for proof in proofs), default=0.0),
            "conversions": lossy,
            "lost": {"max": worst["lost"], "worst": worst["module"]} if lossy and worst else None,
        }


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


def _lost(repack: Repack, action: Action) -> float:
    assert action.treatment is not None
    with torch.inference_mode():
        return _through(action.module, repack.decoder.qtensor(action.module), repack.routes[action.treatment])[1].lost
