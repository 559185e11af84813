"""The recipe of a repacked artifact, which later stages read: what made its weights, in the schemes that they now have, and
the engines that load all of them in their new layouts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from pydantic import ValidationError

from quantpub.algorithms import ADOPTED
from quantpub.errors import InputError
from quantpub.opened import Opened
from quantpub.recipe import Recipe
from quantpub.scheme import PRESETS, Scheme
from quantpub.targets import TARGETS, unloadable
from quantpub.treatments import Treatment

REPACKED = "; repacked as "


def repacked_recipe(opened: Opened, treatments: Sequence[Treatment], used: Collection[int]) -> Recipe:
    """The recipe of one of ours with the engines of its new layout; of another tool's, what can be said of it.

    used: the places of treatments that some weight has. Errors: InputError when it could not be read back.
    """
    present = [treatments[place] for place in sorted(used)]
    layouts = " and ".join(dict.fromkeys(treatment.layout.name for treatment in present))
    artifact = opened.artifact
    found = _own(artifact.recipe(), treatments, layouts) if artifact else _adopted(opened, treatments, layouts)
    engines = _engines(opened, treatments[0].layout.name, present)
    try:
        return Recipe.model_validate(found | {"engines": engines})
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
        what = f"its recipe cannot be written for {layouts}: {reason}"
        raise InputError(what, where=opened.held.source.label, next="choose another layout") from None


def _engines(opened: Opened, layout: str, used: Sequence[Treatment]) -> dict[str, str]:
    """Those that load every treatment. Errors: InputError when there is none."""
    reasons = {name: _unloadable(name, layout, used) for name in TARGETS}
    if all(reasons.values()):
        what = f"no engine would load it: {next(iter(reasons.values()))}"
        raise InputError(what, where=opened.held.source.label, next="choose another layout")
    return {name: layout for name, reason in reasons.items() if reason is None}


def _unloadable(engine: str, layout: str, used: Sequence[Treatment]) -> str | None:
    mixed = TARGETS[engine].mixed if len({t.scheme for t in used}) > 1 else None
    reasons = [unloadable(engine, layout), *(unloadable(engine, t.layout.name, t.scheme.name) for t in used)]
    return mixed or next((reason for reason in reasons if reason), None)


def _own(own: Recipe, treatments: Sequence[Treatment], layouts: str) -> dict[str, Any]:
    """Each scheme as it now is, its own and those of its rules; of another tool's rules nothing is known."""
    found = own.model_dump() | {"description": f"{own.description.partition(REPACKED)[0]}{REPACKED}{layouts}"}
    for part, treatment in zip([found, *found["rules"]], treatments, strict=False):
        if part["scheme"] != treatment.scheme.name:
            part |= {"scheme": treatment.scheme.name, "group_size": _size(treatment.scheme)}
    return found


def _adopted(opened: Opened, treatments: Sequence[Treatment], layouts: str) -> dict[str, Any]:
    scheme = treatments[0].scheme
    if scheme.name not in PRESETS:
        raise InputError(f"scheme {scheme.name} has no name among ours", where=opened.held.source.label)
    method = opened.adopted.method
    return {
        "name": f"{ADOPTED}-{method.name}",
        "description": f"quantized by {method.tool}, repacked as {layouts}",
        "scheme": scheme.name,
        "group_size": _size(scheme),
        "algorithm": {"name": ADOPTED, "by": method.tool},
        "kv_cache": "fp8" if opened.adopted.shared or any(line.get("kv") for line in opened.adopted.lines) else None,
    }


def _size(scheme: Scheme) -> int | None:
    return None if PRESETS[scheme.name].group_size == scheme.group_size else scheme.group_size
