"""Treatments: what a recipe, and each of its rules, makes of a weight; and how a checkpoint of several is declared."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantpub.errors import InputError
from quantpub.families import HEAD, LINEAR, ROUTER, Family
from quantpub.layouts import LAYOUTS
from quantpub.layouts.base import CT, Layout, ct_config
from quantpub.recipe import Recipe
from quantpub.registry import load
from quantpub.scheme import Scheme

_EXPERTS = re.compile(r"(.*\.experts)\.")
ASKED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@dataclass(frozen=True)
class Treatment:
    """algorithm: its name and parameters."""

    scheme: Scheme
    algorithm: Mapping[str, Any]
    layout: Layout

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Treatment:
        layout: Layout = load(LAYOUTS, "layout", value["layout"])
        return Treatment(Scheme.from_json(value["scheme"]), value["algorithm"], layout)

    def as_json(self) -> dict[str, Any]:
        return {"scheme": self.scheme.as_json(), "algorithm": dict(self.algorithm), "layout": self.layout.name}


def make_treatments(recipe: Recipe, layout_name: str) -> tuple[Treatment, ...]:
    """The recipe's own and its rules'. A rule's layout is the recipe's, or the one of the same method for its scheme.

    Errors: InputError when no layout of that method holds a rule's scheme.
    """
    layout: Layout = load(LAYOUTS, "layout", layout_name)
    own = recipe.resolved_scheme()
    treatments = [Treatment(own, recipe.algorithm, layout)]
    for rule in recipe.rules:
        scheme = rule.resolved_scheme()
        held = layout if scheme == own else _beside(layout, scheme, recipe.name)
        treatments.append(Treatment(scheme, rule.algorithm or recipe.algorithm, held))
    return tuple(treatments)


def _beside(layout: Layout, scheme: Scheme, recipe: str) -> Layout:
    """The layout in which a weight of another `scheme` can stand in the same checkpoint as those of `layout`."""
    n, k = 1024, 1024 * max(1, scheme.group_size)  # any layout holds such a weight, if it holds the scheme at all
    mixing: list[Layout] = [] if layout.group is None else [load(LAYOUTS, "layout", name) for name in LAYOUTS]
    for other in sorted((each for each in mixing if each.method == layout.method), key=lambda each: each is not layout):
        if not other.reject(scheme, n, k, "BF16"):
            return other
    raise InputError(
        f"a checkpoint in layout {layout.name} cannot hold weights of scheme {scheme.name}",
        where=f"recipe {recipe}",
        next="choose another scheme for this rule, or another layout",
    )


def natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def unquantized(copied: Iterable[tuple[str, str]], family: Family) -> tuple[str, ...]:
    """Of (module, role): every Linear in high precision by its full name; `lm_head` also where it is tied.

    Where all members of a merged linear stay, its own name too: several engines look for no other. So of a layer's experts,
    which stay together or not at all: engines hold them in one module, and ask for that.
    """
    found = {module for module, role in copied if role in (LINEAR, ROUTER, HEAD)}
    experts = {module[: match.end(1)] for module in found if (match := _EXPERTS.match(module))}
    merged = {
        f"{prefix}.{whole}"
        for prefix in {module.rpartition(".")[0] for module in found}
        for whole, members in family.fused.items()
        if len(members) > 1 and all(f"{prefix}.{member}" in found for member in members)
    }
    return tuple(sorted(found | merged | experts | {"lm_head"}, key=natural))


def declared(
    treatments: Sequence[Treatment], treated: Mapping[str, int], ignored: Sequence[str], kv_cache: bool = False
) -> dict[str, Any]:
    """`quantization_config` of modules → place in `treatments`. kv_cache: whether the checkpoint holds scales of one.

    Where there is more than one, each group names its modules in full: a class name would come before the members of a
    merged module in SGLang's order of lookup, and after them in vLLM's. Experts are named as vLLM asks for them, too.
    """
    config, cache = _weights_config(treatments, treated, ignored), treatments[0].layout.kv_cache
    assert not kv_cache or cache is not None, "a layout without a place for its scales is refused"
    return cache.declare(config) if kv_cache and cache is not None else config


def _weights_config(
    treatments: Sequence[Treatment], treated: Mapping[str, int], ignored: Sequence[str]
) -> dict[str, Any]:
    used = sorted(set(treated.values())) or [0]
    first = treatments[used[0]]
    if first.layout.method == CT:
        ignored = [*ignored, *_asked(ignored)]
    if len({(treatments[place].scheme, treatments[place].layout.name) for place in used}) == 1:
        return first.layout.config(first.scheme, ignored)
    groups = []
    for place in used:
        treatment = treatments[place]
        assert treatment.layout.group is not None, "`_beside` lets only layouts mix that have groups"
        names = [module for module, at in treated.items() if at == place]
        entries = targets(names, treated) + targets(_asked(names), _asked(treated))
        groups.append(treatment.layout.group(treatment.scheme) | {"targets": entries})
    return ct_config(groups, ignored)


def targets(names: Sequence[str], others: Collection[str]) -> list[str]:
    """`names` as few entries: a pattern of the whole name where it holds of all of `others` of that form, else names."""
    forms: dict[str, list[str]] = {}
    for name in names:
        forms.setdefault(_form(name), []).append(name)
    counts = Counter(_form(name) for name in others)
    entries: list[str] = []
    for form, members in forms.items():
        whole = counts[form] == len(members)
        entries += [f"re:^{form}$"] if whole and len(members) > 1 else sorted(members, key=natural)
    return entries


def _asked(names: Iterable[str]) -> list[str]:
    """What vLLM calls experts named w1, w2 and w3 when it looks up the scheme of a layer's: it asks for those of expert 0.

    What it does not find is left in high precision without a word; what it finds is loaded as quantized.
    """
    parts = (name.rpartition(".") for name in names)
    return [f"{path}.{ASKED[leaf]}" for path, _, leaf in parts if path.endswith(".experts.0") and leaf in ASKED]


def _form(name: str) -> str:
    return r"\d+".join(re.escape(text) for text in re.split(r"\d+", name))
