"""Who asks, and what they may do. Tokens are made afresh for every Hub; none is known outside the process.

Three people have one: the owner writes everywhere; a member of the same organization reads everything and writes
nothing; a stranger sees what is public. The Hub answers as huggingface.co does: a token it does not know is 401
whatever is asked for; a private repository does not exist for those who may not see it; without a right it is 403.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from quantpub.hub.store import Repo
from quantpub.hub.wire import Refusal


@dataclass(frozen=True)
class Person:
    name: str
    role: str  # of the token: write, read
    member: bool  # of the organization that owns every repository here


ANONYMOUS = Person("anonymous", "none", member=False)


def new_token() -> str:
    return "hf_" + secrets.token_hex(17)


class Access:
    def __init__(self) -> None:
        self.owner, self.reader, self.stranger = new_token(), new_token(), new_token()
        self._people = {
            self.owner: Person("owner", "write", member=True),
            self.reader: Person("reader", "read", member=True),
            self.stranger: Person("stranger", "write", member=False),
        }

    def person(self, authorization: str | None) -> Person:
        """The person behind an Authorization header. Errors: Refusal 401."""
        if authorization is None:
            return ANONYMOUS
        kind, _, token = authorization.partition(" ")
        if kind != "Bearer" or token not in self._people:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self._people[token]


def require_token(person: Person) -> None:
    if person is ANONYMOUS:
        raise Refusal(401, "Invalid username or password.")


def require_read(person: Person, repo: Repo | None, content: bool = False) -> Repo:
    """The repository, if `person` may see it; and its files, when `content`."""
    if repo is None or (repo.private and not person.member):
        raise Refusal(401 if person is ANONYMOUS else 404, "Repository not found", "RepoNotFound")
    if content and repo.gated and not person.member:
        raise Refusal(401 if person is ANONYMOUS else 403, f"Access to model {repo.id} is restricted.", "GatedRepo")
    return repo


def require_write(person: Person, repo: Repo | None) -> Repo:
    repo = require_read(person, repo)
    require_token(person)
    if not may_write(person):
        raise Refusal(403, "Forbidden: you must use a write token to upload to a repository.")
    return repo


def may_write(person: Person) -> bool:
    return person.role == "write" and person.member


def whoami(person: Person) -> dict[str, Any]:
    require_token(person)
    token = {"displayName": person.name, "role": person.role, "createdAt": "2026-01-01T00:00:00.000Z"}
    return {
        "type": "user",
        "id": person.name,
        "name": person.name,
        "fullname": person.name,
        "isPro": False,
        "orgs": [],
        "auth": {"type": "access_token", "accessToken": token},
    }
