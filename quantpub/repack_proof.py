"""The proof of a repack: what became of each weight, block by block, and the lines of `.quantpub/repack.jsonl` that say so."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import torch

from quantpub.artifact import META, PROOFS
from quantpub.conversions import convert, cost, relative
from quantpub.destination import Destination
from quantpub.errors import InputError
from quantpub.files import disk_errors, sha256_file
from quantpub.opened import Opened
from quantpub.qtensor import QTensor
from quantpub.repacking import Repack, Route
from quantpub.sources import LocalSource, read_errors

MOVED = 2.0**-22  # twice what a float32 number beside a reciprocal is away


@dataclass(frozen=True)
class Proof:
    """Of one module. equal: bit for bit. rounded, lost: relative norms of what changed."""

    module: str
    equal: bool
    rounded: float = 0.0
    lost: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return {"module": self.module, "equal": self.equal, "rounded": self.rounded, "lost": self.lost}


class Tally:
    """What becomes of one weight on its way, block by block, and what that costs."""

    def __init__(self, module: str, route: Route) -> None:
        self.module, self.route = module, route
        self.change = self.whole = self.rounded = 0.0

    def through(self, before: QTensor) -> QTensor:
        """The weight as the layout will hold it. Errors: InputError when its numbers have no place in the other scheme."""
        after, route = before, self.route
        if route.conversion is not None:
            try:
                after = convert(before, route.conversion, route.scheme, route.dtype)
            except ValueError as reason:
                what = f"{reason}, and {route.layout.name} has no place for them"
                advice = "choose another layout (see `quantpub list layouts`)"
                raise InputError(what, where=self.module, next=advice) from None
            change, whole = cost(before, after)
            self.change, self.whole = self.change + change, self.whole + whole
        _require_scales(self.module, after)
        held = route.layout.nearest(after)
        self.rounded = max(self.rounded, 0.0 if held is after else _change(after, held))
        if self.rounded > MOVED:
            what = f"{route.layout.name} cannot hold its global scales: the nearest are {self.rounded:.1e} of them away"
            raise InputError(what, where=self.module, next="choose another layout")
        return held

    def proof(self) -> Proof:
        lost = relative(self.change, self.whole)
        return Proof(self.module, lost == 0 and self.rounded == 0, self.rounded, lost)


def _require_scales(module: str, q: QTensor) -> None:
    """Errors: InputError where a scale of the whole tensor is none, or has no reciprocal in float32."""
    for name, value in (("global scale", q.global_scale), ("scale of activations", q.input_scale)):
        if value is not None and not bool((value > 0) & torch.isfinite(value) & torch.isfinite(value.reciprocal())):
            what, advice = f"its {name} is {float(value):g}", "run `quantpub verify` on it; quantize it again"
            raise InputError(what, where=module, next=advice)


def _change(before: QTensor, after: QTensor) -> float:
    """By how much global scales moved, the largest relative change."""
    pairs = [(before.global_scale, after.global_scale), (before.input_scale, after.input_scale)]
    return max(
        (float(((a.double() - b.double()) / a.double()).abs()) for a, b in pairs if a is not None and b is not None),
        default=0.0,
    )


class Sums:
    """The sha256 of every shard of the source, found while it is read, and held against those that are stated of it.

    Of another tool's in a folder none is stated; there the file's state stands for it.
    """

    def __init__(self, opened: Opened, hashing: Executor) -> None:
        self._source, self._hashing = opened.held.source, hashing
        self._unsealed = opened.artifact is None and isinstance(self._source, LocalSource)
        artifact = opened.artifact
        self._stated = [(artifact.sums(), "its SHA256SUMS"), (artifact.journal(), "its journal")] if artifact else []
        self._found: dict[str, Future[str]] = {}

    def begin(self, shard: str) -> None:
        if not self._unsealed:
            self._found[shard] = self._hashing.submit(self._hashed, shard)

    def _hashed(self, shard: str) -> str:
        path = self._source.path(shard)
        with read_errors(path):
            return sha256_file(path)

    def end(self, shard: str, require_unchanged: Callable[[], None]) -> str:
        """Errors: InputError where it is not the one that is stated; what `require_unchanged` raises goes before."""
        if self._unsealed:
            require_unchanged()
            return self._source.state(shard)
        found = self._found.pop(shard).result()
        require_unchanged()
        stated = {name: sums[shard] for sums, name in self._stated if shard in sums}
        if not isinstance(self._source, LocalSource):
            stated["the Hub"] = self._source.sha256(shard)
        if other := next((name for name, digest in stated.items() if digest != found), None):
            what, where = f"the shard is damaged: it has not the sha256 that {other} states", self._source.where(shard)
            raise InputError(what, where=where, next="download or copy the checkpoint again, or make it again")
        return found


class Proofs:
    """The lines of repack.jsonl: written before the shard they speak of, so that a rerun finds those of finished ones."""

    def __init__(self, destination: Destination) -> None:
        self._destination, self._open = destination, list[Proof]()
        self._by_shard = {shard: lines for shard, lines in self._read().items() if self._whole(shard, lines)}

    @property
    def shards(self) -> set[str]:
        """Finished, and with a proof of every module."""
        return set(self._by_shard)

    def _whole(self, shard: str, lines: list[dict[str, Any]]) -> bool:
        if shard not in self._destination.finished:
            return False
        due = [a.module for a in self._destination.plan.shards[shard] if a.treatment is not None]
        return [line["module"] for line in lines] == due

    def _read(self) -> dict[str, list[dict[str, Any]]]:
        path = self._destination.artifact.meta / PROOFS
        if not path.is_file():
            return {}
        try:
            lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            return {line["shard"]: [Proof(**each).as_json() for each in line["modules"]] for line in lines}
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
        proofs = [proof for shard in self._destination.plan.shards for proof in self._by_shard[shard]]
        worst = max(proofs, key=lambda proof: float(proof["lost"]), default=None)
        lossy = [{"name": c.name, "note": c.note} for c in repack.conversions]
        return {
            "from": repack.opened.lineage(),
            "modules": len(proofs),
            "equal": sum(proof["equal"] for proof in proofs),
            "rounded": max((proof["rounded"] for proof in proofs), default=0.0),
            "conversions": lossy,
            "lost": {"max": worst["lost"], "worst": worst["module"]} if lossy and worst else None,
        }
