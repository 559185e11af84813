"""The Hub's API, reading side: who am I, what is in a repository, at which commit, and since when."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs, urlencode

from quantpub.hub import cards, git
from quantpub.hub.access import Person, require_read, require_write
from quantpub.hub.access import whoami as describe
from quantpub.hub.state import Hub
from quantpub.hub.store import Commit, File, Repo
from quantpub.hub.wire import Refusal, Reply, Request, json_reply


def whoami(hub: Hub, request: Request, person: Person) -> Reply:
    return json_reply(describe(person))


def auth_check(hub: Hub, request: Request, person: Person) -> Reply:
    require_read(person, hub.repo(request.params), content=True)
    return json_reply({})


def auth_check_write(hub: Hub, request: Request, person: Person) -> Reply:
    require_write(person, hub.repo(request.params))
    return json_reply({})


def info(hub: Hub, request: Request, person: Person) -> Reply:
    """A repository at a revision; `expand` asks for single properties, `blobs` for sizes and digests."""
    repo, commit = hub.readable(request, person)
    whole = {**_identity(repo, commit), **_card(hub, commit), "siblings": _siblings(commit, request.flag("blobs"))}
    expand = [*request.query.get("expand", []), *request.query.get("expand[]", [])]
    return json_reply({key: value for key, value in whole.items() if not expand or key in ("_id", "id", *expand)})


def _identity(repo: Repo, commit: Commit) -> dict[str, Any]:
    first, name = min(repo.commits.values(), key=lambda known: known.at), repo.id.removeprefix("datasets/")
    return {
        "_id": name,
        "id": name,
        **({"modelId": name} if name == repo.id else {}),
        "author": name.split("/")[0],
        "sha": commit.oid,
        "createdAt": _time(first.at),
        "lastModified": _time(commit.at),
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
    }


def _card(hub: Hub, commit: Commit) -> dict[str, Any]:
    try:
        data = cards.metadata(hub.store.text(commit, "README.md")) or {}
    except ValueError:
        data = {}
    known = {
        "cardData": data or None,
        "tags": data.get("tags") or [],
        "library_name": data.get("library_name"),
        "pipeline_tag": data.get("pipeline_tag"),
    }
    return {key: value for key, value in known.items() if value is not None}


def _siblings(commit: Commit, blobs: bool) -> list[dict[str, Any]]:
    return [{"rfilename": path, **(_blob(file) if blobs else {})} for path, file in sorted(commit.tree.items())]


def _blob(file: File) -> dict[str, Any]:
    lfs = {"sha256": file.sha256, "size": file.size, "pointerSize": len(git.pointer(file.sha256, file.size))}
    return {"blobId": file.blob, "size": file.size, **({"lfs": lfs} if file.lfs else {})}


def tree(hub: Hub, request: Request, person: Person) -> Reply:
    """The files and folders of a commit, `hub.page_size` at a time; a Link header names the next page."""
    _, commit = hub.readable(request, person)
    entries = _below(hub, commit, request.params.get("path", ""), request.flag("recursive"))
    start = int(request.query.get("cursor", ["0"])[-1])
    end = start + hub.page_size
    link = {"Link": f'<{_next_page(hub, request, end)}>; rel="next"'} if end < len(entries) else {}
    return json_reply(entries[start:end], headers=link)


def _below(hub: Hub, commit: Commit, folder: str, recursive: bool) -> list[dict[str, Any]]:
    folders = git.tree_oids({path: file.blob for path, file in commit.tree.items()})
    if folder not in folders:
        raise Refusal(404, f"{folder} does not exist on this revision", "EntryNotFound")
    found = {path: _file(hub, path, file) for path, file in commit.tree.items()}
    found |= {path: {"type": "directory", "oid": oid, "size": 0, "path": path} for path, oid in folders.items() if path}
    return [
        found[path]
        for path in sorted(found)
        if git.folder_of(path) == folder or (recursive and folder in git.folders_above(path))
    ]


def _file(hub: Hub, path: str, file: File) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "oid": file.blob, "size": file.size, "path": path}
    wrong = path in hub.faults.misreported
    if wrong:
        entry["oid"] = file.blob[::-1]
    if file.lfs:
        sha256 = file.sha256[::-1] if wrong else file.sha256
        entry["lfs"] = {"oid": sha256, "size": file.size, "pointerSize": len(git.pointer(sha256, file.size))}
    return entry


def _next_page(hub: Hub, request: Request, cursor: int) -> str:
    query = {**request.query, "cursor": [str(cursor)]}
    return f"{hub.endpoint}{request.path}?{urlencode(query, doseq=True)}"


def paths_info(hub: Hub, request: Request, person: Person) -> Reply:
    """The named entries that exist; names that do not are left out."""
    _, commit = hub.readable(request, person)
    paths = parse_qs(request.body.read().decode()).get("paths", [])
    return json_reply([_file(hub, path, commit.tree[path]) for path in paths if path in commit.tree])


def refs(hub: Hub, request: Request, person: Person) -> Reply:
    repo, _ = hub.readable(request, person)
    branches, tags = _refs("heads", repo.branches), _refs("tags", repo.tags)
    return json_reply({"branches": branches, "converts": [], "tags": tags, "pullRequests": []})


def _refs(kind: str, targets: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in targets.items()]


def commits(hub: Hub, request: Request, person: Person) -> Reply:
    repo, newest = hub.readable(request, person)
    return json_reply(
        [
            {
                "id": commit.oid,
                "title": commit.title,
                "message": commit.message,
                "date": _time(commit.at),
                "authors": [{"user": commit.author}],
            }
            for commit in repo.history(newest)
        ]
    )


def _time(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
