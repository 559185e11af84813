"""A Hub repository at one pinned commit, as a source. Small files are fetched once, and lie in the Hub's cache.

A shard's header comes by a range request. Tensors are read from the file, which is fetched once for all of them; where only
single numbers are wanted, those of a shard come by range requests, too, and no file of weights is fetched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from quantpub.errors import InputError
from quantpub.files import sha256_file
from quantpub.ranges import FIRST, Part, RangedFile
from quantpub.shards import AGAIN, MAX_HEADER, parse_header, read_header
from quantpub.sources import Header, hub_errors, licence, read_span

SMALL = 64  # bytes of a single number


class HubSource:
    def __init__(self, repo: str, revision: str | None, whole: bool = True) -> None:
        """whole: whether a file of weights may be fetched when a tensor of it is asked for; else it is read by ranges.

        Errors: InputError, AuthError, UnavailableError.
        """
        from huggingface_hub import HfApi

        with hub_errors(repo, revision):
            self._info = HfApi(library_name="quantpub").model_info(repo, revision=revision, files_metadata=True)
        self.repo, self.whole, self.label = repo, whole, f"{repo}@{self.commit[:7]}"
        self._ranged: dict[str, RangedFile] = {}
        self._headers: dict[str, Header] = {}

    @property
    def commit(self) -> str:
        return str(self._info.sha)

    @cached_property
    def files(self) -> dict[str, int]:
        entries = sorted(self._info.siblings or [], key=lambda entry: entry.rfilename)
        return {entry.rfilename: entry.size or 0 for entry in entries if entry.rfilename != ".gitattributes"}

    def path(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        with hub_errors(self.repo, self.commit):
            return Path(hf_hub_download(self.repo, name, revision=self.commit, library_name="quantpub"))

    def read(self, name: str) -> bytes:
        return self.path(name).read_bytes()

    def sha256(self, shard: str) -> str:
        """As the Hub states it; of a file that is not in LFS, computed."""
        entry = self._entry(shard)
        return str(entry.lfs.sha256) if entry.lfs else sha256_file(self.path(shard))

    def state(self, shard: str) -> str:
        return self.sha256(shard)

    def header(self, name: str) -> Header:
        """By one range request, or two where it is long. The size is checked against the repository's."""
        if name not in self._headers:
            held = self._held(name)
            self._headers[name] = read_header(held) if held else self._header(name)
        return self._headers[name]

    def _header(self, name: str) -> Header:
        where, size = self.where(name), self.files[name]
        first = self._read(name, 0, min(FIRST, size), [(0, min(FIRST, size))]) if size >= 8 else b""
        end = 8 + int.from_bytes(first[:8], "little")
        if size < 8 or end > min(8 + MAX_HEADER, size):
            raise InputError(f"not a whole safetensors file ({size} bytes)", where=where, next=AGAIN)
        rest = self._read(name, len(first), end) if end > len(first) else b""
        tensors, metadata = parse_header((first + rest)[8:end], where)
        promised = max((info.end for info in tensors.values()), default=end)
        if promised != size:
            state = "truncated" if size < promised else "too long"
            raise InputError(f"{state}: {size} bytes, its header promises {promised}", where=where)
        return tensors, metadata

    def span(self, name: str, start: int, nbytes: int) -> memoryview:
        """Of the file in the Hub's cache. By a range request where files may not be fetched, and it is not there already."""
        held = self._held(name) or (self.path(name) if self.whole else None)
        if held is not None:
            return read_span(held, start, nbytes, self.where(name))
        along = self._numbers(name) if nbytes <= SMALL else ()
        return memoryview(bytearray(self._read(name, start, start + nbytes, along)))

    def _numbers(self, name: str) -> Iterator[Part]:
        """Where in a shard the single numbers lie."""
        return ((info.start, info.end) for info in self.header(name)[0].values() if 0 < info.nbytes <= SMALL)

    def _held(self, name: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo, name, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def _read(self, name: str, start: int, end: int, along: Iterable[Part] = ()) -> bytes:
        with hub_errors(self.repo, self.commit):
            return self._file(name).read(start, end, along)

    def _file(self, name: str) -> RangedFile:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils._headers import build_hf_headers

        if name not in self._ranged:
            url, size = hf_hub_url(self.repo, name, revision=self.commit), self.files[name]
            token = partial(build_hf_headers, library_name="quantpub")
            self._ranged[name] = RangedFile(url, size, token, self.where(name))
        return self._ranged[name]

    def where(self, name: str) -> str:
        return f"{self.label}/{name}"

    def fingerprint(self, shard: str) -> str:
        entry = self._entry(shard)
        return str(entry.lfs.sha256) if entry.lfs else str(entry.blob_id)

    def _entry(self, name: str) -> Any:
        return next(entry for entry in self._info.siblings or [] if entry.rfilename == name)

    def identity(self) -> dict[str, Any]:
        card = self._info.card_data.to_dict() if self._info.card_data else {}
        return {
            "kind": "hub",
            "repo": self.repo,
            "commit": self.commit,
            "gated": bool(self._info.gated),
            **licence(card),
        }
