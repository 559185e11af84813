"""The plan: what becomes of every tensor, known from headers alone, before any weight is read.

Every source tensor has exactly one action (a 3-D expert parameter one for each linear inside it). A linear that the
layout cannot hold is an error, not a copy, unless the recipe ignores it. Output sizes are exact, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantpub.checkpoint import INDEX, Checkpoint, Slice
from quantpub.errors import InputError, closest
from quantpub.families import FAMILIES, HEAD, LINEAR, ROUTER, Family
from quantpub.files import sha256_json
from quantpub.layouts import LAYOUTS
from quantpub.layouts.base import Layout, Spec
from quantpub.recipe import Recipe
from quantpub.registry import load
from quantpub.scheme import Scheme
from quantpub.shards import build_header, tensor_bytes

QUANTIZE, COPY = "quantize", "copy"
FLOATS = ("BF16", "F16", "F32")
TP_SIZES = (1, 2, 4, 8)
ROW_PARALLEL = re.compile(r"\.(o_proj|down_proj|w2)$")  # their K is cut by tensor parallelism, the others' N


@dataclass(frozen=True)
class Action:
    """What happens to one tensor. reason: why it is copied. outputs: output tensor → (dtype, shape)."""

    kind: str
    part: Slice
    role: str
    outputs: Spec
    reason: str | None = None

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
            "outputs": {name: [dtype, list(shape)] for name, (dtype, shape) in self.outputs.items()},
        }


@dataclass(frozen=True)
class Plan:
    """shards: file → actions in file order. rejections: tensor → reason; a plan that has any cannot be run."""

    recipe: Recipe
    scheme: Scheme
    layout: Layout
    checkpoint: Checkpoint
    family: Family
    shards: dict[str, tuple[Action, ...]]
    ignored: tuple[str, ...]
    rejections: dict[str, str]

    @property
    def actions(self) -> list[Action]:
        return [action for actions in self.shards.values() for action in actions]

    def outputs(self, shard: str) -> Spec:
        return {name: spec for action in self.shards[shard] for name, spec in action.outputs.items()}

    def shard_bytes(self, shard: str) -> int:
        header, infos = build_header(self.outputs(shard), self.metadata)
        return max((info.end for info in infos.values()), default=len(header))

    @property
    def metadata(self) -> dict[str, str]:
        return {"format": "pt", **self.layout.metadata}

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
    layout: Layout = load(LAYOUTS, "layout", layout_name)
    family, scheme = _family(checkpoint), recipe.resolved_scheme()
    rejections: dict[str, str] = {}
    shards = {
        shard: tuple(
            _action(part, family, scheme, layout, recipe, rejections) for part in checkpoint.slices(shard, family)
        )
        for shard in checkpoint.shards
    }
    plan = Plan(recipe, scheme, layout, checkpoint, family, shards, _ignored(shards), rejections)
    _check_outputs_once(plan)
    return plan


def _family(checkpoint: Checkpoint) -> Family:
    model_type = checkpoint.config.get("model_type")
    if model_type not in FAMILIES:
        raise InputError(
            f"unknown architecture {model_type!r}",
            where=checkpoint.source.where("config.json"),
            next=closest(str(model_type), FAMILIES),
        )
    return FAMILIES[model_type]


def _action(
    part: Slice, family: Family, scheme: Scheme, layout: Layout, recipe: Recipe, rejections: dict[str, str]
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
    if reason := _reject(part, scheme, layout):
        rejections[part.name] = reason
        return Action(COPY, part, role, copied, f"rejected: {reason}")
    module, (n, k) = part.name.removesuffix(".weight"), info.shape
    outputs = {f"{module}.{suffix}": spec for suffix, spec in layout.spec(scheme, n, k, info.dtype).items()}
    return Action(QUANTIZE, part, role, outputs)


def _reject(part: Slice, scheme: Scheme, layout: Layout) -> str | None:
    if len(part.info.shape) != 2:
        return f"shape {list(part.info.shape)} is not a matrix"
    if part.info.dtype not in FLOATS:
        return f"dtype {part.info.dtype} is not one of {', '.join(FLOATS)}"
    n, k = part.info.shape
    return layout.reject(scheme, n, k) if n and k else f"shape {[n, k]} is empty"


def ignores(entries: Sequence[str], module: str) -> bool:
    """An entry is a module's full name, or `re:` and a pattern of the whole name."""
    return any(re.fullmatch(entry[3:], module) if entry.startswith("re:") else entry == module for entry in entries)


def unmatched(plan: Plan) -> list[str]:
    """Entries of the recipe's `ignore` that name nothing here; a tied head is no tensor, so `lm_head` may."""
    modules = [action.module for action in plan.actions]
    entries = [entry for entry in plan.recipe.ignore if entry != "lm_head"]
    return [entry for entry in entries if not any(ignores((entry,), module) for module in modules)]


def natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _ignored(shards: Mapping[str, Sequence[Action]]) -> tuple[str, ...]:
    """Every Linear that stays in high precision, by its full name; `lm_head` also where it is tied to the embedding."""
    unquantized = {
        action.module
        for actions in shards.values()
        for action in actions
        if action.kind == COPY and action.role in (LINEAR, ROUTER, HEAD)
    }
    return tuple(sorted(unquantized | {"lm_head"}, key=natural))


def _check_outputs_once(plan: Plan) -> None:
    counts = Counter(name for action in plan.actions for name in action.outputs)
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


def index_json(plan: Plan) -> dict[str, Any]:
    """model.safetensors.index.json of the artifact."""
    weight_map = {name: shard for shard in plan.shards for name in plan.outputs(shard)}
    total = sum(tensor_bytes(dtype, shape) for shard in plan.shards for dtype, shape in plan.outputs(shard).values())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def artifact_config(plan: Plan) -> dict[str, Any]:
    """The source's config.json with `quantization_config`, and without the local path transformers writes there."""
    return public_config(plan.checkpoint) | {"quantization_config": plan.layout.config(plan.scheme, plan.ignored)}


def public_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The source's configuration without the local path that transformers writes there."""
    return {
        key: value for key, value in checkpoint.config.items() if key not in ("_name_or_path", "quantization_config")
    }


def tensor_parallel(plan: Plan) -> dict[int, str | None]:
    """Size → the first reason why the layout cannot be cut so, or None."""
    n_multiple, k_multiple = plan.layout.tp_multiple(plan.scheme)
    quantized = [action for action in plan.actions if action.kind == QUANTIZE]

    def reason(size: int) -> str | None:
        for action in quantized:
            n, k = action.part.info.shape
            side, multiple, name = (
                (k, k_multiple, "in") if ROW_PARALLEL.search(action.module) else (n, n_multiple, "out")
            )
            if side % size or side // size % multiple:
                return f"{action.module}: {side} {name}_features / {size} is not a multiple of {multiple}"
        return None

    return {size: reason(size) for size in TP_SIZES}


def summary(plan: Plan) -> dict[str, Any]:
    """The plan's figures: counts, exact bytes, bits per weight, estimated peak memory, tensor parallelism, rejections."""
    quantized = [action for action in plan.actions if action.kind == QUANTIZE]
    weights = sum(math.prod(action.part.info.shape) for action in quantized)
    packed = sum(tensor_bytes(*spec) for action in quantized for spec in action.outputs.values())
    parameters = sum(math.prod(action.part.info.shape) for action in plan.actions)
    output = sum(plan.shard_bytes(shard) for shard in plan.shards)
    return {
        "model": plan.checkpoint.source.identity(),
        "recipe": plan.recipe.name,
        "scheme": plan.scheme.name,
        "layout": plan.layout.name,
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
