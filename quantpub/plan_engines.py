"""Which engines load what a plan would write: the tables asked for every weight, merged as engines merge it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from quantpub import advice
from quantpub.errors import InputError
from quantpub.gemms import is_expert, some_experts
from quantpub.layouts.base import Layout
from quantpub.recipe import Recipe
from quantpub.targets import unloadable
from quantpub.treatments import Treatment

if TYPE_CHECKING:
    from quantpub.plan import Plan


def no_engine(module: str, treatment: Treatment, recipe: Recipe, chosen: Layout) -> str | None:
    """Why none of the engines in question would load the weight."""
    experts = is_expert(module)
    names = advice.in_question(recipe.engines, chosen.name)
    reasons = [unloadable(engine, treatment.layout.name, treatment.scheme.name, experts) for engine in names]
    return reasons[0] if reasons and all(reasons) else None


def engines_of(plan: Plan) -> dict[str, str | None]:
    """Engine → why it cannot load this plan's checkpoint, or None.

    In question are the engines that the recipe gives the layout; of a layout that it gives none, all.
    """
    treated = plan.treated
    multiples = {module: t.layout.tp_multiple(t.scheme) or (1, 1) for module, t in treated.items()}
    apart = advice.unmerged(plan.shapes, {module: rows for module, (rows, _) in multiples.items()}, plan.family)
    names, found = advice.in_question(plan.recipe.engines, plan.layout.name), merged_weights(plan)
    kept = some_experts(action.module for action in plan.actions if action.treatment is None)
    return {engine: advice.refusal(engine, found, apart, kept) for engine in names}


def merged_weights(plan: Plan) -> list[advice.Weight]:
    """The quantized weights as engines multiply by them."""
    stored = {module: (t.scheme, t.layout.name) for module, t in plan.treated.items()}
    return advice.weights(plan.shapes, stored, plan.family)


def unserved(plan: Plan) -> dict[str, str]:
    """tensor → reason, where no engine in question loads the checkpoint though each weight alone has one that would."""
    refusals = list(engines_of(plan).values())
    if plan.rejections or not refusals or not all(refusals):
        return {}
    return {a.part.name: str(refusals[0]) for a in plan.actions if a.treatment is not None}


def require_engines(plan: Plan, asked: Sequence[str]) -> None:
    """Errors: InputError when an engine that was asked for by name cannot load what would be written for it."""
    refusals = {} if plan.rejections else engines_of(plan)
    for engine in asked:
        if (reason := refusals.get(engine)) and plan.recipe.engines.get(engine) == plan.layout.name:
            others = [name for name, why in refusals.items() if why is None]
            raise InputError(
                f"{engine} cannot load it: {reason}",
                where=f"recipe {plan.recipe.name}, layout {plan.layout.name}",
                next=f"without --engine {engine} it is written for {' and '.join(others)}; or choose another recipe",
            )
