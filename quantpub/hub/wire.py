"""HTTP/1.1 as the Hub speaks it: one request in, one reply out; bodies pass through in pieces.

`Request.body` is read once, as JSON (small, with a limit) or as chunks (a shard, of which never more than one chunk is
in memory). A `Reply` carries bytes or a slice of a file. A `Refusal` becomes the Hub's error reply: the reason in
`X-Error-Message` and in a JSON body, its kind in `X-Error-Code`, which clients rely on to tell errors apart.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from io import BufferedIOBase
from pathlib import Path
from typing import Any

CHUNK = 1 << 20
JSON_LIMIT = 64 << 20


class Refusal(Exception):
    """A request that is answered with an error status."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class Slice:
    """Part of a file on disk. `damaged` inverts its first byte, for tests of those who should notice."""

    path: Path
    start: int
    length: int
    damaged: bool = False

    def chunks(self) -> Iterator[bytes]:
        with self.path.open("rb") as f:
            f.seek(self.start)
            left = self.length
            while left and (chunk := f.read(min(CHUNK, left))):
                if self.damaged and left == self.length:
                    chunk = bytes([chunk[0] ^ 0xFF]) + chunk[1:]
                left -= len(chunk)
                yield chunk


@dataclass(frozen=True)
class Reply:
    status: int = 200
    content: bytes | Slice = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return self.content.length if isinstance(self.content, Slice) else len(self.content)

    def chunks(self) -> Iterator[bytes]:
        return self.content.chunks() if isinstance(self.content, Slice) else iter([self.content])


def json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    kind = {"Content-Type": "application/json; charset=utf-8"}
    return Reply(status, json.dumps(value).encode(), {**kind, **(headers or {})})


def html_reply(status: int) -> Reply:
    """What a proxy or a load balancer in front of the Hub answers when it is in trouble."""
    return Reply(status, b"<html><body>Bad gateway</body></html>", {"Content-Type": "text/html"})


def error_reply(refusal: Refusal, headers: Mapping[str, str] | None = None) -> Reply:
    names = {"X-Error-Message": refusal.message, **({"X-Error-Code": refusal.code} if refusal.code else {})}
    return json_reply({"error": refusal.message}, refusal.status, {**names, **(headers or {})})


class Body:
    """The body of a request, as it arrives."""

    def __init__(self, stream: BufferedIOBase, headers: Message) -> None:
        self._stream = stream
        self._chunked = "chunked" in (headers.get("Transfer-Encoding") or "").lower()
        self._left = 0 if self._chunked else int(headers.get("Content-Length") or 0)
        self.received = 0

    def chunks(self) -> Iterator[bytes]:
        """The body in pieces of at most 1 MiB. What was read before is not given again."""
        while size := self._next_size():
            chunk = self._stream.read(size)
            self.received += len(chunk)
            self._left -= size
            if self._chunked and self._left == 0:
                self._stream.readline()
            if len(chunk) < size:
                raise ConnectionResetError("the client closed the connection within a body")
            yield chunk

    def _next_size(self) -> int:
        if self._chunked and self._left == 0:
            self._left = int(self._stream.readline().split(b";")[0], 16)
            if self._left == 0:
                self._stream.readline()
                self._chunked = False
        return min(CHUNK, self._left)

    def read(self, limit: int = JSON_LIMIT) -> bytes:
        pieces: list[bytes] = []
        for chunk in self.chunks():
            if self.received > limit:
                raise Refusal(413, "Payload Too Large")
            pieces.append(chunk)
        return b"".join(pieces)

    def drain(self) -> None:
        for _ in self.chunks():
            pass


@dataclass
class Request:
    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Message
    body: Body
    params: Mapping[str, str] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        try:
            value = json.loads(self.body.read())
        except ValueError as error:
            raise Refusal(400, f"Invalid JSON: {error}") from None
        if not isinstance(value, dict):
            raise Refusal(400, "Invalid JSON: expected an object")
        return value

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[-1].lower() in ("1", "true")


def request_id() -> dict[str, str]:
    return {"X-Request-Id": f"Root=1-{uuid.uuid4()}"}


def file_reply(path: Path, wanted: str | None, headers: Mapping[str, str], damaged: bool = False) -> Reply:
    """A file, or the one byte range of it that a Range header asks for: 206, or 416 when it lies outside."""
    size = path.stat().st_size
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted or "")
    if not match or match.groups() == ("", ""):
        return Reply(200, Slice(path, 0, size, damaged), headers)
    first, last = _range(match[1], match[2], size)
    if first >= size or first > last:
        return Reply(416, b"", {**headers, "Content-Range": f"bytes */{size}"})
    span = {"Content-Range": f"bytes {first}-{last}/{size}"}
    return Reply(206, Slice(path, first, last - first + 1, damaged and first == 0), {**headers, **span})


def _range(first: str, last: str, size: int) -> tuple[int, int]:
    if not first:
        return max(0, size - int(last)), size - 1
    return int(first), min(int(last), size - 1) if last else size - 1
