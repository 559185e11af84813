"""A dataset repository of the Hub at one commit: which files a split has, and those files, downloaded.

A name without a whole commit id is resolved to one first. A split of more than LIMIT bytes is not downloaded whole: files
are drawn by the seed until they are LIMIT bytes together. When the Hub does not answer and the name holds a commit, files
that an earlier download left in the Hub's cache serve, if the split is whole there (its numbering says so).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantpub.errors import AuthError, InputError, UnavailableError
from quantpub.files import sha256_file
from quantpub.samples.picking import permutation
from quantpub.samples.request import DEFAULT, OWN_FILE, Dataset, Request
from quantpub.samples.splits import files_of
from quantpub.sources import front_matter, hub_errors

LIMIT = 2 << 30
CARD = "README.md"
_NUMBER = re.compile(r"(.*?)(\d+)-of-(\d+)(.*)")


@dataclass(frozen=True)
class Downloaded:
    """files: name in the repository → where it is, in order. record: for evidence. label: what errors call it."""

    files: dict[str, Path]
    record: dict[str, Any]
    label: str


@dataclass(frozen=True)
class _Listing:
    """What a commit holds. files: name → (bytes, sha256 where the Hub states it).

    folder: in the Hub's cache, when the Hub itself could not be asked; trouble: why it could not.
    """

    commit: str
    files: dict[str, tuple[int, str | None]]
    folder: Path | None = None
    trouble: UnavailableError | None = None


def commit_of(data: Dataset, request: Request) -> str:
    """The commit that the name means now. Errors: InputError, AuthError, UnavailableError."""
    if data.pinned:
        return str(data.revision)
    with dataset_errors(data, request):
        return str(_api().dataset_info(data.repo, revision=data.revision).sha)


def download(data: Dataset, request: Request) -> Downloaded:
    """The files of the split, at one commit. Errors: InputError, AuthError, UnavailableError."""
    listing = _listed(data, request)
    card = _card(_fetched(data, request, listing, CARD)[0]) if CARD in listing.files else {}
    split, names = files_of(data.split, listing.files, card, str(data))
    if listing.trouble and not _whole(names):
        raise listing.trouble
    chosen = _within_limit({name: listing.files[name][0] for name in names}, request.seed)
    files = {name: _fetched(data, request, listing, name) for name in chosen}
    record = {
        "kind": "hub",
        "repo": data.repo,
        "commit": listing.commit,
        "split": split,
        "pinned": f"{data.repo}@{listing.commit}:{split}",
        "files": {name: sha256 for name, (_, sha256) in files.items()},
        "files_in_split": len(names),
    }
    paths = {name: path for name, (path, _) in files.items()}
    return Downloaded(paths, record, f"{data.repo}@{listing.commit[:7]}")


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="quantpub")


def _listed(data: Dataset, request: Request) -> _Listing:
    try:
        with dataset_errors(data, request):
            info = _api().dataset_info(data.repo, revision=data.revision, files_metadata=True)
    except UnavailableError as error:
        if (kept := _kept(data, error)) is None:
            raise
        return kept
    entries = info.siblings or []
    files = {entry.rfilename: (entry.size or 0, entry.lfs.sha256 if entry.lfs else None) for entry in entries}
    return _Listing(str(info.sha), files)


def _card(path: Path) -> dict[str, Any]:
    return front_matter(path.read_text("utf-8", "replace"))


def _fetched(data: Dataset, request: Request, listing: _Listing, name: str) -> tuple[Path, str]:
    """(where the file is, its sha256)"""
    from huggingface_hub import hf_hub_download

    if listing.folder:
        return listing.folder / name, sha256_file(listing.folder / name)
    kind, commit = "dataset", listing.commit
    with dataset_errors(data, request):
        path = Path(hf_hub_download(data.repo, name, repo_type=kind, revision=commit, library_name="quantpub"))
    found, stated = sha256_file(path), listing.files[name][1]
    if stated not in (None, found):
        raise UnavailableError(
            "the download is damaged: its sha256 is not the one that the Hub states",
            where=f"{data.repo}/{name}",
            next=f"delete {path.resolve()} and run the same command again",
        )
    return path, found


def _within_limit(sizes: dict[str, int], seed: int) -> list[str]:
    """The files to read, in their order."""
    names, chosen, total = list(sizes), set[str](), 0
    for place in permutation(len(names), seed):
        if total < LIMIT:
            chosen.add(names[place])
            total += sizes[names[place]]
    return [name for name in names if name in chosen]


def _kept(data: Dataset, trouble: UnavailableError) -> _Listing | None:
    """What the Hub's cache holds of the commit, if anything."""
    from huggingface_hub import snapshot_download

    if not data.pinned:
        return None
    try:
        found = snapshot_download(data.repo, repo_type="dataset", revision=data.revision, local_files_only=True)
    except OSError:  # LocalEntryNotFoundError is one
        return None
    paths = sorted(path for path in Path(found).rglob("*") if path.is_file())
    files: dict[str, tuple[int, str | None]] = {
        path.relative_to(found).as_posix(): (path.stat().st_size, None) for path in paths
    }
    return _Listing(str(data.revision), files, Path(found), trouble)


def _whole(names: list[str]) -> bool:
    """Whether a split's files are numbered, and all there; a single file counts when it has no number."""
    found = [_NUMBER.fullmatch(name) for name in names]
    if not all(found):
        return len(names) == 1
    return len(names) == sum({m[1]: int(m[3]) for m in found if m}.values())


@contextmanager
def dataset_errors(data: Dataset, request: Request) -> Iterator[None]:
    """huggingface_hub's exceptions as quantpub's, in the words of a dataset."""
    lead = "the default calibration data cannot be had: " if request.data == DEFAULT else ""
    own = f"or give your own text: {OWN_FILE}"
    try:
        with hub_errors(data.repo, data.revision), _not_answered():
            yield
    except UnavailableError as error:
        advice = "unset it" if "HF_HUB_OFFLINE" in error.what else error.next
        raise UnavailableError(f"{lead}{error.what}", where=str(data), next=f"{advice}; {own}") from error
    except AuthError as error:
        what = error.what.replace("this model", "this dataset").replace("such model", "such dataset")
        raise AuthError(f"{lead}{what}", where=str(data), next=f"{error.next}; {own}") from error
    except InputError as error:
        if not error.what.startswith("no revision"):
            raise
        raise InputError(error.what, where=data.repo, next="check the revision after the @") from None


@contextmanager
def _not_answered() -> Iterator[None]:
    """A file that can be had neither from the Hub nor from its cache is the network's doing, not the repository's."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        yield
    except LocalEntryNotFoundError as error:
        advice = "check the network, and run the same command again"
        raise UnavailableError("the Hub did not answer", next=advice) from error
