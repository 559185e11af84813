"""Recipes: one YAML file says scheme, algorithm, what stays in high precision, each engine's layout, and the gate.

`./recipes/NAME.yaml` of the user's own folder is looked up first, then the recipes that come with quantpub. A path to a
YAML file works too. Unknown keys are errors: a misspelt knob must not be a default in disguise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from quantpub.algorithms import ADOPTED, ALGORITHMS
from quantpub.errors import InputError, QuantpubError, UsageError, closest
from quantpub.files import sha256_json
from quantpub.layouts import KERNEL_LAYOUTS, LAYOUTS
from quantpub.recipe_files import recipe_files
from quantpub.registry import load
from quantpub.scheme import WHOLE, Scheme, preset
from quantpub.targets import TARGETS, unloadable
from quantpub.transforms import TRANSFORMS
from quantpub.workloads import WORKLOADS, parse


def _known_scheme(value: str) -> str:
    preset(value)
    return value


def _valid_pattern(entry: str) -> str:
    try:
        re.compile(entry.removeprefix("re:") if entry.startswith("re:") else "")
    except re.error as error:
        raise ValueError(f"{entry!r} is not a valid pattern: {error}") from None
    return entry


def _sensible_group(value: int | None) -> int | None:
    if value is not None and value != WHOLE and value < 1:
        raise ValueError(f"group_size is a number of columns, or {WHOLE} for whole rows, not {value}")
    return value


def _known_algorithm(value: dict[str, Any] | None) -> dict[str, Any] | None:
    if value is not None and str(value.get("name")) not in (*ALGORITHMS, ADOPTED):
        raise ValueError(f"unknown algorithm {value.get('name')!r}: {closest(str(value.get('name')), ALGORITHMS)}")
    return value


def _known_transform(value: dict[str, Any] | None) -> dict[str, Any] | None:
    if value is not None and str(value.get("name")) not in TRANSFORMS:
        raise ValueError(f"unknown transform {value.get('name')!r}: {closest(str(value.get('name')), TRANSFORMS)}")
    return value


def _known_workload(value: str | None) -> str | None:
    if value is not None:
        parse(value)
    return value


SchemeName = Annotated[str, AfterValidator(_known_scheme)]
Pattern = Annotated[str, AfterValidator(_valid_pattern)]
GroupSize = Annotated[StrictInt | None, AfterValidator(_sensible_group)]


class Gate(BaseModel):
    """What an artifact must show before it is published."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    workload: Annotated[str | None, AfterValidator(_known_workload)] = None
    min_speedup: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_kl: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="nats per token to the base model"
    )

    @model_validator(mode="after")
    def _whole(self) -> Gate:
        if self.min_speedup is not None and self.workload is None:
            raise ValueError(f"min_speedup {self.min_speedup} needs a workload beside it: {', '.join(WORKLOADS)}")
        return self


class Calibration(BaseModel):
    """What a recipe is calibrated with unless the command line says otherwise, and how much of it experts must see.

    data: a file (jsonl, txt, parquet), or a dataset id of the Hub with `@revision` and `:split`.
    min_expert_tokens: an expert that the router sent fewer tokens is an error. Experts that got few are shown others of
    their layer's tokens, so that their statistics are sound whatever the router does.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    data: str | None = None
    num_samples: StrictInt = Field(default=512, ge=1)
    max_seq_len: StrictInt = Field(default=2048, ge=2)
    seed: StrictInt = 0
    min_expert_tokens: StrictInt = Field(default=0, ge=0)


class Rule(BaseModel):
    """Another treatment for the linears that `match` names: a full module name, or `re:` and a pattern of the whole name."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    match: Pattern
    scheme: SchemeName
    group_size: GroupSize = None
    algorithm: Annotated[dict[str, Any] | None, AfterValidator(_known_algorithm)] = None

    def resolved_scheme(self) -> Scheme:
        return preset(self.scheme, self.group_size)


class Recipe(BaseModel):
    """A recipe file. `algorithm` holds the algorithm's name and its parameters; of `rules` the first that matches wins.

    transform: what is done to the model beforehand, without changing what it computes. kv_cache: fp8, with calibrated scales.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    description: str
    scheme: SchemeName
    group_size: GroupSize = None
    algorithm: Annotated[dict[str, Any], AfterValidator(_known_algorithm)]
    transform: Annotated[dict[str, Any] | None, AfterValidator(_known_transform)] = None
    kv_cache: Literal["fp8"] | None = None
    calibration: Calibration = Calibration()
    ignore: tuple[Pattern, ...] = ()
    rules: tuple[Rule, ...] = ()
    engines: dict[str, str] = Field(min_length=1)
    gate: Gate = Gate()

    @model_validator(mode="after")
    def _known_names(self) -> Recipe:
        for engine, layout in self.engines.items():
            if engine not in TARGETS:
                raise ValueError(f"unknown engine {engine!r}: {closest(engine, TARGETS)}")
            if layout not in LAYOUTS:
                raise ValueError(f"unknown layout {layout!r}: {closest(layout, LAYOUTS)}")
            if layout not in TARGETS[engine].loads:
                raise ValueError(f"{engine} does not load {layout}; it loads {', '.join(TARGETS[engine].loads)}")
            if TARGETS[engine].mixed and {rule.resolved_scheme() for rule in self.rules} - {self.resolved_scheme()}:
                raise ValueError(f"{engine} cannot have a recipe of several schemes: {TARGETS[engine].mixed}")
        return self

    def resolved_scheme(self) -> Scheme:
        return preset(self.scheme, self.group_size)

    def rule_for(self, module: str) -> int:
        """The place of the first rule that matches, or -1."""
        return next((i for i, rule in enumerate(self.rules) if ignores((rule.match,), module)), -1)

    def require_bindable(self) -> None:
        """Errors: InputError when the algorithm of the recipe or of a rule does not fit its scheme or parameters."""
        self.bind(self.algorithm, self.resolved_scheme())
        for rule in self.rules:
            self.bind(rule.algorithm or self.algorithm, rule.resolved_scheme())
        if self.transform is not None:
            from quantpub.smoothing import bound

            bound(self)

    def bind(self, chosen: Mapping[str, Any], scheme: Scheme) -> tuple[Any, Any]:
        """(the Algorithm, its params). Imports torch. Errors: InputError when a parameter is unknown or does not fit."""
        algorithm = load(ALGORITHMS, "algorithm", chosen["name"])
        given = {key: value for key, value in chosen.items() if key != "name"}
        known = {field.name for field in dataclasses.fields(algorithm.params)}
        for key in given:
            if key not in known:
                raise InputError(
                    f"algorithm {algorithm.name} has no parameter {key!r}",
                    where=f"recipe {self.name}",
                    next=closest(key, known) if known else "it has none",
                )
        if reason := algorithm.reject(scheme):
            raise InputError(reason, where=f"recipe {self.name}", next="choose another algorithm or scheme")
        try:
            return algorithm, TypeAdapter(algorithm.params).validate_python(given)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or algorithm.name
            raise InputError(
                f"{key}: {first['msg']}", where=f"recipe {self.name}", next="mend this parameter"
            ) from None

    def layouts(self, engines: list[str], layouts: list[str]) -> list[str]:
        """The layouts to write, each once: those asked for by name, and those of the engines (all of them by default)."""
        for engine in engines:
            if engine not in self.engines:
                reason = self._refused_by(engine)
                raise UsageError(
                    f"recipe {self.name} has no layout for engine {engine!r}{f': {reason}' if reason else ''}",
                    next=f"choose a recipe that has one, as {_recipes_for(engine)}"
                    if reason
                    else closest(engine, self.engines),
                )
        for layout in layouts:
            if layout in KERNEL_LAYOUTS:
                raise UsageError(
                    f"{layout} is what a kernel eats: engines make it when they load, and none reads it from disk",
                    next=f"name a layout on disk: {', '.join(LAYOUTS)}",
                )
            if layout not in LAYOUTS:
                raise UsageError(f"unknown layout {layout!r}", next=closest(layout, LAYOUTS))
        chosen = [*layouts, *(self.engines[engine] for engine in engines)]
        return list(dict.fromkeys(chosen or self.engines.values()))

    def _refused_by(self, engine: str) -> str | None:
        """Why an engine loads none of the recipe's layouts, where that is known."""
        if engine not in TARGETS:
            return None
        scheme, layouts = self.resolved_scheme().name, dict.fromkeys(self.engines.values())
        reasons = [unloadable(engine, layout, scheme) for layout in layouts]
        return f"{TARGETS[engine].summary}: {reasons[0]}" if all(reasons) else None

    def digest(self) -> str:
        return sha256_json(self.model_dump(mode="json"))

    def as_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def _recipes_for(engine: str) -> str:
    """Recipes that name the engine, as words."""
    own = []
    for name, path in recipe_files().items():
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError, AttributeError, TypeError):
            own += [name] if engine in yaml.safe_load(path.read_text("utf-8"))["engines"] else []
    return " or ".join(own[:4]) or "one of your own"


def ignores(entries: Sequence[str], module: str) -> bool:
    """An entry is a module's full name, or `re:` and a pattern of the whole name."""
    return any(re.fullmatch(entry[3:], module) if entry.startswith("re:") else entry == module for entry in entries)


def load_recipe(name: str) -> Recipe:
    """The recipe called `name`, or in the YAML file `name`. Errors: UsageError (unknown), InputError (not valid)."""
    known = recipe_files()
    path = Path(name) if name.endswith((".yaml", ".yml")) else known.get(name)
    if path is None or not path.is_file():
        raise UsageError(f"unknown recipe {name!r}", where=None, next=closest(name, known))
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
        if not isinstance(content, dict):
            raise InputError("a recipe is a mapping of keys to values", where=str(path))
        return Recipe(**{"name": path.stem, **content})
    except yaml.YAMLError as error:
        raise InputError(f"not valid YAML: {error!s:.120}", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 (byte {error.start})", where=str(path), next="save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"cannot be read: {(error.strerror or str(error)).lower()}", where=str(path)) from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "recipe"
        raise InputError(
            f"{key}: {first['msg'].removeprefix('Value error, ')}", where=str(path), next=_advice(key)
        ) from None
    except QuantpubError as error:
        raise InputError(error.what, where=str(path), next=error.next) from None


def _advice(key: str) -> str:
    return (
        "remove the key, or see the recipes that come with quantpub"
        if key not in Recipe.model_fields
        else "mend this line"
    )
