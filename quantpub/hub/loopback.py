"""A Hub in this process, for as long as a `with` block lasts.

    with LoopbackHub() as hub:
        hub.add_repo("org/base", folder)                     # to download from
        api = HfApi(endpoint=hub.endpoint, token=hub.token)   # the real client
        hub.log                                              # every request, in order

It holds models, and datasets to read (`datasets/org/name`), and speaks plain LFS: a client that is to upload must run
with HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from quantpub.hub import routes
from quantpub.hub.faults import Faults
from quantpub.hub.server import Listener
from quantpub.hub.state import Entry, Hub
from quantpub.hub.store import Commit, File, Repo, Store


@dataclass
class LoopbackHub:
    """`root` keeps the content (default: a temporary folder, removed at the end). `page_size`: of tree listings.
    `part_size`: LFS objects above it go up in parts."""

    root: Path | None = None
    page_size: int = 1000
    part_size: int | None = None
    _hub: Hub = field(init=False, repr=False)
    _exit: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False)

    def __enter__(self) -> LoopbackHub:
        root = self.root or Path(self._exit.enter_context(tempfile.TemporaryDirectory(prefix="quantpub-hub-")))
        self._hub = Hub(Store(root), page_size=self.page_size, part_size=self.part_size)
        self._hub.storage = self._listen(Listener(self._hub, routes.STORAGE, tokens=False))
        self._hub.endpoint = self._listen(Listener(self._hub, routes.HUB, tokens=True))
        return self

    def _listen(self, listener: Listener) -> str:
        self._exit.callback(listener.start().stop)
        return listener.origin

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._hub.closing.set()
        self._exit.close()
        if self._hub.crashes and kind is None:
            raise RuntimeError("the loopback Hub failed within:\n" + "\n".join(self._hub.crashes))

    @property
    def endpoint(self) -> str:
        return self._hub.endpoint

    @property
    def token(self) -> str:
        """The owner's token. `reader_token` may read everything, `stranger_token` only what is public."""
        return self._hub.access.owner

    @property
    def reader_token(self) -> str:
        return self._hub.access.reader

    @property
    def stranger_token(self) -> str:
        return self._hub.access.stranger

    @property
    def log(self) -> list[Entry]:
        return self._hub.log

    @property
    def faults(self) -> Faults:
        return self._hub.faults

    def add_repo(
        self,
        repo_id: str,
        folder: Path | None = None,
        *,
        private: bool = False,
        gated: str | bool = False,
        revision: str = "main",
        tag: str | None = None,
    ) -> str:
        """Make branch `revision` of a repository hold what `folder` holds, referred to in place; the commit's id.

        The repository is made when it is new, with nothing but its first commit when there is no folder.
        """
        repo = self._hub.store.create(repo_id, private, gated) or self.repo(repo_id)
        if folder:
            self._commit(repo, revision, self.refer(folder), "Upload folder", replace=True)
        oid = self.head(repo_id, revision)
        if tag:
            repo.tags[tag] = oid
        return oid

    def refer(self, folder: Path) -> dict[str, str]:
        """Know the content of a folder by reference, so that uploading it takes no disk again; path → sha256."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): self._hub.store.blobs.refer(path) for path in paths}

    def commit(self, repo_id: str, files: Mapping[str, bytes], *, revision: str = "main", title: str = "Edit") -> str:
        """Somebody else's commit: these files are written over what is there; the commit's id."""
        digests = {path: self._hub.store.blobs.write([content]) for path, content in files.items()}
        return self._commit(self.repo(repo_id), revision, digests, title, replace=False)

    def _commit(self, repo: Repo, branch: str, digests: Mapping[str, str], title: str, *, replace: bool) -> str:
        with repo.lock:
            head = repo.commits[repo.branches.get(branch, repo.branches["main"])]
            patterns, blobs = self._hub.store.attributes(head), self._hub.store.blobs
            tree = {path: file for path, file in head.tree.items() if path == ".gitattributes" or not replace}
            tree |= {path: blobs.file(sha256, path, patterns) for path, sha256 in digests.items()}
            repo.branches.setdefault(branch, head.oid)
            repo.objects |= {file.sha256 for file in tree.values() if file.lfs}
            return repo.commit(branch, tree, title, author="somebody").oid

    def repo(self, repo_id: str) -> Repo:
        return self._hub.store.repos[repo_id]

    def head(self, repo_id: str, revision: str = "main") -> str:
        return self._at(repo_id, revision).oid

    def tree(self, repo_id: str, revision: str = "main") -> Mapping[str, File]:
        return self._at(repo_id, revision).tree

    def history(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The commits of a revision, newest first."""
        return list(self.repo(repo_id).history(self._at(repo_id, revision)))

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        return self._hub.store.blobs.read(self.tree(repo_id, revision)[path].sha256)

    def _at(self, repo_id: str, revision: str) -> Commit:
        commit = self.repo(repo_id).resolve(revision)
        if commit is None:
            raise KeyError(f"{repo_id} has no revision {revision}")
        return commit
