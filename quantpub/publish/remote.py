"""One repository at the Hub, as publishing needs it: each method is one question or one deed, with quantpub's errors.

What huggingface_hub does not retry is retried here, if doing it twice is the same as doing it once. The commit is not
among these: landing.py looks first whether it is already there. No call waits for ever: the client's own default has
no timeout, so a client with one is installed for the process, once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_session,
    hf_hub_url,
    set_client_factory,
)
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo, RepoFile
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import default_client_factory, hf_raise_for_status

from quantpub import __version__
from quantpub.artifact import SUMS
from quantpub.errors import AuthError, ConflictError, InputError, UnavailableError
from quantpub.publish.failures import LOGIN, RERUN, http, patiently
from quantpub.publish.plan import RemoteFile, parse_sums

CONNECT_S, ANSWER_S = 10.0, 120.0  # the Hub itself gives a commit 60 s, and may land it after that


@functools.cache
def _never_wait_for_ever() -> None:
    def client() -> Any:
        bounded = default_client_factory()
        bounded.timeout = http.Timeout(ANSWER_S, connect=CONNECT_S, pool=None)
        return bounded

    set_client_factory(client)


@dataclass(frozen=True)
class Head:
    """What the repository holds now. `ours`: path → sha256 of what quantpub wrote there last."""

    oid: str
    private: bool
    tree: dict[str, RemoteFile] = field(default_factory=dict)
    ours: dict[str, str] = field(default_factory=dict)


class Remote:
    def __init__(self, repo_id: str, endpoint: str | None = None, token: str | None = None) -> None:
        _never_wait_for_ever()
        self.repo_id, self.token = repo_id, token
        self.api = HfApi(endpoint, token, library_name="quantpub", library_version=__version__)
        self.url = f"{self.api.endpoint}/{repo_id}"

    def info(self, revision: str | None = None) -> ModelInfo | None:
        """What the Hub says of the repository; None when there is none, or none to see."""

        def ask() -> ModelInfo | None:
            try:
                # without a timeout of its own this call would undo the client's
                return self.api.model_info(self.repo_id, revision=revision, timeout=ANSWER_S)
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                return None

        return patiently(ask, self.url)

    def head(self) -> Head | None:
        """The commit to build on, and all that lies there; None when there is no repository yet."""
        info = self.info()
        if info is None:
            return None
        oid = str(info.sha)
        tree = self.tree(oid)
        sums = self.read(SUMS, oid) if SUMS in tree else b""
        ours = parse_sums(sums.decode("utf-8", "replace"))
        return Head(oid, bool(info.private), tree, {**ours, SUMS: ""} if ours else {})

    def head_oid(self) -> str | None:
        info = self.info()
        return str(info.sha) if info else None

    def tree(self, revision: str) -> dict[str, RemoteFile]:
        def ask() -> dict[str, RemoteFile]:
            found = self.api.list_repo_tree(self.repo_id, recursive=True, revision=revision)
            return {
                file.path: RemoteFile(file.path, file.size, file.blob_id, file.lfs.sha256 if file.lfs else None)
                for file in found
                if isinstance(file, RepoFile)
            }

        return patiently(ask, self.url)

    def commits_since(self, oid: str, revision: str) -> list[str]:
        """The commits on top of `oid` that lead to `revision`, oldest first; none when `oid` is not below it."""

        def ask() -> list[str]:
            return [commit.commit_id for commit in self.api.list_repo_commits(self.repo_id, revision=revision)]

        line = patiently(ask, self.url)
        return line[: line.index(oid)][::-1] if oid in line else []

    def read(self, path: str, revision: str, length: int | None = None) -> bytes:
        """A file's content, or its first `length` bytes by a range request."""

        def ask() -> bytes:
            url = hf_hub_url(self.repo_id, path, revision=revision, endpoint=self.api.endpoint)
            headers = self._headers({"Range": f"bytes=0-{length - 1}"} if length else {})
            with get_session().stream("GET", url, headers=headers, follow_redirects=True) as reply:
                hf_raise_for_status(reply)
                if length and reply.status_code != 206:
                    raise UnavailableError("the server ignores range requests", where=url, next="check HF_ENDPOINT")
                return bytes(reply.read())

        return patiently(ask, self.url)

    def require_write(self, exists: bool) -> None:
        """Errors: AuthError, before anything is uploaded."""
        if exists:
            patiently(lambda: self.api.auth_check(self.repo_id, write=True), self.url)
            return
        who = patiently(lambda: self.api.whoami(), self.url)
        role = ((who.get("auth") or {}).get("accessToken") or {}).get("role")
        if role == "read":
            raise AuthError("the token may only read", where=self.url, next=LOGIN)

    def create(self) -> None:
        """Make the repository, private. One that another process made meanwhile will do."""
        try:
            patiently(lambda: self.api.create_repo(self.repo_id, private=True), self.url)
        except ConflictError:
            if self.info() is None:
                raise AuthError(
                    "the name is taken, and the token may not see the repository", where=self.url, next=LOGIN
                ) from None

    def make_public(self) -> None:
        patiently(lambda: self.api.update_repo_settings(self.repo_id, visibility="public"), self.url)
        info = self.info()
        if info is None or info.private:
            raise UnavailableError("the repository did not become public", where=self.url, next=RERUN)

    def validate_card(self, text: str) -> list[str]:
        """The Hub's warnings about the card's metadata. Errors: InputError with what it refuses."""

        def ask() -> dict[str, Any]:
            reply = get_session().post(
                f"{self.api.endpoint}/api/validate-yaml",
                headers=self._headers({}),
                json={"content": text, "repoType": "model"},
            )
            if reply.status_code != 400:
                hf_raise_for_status(reply)
            answer: dict[str, Any] = reply.json()
            return answer

        verdict = patiently(ask, self.url)
        errors = [str(item.get("message")) for item in verdict.get("errors", [])]
        if errors:
            raise InputError(
                f"the Hub refuses the card: {'; '.join(errors)}",
                where="README.md",
                next="run `quantpub card`, and publish again",
            )
        return [str(item.get("message")) for item in verdict.get("warnings", [])]

    def upload(self, additions: Sequence[CommitOperationAdd]) -> None:
        """Bring content to the Hub. Nothing shows until it is committed. Errors: InputError when one is left out."""
        patiently(lambda: self.api.preupload_lfs_files(self.repo_id, additions, free_memory=False), self.url, waits=())
        # the client leaves these out of the commit without a word
        ignored = [item.path_in_repo for item in additions if item._should_ignore]
        if ignored:
            raise InputError(
                f"the repository's .gitignore leaves out {', '.join(ignored)}",
                where=self.url,
                next="remove these lines from .gitignore there",
            )

    def commit(self, operations: Sequence[CommitOperationAdd | CommitOperationDelete], parent: str, title: str) -> str:
        """One commit, only on top of `parent`, tried once; its id."""

        def send() -> str:
            return self.api.create_commit(self.repo_id, operations, commit_message=title, parent_commit=parent).oid

        return patiently(send, self.url, waits=())

    def tag_target(self, tag: str) -> str | None:
        refs = patiently(lambda: self.api.list_repo_refs(self.repo_id), self.url)
        return next((ref.target_commit for ref in refs.tags if ref.name == tag), None)

    def tag(self, tag: str, oid: str) -> None:
        """Name a commit. A tag that already names it will do; one that names another is a ConflictError."""

        def send() -> None:
            try:
                self.api.create_tag(self.repo_id, tag=tag, revision=oid)
            except HfHubHTTPError as error:
                if error.response.status_code != 409 or self.tag_target(tag) != oid:
                    raise

        patiently(send, self.url)

    def card_data(self, revision: str) -> dict[str, Any]:
        """The metadata that the Hub has read from the card."""
        info = self.info(revision)
        return dict(vars(info.card_data)) if info and info.card_data else {}

    def _headers(self, more: dict[str, str]) -> dict[str, str]:
        return {**build_hf_headers(token=self.token, library_name="quantpub", library_version=__version__), **more}
