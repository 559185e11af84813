"""A source checkpoint: its config, every tensor by name, and its weights read one at a time.

Opening one reads headers only. It is checked whole before any work starts: each file the index names exists and has the
size that its header promises, every tensor is where the index says, nothing is a pickle, nothing is quantized already.
A 3-D expert parameter [E, members*N, K] is presented as the 2-D linears it holds, so that no algorithm knows about MoE.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from quantpub.errors import InputError, UnavailableError
from quantpub.families import Family
from quantpub.shards import DTYPES, TensorInfo, read_header
from quantpub.sources import Source, open_source, read_errors

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PIECE = 8 << 20  # tensors that are only copied travel in pieces of this many bytes
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Small files that belong to a release, taken along byte for byte
COMPANION_SUFFIXES = (".json", ".txt", ".jinja", ".model", ".tiktoken", ".vocab")
COMPANION_PREFIXES = ("license", "licence", "notice", "use_policy")
# What tools write of a quantization beside config.json
QUANT_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")
NOT_COMPANIONS = ("config.json", INDEX, *QUANT_FILES)


@dataclass(frozen=True)
class Slice:
    """A tensor as the plan sees it: a whole source tensor, or one 2-D linear of a 3-D expert parameter."""

    name: str
    source: str
    shard: str
    info: TensorInfo


@dataclass(frozen=True)
class Checkpoint:
    """shards: file → tensors in file order. left_behind: files that are neither weights nor companions."""

    source: Source
    config: dict[str, Any]
    shards: dict[str, dict[str, TensorInfo]]
    companions: tuple[str, ...]
    left_behind: tuple[str, ...]

    @property
    def indexed(self) -> bool:
        return list(self.shards) != [SINGLE]

    def slices(self, shard: str, family: Family) -> Iterator[Slice]:
        """Every tensor of a shard in file order, 3-D experts split into their linears."""
        for name, info in self.shards[shard].items():
            members = family.expert_members(name)
            if members and len(info.shape) == 3:
                yield from _expert_slices(name, info, shard, members)
            else:
                yield Slice(name, name, shard, info)


def _expert_slices(name: str, info: TensorInfo, shard: str, members: tuple[str, ...]) -> Iterator[Slice]:
    experts, rows, k = info.shape
    n, prefix = rows // len(members), name.rpartition(".experts.")[0]
    nbytes = n * k * DTYPES[info.dtype].itemsize
    for expert in range(experts):
        for place, member in enumerate(members):
            start = info.start + (expert * len(members) + place) * nbytes
            part = TensorInfo(info.dtype, (n, k), start, start + nbytes)
            yield Slice(f"{prefix}.experts.{expert}.{member}.weight", name, shard, part)


def open_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """A local folder or a Hub id. Errors: InputError, AuthError, UnavailableError."""
    source = open_source(model, revision)
    config = _config(source)
    names = _shard_names(source)
    shards = {name: dict(sorted(source.header(name)[0].items(), key=lambda item: item[1].start)) for name in names}
    _check_index(source, shards)
    companions = tuple(name for name in source.files if is_companion(name))
    taken = {*companions, *names, *NOT_COMPANIONS}
    return Checkpoint(source, config, shards, companions, tuple(name for name in source.files if name not in taken))


def open_config(model: str, revision: str | None = None) -> dict[str, Any]:
    """config.json alone, of a folder or Hub id that need not hold weights. Errors: those of `open_checkpoint`."""
    return _config(open_source(model, revision))


def _config(source: Source) -> dict[str, Any]:
    config = read_config(source)
    _refuse_quantized(source, config)
    if "auto_map" in config:
        raise InputError(
            "it asks for remote code (auto_map), which quantpub does not run",
            where=source.where("config.json"),
            next="use a checkpoint whose architecture transformers knows",
        )
    return config


def read_config(source: Source) -> dict[str, Any]:
    """config.json as it stands. Errors: InputError when there is none, or it is no JSON object."""
    where = source.where("config.json")
    if "config.json" not in source.files:
        raise InputError(
            "there is no config.json", where=source.label, next="name a folder or repo in Hugging Face form"
        )
    try:
        config: dict[str, Any] = json.loads(source.read("config.json"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON: {error}", where=where) from None
    if not isinstance(config, dict):
        raise InputError("not a JSON object", where=where)
    return config


def _refuse_quantized(source: Source, config: dict[str, Any]) -> None:
    declared = config.get("quantization_config") or config.get("compression_config")
    others = [name for name in QUANT_FILES if name in source.files]
    if declared or others:
        method = declared.get("quant_method", "unknown method") if isinstance(declared, dict) else others[0]
        raise InputError(
            f"the checkpoint is quantized already ({method})",
            where=source.where("config.json"),
            next="start from the full-precision model it was made from; `quantpub repack` writes these weights in another layout",
        )


def _shard_names(source: Source) -> list[str]:
    if INDEX in source.files:
        names = sorted(set(_index(source).values()))
        missing = [name for name in names if name not in source.files]
        if nested := [name for name in names if "/" in name]:
            raise InputError(f"it names {nested[0]}, outside the folder", where=source.where(INDEX))
        if missing:
            raise InputError(
                f"it names {missing[0]}, which does not exist",
                where=source.where(INDEX),
                next="download or copy the checkpoint again",
            )
        return names
    if SINGLE in source.files:
        return [SINGLE]
    pickles = [name for name in source.files if name.endswith(PICKLES)]
    if pickles:
        raise InputError(
            f"its weights are pickles ({pickles[0]}), which can run code when opened",
            where=source.label,
            next="convert it to safetensors first: load it in transformers, then save_pretrained",
        )
    raise InputError(f"there is neither {SINGLE} nor {INDEX}", where=source.label)


def _index(source: Source) -> dict[str, str]:
    try:
        weight_map: dict[str, str] = json.loads(source.read(INDEX))["weight_map"]
        return dict(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            "not a valid index: no weight_map", where=source.where(INDEX), next="download or copy the checkpoint again"
        ) from None


def _check_index(source: Source, shards: dict[str, dict[str, TensorInfo]]) -> None:
    """The index and the headers name the same tensors in the same files, each once."""
    found = [(name, shard) for shard, tensors in shards.items() for name in tensors]
    if INDEX not in source.files:
        return
    index = _index(source)
    for name, shard in found:
        if index.get(name) != shard:
            raise InputError(
                f"tensor {name} lies in {shard}, the index says {index.get(name, 'nothing of it')}",
                where=source.where(INDEX),
            )
    if missing := sorted(set(index) - {name for name, _ in found}):
        raise InputError(f"tensor {missing[0]} is not in {index[missing[0]]}", where=source.where(INDEX))


def is_companion(name: str) -> bool:
    if "/" in name:
        return name.startswith("additional_chat_templates/") and name.endswith(".jinja")
    small = name.lower()
    return (
        name not in NOT_COMPANIONS
        and not small.endswith(".index.json")
        and (small.endswith(COMPANION_SUFFIXES) or small.startswith(COMPANION_PREFIXES))
    )


def public_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The source's configuration without the local path that transformers writes there."""
    return {
        key: value for key, value in checkpoint.config.items() if key not in ("_name_or_path", "quantization_config")
    }


class ShardReader:
    """Reads a shard once, front to back, with plain reads (a mapped file would count as memory), hashing as it goes."""

    def __init__(self, checkpoint: Checkpoint, shard: str) -> None:
        """Errors: InputError when the file cannot be read, UnavailableError when it is not the one that was planned."""
        self._path = checkpoint.source.path(shard)
        with read_errors(self._path):
            self._file, self._hash = self._path.open("rb", buffering=0), hashlib.sha256()
        self._state = _state(self._file.fileno())
        if read_header(self._path)[0] != checkpoint.shards[shard]:
            raise self._changed()

    def tensor(self, part: Slice) -> torch.Tensor:
        """The whole tensor. Must be called in file order."""
        raw = torch.empty(part.info.nbytes, dtype=torch.uint8)
        self._fill(part.info.start, memoryview(raw.numpy().data))
        return raw.view(DTYPES[part.info.dtype]).view(part.info.shape)

    def pieces(self, part: Slice) -> Iterator[tuple[int, torch.Tensor]]:
        """(offset in the tensor, its bytes) in pieces of at most PIECE."""
        for offset in range(0, part.info.nbytes, PIECE):
            raw = torch.empty(min(PIECE, part.info.nbytes - offset), dtype=torch.uint8)
            self._fill(part.info.start + offset, memoryview(raw.numpy().data))
            yield offset, raw

    def finish(self) -> str:
        """The sha256 of the whole file."""
        while rest := self._file.read(PIECE):
            self._hash.update(rest)
        if _state(self._file.fileno()) != self._state:
            raise self._changed()
        self._file.close()
        return self._hash.hexdigest()

    def _changed(self) -> UnavailableError:
        advice = "keep the source unchanged and run the same command again"
        return UnavailableError("the file changed while it was read", where=str(self._path), next=advice)

    def _fill(self, start: int, buffer: memoryview) -> None:
        gap = start - self._file.tell()
        assert gap >= 0, "tensors are read in file order"
        if gap:
            self._hash.update(self._file.read(gap))
        filled = 0
        while filled < len(buffer):
            got = self._file.readinto(buffer[filled:])
            if not got:
                raise self._changed()
            filled += got
        self._hash.update(buffer)


def _state(fd: int) -> tuple[int, int, int]:
    found = os.fstat(fd)
    return found.st_ino, found.st_size, found.st_mtime_ns


def read_slice(source: Source, part: Slice) -> torch.Tensor:
    """One tensor read on its own, in any order (checks and comparisons; quantizing reads a shard front to back)."""
    return read_tensor(source, part.shard, part.info)


def read_tensor(source: Source, shard: str, info: TensorInfo) -> torch.Tensor:
    """As it stands in the file. Errors: InputError when the file is shorter than its header says."""
    if not info.nbytes:
        return torch.empty(info.shape, dtype=DTYPES[info.dtype])
    raw = torch.frombuffer(source.span(shard, info.start, info.nbytes), dtype=torch.uint8)
    return raw.view(DTYPES[info.dtype]).view(info.shape)
