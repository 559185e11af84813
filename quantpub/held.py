"""A quantized checkpoint as it lies, in a folder or on the Hub, whoever made it: its files, config and headers.

Opening one reads headers only, on the Hub by range requests. Nothing is refused here: what is wrong with files and index
is kept in words, so that a check can say it. `adopt` says what the tensors mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from quantpub.checkpoint import INDEX, QUANT_FILES, read_config, read_tensor
from quantpub.errors import InputError, QuantpubError
from quantpub.shards import TensorInfo
from quantpub.sources import Header, Source, open_source

SUFFIX = ".safetensors"
PICKLES = ("pickles, which can run code when they are opened", "convert them to safetensors first")
# Weights in other files, which are not read here → what they are, and what to do
OTHERS = {
    ".gguf": ("GGUF, llama.cpp's format", "name the checkpoint in Hugging Face form that it was made from"),
    ".bin": PICKLES,
    ".pt": PICKLES,
    ".pth": PICKLES,
    ".onnx": ("ONNX graphs", "name the checkpoint in Hugging Face form that they were made from"),
}
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Held:
    """headers: shard → header. problems: what is wrong with files and index, a sentence each."""

    source: Source
    config: dict[str, Any]
    headers: dict[str, Header]
    problems: tuple[str, ...]

    @cached_property
    def place(self) -> dict[str, str]:
        """tensor → shard, in file order; of a tensor in two shards the first."""
        found: dict[str, str] = {}
        for shard, (tensors, _) in self.headers.items():
            for name in sorted(tensors, key=lambda name: tensors[name].start):
                found.setdefault(name, shard)
        return found

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The entries of all shards' headers together."""
        return {key: value for _, entries in self.headers.values() for key, value in entries.items()}

    def info(self, name: str) -> TensorInfo:
        return self.headers[self.place[name]][0][name]

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor. Errors: InputError when the file is shorter than its header says."""
        return read_tensor(self.source, self.place[name], self.info(name))

    @cached_property
    def text_config(self) -> dict[str, Any]:
        """The part of the config that describes the language model: of several models in one it has a key of its own."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @property
    def dtype(self) -> str:
        """The model's own dtype in safetensors' words."""
        stated = next(
            (c[key] for c in (self.config, self.text_config) for key in ("dtype", "torch_dtype") if c.get(key)), None
        )
        return DTYPES.get(str(stated).removeprefix("torch."), "BF16")

    @cached_property
    def quantization(self) -> dict[str, Any]:
        """What the checkpoint says of its quantization: in config.json, else in a file of its own. Empty: nothing."""
        for config in (self.config, self.text_config):
            found = config.get("quantization_config") or config.get("compression_config")
            if isinstance(found, dict):
                return found
        return next((found for name in QUANT_FILES if (found := self.json(name))), {})

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file beside config.json; empty where there is none. Errors: InputError when it is not valid."""
        if name not in self.source.files:
            return {}
        try:
            value = json.loads(self.source.read(name))
        except (ValueError, RecursionError):
            raise InputError("not valid JSON", where=self.source.where(name)) from None
        return value if isinstance(value, dict) else {}


def open_held(model: str, revision: str | None = None, whole: bool = True) -> Held:
    """A folder or Hub id. whole: of one on the Hub, whether its weights will be wanted: then files are fetched, once each.

    Errors: InputError when there is no config.json or no weights; AuthError, UnavailableError.
    """
    source = open_source(model, revision, whole)
    names = sorted({name for name in source.files if name.endswith(SUFFIX) and "/" not in name})
    if not names:
        raise _without_shards(source)
    config = read_config(source)
    index, problems = _index(source)
    headers: dict[str, Header] = {}
    for name in names:
        try:
            headers[name] = source.header(name)
        except QuantpubError as error:
            if not isinstance(error, InputError):
                raise
            problems.append(f"{name}: {error.what}")
    return Held(source, config, headers, (*problems, *_of_index(index, headers, INDEX in source.files)))


def _without_shards(source: Source) -> InputError:
    for suffix, (kind, advice) in OTHERS.items():
        if found := next((name for name in source.files if name.endswith(suffix)), None):
            return InputError(f"{found}: its weights are {kind}", where=source.label, next=advice)
    return InputError(
        "there are no safetensors files", where=source.label, next="name a folder or repo that holds weights"
    )


def _index(source: Source) -> tuple[dict[str, str], list[str]]:
    if INDEX not in source.files:
        return {}, []
    try:
        return dict(json.loads(source.read(INDEX))["weight_map"].items()), []
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}, [f"{INDEX} holds no weight_map"]


def _of_index(index: Mapping[str, str], headers: Mapping[str, Header], indexed: bool) -> list[str]:
    """The index and the headers must be the same map, each tensor in one shard."""
    found = [(name, shard) for shard, (tensors, _) in headers.items() for name in tensors]
    homes: dict[str, list[str]] = {}
    for name, shard in found:
        homes.setdefault(name, []).append(shard)
    problems = [f"tensor {name} lies in {' and in '.join(shards)}" for name, shards in homes.items() if len(shards) > 1]
    if not indexed:
        return problems if len(headers) < 2 else [*problems, f"{INDEX} is missing: engines find shards by it"]
    problems += [
        f"{name}: {INDEX} says {shard}, and it is not there"
        for name, shard in index.items()
        if shard not in homes.get(name, ())
    ]
    return problems + [
        f"{name} lies in {shard}, {INDEX} does not name it" for name, shard in found if name not in index
    ]
