"""Uploading, and the one commit that makes it visible.

The commit is sent on top of the head that was read at the start, and the Hub refuses it (412) when the head has moved.
Its answer can be lost although it landed, so an error is never taken at its word: the history is read, and a commit on
top of our head that holds exactly the plan is ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from quantpub.errors import ConflictError, UnavailableError
from quantpub.publish import failures
from quantpub.publish.plan import Change, Plan, differences
from quantpub.publish.remote import Remote

Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all
Operation = CommitOperationAdd | CommitOperationDelete
ALONE = 10_000_000  # a file above this is uploaded in a call of its own


def upload(remote: Remote, plan: Plan, changes: Sequence[Change], progress: Progress) -> list[Operation]:
    """Bring every new or changed file to the Hub, the largest first; the operations of the commit."""
    sent = sorted((c for c in changes if c.action in ("add", "update")), key=lambda change: -change.size)
    operations, done, total = [], 0, sum(change.size for change in sent)
    for batch in _batches(sent):
        progress(f"upload {batch[0].path}", done, total)
        additions = [CommitOperationAdd(change.path, plan[change.path].source) for change in batch]
        remote.upload(additions)
        operations += additions
        done += sum(change.size for change in batch)
    progress("uploaded", done, total)
    return [*operations, *(CommitOperationDelete(c.path, is_folder=False) for c in changes if c.action == "delete")]


def _batches(changes: Sequence[Change]) -> list[list[Change]]:
    alone = [[change] for change in changes if change.size > ALONE]
    together = [change for change in changes if change.size <= ALONE]
    return [*alone, together] if together else alone


def land(remote: Remote, plan: Plan, operations: Sequence[Operation], head: str, title: str) -> str:
    """The id of the one commit that holds the plan. Errors: ConflictError when the head moved, UnavailableError."""
    for wait in (*failures.WAITS_S, None):
        try:
            return remote.commit(operations, head, title)
        except (ConflictError, UnavailableError):
            landed = find_landed(remote, plan, head)
            if landed:
                return landed
            if wait is None:
                raise
            time.sleep(wait)
    raise AssertionError("unreachable")


def find_landed(remote: Remote, plan: Plan, head: str) -> str | None:
    """Our commit, if it is there; None when nothing has happened. Errors: ConflictError when something else has."""
    now = remote.head_oid()
    if now == head:
        return None
    since = remote.commits_since(head, now) if now else []
    if since and not differences(plan, remote.tree(since[0])):
        return since[0]
    raise ConflictError(
        "somebody else committed to the repository meanwhile",
        where=remote.url,
        next="look at what was changed there, and run the command again",
    )
