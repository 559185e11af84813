"""Where a checkpoint lies: a local folder, or a Hub repository at one pinned commit.

Both answer the same four questions: which files there are, where one is on disk (a Hub file is fetched when asked for),
what a shard's header says (on a Hub without fetching its weights), and who this source is. The Hub's is in `hub_source`.
"""

from __future__ import annotations

import errno
import hashlib
import json
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
from quantpub.files import ANY_STAGE, NOT_WRITABLE, disk_error, sha256_file
from quantpub.ranges import is_transport
from quantpub.shards import TensorInfo, read_header

Header = tuple[dict[str, TensorInfo], dict[str, str]]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SAMPLES, SAMPLE = 16, 64 << 10
DISK = (*NOT_WRITABLE, errno.ENOSPC, errno.EDQUOT, errno.EIO)


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
    def state(self, shard: str) -> str: ...
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

    def state(self, shard: str) -> str:
        """Which file it is, and when it was last written: another after every change, and of every copy."""
        with read_errors(self.path(shard)):
            found = self.path(shard).stat()
        return hashlib.sha256(f"{found.st_ino} {found.st_size} {found.st_mtime_ns}".encode()).hexdigest()

    def header(self, name: str) -> Header:
        with read_errors(self.path(name)):
            return read_header(self.path(name))

    def span(self, name: str, start: int, nbytes: int) -> memoryview:
        """So many bytes of a file. Errors: InputError when it ends before."""
        return read_span(self.path(name), start, nbytes, self.where(name))

    def is_link(self, name: str) -> bool:
        """Links that the Hub's client made, into its own cache, are not counted."""
        path, repo = self.path(name), cached_repo(self.folder)
        return path.is_symlink() and (repo is None or path.resolve().parent != (repo / "blobs").resolve())

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
    """A folder's name; of a snapshot in the Hub's cache the model's."""
    repo = cached_repo(folder)
    return repo.name.rpartition("--")[2] if repo else folder.resolve().name


def cached_repo(folder: Path) -> Path | None:
    """The folder in the Hub's cache whose snapshot this is (models--OWNER--NAME/snapshots/COMMIT); None of any other."""
    above = folder.absolute().parent
    return above.parent if above.name == "snapshots" and above.parent.name.startswith("models--") else None


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


def open_source(model: str, revision: str | None, whole: bool = True) -> Source:
    """A folder when one of that name exists, else a Hub id. whole: see `hub_source`.

    Errors: InputError, AuthError, UnavailableError.
    """
    folder = Path(model)
    if folder.is_dir():
        if revision:
            raise InputError("--revision goes with a Hub id, not with a local folder", where=model)
        if not os.access(folder, os.R_OK | os.X_OK):
            raise InputError("the folder cannot be read: permission denied", where=model, next="check its permissions")
        return LocalSource(folder)
    if folder.exists() or model.startswith((".", "/", "~")) or not HUB_ID.fullmatch(model):
        raise InputError("no such folder", where=model, next="name a checkpoint's folder, or a Hub id like owner/name")
    from quantpub.hub_source import HubSource

    return HubSource(model, revision, whole)


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
    ask = "ask for it on its page, then `hf auth login`"
    kinds: list[tuple[type[Exception], QuantpubError]] = [
        (hub.GatedRepoError, AuthError("access to this model must be granted first", where=repo, next=ask)),
        (
            hub.RepositoryNotFoundError,
            AuthError("no such model on the Hub, or no right to read it", where=repo, next=login),
        ),
        (hub.RevisionNotFoundError, InputError(f"no revision {revision!r}", where=repo, next="check --revision")),
        (hub.LocalEntryNotFoundError, _silent("the Hub did not answer", repo)),  # nor does the cache hold it
        (hub.EntryNotFoundError, InputError("a file is missing from the repository", where=repo)),
        (hub.HFValidationError, InputError("not a Hub id", where=repo, next="name one like owner/name")),
        (
            hub.OfflineModeIsEnabled,
            UnavailableError("HF_HUB_OFFLINE is set", where=repo, next="unset it, or name a local folder"),
        ),
        (json.JSONDecodeError, _silent("what answered is not a Hub", repo)),
    ]
    for kind, mapped in kinds:
        if isinstance(error, kind):
            return mapped
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return AuthError("the Hub refused the token", where=repo, next=login)
    if isinstance(error, OSError) and error.errno in DISK:
        return disk_error(error, Path(error.filename or repo), ANY_STAGE)
    if isinstance(error, OSError) or is_transport(error):
        said = f"the Hub answered {status}" if status else f"the Hub did not answer ({type(error).__name__})"
        return _silent(said, repo)
    return None


def _silent(what: str, repo: str) -> UnavailableError:
    return UnavailableError(what, where=repo, next="check the network and HF_ENDPOINT, and run the same command again")
