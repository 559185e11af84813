"""Sequential algorithms: each layer's linears solved on inputs that come through the quantized layers before it.

A layer is gone through twice: once to gather the Hessian of every input, then, with its weights quantized, for what
enters the next. Hessians live as long as their layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from quantpub.actions import Action
from quantpub.algorithms.base import Algorithm
from quantpub.calibrated import input_sets
from quantpub.checkpoint import read_slice
from quantpub.fused import fused_amax
from quantpub.gemms import LAYER
from quantpub.layer_store import LayerStore
from quantpub.observe.layers import Seen, run, watched
from quantpub.observe.passing import Pass, begun, settings
from quantpub.observe.ranks import join
from quantpub.plan import Plan
from quantpub.qtensor import QTensor, dequantize
from quantpub.samples import Request, identify, read_samples
from quantpub.solved import Solved, solved_key
from quantpub.sound import require_sound
from quantpub.statistics import folder_of, statistics_key
from quantpub.stats import Stats

Bound = list[tuple[Algorithm, Any]]


def solve(
    plan: Plan, request: Request, device: str = "cpu", progress: Callable[[int, int], None] = lambda done, total: None
) -> Solved:
    """Every quantized linear of the plan, solved: out of the cache, or now. Errors: those of `observe`."""
    ranks = join(device)
    key = solved_key(plan, statistics_key(plan.checkpoint, identify(request, plan.checkpoint), settings(device)))
    if found := Solved.open(key, plan.treatments):
        return found
    store = LayerStore(folder_of("solved", key))
    with begun(store, ranks):
        going = Pass(plan.checkpoint, read_samples(request, plan.checkpoint), store, ranks)
        bound = [plan.recipe.bind(treatment.algorithm, treatment.scheme) for treatment in plan.treatments]
        amax, actions = fused_amax(plan), _by_layer(plan)
        one_scale = {member: members for members in input_sets(plan) for member in members}
        for layer in going.layers(progress):
            todo = actions.get(layer, [])
            seen = watched(
                going.skeleton, layer, going.hidden, ranks, going.mine, going.batches, hessian=True, keep=False
            )
            solved = _solved(plan, todo, seen, bound, amax, one_scale, device)
            _set(going, layer, {module: dequantize(q) for module, q in solved.items()})
            run(going.skeleton, layer, going.hidden)
            going.store(layer, _packed(plan, todo, solved), {"experts": seen.routed})
        return Solved(store, going.end(key, "solve"), plan.treatments)


def _by_layer(plan: Plan) -> dict[int, list[Action]]:
    found: dict[int, list[Action]] = {}
    for action in plan.actions:
        if action.treatment is not None and (match := LAYER.match(action.module)):
            found.setdefault(int(match[1]), []).append(action)
    return found


def _solved(
    plan: Plan,
    todo: list[Action],
    seen: Seen,
    bound: Bound,
    amax: Mapping[str, float],
    one_scale: Mapping[str, Sequence[str]],
    device: str,
) -> dict[str, QTensor]:
    """module → its quantized weight. Linears of one input and treatment are solved as one: rows do not know of each other,
    and the Hessian is factored once."""
    together: dict[tuple[str, int], list[Action]] = {}
    for action in todo:
        assert action.treatment is not None
        owner = seen.watch.inputs[action.module]
        alone = "" if "hessian" in bound[action.treatment][0].needs else action.module
        together.setdefault((owner + alone, action.treatment), []).append(action)
    found: dict[str, QTensor] = {}
    for (_, place), actions in together.items():
        weights = [_weight(plan, action) for action in actions]
        algorithm, params = bound[place]
        stats = _stats(seen, actions[0].module, amax, one_scale)
        q = algorithm.quantize(torch.cat(weights).to(device), stats, plan.treatments[place].scheme, params)
        parts = split(q, [len(w_NK) for w_NK in weights])
        found |= {action.module: part for action, part in zip(actions, parts, strict=True)}
    return found


def _weight(plan: Plan, action: Action) -> torch.Tensor:
    w_NK = read_slice(plan.checkpoint.source, action.part)
    require_sound(plan, action.part.shard, action, w_NK)
    return w_NK


def _stats(seen: Seen, module: str, amax: Mapping[str, float], one_scale: Mapping[str, Sequence[str]]) -> Stats:
    """one_scale: module → those of which an engine keeps one scale of inputs, itself included."""
    gathered = seen.watch.gathered[seen.watch.inputs[module]]
    sharing = {seen.watch.inputs[member] for member in one_scale[module]}
    assert gathered.sum_KK is not None
    return Stats(
        second_moment_K=(gathered.sum_K / gathered.tokens).float(),
        group_amax=amax.get(module),
        hessian_KK=gathered.sum_KK / gathered.tokens,
        input_amax=max(float(seen.watch.gathered[owner].amax_K.max()) for owner in sharing),
        sample_RK=gathered.sample(),
    )


def split(q: QTensor, rows: Sequence[int]) -> list[QTensor]:
    """A weight cut into bands of so many rows each. Scales belong to single rows where there is more than one band."""
    if len(rows) == 1:
        return [q]
    codes, scales = q.codes_NK.split(list(rows)), q.scale.split(list(rows))
    zeros = [None] * len(rows) if q.zero is None else q.zero.split(list(rows))
    return [replace(q, codes_NK=c, scale=s, zero=z) for c, s, z in zip(codes, scales, zeros, strict=True)]


def _set(going: Pass, layer: int, weights: Mapping[str, torch.Tensor]) -> None:
    """Give the loaded layer the weights that its linears will have."""
    module = going.skeleton.module(layer)
    for name, (part, place) in going.skeleton.parts(layer).items():
        if (w_NK := weights.get(part.name.removesuffix(".weight"))) is not None and name.endswith(".weight"):
            value = module.get_parameter(place.parameter)
            target = value if place.expert is None else value[place.expert][place.rows(part)]
            target.copy_(w_NK)


def _packed(plan: Plan, todo: list[Action], solved: Mapping[str, QTensor]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for action in todo:
        assert action.treatment is not None
        tensors = plan.treatments[action.treatment].layout.pack(solved[action.module])
        found |= {f"{action.module}.{suffix}": tensor for suffix, tensor in tensors.items()}
    return found
