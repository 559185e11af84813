"""The plan of a repack: every tensor of a quantized checkpoint, and what it becomes in another layout. No weight is read.

A weight keeps its scheme where the layout holds it: then codes, scales and zeros come through bit for bit. Else a conversion
leads to a scheme that the layout holds (`pairs`); what that costs is found while it is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from quantpub.actions import COPY, QUANTIZE, SMOOTH, Action
from quantpub.artifact import META
from quantpub.checkpoint import NOT_COMPANIONS, Checkpoint, Slice, is_companion
from quantpub.conversions import routes
from quantpub.decode import Decoder
from quantpub.errors import InputError
from quantpub.kv_cache import LETTERS, letter_of
from quantpub.layouts import LAYOUTS
from quantpub.layouts.base import CT, Layout, Spec
from quantpub.opened import Opened
from quantpub.pairs import HOLDS, Conversion
from quantpub.plan import Plan
from quantpub.plan_engines import engines_of
from quantpub.registry import load
from quantpub.repack_recipe import repacked_recipe
from quantpub.scheme import Scheme
from quantpub.shards import TensorInfo, tensor_bytes
from quantpub.smoothing import Smoothing, smoothing_of
from quantpub.sources import front_matter
from quantpub.treatments import Treatment

BF16_ONLY = "is for models in bf16, and this one is in fp16"
QUANTIZATION = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Route:
    """How the weights of one treatment come to the new layout. conversion: None where they keep their scheme.

    dtype: what it rounds scales to, in safetensors' words; empty: they stay as they are.
    """

    layout: Layout
    scheme: Scheme
    conversion: Conversion | None
    dtype: str = ""


@dataclass(frozen=True)
class Repack:
    """plan: what is written. routes: by place of a treatment, in the old checkpoint and in the new."""

    opened: Opened
    plan: Plan
    routes: tuple[Route, ...]

    @property
    def decoder(self) -> Decoder:
        return self.opened.decoder

    @cached_property
    def kv_scales(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return self.decoder.kv_scales()

    @cached_property
    def smoothing(self) -> Smoothing | None:
        """Of one of ours what was folded into it."""
        return smoothing_of(self.opened.artifact, self.decoder) if self.opened.artifact else None

    @property
    def conversions(self) -> list[Conversion]:
        used = {action.treatment for action in self.plan.actions if action.treatment is not None}
        return [c for place in sorted(used) if (c := self.routes[place].conversion) is not None]


def make_repack(opened: Opened, layout_name: str) -> Repack:
    """Errors: InputError when the checkpoint does not bear reading, or the layout cannot hold its weights."""
    _require_sound(opened)
    layout: Layout = load(LAYOUTS, "layout", layout_name)
    decoder = opened.decoder
    found = _routes(layout, opened)
    treatments = tuple(
        Treatment(route.scheme, t.algorithm, route.layout) for t, route in zip(decoder.treatments, found, strict=True)
    )
    checkpoint = _checkpoint(opened)
    quantized = [line for line in decoder.actions if line["action"] == QUANTIZE]
    shards: dict[str, tuple[Action, ...]] = {
        shard: tuple(_action(opened, line, treatments, found) for line in decoder.actions if line["shard"] == shard)
        for shard in checkpoint.shards
    }
    plan = Plan(
        repacked_recipe(opened, treatments, {line["treatment"] for line in quantized}),
        treatments,
        checkpoint,
        decoder.family(),
        shards,
        decoder.ignored(),
        {},
        str(_run(opened).get("calibration", "")),
        _origin(opened),
    )
    _require_held(plan, opened)
    _require_engine(plan, opened)
    return Repack(opened, plan, found)


def _run(opened: Opened) -> dict[str, Any]:
    return opened.artifact.run() if opened.artifact else {}


def _require_sound(opened: Opened) -> None:
    """What cannot be read whole is not written anew. Errors: InputError."""
    held, advice = opened.held, "run `quantpub verify` on it; download or make it again"
    problems = [*held.problems]
    if opened.artifact is None:
        unreadable = opened.adopted.said("readable")
        problems += opened.adopted.said("tensors") or unreadable
        advice = "quantize again from the full-precision model" if problems == unreadable else advice
    else:
        opened.decoder.require_whole()
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InputError(f"{problems[0]}{more}", where=held.source.label, next=advice)
    if not opened.decoder.modules():
        raise InputError("no module of it is quantized", where=held.source.label, next=advice)


def _routes(layout: Layout, opened: Opened) -> tuple[Route, ...]:
    """One for each treatment. Errors: InputError, also when none would lead to the layout that was asked for."""
    dtypes: dict[int, set[str]] = {place: set() for place in range(len(opened.decoder.treatments))}
    for line in opened.decoder.actions:
        if line["action"] == QUANTIZE:
            dtypes[line["treatment"]].add(line["dtype"])
    found = tuple(_route(place, layout, opened, sorted(used)) for place, used in dtypes.items())
    if any(found[place].layout.name == layout.name for place, used in dtypes.items() if used):
        return found
    return tuple(_route(place, layout, opened, sorted(used), alone=True) for place, used in dtypes.items())


def _route(place: int, layout: Layout, opened: Opened, dtypes: Sequence[str], alone: bool = False) -> Route:
    """For weights of its scheme, of sides that every layout takes. alone: in no layout beside. Errors: InputError."""
    treatment = opened.decoder.treatments[place]
    scheme = treatment.scheme
    if not dtypes:  # of a rule that no weight has
        return Route(layout, scheme, None)
    reasons = []
    for conversion, target in [(None, scheme), *routes(scheme)]:
        dtype = _scales(conversion, opened.held.dtype)
        for held in [layout] if alone else _holders(layout, treatment.layout):
            if (reason := _refused(held, target, [dtype] if dtype else dtypes, opened.held.dtype)) is None:
                return Route(held, target, conversion, dtype)
            reasons.append(reason)
    others = [name for name, schemes in HOLDS.items() if scheme.name in schemes]
    advice = f"layouts that hold {scheme.name}: {', '.join(others)}" if others else "no layout that is written holds it"
    reason = next((reason for reason in reasons if reason.endswith(BF16_ONLY)), reasons[0])
    raise InputError(reason, where=opened.held.source.label, next=advice)


def _scales(conversion: Conversion | None, model: str) -> str:
    """The dtype that a conversion rounds scales to."""
    if conversion is None:
        return ""
    return model if conversion.dtype == "model" else conversion.dtype


def _holders(layout: Layout, present: Layout) -> list[Layout]:
    """The layout itself; beside it, in a checkpoint of several schemes, one of the same method, that of the weights first."""
    beside: list[Layout] = []
    if layout.group is not None and layout.method == CT:
        beside = [load(LAYOUTS, "layout", name) for name in LAYOUTS]
    return [
        layout,
        *(each for each in sorted(beside, key=lambda each: each.name != present.name) if _beside(each, layout)),
    ]


def _beside(other: Layout, layout: Layout) -> bool:
    return other.method == layout.method and other.group is not None and other.name != layout.name


def _refused(layout: Layout, scheme: Scheme, dtypes: Sequence[str], model: str) -> str | None:
    """dtypes: of scales. model: the model's own, in which its other tensors stand and engines compute."""
    n, k = 1024, 1024 * max(1, scheme.group_size)
    reasons = (layout.reject(scheme, n, k, dtype) for dtype in dtypes or ("BF16",))
    if reason := next((reason for reason in reasons if reason), None):
        return reason
    if model == "F16" and layout.reject(scheme, n, k, model):
        return f"{layout.name} {BF16_ONLY}"
    return None


def _checkpoint(opened: Opened) -> Checkpoint:
    held, source = opened.held, opened.held.source
    lines = [line["shard"] for line in opened.decoder.actions]
    shards = {shard: held.headers[shard][0] for shard in sorted(set(lines))}
    config = {key: value for key, value in held.config.items() if key not in QUANTIZATION}
    if isinstance(inner := config.get("text_config"), dict):
        config["text_config"] = {key: value for key, value in inner.items() if key not in QUANTIZATION}
    companions = tuple(name for name in source.files if is_companion(name))
    taken = {*companions, *shards, *NOT_COMPANIONS}
    left = tuple(name for name in source.files if name not in taken and not name.startswith(f"{META}/"))
    return Checkpoint(source, config, shards, companions, left)


def _action(opened: Opened, line: Mapping[str, Any], treatments: Sequence[Treatment], ways: Sequence[Route]) -> Action:
    dtype, (name, shape) = line["dtype"], (line["as"], tuple(line["shape"]))
    kv = _kv(opened, line, treatments[0].layout)
    if line["action"] != QUANTIZE:
        found = opened.held.info(name)
        part = Slice(name, line["tensor"], line["shard"], found)
        kind = SMOOTH if line["action"] == SMOOTH else COPY
        return Action(kind, part, line["role"], {name: (found.dtype, found.shape)}, line["reason"], kv=kv)
    dtype = ways[line["treatment"]].dtype or dtype
    part = Slice(name, line["tensor"], line["shard"], TensorInfo(dtype, shape, 0, tensor_bytes(dtype, shape)))
    treatment, module = treatments[line["treatment"]], name.removesuffix(".weight")
    spec = treatment.layout.spec(treatment.scheme, *shape, dtype)
    outputs = {f"{module}.{suffix}": each for suffix, each in spec.items()}
    return Action(QUANTIZE, part, line["role"], outputs, treatment=line["treatment"], kv=kv)


def _kv(opened: Opened, line: Mapping[str, Any], layout: Layout) -> Spec:
    """One scale that another tool has of keys and values alike is written as two."""
    attention, _, leaf = str(line["as"]).removesuffix(".weight").rpartition(".")
    letters, cache = [letter_of(name) for name in line.get("kv", {})], layout.kv_cache
    if opened.artifact is None and f"{attention}.kv_scale" in opened.adopted.shared:
        letters = list(LETTERS.get(leaf, ""))
    if letters and cache is None:
        what = f"{layout.name} has no place for the scales of its FP8 KV cache"
        raise InputError(what, where=attention, next="choose a layout of compressed-tensors or ModelOpt")
    return {cache.name(attention, letter): ("F32", cache.shape) for letter in letters} if cache else {}


def _require_held(plan: Plan, opened: Opened) -> None:
    """Errors: InputError for the first weight that its layout cannot hold, and how many there are."""
    reasons = []
    for action in plan.actions:
        if action.treatment is not None:
            treatment, (n, k) = plan.treatments[action.treatment], action.part.info.shape
            if reason := treatment.layout.reject(treatment.scheme, n, k, action.part.info.dtype):
                reasons.append(f"{action.module}: {reason}")
    if reasons:
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        raise InputError(f"{reasons[0]}{more}", where=opened.held.source.label, next="choose another layout")


def _require_engine(plan: Plan, opened: Opened) -> None:
    """As for weights that are quantized here: what no engine loads is not written. Errors: InputError."""
    refusals = list(engines_of(plan).values())
    if refusals and all(refusals):
        raise InputError(
            f"no engine would load it: {refusals[0]}", where=opened.held.source.label, next="choose another layout"
        )


def _origin(opened: Opened) -> dict[str, Any]:
    """Of one of ours the model it was made from, and its shards; of another tool's, itself and what its card says of its base."""
    if opened.artifact is not None:
        weights = {shard: line["source_sha256"] for shard, line in opened.artifact.journal_entries().items()}
        return {"weights": weights, **_run(opened)["source"]}
    source = opened.held.source
    card = front_matter(source.read("README.md").decode("utf-8", "replace")) if "README.md" in source.files else {}
    base = card.get("base_model")
    base = base[0] if isinstance(base, list) and len(base) == 1 else base
    stated = {"base_model": base} if isinstance(base, str) else {}
    return {**source.identity(), "quantized_by": opened.adopted.method.tool, **stated}
