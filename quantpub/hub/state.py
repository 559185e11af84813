"""What one running Hub knows: its store, its people, the faults on order, and the log of requests.

Large objects live at a second origin, as on huggingface.co: a storage service of its own that knows no tokens. An
address there is its own permit, because it is signed; a request that brings an Authorization header is refused, so a
client that carries its token across a redirect is found out.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlencode

from quantpub.hub.access import Access, Person, require_read
from quantpub.hub.faults import Faults
from quantpub.hub.store import Commit, Repo, Store
from quantpub.hub.wire import Refusal, Request

SIGNATURE = "X-Amz-Signature"


@dataclass(frozen=True)
class Entry:
    """One request. `status` 0: it was not answered. `received`, `sent`: bytes of the bodies."""

    method: str
    path: str
    status: int
    route: str
    authorized: bool
    received: int
    sent: int


@dataclass
class Hub:
    store: Store
    access: Access = field(default_factory=Access)
    faults: Faults = field(default_factory=Faults)
    log: list[Entry] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)
    endpoint: str = ""
    storage: str = ""
    page_size: int = 1000
    part_size: int | None = None  # LFS objects above this go up in parts
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32))

    def signed(self, path: str, **query: str | int) -> str:
        """An address at the storage service, good for exactly this path and query."""
        asked = urlencode(query)
        return f"{self.storage}{path}?{asked}{'&' if asked else ''}{SIGNATURE}={self._signature(path, asked)}"

    def require_signature(self, request: Request) -> None:
        asked = urlencode({key: values for key, values in request.query.items() if key != SIGNATURE}, doseq=True)
        given = request.query.get(SIGNATURE, [""])[-1]
        if not hmac.compare_digest(given, self._signature(request.path, asked)):
            raise Refusal(403, "SignatureDoesNotMatch")

    def _signature(self, path: str, query: str) -> str:
        return hmac.new(self.secret, f"{path}?{query}".encode(), hashlib.sha256).hexdigest()

    def repo(self, params: Mapping[str, str]) -> Repo | None:
        """The model, or the dataset under its name with `datasets/` before it."""
        kind = f"{params['kind']}/" if "kind" in params else ""
        return self.store.repos.get(f"{kind}{params['owner']}/{params['name']}")

    def readable(self, request: Request, person: Person, content: bool = False) -> tuple[Repo, Commit]:
        """The repository and commit that a request names. Errors: Refusal as the Hub words it."""
        repo = require_read(person, self.repo(request.params), content)
        return repo, revision(repo, request.params.get("rev", "main"))


def revision(repo: Repo, name: str) -> Commit:
    commit = repo.resolve(name)
    if commit is None:
        raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
    return commit
