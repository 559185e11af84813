"""One long text: windows of the asked length, at even strides from its beginning to its end.

A text of at most 8 bytes for each token that was asked for is tokenized whole. When it holds enough whole windows, they
start at even strides; otherwise all its windows serve, one after another, and the rest at its end when it is long enough.
A longer text is not read whole: from evenly spread places of the file, each moved on to the next white space, as much is
read as one window needs. Every window gets the special tokens that the tokenizer puts around a text.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile

from quantpub.errors import InputError
from quantpub.samples.documents import DataFile
from quantpub.samples.encoder import Encoder
from quantpub.samples.request import OWN_FILE
from quantpub.sources import read_errors

DENSE = 8  # bytes a token
BLOCK = 1 << 20  # characters tokenized at once
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Windows:
    """samples: (where it starts, ids). unit: of those places. passed: places where too little text was."""

    samples: list[tuple[int, list[int]]]
    unit: str
    passed: int = 0


def windows(file: DataFile, encoder: Encoder, wanted: int, minimum: int, progress: Callable[[int], None]) -> Windows:
    """Errors: InputError when the file is empty, no text, or too short for one window of `minimum` tokens."""
    with read_errors(file.path):
        long = file.path.stat().st_size > wanted * DENSE * encoder.limit
        found = _strided(file, encoder, wanted, minimum, progress) if long else _whole(file, encoder, wanted, minimum)
    if not found.samples:
        raise InputError(f"the text has less than {minimum} tokens", where=file.label, next="give a longer text")
    return found


def _whole(file: DataFile, encoder: Encoder, wanted: int, minimum: int) -> Windows:
    text = _decoded(file.path.read_bytes(), 0, file.label, final=True).removeprefix("\ufeff")
    if not text.strip():
        raise InputError("the file is empty", where=file.label, next=OWN_FILE)
    ids = [i for block in _blocks(text) for i in encoder.encode_long(block)]
    room = _room(encoder)
    if len(ids) // room >= wanted:
        starts = [i * len(ids) // wanted for i in range(wanted)]
    else:
        starts = list(range(0, len(ids), room))
    cut = [(start, _framed(encoder, ids[start : start + room])) for start in starts]
    return Windows([(start, row) for start, row in cut if len(row) >= minimum], "token of the text, from 0")


def _strided(file: DataFile, encoder: Encoder, wanted: int, minimum: int, progress: Callable[[int], None]) -> Windows:
    size, room = file.path.stat().st_size, _room(encoder)
    starts = [i * size // wanted for i in range(wanted)]
    kept = []
    for start in starts:
        (ids,) = encoder.encode([_passage(file, start, DENSE * encoder.limit)], special=False)
        if len(row := _framed(encoder, ids[:room])) >= minimum:
            kept.append((start, row))
        progress(len(kept))
    return Windows(kept, "byte of the file, from 0", wanted - len(kept))


def _passage(file: DataFile, start: int, length: int) -> str:
    """About `length` bytes of text from `start` on, beginning with a word and ending with a whole character."""
    with file.path.open("rb") as f:
        f.seek(start)
        raw = f.read(length)
    skip = sum(1 for _ in takewhile(_continues, raw[:3])) if start else 0
    text = _decoded(raw[skip:], start + skip, file.label, final=False).removeprefix("\ufeff")
    space = _SPACE.search(text, 0, 256) if start else None
    return text[space.end() :] if space else text


def _continues(byte: int) -> bool:
    """Whether a byte of UTF-8 is not the first of its character."""
    return byte & 0xC0 == 0x80


def _decoded(raw: bytes, start: int, label: str, final: bool) -> str:
    if b"\0" in raw:
        raise InputError("not text: it holds NUL bytes", where=label, next=OWN_FILE)
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(raw, final)
    except UnicodeDecodeError as error:
        what = f"not UTF-8 (byte {start + error.start})"
        raise InputError(what, where=label, next="convert the file to UTF-8") from None


def _blocks(text: str) -> list[str]:
    """The text in pieces of about BLOCK characters that end with a line, where there are lines."""
    blocks, at = [], 0
    while at < len(text):
        end = text.rfind("\n", at, at + BLOCK) + 1 if at + BLOCK < len(text) else len(text)
        end = end if end > at else at + BLOCK
        blocks.append(text[at:end])
        at = end
    return blocks


def _room(encoder: Encoder) -> int:
    return max(1, encoder.limit - sum(map(len, encoder.frame)))


def _framed(encoder: Encoder, ids: list[int]) -> list[int]:
    before, after = encoder.frame
    return [*before, *ids, *after][: encoder.limit]
