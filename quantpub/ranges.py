"""Parts of a file at an address, by HTTP range requests: the header of a shard, and single numbers anywhere in it.

A request costs as much time as a few hundred kB, so parts that lie near each other are read as one, and the gaps along with
them. safetensors sorts tensors by the width of their dtype, then by name: the float32 scales of a whole shard lie together,
right behind its header. A server that ignores the range and begins to send the whole file is stopped.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from quantpub.errors import InputError, UnavailableError

FIRST = 1 << 17  # bytes of the first request of a file: a header for the most part, and what lies behind it
GAP = 1 << 16  # bytes between two parts that are read along with them
AT_ONCE = 8  # requests
WAITS_S: tuple[float, ...] = (1, 4)
TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2")  # huggingface_hub 1 and 2 raise these as they are

Part = tuple[int, int]  # start and end, in bytes from the file's beginning


class RangedFile:
    """size: of the whole file. headers: what a request brings along, a token for one. where: the file, as a user knows it."""

    def __init__(self, url: str, size: int, headers: Callable[[], Mapping[str, str]], where: str) -> None:
        self.url, self.size, self.where, self._headers = url, size, where, headers
        self._kept: dict[int, bytes] = {}
        self._starts: list[int] = []
        self._lock = threading.Lock()

    def read(self, start: int, end: int, along: Iterable[Part] = ()) -> bytes:
        """along: small parts that are read with this one and kept, with as few requests as pays.

        Errors: InputError when the file ends before; UnavailableError, and those of huggingface_hub and its transport.
        """
        with self._lock:
            if (found := self._find(start, end)) is None:
                self._keep(along)
                found = self._find(start, end)
        return self._request((start, end)) if found is None else found

    def _keep(self, parts: Iterable[Part]) -> None:
        due = runs(part for part in parts if self._find(*part) is None)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = list(pool.map(self._request, due))
        self._kept |= {start: data for (start, _), data in zip(due, found, strict=True)}
        self._starts = sorted(self._kept)

    def _find(self, start: int, end: int) -> bytes | None:
        place = bisect.bisect_right(self._starts, start) - 1
        if place < 0:
            return None
        first = self._starts[place]
        held = self._kept[first][start - first : end - first]
        return held if len(held) == end - start else None

    def _request(self, part: Part) -> bytes:
        for wait in (*WAITS_S, None):
            try:
                return self._once(*part)
            except Exception as error:
                if wait is None or not is_transport(error):
                    raise
                time.sleep(wait)
        raise AssertionError("unreachable")

    def _once(self, start: int, end: int) -> bytes:
        from huggingface_hub import constants
        from huggingface_hub.utils._http import hf_raise_for_status, http_stream_backoff

        asked = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity", **self._headers()}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        # a connection that breaks within a body is not for the client to mend: it would yield a second time
        with http_stream_backoff("GET", self.url, headers=asked, timeout=timeout, retry_on_exceptions=()) as reply:
            hf_raise_for_status(reply)
            if reply.status_code != 206:
                raise UnavailableError(
                    f"the Hub answered a range request with the whole file of {self.size} bytes, which was not read",
                    where=self.where,
                    next="set HF_ENDPOINT to a Hub that serves ranges; or download the repository, and name its folder",
                )
            data = b"".join(_at_most(end - start, reply.iter_bytes()))
        if len(data) < end - start:
            raise InputError("the file ends before its header says", where=self.where)
        return data


def _at_most(nbytes: int, chunks: Iterable[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk[:nbytes]
        nbytes -= len(chunk)
        if nbytes <= 0:
            return


def runs(parts: Iterable[Part], gap: int = GAP) -> list[Part]:
    """The parts in order, those that lie at most `gap` bytes apart as one."""
    found: list[Part] = []
    for start, end in sorted(parts):
        if found and start - found[-1][1] <= gap:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def is_transport(error: BaseException) -> bool:
    """Whether a connection failed, rather than that a server refused."""
    return type(error).__module__.partition(".")[0] in TRANSPORTS
