"""What a publication did, or would do: the one object that the command prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantpub.publish.plan import Change
from quantpub.publish.readback import Verified


@dataclass(frozen=True)
class Rehearsal:
    """What a publication to a loopback Hub showed. `identical` of `downloaded` files came back with the same sha256."""

    downloaded: int
    identical: int
    commits: int
    second_changed: bool
    requests: int

    def as_json(self) -> dict[str, Any]:
        return {
            "downloaded": self.downloaded,
            "identical": self.identical,
            "commits": self.commits,
            "second": {"changed": self.second_changed},
            "requests": self.requests,
        }


@dataclass(frozen=True)
class PublishResult:
    """`changed`: a commit was made. `bytes_sent`: the size of all new and changed files, in a dry run too.
    `commit` and `verified` are None in a dry run of a repository that does not exist, or was not read back."""

    repo: str
    url: str
    commit: str | None
    changed: bool
    private: bool
    dry_run: bool
    files: tuple[Change, ...]
    bytes_sent: int
    tag: str | None = None
    warnings: tuple[str, ...] = ()
    verified: Verified | None = None
    rehearsal: Rehearsal | None = None

    def as_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {
            "repo": self.repo,
            "url": self.url,
            "commit": self.commit,
            "changed": self.changed,
            "private": self.private,
            "dry_run": self.dry_run,
            "tag": self.tag,
            "files": [{"path": file.path, "action": file.action, "size": file.size} for file in self.files],
            "bytes_sent": self.bytes_sent,
            "warnings": list(self.warnings),
            "verified": self.verified.as_json() if self.verified else None,
        }
        return {**value, "rehearsal": self.rehearsal.as_json()} if self.rehearsal else value
