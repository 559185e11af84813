"""Smoothing of one checkpoint: the factors of every fold, found from a calibration, and what they make of each tensor.

Legend: K in_features of a reader, F factors of a fold (`quantpub.folds`), R sampled tokens.

Where a tensor of a fold stays as it is stored (a router, a bias, a linear that is not quantized), factors are powers of two:
multiplying and dividing by them loses no bit. Otherwise they are free, which is worth 6 % of the KL of int8 on a trained
model of 28M parameters, and a norm is exact all the same: its weight g/s is rounded to its dtype first, and s becomes the
ratio of the two. What is left to rounding are weights that are quantized next, in steps many times as coarse. A norm that
stores its weight less one takes the ratio always: a router that reads it is rounded once more in its own dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from quantpub.artifact import SMOOTHING, Artifact
from quantpub.checkpoint import Slice, read_slice
from quantpub.decode import AGAIN, Decoder
from quantpub.errors import InputError, closest
from quantpub.folds import NORM, Fold, folds, useful
from quantpub.plan import Plan
from quantpub.recipe import Recipe
from quantpub.registry import load
from quantpub.scheme import Scheme
from quantpub.stats import Observed
from quantpub.transforms import TRANSFORMS
from quantpub.transforms.base import Transform
from quantpub.transforms.smoothquant import Limits, Reader, Solution, reader_of, stacked

ROWS = 512  # of all weights that read one input, so many rows judge a choice
OCTAVES = {"F16": 6, "BF16": 16, "F32": 16}  # largest |log2 s|: fp16 has 5 bits of exponent


class Inputs(Protocol):
    """What is asked of a calibration's statistics."""

    def has(self, module: str) -> bool: ...
    def input(self, module: str) -> Observed: ...


class Smoothing:
    """folds, and by their source s_F: positive float32 [F]. evidence: JSON, by source, how each was chosen."""

    def __init__(
        self, found: Sequence[Fold], s: Mapping[str, torch.Tensor], evidence: dict[str, Any] | None = None
    ) -> None:
        self.folds, self.evidence, self._s = tuple(found), {} if evidence is None else evidence, s
        self._divided = {tensor: fold for fold in found for tensor in fold.tensors[:2]}
        self._read = {reader: fold for fold in found for reader in fold.readers}

    def apply(self, tensor: str, w: torch.Tensor) -> torch.Tensor:
        """A tensor of the source as it is folded, by its full name: a new one in its dtype, or itself where it has no part."""
        read, divided = self._columns(tensor.removesuffix(".weight")), self._divided.get(tensor)
        if read is None and (divided is None or divided.source not in self._s):
            return w
        made = w.to(torch.float32, copy=True)
        if read is not None and tensor.endswith(".weight"):
            made *= read.to(w.device)
        if divided is not None and divided.source in self._s:
            made = _divide(made, self._s[divided.source].to(w.device), divided, tensor)
        return made.to(w.dtype)

    def observed(self, module: str, seen: Observed) -> Observed:
        """What calibration would have seen of the input of a linear of the folded model."""
        s_K = self._columns(module)
        if s_K is None:
            return seen
        s_K = s_K.to(seen.amax_K.device)
        sample_RK = (seen.sample_RK.float() / s_K).to(seen.sample_RK.dtype)
        return replace(
            seen, amax_K=seen.amax_K / s_K, second_moment_K=seen.second_moment_K / s_K.square(), sample_RK=sample_RK
        )

    def vectors(self) -> dict[str, torch.Tensor]:
        """Source of a fold → s_F, float32: what `from_vectors` wants."""
        return dict(self._s)

    @staticmethod
    def from_vectors(found: Sequence[Fold], vectors: Mapping[str, torch.Tensor], where: str = "") -> Smoothing:
        """Errors: InputError when they are not the factors of these folds."""
        expected = {fold.source: fold.size for fold in found}
        problems = [f"{name} is no place where this model is smoothed" for name in vectors if name not in expected]
        problems += [f"the factors of {name} are missing" for name in expected if name not in vectors]
        problems += [
            f"the factors of {name} are not {expected[name]} positive float32 numbers"
            for name, s in vectors.items()
            if name in expected and not _sound(s, expected[name])
        ]
        if problems:
            raise InputError(problems[0], where=where or None, next=AGAIN)
        return Smoothing(found, vectors)

    def _columns(self, module: str) -> torch.Tensor | None:
        """s of every column of a linear that reads a smoothed input: float32 [K]."""
        fold = self._read.get(module)
        return None if fold is None or fold.source not in self._s else self._s[fold.source][_entries(fold)]


def _sound(s: torch.Tensor, size: int) -> bool:
    return s.dtype == torch.float32 and s.shape == (size,) and bool(torch.isfinite(s).all()) and bool((s > 0).all())


def _entries(fold: Fold) -> torch.Tensor:
    return torch.tensor(fold.columns())


def _divide(w: torch.Tensor, s_F: torch.Tensor, fold: Fold, tensor: str) -> torch.Tensor:
    """w: float32, changed in place where its rows are divided."""
    if fold.less_one and tensor.endswith(".weight"):
        return ((1 + w.double()) / s_F - 1).float()
    if fold.kind == NORM:
        return w / s_F
    rows = torch.tensor(fold.rows(), device=w.device)
    w[rows] = w[rows] / (s_F if w.dim() == 1 else s_F[:, None])
    return w


def solve(plan: Plan, statistics: Inputs, device: str = "cpu") -> Smoothing:
    """The factors of all folds of a plan, from one fold's readers at a time. What calibration did not reach keeps s = 1.

    Values and up come before norms, whose readers they change. Errors: InputError for parameters that do not fit.
    """
    transform, params = bound(plan.recipe)
    parts = {action.part.name: action.part for action in plan.actions}
    s: dict[str, torch.Tensor] = {}
    evidence: dict[str, Any] = {}
    smoothing = Smoothing(plan.folds, s, evidence)
    for fold in sorted(plan.folds, key=lambda fold: fold.kind == NORM):
        readers = _readers(plan, statistics, smoothing, fold, parts, device)
        if not readers:
            s[fold.source], evidence[fold.source] = torch.ones(fold.size), {"observed": False}
            continue
        octaves = min(OCTAVES[parts[name].info.dtype] for name in fold.tensors if name in parts)
        limits = Limits(not _free(plan, fold, parts), octaves, below_one=fold.less_one)
        found: Solution = transform.solve(readers, _entries(fold).to(device), limits, params)
        s[fold.source] = found.s_F.cpu()
        if fold.kind == NORM:
            weight = read_slice(plan.checkpoint.source, parts[f"{fold.source}.weight"])
            s[fold.source] = realised(weight, s[fold.source], fold.less_one)
        evidence[fold.source] = found.as_json()
    return smoothing


def realised(weight: torch.Tensor, s_F: torch.Tensor, less_one: bool) -> torch.Tensor:
    """The ratio of a norm's weight to what its dtype makes of weight / s: near `s_F`, and exact."""
    g_F, one = weight.double() + less_one, float(less_one)
    held_F = (g_F / s_F - one).to(weight.dtype).double() + one
    return torch.where((held_F != 0) & (g_F != 0), g_F / held_F, s_F.double()).float()


def _free(plan: Plan, fold: Fold, parts: Mapping[str, Slice]) -> bool:
    """Whether factors need not be powers of two: every tensor but a norm's weight is quantized next."""
    modules = (*fold.readers, *(() if fold.kind == NORM else (fold.source,)))
    return f"{fold.source}.bias" not in parts and all(module in plan.treated for module in modules)


def _readers(
    plan: Plan, statistics: Inputs, smoothing: Smoothing, fold: Fold, parts: Mapping[str, Slice], device: str
) -> list[Reader]:
    """The linears whose inputs are rounded and were observed; those of one input and scheme stacked."""
    judged = [reader for reader in fold.readers if reader in plan.rounded]
    seen = {reader: statistics.input(reader) for reader in judged if statistics.has(reader)}
    seen = {reader: found for reader, found in seen.items() if found.tokens and len(found.sample_RK)}
    share = min(1.0, ROWS / max(1, sum(plan.shapes[reader][0] for reader in seen)))
    stacks: dict[tuple[int, Scheme], list[Reader]] = {}
    for reader, found in seen.items():
        w_NK = smoothing.apply(f"{reader}.weight", read_slice(plan.checkpoint.source, parts[f"{reader}.weight"]))
        w_NK, scheme = w_NK.to(device).float(), plan.treated[reader].scheme
        stacks.setdefault((id(found.sample_RK), scheme), []).append(reader_of(found, w_NK, scheme, share))
    return [stacked(stack) for stack in stacks.values()]


def bound(recipe: Recipe) -> tuple[Transform, Any]:
    """(the recipe's transform, its params). Errors: InputError when a parameter is unknown or does not fit."""
    assert recipe.transform is not None
    transform: Transform = load(TRANSFORMS, "transform", recipe.transform["name"])
    given = {key: value for key, value in recipe.transform.items() if key != "name"}
    known, where = [field.name for field in dataclasses.fields(transform.params)], f"recipe {recipe.name}"
    if odd := next((key for key in given if key not in known), None):
        raise InputError(f"transform {transform.name} has no parameter {odd!r}", where=where, next=closest(odd, known))
    try:
        return transform, TypeAdapter(transform.params).validate_python(given)
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"])) or transform.name
        what = f"{key}: {error.errors()[0]['msg'].removeprefix('Value error, ')}"
        raise InputError(what, where=where, next="mend this parameter") from None


def smoothing_of(artifact: Artifact, decoder: Decoder) -> Smoothing | None:
    """What an artifact was smoothed by, or None. Errors: InputError when the file is missing or not of its model."""
    recipe = artifact.recipe()
    if recipe.transform is None:
        return None
    path = artifact.meta / SMOOTHING
    try:
        vectors = load_file(path)
    except (OSError, SafetensorError) as error:
        what = f"the vectors of smoothing cannot be read ({type(error).__name__})"
        raise InputError(what, where=str(path), next=AGAIN) from None
    reject, config = load(TRANSFORMS, "transform", recipe.transform["name"]).reject, artifact.config()
    rounded = [module for module, _ in decoder.modules() if not reject(decoder.treated(module).scheme)]
    shapes = {line["as"]: tuple(line["shape"]) for line in decoder.actions}
    found = useful(folds(str(config.get("model_type")), config, shapes), rounded, recipe.kv_cache is not None)
    return Smoothing.from_vectors(found, vectors, str(path))
