"""Where a checkpoint lies: a local folder, or a Hub repository at one pinned commit.

Both answer the same four questions: which files there are, where one is on disk (a Hub file is fetched when asked for),
what a shard's header says (on a Hub by range requests, without its weights), and who this source is.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

from quantpub.errors import AuthError, InputError, QuantpubError, UnavailableError
from quantpub.files import sha256_file
from quantpub.shards import TensorInfo, parse_header, read_header

Header = tuple[dict[str, TensorInfo], dict[str, str]]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SAMPLES, SAMPLE = 16, 64 << 10
SPAN = 1 << 18  # bytes that a range request reads beyond what was asked: the next small tensor is there, too
TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2")  # huggingface_hub 1 and 2 raise these as they are


class Source(Protocol):
    """label: what a user calls it. files: name → size."""

    @property
    def label(self) -> str: ...
    @property
    def files(self) -> dict[str, int]: ...
    def path(self, name: str) -> Path: ...
    def read(self, name: str) -> bytes: ...
    def header(self, name: str) -> Header: ...
    def span(self, name: str, start: int, nbytes: int) -> memoryview: ...
    def where(self, name: str) -> str: ...
    def fingerprint(self, shard: str) -> str: ...
    def sha256(self, shard: str) -> str: ...
    def identity(self) -> dict[str, Any]: ...


class LocalSource:
    def __init__(self, folder: Path) -> None:
        self.folder, self.label = folder, str(folder)

    @cached_property
    def files(self) -> dict[str, int]:
        found = (path for path in self.folder.rglob("*") if path.is_file())
        sizes = {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in found}
        return {name: size for name, size in sorted(sizes.items()) if not name.startswith(".git/")}

    def path(self, name: str) -> Path:
        return self.folder / name

    def read(self, name: str) -> bytes:
        with read_errors(self.path(name)):
            return self.path(name).read_bytes()

    def sha256(self, shard: str) -> str:
        """Of the whole file, read now."""
        with read_errors(self.path(shard)):
            return sha256_file(self.path(shard))

    def header(self, name: str) -> Header:
        with read_errors(self.path(name)):
            return read_header(self.path(name))

    def span(self, name: str, start: int, nbytes: int) -> memoryview:
        """So many bytes of a file. Errors: InputError when it ends before."""
        return read_span(self.path(name), start, nbytes, self.where(name))

    def where(self, name: str) -> str:
        return str(self.folder / name)

    def fingerprint(self, shard: str) -> str:
        """Digest of a shard's size and of blocks sampled across it: cheap, and different for retrained weights."""
        path, size = self.path(shard), self.files[shard]
        digest = hashlib.sha256(str(size).encode())
        with read_errors(path), path.open("rb", buffering=0) as f:
            for i in range(SAMPLES):
                f.seek(max(0, size - SAMPLE) * i // (SAMPLES - 1))
                digest.update(f.read(SAMPLE))
        return digest.hexdigest()

    def identity(self) -> dict[str, Any]:
        """The folder's own name, not its path: nothing local goes into an artifact."""
        card = self.read("README.md").decode("utf-8", "replace") if "README.md" in self.files else ""
        return {"kind": "local", "name": _own_name(self.folder.absolute()), **licence(front_matter(card))}


def _own_name(folder: Path) -> str:
    """A folder's name; of a snapshot in the Hub's cache (models--OWNER--NAME/snapshots/COMMIT) the model's."""
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.resolve().name


class HubSource:
    def __init__(self, repo: str, revision: str | None) -> None:
        from huggingface_hub import HfApi

        self._api = HfApi(library_name="quantpub")
        with hub_errors(repo, revision):
            self._info = self._api.model_info(repo, revision=revision, files_metadata=True)
        self.repo, self.label = repo, f"{repo}@{self.commit[:7]}"
        self.fetched = 0  # bytes of weights that were asked for by range
        self._open: dict[str, Any] = {}

    @property
    def commit(self) -> str:
        return str(self._info.sha)

    @cached_property
    def files(self) -> dict[str, int]:
        entries = sorted(self._info.siblings or [], key=lambda entry: entry.rfilename)
        return {entry.rfilename: entry.size or 0 for entry in entries if entry.rfilename != ".gitattributes"}

    def path(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        with hub_errors(self.repo, self.commit):
            return Path(hf_hub_download(self.repo, name, revision=self.commit, library_name="quantpub"))

    def read(self, name: str) -> bytes:
        return self.path(name).read_bytes()

    def sha256(self, shard: str) -> str:
        """As the Hub states it; of a file that is not in LFS, computed."""
        entry = self._entry(shard)
        return str(entry.lfs.sha256) if entry.lfs else sha256_file(self.path(shard))

    def header(self, name: str) -> Header:
        """By two range requests: 8 bytes of length, then the header. The size is checked against the repository's."""
        from huggingface_hub import HfFileSystem

        with hub_errors(self.repo, self.commit):
            f = HfFileSystem().open(f"{self.repo}/{name}", revision=self.commit, block_size=1 << 20)
            with f:
                length = int.from_bytes(f.read(8), "little")
                tensors, metadata = parse_header(f.read(length), self.where(name))
        promised = max((info.end for info in tensors.values()), default=8 + length)
        if promised != self.files[name]:
            raise InputError(
                f"truncated: {self.files[name]} bytes, its header promises {promised}", where=self.where(name)
            )
        return tensors, metadata

    def span(self, name: str, start: int, nbytes: int) -> memoryview:
        """By a range request, unless the file lies in the cache already."""
        from huggingface_hub import HfFileSystem, try_to_load_from_cache

        if isinstance(held := try_to_load_from_cache(self.repo, name, revision=self.commit), str):
            return read_span(Path(held), start, nbytes, self.where(name))
        with hub_errors(self.repo, self.commit):
            if name not in self._open:
                path = f"{self.repo}/{name}"
                self._open[name] = HfFileSystem().open(
                    path, revision=self.commit, block_size=SPAN, cache_type="readahead"
                )
            self._open[name].seek(start)
            data = self._open[name].read(nbytes)
        self.fetched += nbytes
        if len(data) < nbytes:
            raise InputError("the file ends before its header says", where=self.where(name))
        return memoryview(bytearray(data))

    def where(self, name: str) -> str:
        return f"{self.label}/{name}"

    def fingerprint(self, shard: str) -> str:
        entry = self._entry(shard)
        return str(entry.lfs.sha256) if entry.lfs else str(entry.blob_id)

    def _entry(self, name: str) -> Any:
        return next(entry for entry in self._info.siblings or [] if entry.rfilename == name)

    def identity(self) -> dict[str, Any]:
        card = self._info.card_data.to_dict() if self._info.card_data else {}
        return {
            "kind": "hub",
            "repo": self.repo,
            "commit": self.commit,
            "gated": bool(self._info.gated),
            **licence(card),
        }


def licence(card: Mapping[str, Any]) -> dict[str, Any]:
    """What a model card's metadata says of licence and language; nothing where it says nothing."""
    return {key: card[key] for key in ("license", "license_name", "license_link", "language") if card.get(key)}


def front_matter(text: str) -> dict[str, Any]:
    """The YAML block that a model card begins with; empty when there is none or it is not valid."""
    block = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    try:
        value = yaml.safe_load(block[1]) if block else None
    except yaml.YAMLError:
        value = None
    return value if isinstance(value, dict) else {}


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """A local file that cannot be read, as one line."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(
            f"cannot be read: {reason}", where=str(path), next="check the file and its permissions"
        ) from None


def read_span(path: Path, start: int, nbytes: int, where: str) -> memoryview:
    """Bytes of a local file, in memory of their own. Errors: InputError when it ends before."""
    data = memoryview(torch.empty(nbytes, dtype=torch.uint8).numpy().data)
    with read_errors(path), path.open("rb", buffering=0) as f:
        f.seek(start)
        done = 0
        while done < nbytes and (got := f.readinto(data[done:])):
            done += got
    if done < nbytes:
        raise InputError("the shard is shorter than its header says", where=where)
    return data


def open_source(model: str, revision: str | None) -> Source:
    """A folder when one of that name exists, else a Hub id. Errors: InputError, AuthError, UnavailableError."""
    folder = Path(model)
    if folder.is_dir():
        if revision:
            raise InputError("--revision goes with a Hub id, not with a local folder", where=model)
        if not os.access(folder, os.R_OK | os.X_OK):
            raise InputError("the folder cannot be read: permission denied", where=model, next="check its permissions")
        return LocalSource(folder)
    if folder.exists() or model.startswith((".", "/", "~")) or not HUB_ID.fullmatch(model):
        raise InputError("no such folder", where=model, next="name a checkpoint's folder, or a Hub id like owner/name")
    return HubSource(model, revision)


@contextmanager
def hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """huggingface_hub's exceptions as quantpub's: what, where, what to do next."""
    try:
        yield
    except QuantpubError:
        raise
    except Exception as error:
        raise _hub_error(error, repo, revision) or error from error


def _hub_error(error: Exception, repo: str, revision: str | None) -> QuantpubError | None:
    from huggingface_hub import errors as hub

    login = "check the name, or `hf auth login`"
    kinds: list[tuple[type[Exception], QuantpubError]] = [
        (
            hub.GatedRepoError,
            AuthError(
                "access to this model must be granted first",
                where=repo,
                next="ask for it on its page, then `hf auth login`",
            ),
        ),
        (
            hub.RepositoryNotFoundError,
            AuthError("no such model on the Hub, or no right to read it", where=repo, next=login),
        ),
        (hub.RevisionNotFoundError, InputError(f"no revision {revision!r}", where=repo, next="check --revision")),
        (hub.EntryNotFoundError, InputError("a file is missing from the repository", where=repo)),
        (
            hub.OfflineModeIsEnabled,
            UnavailableError("HF_HUB_OFFLINE is set", where=repo, next="unset it, or name a local folder"),
        ),
    ]
    for kind, mapped in kinds:
        if isinstance(error, kind):
            return mapped
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        return AuthError("the Hub refused the token", where=repo, next=login)
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in TRANSPORTS:
        return UnavailableError(
            f"the Hub did not answer ({type(error).__name__})",
            where=repo,
            next="check the network and HF_ENDPOINT, and run the same command again",
        )
    return None
