"""Between plan and quantizing: find out whether data is needed, which, and what it says; out of the cache where it can."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from quantpub.algorithms import ALGORITHMS
from quantpub.errors import UsageError
from quantpub.files import sha256_json
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
