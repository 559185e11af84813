"""One commit: a list of operations, one JSON object a line, that lands whole or not at all.

    {"key": "header", "value": {"summary", "description", "parentCommit"?}}        first, and once
    {"key": "file", "value": {"path", "content", "encoding": "base64"}}
    {"key": "lfsFile", "value": {"path", "algo": "sha256", "oid", "size"?}}        a copy leaves out the size
    {"key": "deletedFile" | "deletedFolder", "value": {"path"}}

`parentCommit` is a lock: when the branch has moved on, the answer is 412. An `lfsFile` may name only an object that was
uploaded to this repository before.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from typing import Any

from quantpub.hub import cards, git
from quantpub.hub.access import Person, require_write
from quantpub.hub.attributes import REGULAR_LIMIT
from quantpub.hub.state import Hub, revision
from quantpub.hub.store import Commit, File, Repo, lfs_file
from quantpub.hub.wire import Refusal, Reply, Request, json_reply

Tree = dict[str, File]
_PART = re.compile(r"(?!\.{1,2}$)(?!\.(?:git|cache)$)[^/\\\0]+")


def commit(hub: Hub, request: Request, person: Person) -> Reply:
    repo = require_write(person, hub.repo(request.params))
    header, operations = _parse(request.body.read())
    with repo.lock:
        head = _lock(repo, request.params["rev"], header.get("parentCommit"))
        tree = dict(head.tree)
        for key, value in operations:
            _OPERATIONS[key](hub, repo, tree, value)
        _require_sound(hub, tree)
        title, message = str(header.get("summary")), str(header.get("description", ""))
        made = repo.commit(request.params["rev"], tree, title, message, author=person.name)
    url = f"{hub.endpoint}/{repo.id}/commit/{made.oid}"
    return json_reply({"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""})


def _parse(body: bytes) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    try:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        pairs = [(line["key"], line["value"]) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise Refusal(400, f"Invalid commit payload: {error}") from None
    if not pairs or pairs[0][0] != "header" or not pairs[0][1].get("summary"):
        raise Refusal(400, "The first line of a commit must be its header, with a summary")
    unknown = [key for key, _ in pairs[1:] if key not in _OPERATIONS]
    if unknown:
        raise Refusal(400, f"Unknown operation: {unknown[0]}")
    return pairs[0][1], pairs[1:]


def _lock(repo: Repo, branch: str, parent: str | None) -> Commit:
    if branch not in repo.branches:
        raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    head = revision(repo, branch)
    if parent is not None and not (len(parent) >= 5 and head.oid.startswith(parent.lower())):
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    return head


def _add_file(hub: Hub, repo: Repo, tree: Tree, value: Mapping[str, Any]) -> None:
    path = _path(value)
    try:
        content = base64.b64decode(value["content"], validate=True)
    except (KeyError, binascii.Error) as error:
        raise Refusal(400, f"{path}: invalid base64 content: {error}") from None
    if len(content) > REGULAR_LIMIT:
        raise Refusal(400, f"{path}: files over 10 MB must be uploaded as LFS")
    tree[path] = hub.store.blobs.regular_file(hub.store.blobs.write([content]))


def _add_lfs(hub: Hub, repo: Repo, tree: Tree, value: Mapping[str, Any]) -> None:
    path, oid = _path(value), str(value.get("oid"))
    if value.get("algo") != "sha256" or oid not in repo.objects:
        raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path}")
    size = hub.store.blobs.path(oid).stat().st_size
    if value.get("size", size) != size:
        raise Refusal(400, f"LFS pointer of {path} states {value['size']} bytes, the object has {size}")
    tree[path] = lfs_file(oid, size)


def _delete_file(hub: Hub, repo: Repo, tree: Tree, value: Mapping[str, Any]) -> None:
    if tree.pop(_path(value), None) is None:
        raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")


def _delete_folder(hub: Hub, repo: Repo, tree: Tree, value: Mapping[str, Any]) -> None:
    below = [path for path in tree if path.startswith(_path(value) + "/")]
    if not below:
        raise Refusal(404, "A folder with this name doesn't exist", "EntryNotFound")
    for path in below:
        del tree[path]


_OPERATIONS = {"file": _add_file, "lfsFile": _add_lfs, "deletedFile": _delete_file, "deletedFolder": _delete_folder}


def _path(value: Mapping[str, Any]) -> str:
    path = str(value.get("path", "")).rstrip("/")
    if not all(_PART.fullmatch(part) for part in path.split("/")):
        raise Refusal(400, f"Invalid path: {path!r}")
    return path


def _require_sound(hub: Hub, tree: Tree) -> None:
    """No path is both a file and a folder, and the card can be read."""
    clashes = {folder for path in tree for folder in git.folders_above(path)} & set(tree)
    if clashes:
        raise Refusal(400, f"Both a file and a folder: {min(clashes)}")
    if "README.md" in tree:
        errors = cards.judge(hub.store.blobs.read(tree["README.md"].sha256).decode("utf-8", "replace"))["errors"]
        if errors:
            raise Refusal(400, f"Invalid metadata in README.md: {errors[0]['message']}")
