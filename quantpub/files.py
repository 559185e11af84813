"""Durable file operations: everything quantpub leaves on disk is complete or absent.

A file is written under a temporary name beside its target, flushed, fsynced, renamed, and its folder fsynced. The name
starts with `.tmp-`, so that what a killed process left behind is recognised and swept by the next run.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantpub import env
from quantpub.errors import QuantpubError, UnavailableError

TEMPORARY = ".tmp-"
NOT_WRITABLE = (errno.EPERM, errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.EISDIR, errno.EROFS, errno.ENAMETOOLONG)
ANY_STAGE = (
    "free some space and run the same command again",
    "make that folder writable, and run the same command again",
)
QUANTIZING = (f"{ANY_STAGE[0]}: finished shards are kept", "choose a folder you can write to with -o")
_passages: dict[str, int] = {}


def write_point(name: str) -> None:
    """A place where a crash must be survivable. QUANTPUB_CRASH_AT=name:n kills the process on its n-th passage."""
    wanted = env.crash_at()
    if wanted is None:
        return
    _passages[name] = _passages.get(name, 0) + 1
    point, _, count = wanted.rpartition(":")
    if point == name and _passages[name] == int(count):
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def disk_errors(path: Path, advice: tuple[str, str] = QUANTIZING) -> Iterator[None]:
    """Turns an OSError into the one line that says which file, why, and what to do.

    advice: where the disk is full or fails, and where the path cannot be written to.
    """
    try:
        yield
    except OSError as error:
        raise disk_error(error, path, advice) from error


def disk_error(error: OSError, path: Path, advice: tuple[str, str] = QUANTIZING) -> QuantpubError:
    reason = (error.strerror or str(error)).lower()
    again = advice[error.errno in NOT_WRITABLE]
    return UnavailableError(f"cannot write: {reason}", where=str(path), next=again)


def fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def temporary(path: Path) -> Path:
    return path.with_name(TEMPORARY + path.name)


def publish_file(source: Path, target: Path) -> None:
    """Rename a finished, fsynced temporary file onto its name, durably."""
    write_point("rename")
    source.replace(target)
    write_point("renamed")
    fsync_folder(target.parent)


def atomic_write(path: Path, data: bytes) -> None:
    """Write `data` to `path`: afterwards the file is either as before or whole. Errors: UnavailableError."""
    draft = temporary(path)
    with disk_errors(path, ANY_STAGE):
        try:
            with draft.open("wb") as f:
                write_point("write")
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            publish_file(draft, path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


def sha256_file(path: Path) -> str:
    with path.open("rb", buffering=0) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def dump_json(value: Any) -> bytes:
    """JSON as quantpub writes it: two spaces, the order given, one final newline, no NaN."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sweep_temporaries(folder: Path) -> list[str]:
    """Remove what a killed run left half written, below `folder`; the names removed."""
    left = sorted(path for path in folder.rglob(TEMPORARY + "*") if path.is_file())
    for path in left:
        path.unlink()
    return [path.name for path in left]
