"""Between plan and quantizing: find out whether data is needed, which, and what it says; out of the cache where it can."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from quantpub.algorithms import ALGORITHMS
from quantpub.errors import InputError, UsageError
from quantpub.files import sha256_json
from quantpub.gemms import LAYER
from quantpub.observe import observe
from quantpub.observe.solving import solve
from quantpub.plan import Plan
from quantpub.registry import load
from quantpub.samples import Request, default_data
from quantpub.solved import Solved
from quantpub.statistics import Statistics, require_experts

Progress = Callable[[int, int], None]  # layers done, layers in all


@dataclass(frozen=True)
class Asked:
    """What the command line says of calibration; None leaves it to the recipe."""

    data: str | None = None
    num_samples: int | None = None
    max_seq_len: int | None = None
    seed: int | None = None


@dataclass(frozen=True, eq=False)
class Found:
    """plans: with the key of what they are carried out with. statistics, solved: None where none are used."""

    plans: list[Plan]
    statistics: Statistics | None = None
    solved: Solved | None = None


def calibrate(
    plans: Sequence[Plan], asked: Asked, device: str = "cpu", progress: Progress = lambda done, total: None
) -> Found:
    """What the plans of one recipe need of data. Errors: UsageError, and those of `observe`."""
    plan = plans[0]
    if (request := requested(plan, asked)) is None:
        return Found(list(plans))
    require_reached(plan)
    minimum = plan.recipe.calibration.min_expert_tokens
    solved = solve(plan, request, device, progress) if "hessian" in plan.calibrates else None
    statistics = observe(plan.checkpoint, request, device, progress) if _observes(plan) else None
    for found in (solved, statistics):
        if found is not None:
            require_experts(found.record, minimum)
    key = sha256_json([found.record["key"] for found in (solved, statistics) if found is not None])
    return Found([replace(each, calibration=key) for each in plans], statistics, solved)


def _observes(plan: Plan) -> bool:
    """Whether statistics are used beside Hessians, which a sequential algorithm gathers itself."""
    return plan.calibrates != {"hessian"}


def require_reached(plan: Plan) -> None:
    """Calibration runs the model's own layers; heads that draft tokens come after them. Asked before any data is read.

    Errors: InputError when a linear beyond them is quantized by what only calibration knows.
    """
    layers = plan.checkpoint.config.get("num_hidden_layers")
    if not isinstance(layers, int) or not plan.calibrates & {"inputs", "hessian"}:
        return
    for module, treatment in plan.treated.items():
        match, act = LAYER.match(module), treatment.scheme.act
        static = act is not None and (act.global_scale or not act.dynamic)
        if match and int(match[1]) >= layers and (static or "hessian" in plan.calibrates):
            what = f"calibration does not reach it: the model runs {layers} layers, and this one drafts tokens"
            advice = f"put 're:model\\.layers\\.{match[1]}\\..*' under `ignore` in a copy of the recipe"
            raise InputError(what, where=module, next=advice)


def requested(plan: Plan, asked: Asked) -> Request | None:
    """The data to use, None where none is. Errors: UsageError when data is named that the recipe has no use for."""
    own = plan.recipe.calibration
    if asked.data is not None and not asked.data.strip():
        raise UsageError("--calibration names nothing", next="give a file, or a dataset id of the Hub")
    if not plan.calibrates and (asked.data or own.data) is None:
        if asked != Asked():
            what = "samples are asked for, but no data"
            raise UsageError(what, where=f"recipe {plan.recipe.name}", next="name it with --calibration")
        return None
    if not plan.calibrates and not any(_uses_moments(t.algorithm["name"]) for t in plan.treatments):
        what = f"recipe {plan.recipe.name} has no use for calibration data: its algorithm looks at weights alone"
        raise UsageError(what, next="leave --calibration out, or see `quantpub list recipes`")
    return Request(
        asked.data or own.data or default_data(plan.checkpoint),
        asked.num_samples or own.num_samples,
        asked.max_seq_len or own.max_seq_len,
        own.seed if asked.seed is None else asked.seed,
    )


def _uses_moments(algorithm: str) -> bool:
    return bool(load(ALGORITHMS, "algorithm", algorithm).uses_moments)
