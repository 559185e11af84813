"""The plan: what becomes of every tensor, known from headers alone, before any weight is read.

Every source tensor has exactly one action (a 3-D expert parameter one for each linear inside it). A linear that the
layout cannot hold is an error, not a copy, unless the recipe ignores it. Output sizes are exact, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from quantpub import advice
from quantpub.checkpoint import INDEX, Checkpoint, Slice
from quantpub.errors import InputError, closest
from quantpub.families import FAMILIES, LINEAR, REFUSED, Family
from quantpub.files import sha256_json
from quantpub.gemms import EXPERT, fuse
from quantpub.layouts.base import Layout, Spec
from quantpub.recipe import Recipe, ignores
from quantpub.scheme import Scheme
from quantpub.shards import build_header, tensor_bytes
from quantpub.targets import unloadable
from quantpub.treatments import Treatment, declared, make_treatments, unquantized

QUANTIZE, COPY = "quantize", "copy"
REJECTED = "rejected: "  # begins the reason of an action that no plan may be run with
FLOATS = ("BF16", "F16", "F32")
TP_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Action:
    """What happens to one tensor. reason: why it is copied. outputs: output tensor → (dtype, shape).

    treatment: of a quantized tensor, its place in the plan's treatments.
    """

    kind: str
    part: Slice
    role: str
    outputs: Spec
    reason: str | None = None
    treatment: int | None = None

    @property
    def module(self) -> str:
        return self.part.name.removesuffix(".weight")

    def as_json(self) -> dict[str, Any]:
        info = self.part.info
        return {
            "tensor": self.part.source,
            "as": self.part.name,
            "shard": self.part.shard,
            "dtype": info.dtype,
            "shape": list(info.shape),
            "role": self.role,
            "action": self.kind,
            "reason": self.reason,
            "treatment": self.treatment,
            "outputs": {name: [dtype, list(shape)] for name, (dtype, shape) in self.outputs.items()},
        }


@dataclass(frozen=True)
class Plan:
    """shards: file → actions in file order. rejections: tensor → reason; a plan that has any cannot be run.

    treatments: the recipe's own first, then one for each of its rules.
    """

    recipe: Recipe
    treatments: tuple[Treatment, ...]
    checkpoint: Checkpoint
    family: Family
    shards: dict[str, tuple[Action, ...]]
    ignored: tuple[str, ...]
    rejections: dict[str, str]

    @property
    def scheme(self) -> Scheme:
        return self.treatments[0].scheme

    @property
    def layout(self) -> Layout:
        return self.treatments[0].layout

    @property
    def actions(self) -> list[Action]:
        return [action for actions in self.shards.values() for action in actions]

    def outputs(self, shard: str) -> Spec:
        return {name: spec for action in self.shards[shard] for name, spec in action.outputs.items()}

    def shard_bytes(self, shard: str) -> int:
        header, infos = build_header(self.outputs(shard), self.metadata)
        return max((info.end for info in infos.values()), default=len(header))

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The entries of every shard's safetensors header: loaders merge the headers, so each tells of the whole model."""
        modules = {
            a.module: (self.treatments[a.treatment].scheme, (a.part.info.shape[0], a.part.info.shape[1]))
            for a in self.actions
            if a.treatment is not None
        }
        copied = [action.part.name for action in self.actions if action.kind == COPY]
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
        return sha256_json([weights, companions, config, self.recipe.digest(), self.layout.name])

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
    rejections |= mixed(shards, family)
    plan = Plan(recipe, treatments, checkpoint, family, shards, _ignored(shards, family), rejections)
    _check_outputs_once(plan)
    rejections |= _unserved(plan)
    return plan


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
    if reason := _reject(part, scheme, layout) or _no_engine(module, treatments[place], recipe, treatments[0].layout):
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
    if (act := scheme.act) and (act.global_scale or not act.dynamic):
        return f"{scheme.name} needs calibrated scales of activations, which this version cannot find"
    n, k = part.info.shape
    return layout.reject(scheme, n, k, part.info.dtype) if n and k else f"shape {[n, k]} is empty"


def unmatched(plan: Plan) -> list[str]:
    """Entries of the recipe's `ignore` that name nothing here; a tied head is no tensor, so `lm_head` may."""
    modules = [action.module for action in plan.actions]
    entries = [entry for entry in plan.recipe.ignore if entry != "lm_head"]
    used = {action.treatment for action in plan.actions}
    idle = [rule.match for place, rule in enumerate(plan.recipe.rules, 1) if place not in used]
    return [entry for entry in entries if not any(ignores((entry,), module) for module in modules)] + idle


def _ignored(shards: Mapping[str, Sequence[Action]], family: Family) -> tuple[str, ...]:
    return unquantized(((a.module, a.role) for actions in shards.values() for a in actions if a.kind == COPY), family)


def _check_outputs_once(plan: Plan) -> None:
    counts = Counter(name for action in plan.actions for name in action.outputs)
    if doubled := [name for name, count in counts.items() if count > 1]:
        raise InputError(
            f"tensor {doubled[0]} would be written twice",
            where=plan.checkpoint.source.label,
            next="the checkpoint holds the same tensor in two shards",
        )


def _no_engine(module: str, treatment: Treatment, recipe: Recipe, chosen: Layout) -> str | None:
    """Why none of the engines in question would load the weight."""
    experts = EXPERT.search(f"{module}.") is not None
    names = advice.in_question(recipe.engines, chosen.name)
    reasons = [unloadable(engine, treatment.layout.name, treatment.scheme.name, experts) for engine in names]
    return reasons[0] if reasons and all(reasons) else None


def engines_of(plan: Plan) -> dict[str, str | None]:
    """Engine → why it cannot load this plan's checkpoint, or None.

    In question are the engines that the recipe gives the layout; of a layout that it gives none, all.
    """
    shapes, treated = _quantized(plan)
    multiples = {module: t.layout.tp_multiple(t.scheme) or (1, 1) for module, t in treated.items()}
    apart = advice.unmerged(shapes, {module: rows for module, (rows, _) in multiples.items()}, plan.family)
    names, found = advice.in_question(plan.recipe.engines, plan.layout.name), merged_weights(plan)
    return {engine: advice.refusal(engine, found, apart) for engine in names}


def merged_weights(plan: Plan) -> list[advice.Weight]:
    """The quantized weights as engines multiply by them."""
    shapes, treated = _quantized(plan)
    return advice.weights(shapes, {module: (t.scheme, t.layout.name) for module, t in treated.items()}, plan.family)


def _quantized(plan: Plan) -> tuple[dict[str, tuple[int, int]], dict[str, Treatment]]:
    """module → (n, k), and module → its treatment, of every quantized weight."""
    actions = [(a, a.treatment) for a in plan.actions if a.treatment is not None]
    shapes = {a.module: (a.part.info.shape[0], a.part.info.shape[1]) for a, _ in actions}
    return shapes, {a.module: plan.treatments[place] for a, place in actions}


def _unserved(plan: Plan) -> dict[str, str]:
    """tensor → reason, where no engine in question loads the checkpoint though each weight alone has one that would."""
    refusals = list(engines_of(plan).values())
    if plan.rejections or not refusals or not all(refusals):
        return {}
    return {a.part.name: str(refusals[0]) for a in plan.actions if a.kind == QUANTIZE}


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


def require_runnable(plan: Plan) -> None:
    """Errors: InputError with the first rejection and how many there are."""
    if plan.rejections:
        tensor, reason = next(iter(plan.rejections.items()))
        more = f" (and {len(plan.rejections) - 1} more; `quantpub plan` lists them)" if len(plan.rejections) > 1 else ""
        raise InputError(
            f"{reason}{more}", where=tensor, next="add the module to `ignore` in the recipe, or choose another recipe"
        )


def index_json(plan: Plan) -> dict[str, Any]:
    """model.safetensors.index.json of the artifact."""
    weight_map = {name: shard for shard in plan.shards for name in plan.outputs(shard)}
    total = sum(tensor_bytes(dtype, shape) for shard in plan.shards for dtype, shape in plan.outputs(shard).values())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def artifact_config(plan: Plan) -> dict[str, Any]:
    """The source's config.json with `quantization_config`, and without the local path transformers writes there."""
    return public_config(plan.checkpoint) | {"quantization_config": quantization_config(plan)}


def quantization_config(plan: Plan) -> dict[str, Any]:
    treated = {action.module: action.treatment for action in plan.actions if action.treatment is not None}
    return declared(plan.treatments, treated, plan.ignored)


def config_files(plan: Plan) -> dict[str, dict[str, Any]]:
    """The JSON files that the layouts want beside config.json."""
    config = quantization_config(plan)
    return {name: value for t in plan.treatments for name, value in t.layout.files(config).items()}


def public_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The source's configuration without the local path that transformers writes there."""
    return {
        key: value for key, value in checkpoint.config.items() if key not in ("_name_or_path", "quantization_config")
    }


def tensor_parallel(plan: Plan) -> dict[int, str | None]:
    """Size → the first reason why an engine cannot load it so, or None.

    What an engine merges is cut member by member; on one GPU a member's rows must be whole blocks where others follow.
    """
    quantized = [action for action in plan.actions if action.kind == QUANTIZE]
    sets = fuse({a.module: (a.part.info.shape[0], a.part.info.shape[1]) for a in quantized}, plan.family).values()
    followed = {member for members in sets for member in members[:-1]}
    reasons = {}
    for size in TP_SIZES:
        found = (_cut(plan, action, size, action.module in followed) for action in quantized)
        reasons[size] = next((reason for reason in found if reason), None)
    return reasons


def _cut(plan: Plan, action: Action, size: int, followed: bool) -> str | None:
    assert action.treatment is not None
    treatment, (n, k) = plan.treatments[action.treatment], action.part.info.shape
    multiples = treatment.layout.tp_multiple(treatment.scheme)
    if multiples is None:
        return None if size == 1 else f"no engine cuts layout {treatment.layout.name}"
    cut = plan.family.cut(action.module)
    side, multiple, name = (k, multiples[1], "in") if cut == "in" else (n, multiples[0], "out")
    parts = size if cut else 1
    if (parts > 1 or (name == "out" and followed)) and (side % parts or side // parts % multiple):
        return f"{action.module}: {side} {name}_features / {parts} is not a multiple of {multiple}"
    return None


def summary(plan: Plan) -> dict[str, Any]:
    """The plan's figures: counts, exact bytes, bits per weight, estimated peak memory, tensor parallelism, rejections."""
    quantized = [action for action in plan.actions if action.kind == QUANTIZE]
    weights = sum(math.prod(action.part.info.shape) for action in quantized)
    packed = sum(tensor_bytes(*spec) for action in quantized for spec in action.outputs.values())
    parameters = sum(math.prod(action.part.info.shape) for action in plan.actions)
    output = sum(plan.shard_bytes(shard) for shard in plan.shards)
    merged, refusals = merged_weights(plan), engines_of(plan)
    engines = [engine for engine, reason in refusals.items() if reason is None]
    used = [plan.treatments[place] for place in sorted({a.treatment for a in quantized if a.treatment is not None})]
    return {
        "model": plan.checkpoint.source.identity(),
        "recipe": plan.recipe.name,
        "scheme": plan.scheme.name,
        "layout": plan.layout.name,
        "schemes": list(dict.fromkeys(treatment.scheme.name for treatment in used)),
        "engines": {engine: reason or "ok" for engine, reason in refusals.items()},
        "shards": len(plan.shards),
        "tensors": len(plan.actions),
        "quantized": len(quantized),
        "copied": dict(sorted(Counter(a.role for a in plan.actions if a.kind == COPY).items())),
        "parameters": parameters,
        "quantized_parameters": weights,
        "source_bytes": sum(plan.checkpoint.source.files[shard] for shard in plan.shards),
        "output_bytes": output,
        "bits_per_quantized_weight": round(8 * packed / weights, 4) if weights else None,
        "bits_per_weight": round(8 * output / parameters, 4) if parameters else None,
        "peak_memory_bytes": peak_memory(plan),
        "tensor_parallel": {str(size): reason or "ok" for size, reason in tensor_parallel(plan).items()},
        "rejected": plan.rejections,
        "ignore_unmatched": unmatched(plan),
        "companions": list(plan.checkpoint.companions),
        "left_behind": [name for name in plan.checkpoint.left_behind if name != INDEX],
        "kernels": advice.kernels(merged, engines),
        "notes": advice.notes(advice.case(merged, [treatment.algorithm for treatment in used], engines)),
    }


WORKERS = min(8, len(os.sched_getaffinity(0)))  # tensors worked on at a time
INTERPRETER = 330 << 20  # Python with torch, safetensors headers and the threads' buffers, measured
QUEUES = 3 * (32 << 20)  # what may wait between reading, computing and writing


def peak_memory(plan: Plan) -> int:
    """Estimated peak of the whole process: the interpreter, the queues, and the tensors in work.

    Each tensor in work stands there as read, as codes (1 byte a weight) and packed; one more is being read.
    """
    largest = max((action.part.info.nbytes for action in plan.actions if action.kind == QUANTIZE), default=0)
    return INTERPRETER + QUEUES + 2 * (WORKERS + 1) * largest
