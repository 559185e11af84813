"""Documents: the rows of one or several files, counted together, read only where they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

Row = dict[str, Any]


class DataFile(NamedTuple):
    """label: what errors call it."""

    path: Path
    label: str


class Documents(Protocol):
    """A place is a row's number among all of them, from 0."""

    def __len__(self) -> int: ...
    def names(self) -> list[str]:
        """The columns that the first row has, those without a value left out."""
        ...

    def read(self, places: Sequence[int], columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
        """(place, row) of each, in file order; of the columns at least those."""
        ...

    def where(self, place: int) -> str:
        """For an error: file and line, or file and row."""
        ...

    def number(self, place: int) -> int:
        """For evidence, in the words of `numbering`."""
        ...

    @property
    def numbering(self) -> str: ...
