"""What calibration adds to a plan's actions: scales of the KV cache, and tensors that factors of smoothing are folded into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from quantpub import kv_cache
from quantpub.actions import COPY, REJECTED, SMOOTH, Action
from quantpub.checkpoint import Checkpoint
from quantpub.families import LINEAR, Family
from quantpub.gemms import LAYER
from quantpub.layouts.base import Layout
from quantpub.registry import load
from quantpub.transforms import TRANSFORMS

if TYPE_CHECKING:
    from quantpub.plan import Plan


CAPPED = (
    "no FP8 KV cache for gemma2 models: their attention caps its logits in a function of its own, which calibration "
    "does not see into"
)


def with_kv(
    shards: Mapping[str, Sequence[Action]],
    checkpoint: Checkpoint,
    family: Family,
    layout: Layout,
    rejections: dict[str, str],
) -> dict[str, tuple[Action, ...]]:
    """The actions of projections of keys and values with the scales of the KV cache."""
    linears = [a for actions in shards.values() for a in actions if a.role == LINEAR]
    reason = CAPPED if checkpoint.config.get("model_type") == "gemma2" else None
    if linears and (reason := reason or kv_cache.refusal(family, layout, ((a.module, a.role) for a in linears))):
        rejections[linears[0].part.name] = reason
    layers = checkpoint.config.get("num_hidden_layers")

    def scaled(action: Action) -> Action:
        kv = kv_cache.scales(action.module, layout, layers) if action.role == LINEAR else {}
        return replace(action, kv=kv) if kv else action

    return {shard: tuple(map(scaled, actions)) for shard, actions in shards.items()}


def smoothed(plan: Plan, shard: str) -> tuple[Action, ...]:
    """The actions of a shard, with those of kind `smooth` for what is folded but not quantized."""
    folded = {tensor for fold in plan.folds for tensor in fold.tensors}

    def folding(action: Action) -> Action:
        if action.kind != COPY or action.part.name not in folded or (action.reason or "").startswith(REJECTED):
            return action
        return replace(action, kind=SMOOTH, reason=f"{action.reason}; factors of smoothing are folded into it")

    return tuple(map(folding, plan.shards[shard]))


def unsmoothed(plan: Plan) -> dict[str, str]:
    """tensor → reason, where the recipe has a transform that finds nothing to do, or that what comes after cannot follow."""
    transform, linears = plan.recipe.transform, [a for a in plan.actions if a.treatment is not None]
    if transform is None or plan.rejections or not linears:
        return {}
    if "hessian" in plan.calibrates:
        return {
            linears[0].part.name: f"an algorithm that goes layer by layer does not follow {transform['name']}: take one"
        }
    if plan.folds:
        return {}
    reason = load(TRANSFORMS, "transform", transform["name"]).reject(plan.scheme)
    nowhere = f"there is no place in this {plan.family.name} model that takes the factors of {transform['name']}"
    return {linears[0].part.name: reason or nowhere}


def unreached(plan: Plan) -> dict[str, str]:
    """tensor → reason: linears behind the layers that the model runs, of which only calibration could know the scales.

    Heads that draft tokens are such layers.
    """
    layers = plan.checkpoint.config.get("num_hidden_layers")
    if not isinstance(layers, int):
        return {}
    found = {}
    for action in plan.actions:
        match = LAYER.match(action.module)
        if action.treatment is None or match is None or int(match[1]) < layers:
            continue
        act = plan.treatments[action.treatment].scheme.act
        if "hessian" in plan.calibrates or (act is not None and act.calibrated):
            found[action.part.name] = (
                f"calibration does not reach it: the model runs {layers} layers, and this one drafts tokens: "
                f"put 're:model\\.layers\\.{match[1]}\\..*' under `ignore` in a copy of the recipe"
            )
    return found
