"""Reading an artifact back: its modules as canonical QTensors, its copied tensors as they stand, one at a time.

The plan says which output tensors belong to which module; the layout's own `unpack` undoes its `pack`. Only headers are
read on opening, and plain reads bring one tensor into memory when it is asked for. Evaluation, verification and
profiling all see an artifact through this one door, which needs no engine and no loader of others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from quantpub.algorithms import ADOPTED
from quantpub.artifact import Artifact
from quantpub.checkpoint import read_tensor
from quantpub.errors import InputError, QuantpubError, closest
from quantpub.families import FAMILIES, GENERIC, Family
from quantpub.kv_cache import letter_of
from quantpub.layouts.base import Config, Tensors
from quantpub.qtensor import QTensor
from quantpub.shards import TensorInfo
from quantpub.sources import LocalSource, Source
from quantpub.treatments import Treatment, declared, unquantized

AGAIN = "quantize it again into another folder"
PLANNED = {"tensor", "as", "shard", "dtype", "shape", "role", "action", "treatment", "outputs"}


class Decoder:
    """treatments: the recipe's, then those of its rules. actions: the lines of plan.jsonl."""

    def __init__(self, artifact: Artifact, source: Source | None = None) -> None:
        """source: where the weights lie, when that is not the artifact's folder.

        Errors: InputError when run.json or the plan is missing or damaged.
        """
        run = artifact.read_json("run.json", ("scheme", "layout", "source", "stages"))
        self._read(artifact, source or LocalSource(artifact.path), _treatments(artifact, run), plan_lines(artifact))

    def _read(
        self, artifact: Artifact, source: Source, treatments: list[Treatment], actions: list[dict[str, Any]]
    ) -> None:
        self.artifact, self.source = artifact, source
        self.treatments, self.actions = treatments, actions
        _require_places(artifact, self.actions, len(self.treatments))
        self._modules = {_module(line): line for line in self.actions if line["action"] == "quantize"}
        self._shard = {name: line["shard"] for line in self.actions for name in outputs_of(line)}
        self._headers: dict[str, dict[str, TensorInfo]] = {}

    def modules(self) -> list[tuple[str, tuple[int, int]]]:
        """(name, (n, k)) of every quantized linear, in the plan's order."""
        return [(name, self._shape(name)) for name in self._modules]

    def source_dtype(self, module: str) -> str:
        """The dtype of the weight that a module was made from, in safetensors' words."""
        return str(self._modules[module]["dtype"])

    @cached_property
    def _copied(self) -> list[str]:
        return [name for line in self.actions if line["action"] != "quantize" for name in line["outputs"]]

    def copied(self) -> list[str]:
        """Every tensor that was taken over as it was, in the plan's order."""
        return list(self._copied)

    def ignored(self) -> tuple[str, ...]:
        """Every Linear that stays in high precision, by its full name."""
        copied = ((_module(line), line["role"]) for line in self.actions if line["action"] != "quantize")
        return unquantized(copied, self.family())

    def family(self) -> Family:
        """Errors: InputError when config.json names no known architecture; of what another tool quantized any will do."""
        model_type = self.artifact.config().get("model_type")
        if model_type not in FAMILIES and all(t.algorithm["name"] == ADOPTED for t in self.treatments):
            return GENERIC
        if model_type not in FAMILIES:
            where = str(self.artifact.path / "config.json")
            raise InputError(
                f"unknown architecture {model_type!r}", where=where, next=closest(str(model_type), FAMILIES)
            )
        return FAMILIES[model_type]

    def declared(self) -> Config:
        """`quantization_config` as the layouts state it for what the plan says."""
        treated = {name: self.place(name) for name in self._modules}
        return declared(self.treatments, treated, self.ignored(), any(line.get("kv") for line in self.actions))

    def metadata(self) -> dict[str, str]:
        """The entries of every shard's safetensors header, as the layout states them."""
        modules = {name: (self.treated(name).scheme, self._shape(name)) for name in self._modules}
        return {"format": "pt", **self.treatments[0].layout.metadata(modules, self.copied())}

    def files(self) -> dict[str, Config]:
        """The JSON files that the layouts want beside config.json."""
        config = self.declared()
        return {name: value for t in self.treatments for name, value in t.layout.files(config).items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor of the artifact, as planned."""
        return self._planned[name][1]

    def require_whole(self) -> None:
        """Headers only. Errors: InputError for the first tensor that is missing or not what the plan says."""
        for name in self._shard:
            self._info(name, self._place_of(name))

    def qtensor(self, module: str) -> QTensor:
        """One quantized weight, decoded. Errors: InputError when a tensor of it is missing or of another shape."""
        treatment = self.treated(module)
        return treatment.layout.unpack(self.packed(module), treatment.scheme, self._shape(module))

    def input_scale(self, module: str) -> torch.Tensor | None:
        """The calibrated scale of one quantized module's activations, a float32 scalar; None where it has none."""
        where = self.treated(module).layout.input_scale
        name = f"{module}.{where.suffix}" if where else None
        if where is None or name not in self._modules[module]["outputs"]:
            return None
        return where.read(self.tensor(f"{module}.{where.suffix}"))

    def kv_scales(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Attention → the scales of its keys and of its values in the KV cache, float32 scalars. Empty: no FP8 cache.

        Errors: InputError when an attention has one of them only, or a tensor is not what the plan says.
        """
        found: dict[str, dict[str, torch.Tensor]] = {}
        for line in self.actions:
            for name in line.get("kv", ()):
                attention = _module(line).rpartition(".")[0]
                found.setdefault(attention, {})[letter_of(name)] = self.tensor(name).reshape(())
        if odd := next((attention for attention, pair in found.items() if len(pair) < 2), None):
            raise InputError(
                f"{odd} has a scale of keys or of values only", where=str(self.artifact.meta / "plan.jsonl"), next=AGAIN
            )
        return {attention: (pair["k"], pair["v"]) for attention, pair in found.items()}

    def treated(self, module: str) -> Treatment:
        """What was made of one quantized module."""
        return self.treatments[self.place(module)]

    def place(self, module: str) -> int:
        """Which of `treatments` a quantized module had."""
        return int(self._modules[module]["treatment"])

    def _shape(self, module: str) -> tuple[int, int]:
        n, k = self._modules[module]["shape"]
        return n, k

    def outputs(self, module: str) -> list[str]:
        """The names of the tensors that hold one quantized module."""
        return list(self._modules[module]["outputs"])

    def packed(self, module: str) -> Tensors:
        """suffix → tensor of one quantized module, as the layout wrote them."""
        return {name.removeprefix(f"{module}."): self.tensor(name) for name in self.outputs(module)}

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor of the artifact, by its own name. Errors: InputError when it is not what the plan says."""
        shard = self._place_of(name)
        return read_tensor(self.source, shard, self._info(name, shard))

    def _place_of(self, name: str) -> str:
        return str(self._shard[name])

    def _info(self, name: str, shard: str) -> TensorInfo:
        where = self.source.where(shard)
        if shard not in self._headers:
            if shard not in self.source.files:
                raise InputError("the shard is missing", where=where, next=AGAIN)
            self._headers[shard] = self.source.header(shard)[0]
        info = self._headers[shard].get(name)
        if info is None:
            raise InputError(f"tensor {name} is missing", where=where, next=AGAIN)
        return self._as_planned(name, info, where)

    @cached_property
    def _planned(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        outputs = (item for line in self.actions for item in outputs_of(line).items())
        return {name: (dtype, tuple(shape)) for name, (dtype, shape) in outputs}

    def _as_planned(self, name: str, info: TensorInfo, where: str) -> TensorInfo:
        dtype, shape = self._planned[name]
        if (info.dtype, info.shape) != (dtype, shape):
            found = f"{info.dtype} {list(info.shape)}"
            raise InputError(f"tensor {name} is {found}, the plan says {dtype} {list(shape)}", where=where, next=AGAIN)
        return info


def _treatments(artifact: Artifact, run: dict[str, Any]) -> list[Treatment]:
    where = str(artifact.meta / "run.json")
    if "treatments" not in run:
        raise InputError("made by an older quantpub, which recorded one scheme for all", where=where, next=AGAIN)
    try:
        return [Treatment.from_json(entry) for entry in run["treatments"]]
    except (KeyError, TypeError, AttributeError, ValueError, QuantpubError) as error:
        what = f"its treatments cannot be read ({type(error).__name__})"
        raise InputError(what, where=where, next=AGAIN) from None


def _require_places(artifact: Artifact, lines: list[dict[str, Any]], count: int) -> None:
    """Errors: InputError when a quantized tensor names no treatment of the run."""
    places = [line["treatment"] for line in lines if line["action"] == "quantize"]
    if not all(isinstance(place, int) and 0 <= place < count for place in places):
        what, where = "a quantized tensor names no treatment of the run", str(artifact.meta / "plan.jsonl")
        raise InputError(what, where=where, next=AGAIN)


def outputs_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """Every tensor that was written for one of the source: output tensor → [dtype, shape]."""
    return {**line["outputs"], **line.get("kv", {})}


def _module(line: dict[str, Any]) -> str:
    return str(line["as"]).removesuffix(".weight")


def plan_lines(artifact: Artifact) -> list[dict[str, Any]]:
    """plan.jsonl: one entry per tensor. Errors: InputError when it is missing or damaged."""
    path = artifact.meta / "plan.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        if not all(line.keys() >= PLANNED for line in lines):
            raise ValueError
        return lines
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"the plan cannot be read ({type(error).__name__})", where=str(path), next=AGAIN) from None
