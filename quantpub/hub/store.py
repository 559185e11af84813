"""What the Hub holds: content by its sha256 on disk, and repositories whose commits name content.

Content is written once, under its own digest, and read from there; a folder that is already on disk is referred to in
place, never copied. A commit is a complete `path → File` mapping. Nothing here speaks HTTP or knows who asks.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from quantpub.files import sha256_file
from quantpub.hub import git
from quantpub.hub.attributes import GITATTRIBUTES, SAMPLE, is_lfs, lfs_patterns

EPOCH = 1767225600  # 2026-01-01, the time of a first commit; each is a second after the last, so ids are reproducible


@dataclass(frozen=True)
class File:
    """One file of a tree. `blob` is git's id: of the content, or of the pointer when the content lies in LFS."""

    sha256: str
    size: int
    blob: str
    lfs: bool

    @property
    def etag(self) -> str:
        """What identifies the content to a client: the sha256 in LFS, git's sha1 otherwise."""
        return self.sha256 if self.lfs else self.blob


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    tree: Mapping[str, File]
    title: str
    message: str
    author: str
    at: int


class DigestMismatch(Exception):
    """The bytes that arrived are not those that were announced."""


class Blobs:
    """Content by sha256: files under one folder, and files elsewhere that were hashed and are referred to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._elsewhere: dict[str, Path] = {}

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._elsewhere or (self.folder / sha256).is_file()

    def path(self, sha256: str) -> Path:
        return self._elsewhere.get(sha256) or self.folder / sha256

    def refer(self, path: Path) -> str:
        """Hash a file that stays where it is; its sha256."""
        sha256 = sha256_file(path)
        self._elsewhere[sha256] = path
        return sha256

    def write(self, chunks: Iterable[bytes], sha256: str | None = None, size: int | None = None) -> str:
        """Take content in pieces, hashing them as they arrive; its sha256. Errors: DigestMismatch."""
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".tmp-", delete=False) as draft:
            try:
                found, length = _copy(chunks, draft.file)
                if sha256 not in (None, found) or size not in (None, length):
                    raise DigestMismatch(f"expected {sha256} of {size} bytes, received {found} of {length} bytes")
                if found not in self._elsewhere:
                    draft.flush()
                    Path(draft.name).replace(self.folder / found)
            finally:
                Path(draft.name).unlink(missing_ok=True)
        return found

    def read(self, sha256: str) -> bytes:
        return self.path(sha256).read_bytes()

    def file(self, sha256: str, path: str, patterns: list[str]) -> File:
        """The tree entry of stored content, in LFS or not as `path`, size and first bytes say."""
        with self.path(sha256).open("rb") as f:
            sample = f.read(SAMPLE)
        size = self.path(sha256).stat().st_size
        return lfs_file(sha256, size) if is_lfs(path, size, sample, patterns) else self.regular_file(sha256)

    def regular_file(self, sha256: str) -> File:
        content = self.read(sha256)
        return File(sha256, len(content), git.blob_oid(content), lfs=False)


def _copy(chunks: Iterable[bytes], target: IO[bytes]) -> tuple[str, int]:
    digest, length = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        length += len(chunk)
        target.write(chunk)
    return digest.hexdigest(), length


def lfs_file(sha256: str, size: int) -> File:
    return File(sha256, size, git.blob_oid(git.pointer(sha256, size)), lfs=True)


@dataclass
class Repo:
    """One repository. `objects` are the LFS objects that were uploaded to it: a commit may name no others."""

    id: str
    private: bool = False
    gated: str | bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    objects: set[str] = field(default_factory=set)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def resolve(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag or a full commit id names."""
        name = "main" if revision == "HEAD" else revision
        oid = self.branches.get(name) or self.tags.get(name) or name
        return self.commits.get(oid)

    def commit(self, branch: str, tree: Mapping[str, File], title: str, message: str = "", *, author: str) -> Commit:
        """Put a commit on top of `branch`, which begins here when it is new."""
        parent, at = self.branches.get(branch), EPOCH + len(self.commits)
        root = git.tree_oids({path: file.blob for path, file in tree.items()})[""]
        oid = git.commit_oid(root, parent, author, at, f"{title}\n\n{message}")
        self.commits[oid] = Commit(oid, parent, dict(tree), title, message, author, at)
        self.branches[branch] = oid
        return self.commits[oid]

    def history(self, commit: Commit) -> Iterator[Commit]:
        """The commit and its ancestors, newest first."""
        step: Commit | None = commit
        while step:
            yield step
            step = self.commits[step.parent] if step.parent else None


class Store:
    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.blobs = Blobs(folder)
        self.repos: dict[str, Repo] = {}
        self.lock = threading.Lock()

    def create(self, repo_id: str, private: bool, gated: str | bool = False) -> Repo | None:
        """A new repository with its first commit; None when the name is taken."""
        with self.lock:
            if repo_id in self.repos:
                return None
            repo = Repo(repo_id, private, gated)
            attributes = self.blobs.regular_file(self.blobs.write([GITATTRIBUTES]))
            repo.commit("main", {".gitattributes": attributes}, "initial commit", author="system")
            self.repos[repo_id] = repo
            return repo

    def text(self, commit: Commit, path: str) -> str:
        """A small text file of a commit; "" when it is not there."""
        file = commit.tree.get(path)
        return self.blobs.read(file.sha256).decode("utf-8", "replace") if file else ""

    def attributes(self, commit: Commit) -> list[str]:
        return lfs_patterns(self.text(commit, ".gitattributes"))
