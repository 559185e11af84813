"""What `quantpub list` shows: registries and data, read without importing what they name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from quantpub.registry import Entry
from quantpub.scheme import SUMMARIES
from quantpub.targets import TARGETS, Target


def _summaries(registry: Mapping[str, Entry]) -> dict[str, str]:
    return {name: entry.summary for name, entry in registry.items()}


def _description(path: Path) -> str:
    """A recipe's own words; of one that is broken, that it is: the others are listed all the same."""
    import yaml

    try:
        return str(yaml.safe_load(path.read_text("utf-8"))["description"])
    except (yaml.YAMLError, OSError, UnicodeDecodeError, TypeError, KeyError) as error:
        return f"(not valid: {type(error).__name__})"


def _recipes() -> dict[str, str]:
    from quantpub.recipe_files import recipe_files

    return {name: _description(path) for name, path in recipe_files().items()}


def _engines() -> dict[str, str]:
    return {name: _engine(target) for name, target in TARGETS.items()}


def _engine(target: Target) -> str:
    """Layouts of the same versions together, and what the engine refuses."""
    versions: dict[str, list[str]] = {}
    for layout, loads in target.loads.items():
        versions.setdefault(loads.versions, []).append(layout)
    loaded = "; ".join(f"{', '.join(layouts)} ({version})" for version, layouts in versions.items())
    return f"{target.summary}: {loaded}" + (f"; not {', '.join(target.refuses)}" if target.refuses else "")


def _algorithms() -> dict[str, str]:
    from quantpub.algorithms import ALGORITHMS

    return _summaries(ALGORITHMS)


def _layouts() -> dict[str, str]:
    from quantpub.layouts import KERNEL_LAYOUTS, LAYOUTS
    from quantpub.pairs import clause

    held = {name: f"{entry.summary}; {clause(name)}" for name, entry in LAYOUTS.items()}
    return held | _summaries(KERNEL_LAYOUTS)


def _kernels() -> dict[str, str]:
    from quantpub.kernels import KERNELS

    return _summaries(KERNELS)


def _rules() -> dict[str, str]:
    from quantpub.verify import RULES

    return _summaries(RULES)


def _failures() -> dict[str, str]:
    from quantpub.failures import FAILURES, caught_by

    return {str(number): f"{failure.what}: {caught_by(failure)}" for number, failure in FAILURES.items()}


LISTS: dict[str, Callable[[], dict[str, str]]] = {
    "recipes": _recipes,
    "schemes": lambda: dict(SUMMARIES),
    "algorithms": _algorithms,
    "layouts": _layouts,
    "kernels": _kernels,
    "engines": _engines,
    "rules": _rules,
    "failures": _failures,
}
