"""safetensors files, streamed: headers read without weights, shards written tensor by tensor at places known beforehand.

A file is: u64 length of the header, the header (JSON: name → dtype, shape, data_offsets; optional __metadata__), the data
without holes. quantpub knows every output tensor's dtype and shape before the first weight is read, so the header is
written first, the file is allocated whole, and a tensor goes to its place as soon as it is made: memory holds one tensor,
not one shard. Order and header bytes are those of the safetensors library (a test compares whole files), which itself can
only write a shard that is complete in memory.
Source: the safetensors format, https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantpub.errors import InputError
from quantpub.files import disk_error, publish_file, sha256_file, temporary, write_point

# safetensors dtypes in the library's own order, which sorts tensors (widest last here, first in the file)
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {name: rank for rank, name in enumerate(DTYPES)}
COPIED = 8 << 20  # bytes at a time, where the kernel does not copy between two files
MAX_HEADER = 100_000_000  # the library's own limit
AGAIN = "download or copy the checkpoint again"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: dtype by its safetensors name; start and end are byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize


def parse_header(raw: bytes, where: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and the metadata of a header's JSON. Offsets become absolute. Errors: InputError."""
    try:
        header: dict[str, Any] = json.loads(raw)
        metadata: dict[str, str] = header.pop("__metadata__", {}) or {}
        base = 8 + len(raw)
        tensors = {name: _info(entry, base) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"its safetensors header is damaged ({error!s:.60})", where=where, next=AGAIN) from None
    for name, info in tensors.items():
        if info.dtype not in DTYPES:
            raise InputError(f"tensor {name} has dtype {info.dtype}, which quantpub does not read", where=where)
        if tensor_bytes(info.dtype, info.shape) != info.nbytes:
            raise InputError(f"tensor {name}: its offsets do not match its shape", where=where, next=AGAIN)
    _require_disjoint(tensors, 8 + len(raw), where)
    return tensors, metadata


def _require_disjoint(tensors: Mapping[str, TensorInfo], start: int, where: str) -> None:
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start < start:
            raise InputError(f"tensor {name} overlaps another", where=where, next=AGAIN)
        start = info.end


def _info(entry: Mapping[str, Any], base: int) -> TensorInfo:
    start, end = entry["data_offsets"]
    return TensorInfo(entry["dtype"], tuple(entry["shape"]), base + start, base + end)


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The header of a file on disk, its size checked against what the header promises. Errors: InputError."""
    where, size = str(path), path.stat().st_size
    with path.open("rb") as f:
        prefix = f.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(MAX_HEADER, size - 8):
            raise InputError(f"not a whole safetensors file ({size} bytes)", where=where, next=AGAIN)
        tensors, metadata = parse_header(f.read(length), where)
    promised = max((info.end for info in tensors.values()), default=8 + length)
    if promised != size:
        state = "truncated" if size < promised else "too long"
        raise InputError(f"{state}: {size} bytes, its header promises {promised}", where=where, next=AGAIN)
    return tensors, metadata


def build_header(
    specs: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorInfo]]:
    """name → (dtype, shape) to header bytes and the place of every tensor, ordered as the safetensors library orders."""
    order = sorted(specs, key=lambda name: (-_RANK[specs[name][0]], name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    places, offset = {}, 0
    for name in order:
        dtype, shape = specs[name]
        end = offset + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        places[name], offset = (dtype, shape, offset, end), end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    infos = {name: TensorInfo(d, s, base + a, base + b) for name, (d, s, a, b) in places.items()}
    return len(text).to_bytes(8, "little") + text, infos


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor as they stand in a file."""
    held = tensor.detach().cpu()
    if held.numel() < 2:  # one element counts as contiguous whatever its stride
        held = held.clone(memory_format=torch.contiguous_format)
    flat = held.contiguous().view(-1).view(torch.uint8)
    return memoryview(flat.numpy().data)


class ShardWriter:
    """One output shard: allocated whole under a temporary name, filled in any order, committed once and durably."""

    def __init__(
        self, path: Path, specs: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        """Errors: UnavailableError when the disk has no room for the whole shard, or the folder refuses it."""
        header, self.places = build_header(specs, metadata)
        self.path, self._draft = path, temporary(path)
        self._open = {name for name, info in self.places.items() if info.nbytes}
        self.size = max((info.end for info in self.places.values()), default=len(header))
        try:
            self._fd = os.open(self._draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            write_point("shard-open")
            _allocate(self._fd, self.size)
            os.pwrite(self._fd, header, 0)
        except OSError as error:
            self.abandon()
            raise disk_error(error, path) from error

    def write(self, name: str, data: memoryview, offset: int = 0) -> None:
        """Put (a piece of) a tensor's bytes in its place; `offset` is the piece's own place within the tensor."""
        place = self.places[name].start + offset
        write_point("tensor")
        try:
            while len(data):
                done = os.pwrite(self._fd, data, place)
                data, place = data[done:], place + done
        except OSError as error:
            raise disk_error(error, self.path) from error
        if place == self.places[name].end:
            self._open.discard(name)

    def copy(self, name: str, source: int, start: int, nbytes: int, offset: int = 0) -> None:
        """`write` of bytes of an open file, without their coming into this process where the kernel can do it."""
        place = self.places[name].start + offset
        write_point("tensor")
        try:
            while nbytes and (done := _copied(source, self._fd, nbytes, start, place)):
                nbytes, start, place = nbytes - done, start + done, place + done
        except OSError as error:
            raise disk_error(error, self.path) from error
        if nbytes:
            raise InputError("a shard of the source became shorter while it was read", where=str(self.path))
        if place == self.places[name].end:
            self._open.discard(name)

    def commit(self) -> str:
        """fsync and hash side by side, for one waits for the disk; then rename onto the final name. Returns the sha256."""
        assert not self._open, f"unwritten tensors: {sorted(self._open)[:3]}"
        try:
            with ThreadPoolExecutor(1) as hashing:
                hashed = hashing.submit(sha256_file, self._draft)
                os.fsync(self._fd)
                digest = hashed.result()
            os.close(self._fd)
            publish_file(self._draft, self.path)
        except OSError as error:
            raise disk_error(error, self.path) from error
        return digest

    def abandon(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(OSError, AttributeError):
            os.close(self._fd)
        self._draft.unlink(missing_ok=True)


def _copied(source: int, target: int, nbytes: int, start: int, place: int) -> int:
    """How many bytes were copied; 0 at the end of the source."""
    try:
        return os.copy_file_range(source, target, nbytes, start, place)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return os.pwrite(target, os.pread(source, min(nbytes, COPIED), start), place)


def to_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """A small file of them, whole."""
    from safetensors.torch import save

    data: bytes = save({name: tensor.contiguous() for name, tensor in sorted(tensors.items())})
    return data


def _allocate(fd: int, size: int) -> None:
    """Reserve the space now: a full disk is found before the work, not after it."""
    try:
        os.posix_fallocate(fd, 0, max(size, 1))
    except OSError as error:
        if error.errno not in (22, 95):  # EINVAL, EOPNOTSUPP: a file system without allocation
            raise
        os.ftruncate(fd, size)
