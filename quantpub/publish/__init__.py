"""Publish an artifact to the Hugging Face Hub: everything in one commit, or nothing.

    plan       every file and its sha256; refused: damage, pickles, code, links, secrets, local paths     plan, refuse
    look       does the repository exist, may the token write, is it as public as was asked, whose files  remote
    card       the Hub's own judgement of the metadata, before anything is uploaded
    upload     content that the Hub does not have, the largest first; nothing shows yet                   landing
    commit     one, on top of the head that was looked at; after an error the history says what happened  landing
    read back  tree, digests, safetensors headers, card: what the Hub holds is the plan                   readback
    tag, and only then, if it was asked for, make it public

A file that quantpub did not write is never touched, nor one that was changed at the Hub since: exit code 5. The same
artifact a second time makes no commit. Nothing is written into the artifact. `rehearse` does all of this against a
loopback Hub and downloads it again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from quantpub.artifact import SUMS, Artifact
from quantpub.errors import ConflictError, QuantpubError
from quantpub.publish.landing import Progress, land, upload
from quantpub.publish.plan import Change, Plan, compare, foreign, read_plan
from quantpub.publish.readback import read_back
from quantpub.publish.refuse import CARD
from quantpub.publish.remote import Head, Remote
from quantpub.publish.result import PublishResult, Rehearsal

__all__ = ["Progress", "PublishResult", "Rehearsal", "publish", "rehearse"]


def _silent(what: str, done: int, total: int) -> None:
    """No progress is shown."""


def publish(
    artifact: Artifact,
    repo_id: str,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    private: bool = True,
    tag: str | None = None,
    dry_run: bool = False,
    progress: Progress = _silent,
) -> PublishResult:
    """Make the repository hold exactly the artifact. `endpoint`, `token`: default to what `hf` uses.

    A repository is always made private; with `private=False` it becomes public after it was read back.
    Errors: InputError, AuthError, ConflictError, UnavailableError. Running it again after any of them is safe.
    """
    plan = read_plan(artifact)
    remote = Remote(repo_id, endpoint, token)
    head = look(remote, plan, private)
    warnings = remote.validate_card((artifact.path / CARD).read_text("utf-8"))
    changes = compare(plan, head.tree, head.ours) if head else compare(plan, {}, {})
    changed = any(change.action != "unchanged" for change in changes)
    _require_free_tag(remote, tag, head, changed)
    commit, verified = (head.oid if head else None), None
    if not dry_run:
        head = head or _created(remote, plan, private)
        commit = _commit(remote, plan, changes, head, progress) if changed else head.oid
        verified = read_back(remote, plan, commit)
        _name_and_show(remote, commit, tag, public=head.private and not private)
    sent = sum(change.size for change in changes if change.action in ("add", "update"))
    return PublishResult(
        repo_id,
        remote.url,
        commit,
        changed and not dry_run,
        private,
        dry_run,
        changes,
        sent,
        tag,
        tuple(warnings),
        verified,
    )


def look(remote: Remote, plan: Plan, private: bool) -> Head | None:
    """The head to build on; None when there is no repository. Errors: AuthError, ConflictError."""
    head = remote.head()
    remote.require_write(exists=head is not None)
    if head is None:
        return None
    if private and not head.private:
        raise ConflictError(
            "the repository is public, and a private one was asked for",
            where=remote.url,
            next="make it private in its settings there, or publish with --public",
        )
    theirs = [*foreign(plan, head.tree, head.ours), *_edited(remote, plan, head)]
    if theirs:
        raise ConflictError(
            f"holds what quantpub did not write: {', '.join(theirs[:10])}",
            where=remote.url,
            next="publish to a repository of its own, or remove these files there",
        )
    return head


def _edited(remote: Remote, plan: Plan, head: Head) -> list[str]:
    """Files of ours that would be replaced, but are no longer as we wrote them."""
    at_stake = [c.path for c in compare(plan, head.tree, head.ours) if c.action in ("update", "delete")]
    return [
        f"{path} (changed since)"
        for path in at_stake
        if path in head.ours and path != SUMS and _sha256_at(remote, head, path) != head.ours[path]
    ]


def _sha256_at(remote: Remote, head: Head, path: str) -> str:
    """Of a file at the Hub; one outside LFS is small, and is read."""
    return head.tree[path].sha256 or hashlib.sha256(remote.read(path, head.oid)).hexdigest()


def _require_free_tag(remote: Remote, tag: str | None, head: Head | None, changed: bool) -> None:
    target = remote.tag_target(tag) if tag and head else None
    if target and head and (changed or target != head.oid):
        raise ConflictError(
            f"the tag {tag} names another commit, {target[:7]}",
            where=remote.url,
            next="choose a new tag: a published one is not moved",
        )


def _created(remote: Remote, plan: Plan, private: bool) -> Head:
    remote.create()
    head = look(remote, plan, private)
    if head is None:
        raise QuantpubError("the Hub does not show the repository that it made", where=remote.url)
    return head


def _commit(remote: Remote, plan: Plan, changes: Sequence[Change], head: Head, progress: Progress) -> str:
    operations = upload(remote, plan, changes, progress)
    return land(remote, plan, operations, head.oid, f"Publish {remote.repo_id.split('/')[-1]} with quantpub")


def _name_and_show(remote: Remote, commit: str, tag: str | None, *, public: bool) -> None:
    if tag:
        remote.tag(tag, commit)
    if public:
        remote.make_public()


def rehearse(artifact: Artifact, repo_id: str) -> PublishResult:
    """Publish to a loopback Hub with the real client, download it again, publish a second time. See rehearsal.py."""
    from quantpub.publish.rehearsal import rehearse as run  # imports the Hub, which only a rehearsal needs

    return run(artifact, repo_id)
