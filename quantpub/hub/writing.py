"""The Hub's API, writing side: repositories, visibility, cards, tags and branches. Commits are in committing.py."""

from __future__ import annotations

import base64
import re

from quantpub.hub import cards
from quantpub.hub.access import Person, may_write, require_token, require_write
from quantpub.hub.attributes import ignore_patterns, is_lfs, matches
from quantpub.hub.state import Hub, revision
from quantpub.hub.store import Repo
from quantpub.hub.wire import Refusal, Reply, Request, json_reply

_NAME = re.compile(r"(?!.*(?:--|\.\.))(?!.*(?:\.git|[-.])$)[\w.-]{1,96}")
FILES_PER_CALL = 256


def create(hub: Hub, request: Request, person: Person) -> Reply:
    """A new repository; 409 with its address when the name is taken."""
    asked = request.json()
    require_token(person)
    if not may_write(person):
        raise Refusal(403, "You don't have the rights to create a model under this namespace")
    if asked.get("type", "model") != "model":
        raise Refusal(400, "This Hub takes models only")
    repo_id = f"{asked.get('organization') or person.name}/{_name(asked.get('name'))}"
    address = {"url": f"{hub.endpoint}/{repo_id}", "name": repo_id}
    if hub.store.create(repo_id, _private(asked.get("visibility"), bool(asked.get("private", False)))):
        return json_reply({**address, "id": repo_id})
    message = "You already created this model repo"
    return json_reply({**address, "error": message}, 409, {"X-Error-Message": message})


def _name(name: object) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise Refusal(400, f"Invalid repository name: {name}")
    return name


def _private(visibility: object, otherwise: bool) -> bool:
    if visibility not in (None, "public", "private"):
        raise Refusal(400, f"Invalid visibility: {visibility}")
    return otherwise if visibility is None else visibility == "private"


def settings(hub: Hub, request: Request, person: Person) -> Reply:
    repo, asked = require_write(person, hub.repo(request.params)), request.json()
    repo.private = _private(asked.get("visibility"), bool(asked.get("private", repo.private)))
    repo.gated = asked.get("gated", repo.gated)
    return json_reply({"visibility": "private" if repo.private else "public", "gated": repo.gated})


def validate_yaml(hub: Hub, request: Request, person: Person) -> Reply:
    verdict = cards.judge(str(request.json().get("content", "")))
    return json_reply(verdict, 400 if verdict["errors"] else 200)


def preupload(hub: Hub, request: Request, person: Person) -> Reply:
    """For each file that is to come: LFS or regular, ignored or not, and what the head holds under its name."""
    repo = require_write(person, hub.repo(request.params))
    asked, head = request.json(), revision(repo, request.params["rev"])
    if len(asked["files"]) > FILES_PER_CALL:
        raise Refusal(413, f"Too many files: at most {FILES_PER_CALL} a call")
    patterns = hub.store.attributes(head)
    ignored = ignore_patterns(asked.get("gitIgnore") or hub.store.text(head, ".gitignore"))

    def answer(path: str, size: int, sample: str) -> dict[str, object]:
        mode = "lfs" if is_lfs(path, size, base64.b64decode(sample), patterns) else "regular"
        known = {"oid": head.tree[path].etag} if path in head.tree else {}
        skip = path in hub.faults.ignored or matches(path, ignored)
        return {"path": path, "uploadMode": mode, "shouldIgnore": skip, **known}

    files = [answer(file["path"], file["size"], file["sample"]) for file in asked["files"]]
    return json_reply({"files": files, "commitOid": head.oid})


def tag(hub: Hub, request: Request, person: Person) -> Reply:
    repo = require_write(person, hub.repo(request.params))
    target, name = revision(repo, request.params["rev"]), str(request.json()["tag"])
    return _new_ref(repo, repo.tags, name, target.oid, "Tag reference exists already.")


def delete_tag(hub: Hub, request: Request, person: Person) -> Reply:
    repo = require_write(person, hub.repo(request.params))
    if repo.tags.pop(request.params["ref"], None) is None:
        raise Refusal(404, "Tag not found", "RevisionNotFound")
    return json_reply({})


def branch(hub: Hub, request: Request, person: Person) -> Reply:
    repo = require_write(person, hub.repo(request.params))
    start = revision(repo, str(request.json().get("startingPoint") or "main"))
    return _new_ref(repo, repo.branches, request.params["ref"], start.oid, "Reference already exists")


def _new_ref(repo: Repo, refs: dict[str, str], name: str, target: str, taken: str) -> Reply:
    with repo.lock:
        if name in refs:
            raise Refusal(409, taken)
        refs[name] = target
    return json_reply({})
