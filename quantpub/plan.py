"""The plan: what becomes of every tensor, known from headers alone, before any weight is read.

Every source tensor has exactly one action (a 3-D expert parameter one for each linear inside it). A linear that the
layout cannot hold is an error, not a copy, unless the recipe ignores it. Output sizes are exact, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from quantpub.actions import COPY, QUANTIZE, REJECTED, Action
from quantpub.algorithms import ADOPTED, ALGORITHMS
from quantpub.checkpoint import Checkpoint, Slice, public_config
from quantpub.errors import InputError, closest
from quantpub.families import FAMILIES, LINEAR, REFUSED, Family
from quantpub.files import sha256_json
from quantpub.folds import Fold, folds, useful
from quantpub.gemms import EXPERT, fuse
from quantpub.layouts.base import Layout, Spec
from quantpub.plan_calibrated import smoothed, unreached, unsmoothed, with_kv
from quantpub.plan_engines import no_engine, unserved
from quantpub.recipe import Recipe, ignores
from quantpub.registry import load
from quantpub.scheme import Scheme
from quantpub.shards import build_header
from quantpub.transforms import TRANSFORMS
from quantpub.treatments import Treatment, make_treatments, unquantized

FLOATS = ("BF16", "F16", "F32")
TP_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Plan:
    """shards: file → actions in file order. rejections: tensor → reason; a plan that has any cannot be run.

    treatments: the recipe's own first, then one for each of its rules. calibration: the key of the statistics that it is
    carried out with, empty where no data is used. origin: of weights that were quantized before, what run.json says of
    the model they were made from.
    """

    recipe: Recipe
    treatments: tuple[Treatment, ...]
    checkpoint: Checkpoint
    family: Family
    shards: dict[str, tuple[Action, ...]]
    ignored: tuple[str, ...]
    rejections: dict[str, str]
    calibration: str = ""
    origin: Mapping[str, Any] | None = None

    @property
    def scheme(self) -> Scheme:
        return self.treatments[0].scheme

    @property
    def layout(self) -> Layout:
        return self.treatments[0].layout

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """module → (n, k) of every quantized weight."""
        found = ((a.module, a.part.info.shape) for a in self.actions if a.treatment is not None)
        return {module: (shape[0], shape[1]) for module, shape in found}

    @cached_property
    def treated(self) -> dict[str, Treatment]:
        """module → its treatment, of every quantized weight."""
        return {a.module: self.treatments[a.treatment] for a in self.actions if a.treatment is not None}

    @property
    def actions(self) -> list[Action]:
        return [action for actions in self.shards.values() for action in actions]

    @cached_property
    def calibrates(self) -> frozenset[str]:
        """What must be observed before it can be run; empty: no data is needed.

        inputs: largest magnitudes of activations; kv: those of keys and values; hessian: an algorithm wants Hessians of
        inputs; transform: what the recipe's transform looks at.
        """
        used = [self.treatments[place] for place in {a.treatment for a in self.actions if a.treatment is not None}]
        names = {str(t.algorithm["name"]) for t in used} - {ADOPTED}
        needs = {need for name in names for need in load(ALGORITHMS, "algorithm", name).needs}
        found = {
            "inputs": any(t.scheme.act is not None and t.scheme.act.calibrated for t in used),
            "kv": bool(self.kv),
            "hessian": "hessian" in needs,
            "transform": self.recipe.transform is not None,
        }
        return frozenset(name for name, needed in found.items() if needed)

    @cached_property
    def kv(self) -> dict[str, Spec]:
        """module → the scales of the KV cache that this layout writes along with it."""
        return {action.module: action.kv for action in self.actions if action.kv}

    @cached_property
    def rounded(self) -> frozenset[str]:
        """The linears whose inputs the recipe's transform prepares."""
        if self.recipe.transform is None:
            return frozenset()
        reject = load(TRANSFORMS, "transform", self.recipe.transform["name"]).reject
        return frozenset(module for module, t in self.treated.items() if not reject(t.scheme))

    @cached_property
    def folds(self) -> tuple[Fold, ...]:
        """Where the recipe's transform scales channels."""
        config = self.checkpoint.config
        shapes = {a.part.name: a.part.info.shape for a in self.actions} if self.rounded else {}
        found = folds(str(config.get("model_type")), config, shapes)
        return useful(found, self.rounded, self.recipe.kv_cache is not None)

    def outputs(self, shard: str) -> Spec:
        return {name: spec for a in self.shards[shard] for name, spec in (a.outputs | a.kv).items()}

    def shard_bytes(self, shard: str) -> int:
        header, infos = build_header(self.outputs(shard), self.metadata)
        return max((info.end for info in infos.values()), default=len(header))

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The entries of every shard's safetensors header: loaders merge the headers, so each tells of the whole model."""
        modules = {module: (t.scheme, self.shapes[module]) for module, t in self.treated.items()}
        copied = [action.part.name for action in self.actions if action.kind != QUANTIZE]
        return {"format": "pt", **self.layout.metadata(modules, copied)}

    def digest(self) -> str:
        """Who this run is: source, recipe and layout. A directory belongs to one digest.

        Weights enter by size and sampled blocks (on a Hub by their sha256): cheap enough to ask before every run. What
        of a finished shard is kept is decided by the sha256 of the whole source shard (`Destination`).
        """
        source = self.checkpoint.source
        weights = {shard: source.fingerprint(shard) for shard in self.shards}
        companions = {name: hashlib.sha256(source.read(name)).hexdigest() for name in self.checkpoint.companions}
        config = public_config(self.checkpoint)
        data = [self.calibration] if self.calibration else []
        return sha256_json([weights, companions, config, self.recipe.digest(), self.layout.name, *data])

    @property
    def unsealed(self) -> bool:
        """Whether nothing states what its source's shards were: another tool's checkpoint in a folder, which is repacked."""
        return self.origin is not None and "weights" not in self.origin and self.origin["kind"] == "local"

    def source_digests(self, shard: str) -> tuple[str, ...]:
        """What a journal may say of a source shard that is as it was: the sha256 of the whole file, read now.

        Where nothing states that, hashing would only cost: while it runs, the file's state stands for it; in the finished
        journal its fingerprint, the same of every copy.
        """
        source = self.checkpoint.source
        return (source.state(shard), source.fingerprint(shard)) if self.unsealed else (source.sha256(shard),)

    def as_jsonl(self) -> bytes:
        return "".join(json.dumps(action.as_json()) + "\n" for action in self.actions).encode()


def make_plan(checkpoint: Checkpoint, recipe: Recipe, layout_name: str) -> Plan:
    """The plan for one layout. Errors: InputError for an unknown architecture or a tensor no one accounts for."""
    treatments, family = make_treatments(recipe, layout_name), _family(checkpoint)
    rejections: dict[str, str] = {}
    shards = {
        shard: tuple(_action(part, family, treatments, recipe, rejections) for part in checkpoint.slices(shard, family))
        for shard in checkpoint.shards
    }
    if recipe.kv_cache:
        shards = with_kv(shards, checkpoint, family, treatments[0].layout, rejections)
    rejections |= mixed(shards, family)
    plan = Plan(recipe, treatments, checkpoint, family, shards, _ignored(shards, family), rejections)
    _check_outputs_once(plan)
    rejections |= unserved(plan)
    rejections |= unsmoothed(plan)
    rejections |= unreached(plan)
    return replace(plan, shards={shard: smoothed(plan, shard) for shard in shards}) if plan.folds else plan


def mixed(shards: Mapping[str, Sequence[Action]], family: Family) -> dict[str, str]:
    """Rule 0 of every engine: the linears that it merges have one treatment. tensor → reason where they have not.

    q/k/v and gate/up are merged (the family's table), and all experts of a layer run in one kernel.
    """
    actions = {
        a.module: a for shard in shards.values() for a in shard if a.role == LINEAR and len(a.part.info.shape) == 2
    }
    shapes = {module: (a.part.info.shape[0], a.part.info.shape[1]) for module, a in actions.items()}
    sets = {module: members for module, members in fuse(shapes, family).items() if len(members) > 1}
    for module in actions:
        if found := EXPERT.search(module):
            layer = module[: found.start()] + ".experts"
            sets[layer] = (*sets.get(layer, ()), module)
    problems = {}
    for name, members in sets.items():
        if any((actions[member].reason or "").startswith(REJECTED) for member in members):
            continue  # that has a reason of its own
        if len({actions[member].treatment for member in members}) > 1:
            odd = next(m for m in members if actions[m].treatment != actions[members[0]].treatment)
            problems[actions[odd].part.name] = (
                f"it is treated otherwise than {members[0]}, which engines merge into {name}"
            )
    return problems


def _family(checkpoint: Checkpoint) -> Family:
    model_type = checkpoint.config.get("model_type")
    if model_type in REFUSED:
        raise InputError(
            f"models of type {model_type} are not quantized: {REFUSED[model_type]}",
            where=checkpoint.source.where("config.json"),
        )
    if model_type not in FAMILIES:
        raise InputError(
            f"unknown architecture {model_type!r}",
            where=checkpoint.source.where("config.json"),
            next=closest(str(model_type), FAMILIES),
        )
    return FAMILIES[model_type]


def _action(
    part: Slice, family: Family, treatments: Sequence[Treatment], recipe: Recipe, rejections: dict[str, str]
) -> Action:
    role, info = family.role(part.name), part.info
    if role is None:
        raise InputError(
            f"the {family.name} family has no tensor of this name",
            where=part.source,
            next="the architecture differs from what its config says; nothing is skipped silently",
        )
    copied: Spec = {part.name: (info.dtype, info.shape)}
    if role != LINEAR:
        return Action(COPY, part, role, copied, f"{role} stays in {info.dtype}")
    if ignores(recipe.ignore, part.name.removesuffix(".weight")):
        return Action(COPY, part, role, copied, "the recipe ignores it")
    module = part.name.removesuffix(".weight")
    place = recipe.rule_for(module) + 1
    if (why := family.kept(module)) and not place:
        return Action(COPY, part, role, copied, why)
    scheme, layout = treatments[place].scheme, treatments[place].layout
    if reason := _reject(part, scheme, layout) or no_engine(module, treatments[place], recipe, treatments[0].layout):
        rejections[part.name] = reason
        return Action(COPY, part, role, copied, f"{REJECTED}{reason}")
    n, k = info.shape
    outputs = {f"{module}.{suffix}": spec for suffix, spec in layout.spec(scheme, n, k, info.dtype).items()}
    return Action(QUANTIZE, part, role, outputs, treatment=place)


def _reject(part: Slice, scheme: Scheme, layout: Layout) -> str | None:
    if len(part.info.shape) != 2:
        return f"shape {list(part.info.shape)} is not a matrix"
    if part.info.dtype not in FLOATS:
        return f"dtype {part.info.dtype} is not one of {', '.join(FLOATS)}"
    n, k = part.info.shape
    return layout.reject(scheme, n, k, part.info.dtype) if n and k else f"shape {[n, k]} is empty"


def _ignored(shards: Mapping[str, Sequence[Action]], family: Family) -> tuple[str, ...]:
    return unquantized(
        ((a.module, a.role) for actions in shards.values() for a in actions if a.kind != QUANTIZE), family
    )


def _check_outputs_once(plan: Plan) -> None:
    counts = Counter(name for action in plan.actions for name in (*action.outputs, *action.kv))
    if doubled := [name for name, count in counts.items() if count > 1]:
        raise InputError(
            f"tensor {doubled[0]} would be written twice",
            where=plan.checkpoint.source.label,
            next="the checkpoint holds the same tensor in two shards",
        )


def require_runnable(plan: Plan) -> None:
    """Errors: InputError with the first rejection and how many there are."""
    if plan.rejections:
        tensor, reason = next(iter(plan.rejections.items()))
        more = f" (and {len(plan.rejections) - 1} more; `quantpub plan` lists them)" if len(plan.rejections) > 1 else ""
        raise InputError(
            f"{reason}{more}", where=tensor, next="add the module to `ignore` in the recipe, or choose another recipe"
        )
