"""JSON lines: one object a line, UTF-8. The places of the lines are noted in one pass; only chosen lines are parsed.

Blank lines are no documents. Of a file of gigabytes, sixteen bytes a line are kept.
"""

from __future__ import annotations

import bisect
import json
from array import array
from collections.abc import Iterator, Sequence

from quantpub.errors import InputError
from quantpub.samples.documents import DataFile, Row
from quantpub.samples.request import OWN_FILE
from quantpub.sources import read_errors

ADVICE = f"a jsonl file has one JSON object a line; {OWN_FILE}"
_HEAD = 64 << 10


class JsonLines:
    def __init__(self, files: Sequence[DataFile]) -> None:
        """Errors: InputError when a file cannot be read, is binary or holds a JSON array."""
        self._files, self._starts = list(files), array("Q")  # the first place of each file
        self._offsets, self._numbers = array("Q"), array("Q")
        for file in files:
            self._starts.append(len(self._offsets))
            with read_errors(file.path):
                self._index(file)

    def _index(self, file: DataFile) -> None:
        with file.path.open("rb") as f:
            _require_lines(f.read(_HEAD), file.label)
            f.seek(0)
            at = 0
            for number, line in enumerate(f, 1):
                if line.strip():
                    self._offsets.append(at)
                    self._numbers.append(number)
                at += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    @property
    def numbering(self) -> str:
        return "line of the file, from 1" if len(self._files) == 1 else "object of the split, from 0"

    def number(self, place: int) -> int:
        return self._numbers[place] if len(self._files) == 1 else place

    def where(self, place: int) -> str:
        return f"{self._files[self._file(place)].label}:{self._numbers[place]}"

    def _file(self, place: int) -> int:
        return bisect.bisect_right(self._starts, place) - 1

    def names(self) -> list[str]:
        (_, first), *_ = self.read([0], [])
        return [name for name, value in first.items() if value is not None]

    def read(self, places: Sequence[int], columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
        """Errors: InputError for a line that is no JSON object."""
        for number, file in enumerate(self._files):
            inside = sorted(place for place in places if self._file(place) == number)
            if inside:
                with read_errors(file.path), file.path.open("rb") as f:
                    for place in inside:
                        f.seek(self._offsets[place])
                        yield place, _parsed(f.readline(), self.where(place))


def _require_lines(head: bytes, label: str) -> None:
    if b"\0" in head:
        raise InputError("not text: it holds NUL bytes", where=label, next=ADVICE)
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        raise InputError("a JSON array, not JSON lines", where=label, next="convert it: jq -c '.[]' FILE > FILE.jsonl")


def _parsed(line: bytes, where: str) -> Row:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 (byte {error.start})", where=where, next="convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON: {error}", where=where, next=ADVICE) from None
    if not isinstance(value, dict):
        raise InputError("the line is not a JSON object", where=where, next=ADVICE)
    return value
