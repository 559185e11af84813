"""What is to be published, and what that changes at the Hub.

The plan is every file of the artifact with its sha256, as `.quantpub/SHA256SUMS` states it, and that file itself. The
same file, read at the Hub, says which of the repository's files were ours: only those may be changed or deleted. A
file that is not ours, or that somebody changed after us, stops the publication.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from quantpub.artifact import SUMS, Artifact
from quantpub.errors import GateError, InputError
from quantpub.files import sha256_file
from quantpub.publish.refuse import failed_gates, refusals

Action = Literal["add", "update", "unchanged", "delete"]
KEPT_BY_THE_HUB = ".gitattributes"  # written by the Hub when a repository is made; says which files are LFS


@dataclass(frozen=True)
class RemoteFile:
    """A file at the Hub: `sha256` is known when it lies in LFS, else `blob`, git's sha1, is what identifies it."""

    path: str
    size: int
    blob: str
    sha256: str | None


@dataclass(frozen=True)
class LocalFile:
    path: str
    size: int
    sha256: str
    source: Path

    @cached_property
    def blob(self) -> str:
        """git's id of the content: sha1 over `blob <size>\\0` and the bytes."""
        digest = hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)
        with self.source.open("rb") as f:
            while chunk := f.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()

    def is_same_as(self, there: RemoteFile | None) -> bool:
        if there is None or there.size != self.size:
            return False
        return there.sha256 == self.sha256 if there.sha256 else there.blob == self.blob


Plan = Mapping[str, LocalFile]
Tree = Mapping[str, RemoteFile]


@dataclass(frozen=True)
class Change:
    path: str
    action: Action
    size: int


def read_plan(artifact: Artifact) -> dict[str, LocalFile]:
    """Every file to publish. Errors: InputError when something in the artifact may not be, or is damaged; GateError."""
    reasons = refusals(artifact)
    if reasons:
        raise InputError(
            "; ".join(reasons[:10]) + ("; …" if reasons[10:] else ""),
            where=str(artifact.path),
            next="mend or remove what is named, and run the stage that wrote it again",
        )
    if failed := failed_gates(artifact):
        raise GateError(
            "; ".join(failed), where=str(artifact.path), next="choose another recipe: a failed gate is not published"
        )
    damaged = artifact.damage()
    if damaged:
        raise InputError(
            f"differs from {SUMS}: {', '.join(damaged[:10])}",
            where=str(artifact.path),
            next="run the stage that writes these files again: what is published must be what was shown",
        )
    digests = {**artifact.sums(), SUMS: sha256_file(artifact.path / SUMS)}
    return {path: _local(artifact.path / path, path, digest) for path, digest in sorted(digests.items())}


def _local(source: Path, path: str, sha256: str) -> LocalFile:
    return LocalFile(path, source.stat().st_size, sha256, source)


def parse_sums(text: str) -> dict[str, str]:
    """path → sha256 of a SHA256SUMS file; empty when it is not one."""
    pairs = [line.split("  ", 1) for line in text.splitlines()]
    return {pair[1]: pair[0] for pair in pairs} if all(len(pair) == 2 and len(pair[0]) == 64 for pair in pairs) else {}


def compare(plan: Plan, tree: Tree, ours: Mapping[str, str]) -> tuple[Change, ...]:
    """What has to happen to each file for the Hub to hold the plan, and nothing of ours besides."""
    wanted = [Change(path, _action(file, tree.get(path)), file.size) for path, file in plan.items()]
    stale = [Change(path, "delete", tree[path].size) for path in ours if path in tree and path not in plan]
    return tuple(sorted([*wanted, *stale], key=lambda change: change.path))


def _action(file: LocalFile, there: RemoteFile | None) -> Action:
    if there is None:
        return "add"
    return "unchanged" if file.is_same_as(there) else "update"


def foreign(plan: Plan, tree: Tree, ours: Mapping[str, str]) -> list[str]:
    """Files at the Hub that quantpub did not write, except those that are as they would be written."""
    unknown = set(tree) - set(ours) - {KEPT_BY_THE_HUB}
    return sorted(path for path in unknown if path not in plan or not plan[path].is_same_as(tree[path]))


def differences(plan: Plan, tree: Tree) -> list[str]:
    """What is missing, other, or too much at the Hub, measured against the plan; empty when it holds the plan."""
    other = [
        f"{path}: {'differs' if path in tree else 'missing'}"
        for path, file in plan.items()
        if not file.is_same_as(tree.get(path))
    ]
    surplus = set(tree) - set(plan) - {KEPT_BY_THE_HUB}
    return sorted([*other, *(f"{path}: not part of the artifact" for path in surplus)])
