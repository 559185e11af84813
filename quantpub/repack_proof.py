"""The proof of a repack: what became of each weight, block by block, and the lines of `.quantpub/repack.jsonl` that say so."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from quantpub.artifact import META
from quantpub.conversions import convert, cost, relative
from quantpub.destination import Destination
from quantpub.errors import InputError
from quantpub.files import disk_errors
from quantpub.qtensor import QTensor
from quantpub.repacking import Repack, Route

PROOFS = "repack.jsonl"


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
            "from": repack.opened.lineage(),
            "modules": len(proofs),
            "equal": sum(proof["equal"] for proof in proofs),
            "rounded": max((proof["rounded"] for proof in proofs), default=0.0),
            "conversions": lossy,
            "lost": {"max": worst["lost"], "worst": worst["module"]} if lossy and worst else None,
        }
