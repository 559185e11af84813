"""What a calibration means for one plan: the statistics of each linear after the transform, and what is folded into weights.

Here what linears share is settled (law 4: afterwards no tensor needs another): the largest input of q/k/v, of gate/up and
of a layer's experts, of which engines keep one scale; the largest weight of what they merge; vectors of smoothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from quantpub import kv_cache
from quantpub.actions import Action
from quantpub.errors import InputError
from quantpub.files import sha256_json
from quantpub.fused import fused_amax
from quantpub.gemms import EXPERT, fuse
from quantpub.plan import Plan
from quantpub.qtensor import QTensor
from quantpub.solved import Solved
from quantpub.statistics import Statistics
from quantpub.stats import Stats

if TYPE_CHECKING:
    from quantpub.smoothing import Smoothing


@dataclass(frozen=True, eq=False)
class Calibrated:
    """group_amax, input_amax: by module. smoothing: of a recipe with a transform. solved: by sequential algorithms.

    unseen: quantized linears that calibration does not run, as those of heads that draft tokens.
    All of it is absent where a recipe uses no data.
    """

    statistics: Statistics | None = None
    solved: Solved | None = None
    smoothing: Smoothing | None = None
    group_amax: Mapping[str, float] = field(default_factory=dict)
    unseen: tuple[str, ...] = ()
    input_amax: Mapping[str, float] = field(default_factory=dict)

    def weight(self, name: str, w: torch.Tensor) -> torch.Tensor:
        """A source tensor as the transform leaves it."""
        return w if self.smoothing is None else self.smoothing.apply(name, w)

    def stats(self, module: str) -> Stats:
        """What an algorithm gets to see of one linear."""
        found = Stats(group_amax=self.group_amax.get(module), input_amax=self.input_amax.get(module))
        if self.statistics is None or not self.statistics.has(module):
            return found
        seen = self.statistics.input(module)
        seen = seen if self.smoothing is None else self.smoothing.observed(module, seen)
        return replace(found, second_moment_K=seen.second_moment_K, sample_RK=seen.sample_RK)

    def solution(self, action: Action) -> QTensor | None:
        """The linear as a sequential algorithm left it, or None."""
        return None if self.solved is None else self.solved.qtensor(action)

    def kv(self, plan: Plan, module: str) -> dict[str, torch.Tensor]:
        """The tensors of the KV cache that go along with a projection: name → scale as the plan's layout stores it."""
        names = plan.kv.get(module, {})
        if not names:
            return {}
        assert self.statistics is not None, "a plan with an FP8 KV cache is calibrated"
        amax = dict(zip("kv", self.statistics.kv(module.rpartition(".")[0]), strict=True))
        return {
            name: kv_cache.kv_scale(amax[kv_cache.letter_of(name)]).reshape(shape) for name, (_, shape) in names.items()
        }

    def shared(self) -> str | None:
        """The digest of what tensors share: a shard is kept only while it is the same."""
        keys = [found.record["key"] for found in (self.statistics, self.solved) if found is not None]
        smoothing = {} if self.smoothing is None else self.smoothing.evidence
        found = [dict(self.group_amax), dict(self.input_amax), keys, smoothing]
        return sha256_json(found) if any(found) else None

    def evidence(self) -> dict[str, Any]:
        """What calibration.json says; empty where no data was used."""
        records = [found.record for found in (self.statistics, self.solved) if found is not None]
        found = dict(records[0]) if records else {}
        if len(records) > 1:
            found["solved"] = records[1]
        if self.statistics is not None:
            found["unseen"] = list(self.unseen)
        if self.smoothing is not None:
            found["smoothing"] = self.smoothing.evidence
        return found


def calibrated(
    plan: Plan, statistics: Statistics | None = None, solved: Solved | None = None, device: str = "cpu"
) -> Calibrated:
    """Errors: InputError when the plan needs what was not observed."""
    smoothing = None
    if plan.recipe.transform is not None:
        from quantpub.smoothing import solve as solve_smoothing

        assert statistics is not None, "a plan with a transform is calibrated"
        smoothing = solve_smoothing(plan, statistics, device)
    group = fused_amax(plan) if smoothing is None else fused_amax(plan, smoothing.apply)
    unseen = () if statistics is None else tuple(m for m in plan.treated if not statistics.has(m))
    found = Calibrated(statistics, solved, smoothing, group, unseen)
    if "inputs" not in plan.calibrates:
        return found
    assert statistics is not None, "a plan with calibrated activations is calibrated"
    return replace(found, input_amax=_input_amax(plan, statistics, smoothing))


def _input_amax(plan: Plan, statistics: Statistics, smoothing: Smoothing | None) -> dict[str, float]:
    """module → the largest input of all linears of which an engine keeps one input scale."""
    own = {}
    for module, treatment in plan.treated.items():
        act = treatment.scheme.act
        if act is not None and act.calibrated:
            seen = statistics.input(module)
            seen = seen if smoothing is None else smoothing.observed(module, seen)
            own[module] = float(seen.amax_K.max())
    _require_sound(own)
    found: dict[str, float] = {}
    for members in input_sets(plan):
        held = [member for member in members if member in own]
        found |= dict.fromkeys(held, max((own[member] for member in held), default=0.0))
    return found


def input_sets(plan: Plan) -> list[list[str]]:
    """Linears that share an input scale: what engines merge; gate and up, and down, of all experts of a layer."""
    sets: dict[str, list[str]] = {}
    for merged, members in fuse(plan.shapes, plan.family).items():
        sets.setdefault(EXPERT.sub(".experts.", merged), []).extend(members)
    return list(sets.values())


def _require_sound(amax: Mapping[str, float]) -> None:
    for module, value in amax.items():
        if not value < float("inf"):
            what = f"the largest input that calibration saw is {value}"
            raise InputError(what, where=module, next="calibrate again with other samples")
