"""Parquet: only the columns that are needed, and only the row groups that hold a chosen row. pyarrow reads it."""

from __future__ import annotations

import bisect
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

from quantpub.errors import InputError
from quantpub.samples.documents import DataFile, Row
from quantpub.samples.request import OWN_FILE

BATCH = 1024  # rows decoded at once


class Parquet:
    def __init__(self, files: Sequence[DataFile]) -> None:
        """Reads the footers. Errors: InputError when a file is no parquet, or pyarrow is not installed."""
        self._files = list(files)
        pq = _pyarrow("pyarrow.parquet", files[0].label)
        with _parquet_errors(self._files):
            self._tables = [pq.ParquetFile(file.path) for file in files]
        rows = [table.metadata.num_rows for table in self._tables]
        self._starts: list[int] = [0, *accumulate(rows)]

    def __len__(self) -> int:
        return self._starts[-1]

    numbering = "row of the split, from 0"

    def number(self, place: int) -> int:
        return place

    def where(self, place: int) -> str:
        file = self._file(place)
        return f"{self._files[file].label}: row {place - self._starts[file]}"

    def _file(self, place: int) -> int:
        return bisect.bisect_right(self._starts, place) - 1

    def names(self) -> list[str]:
        columns = [field.name for field in self._tables[self._file(0)].schema_arrow]
        (_, first), *_ = self.read([0], columns)
        return [name for name, value in first.items() if value is not None]

    def read(self, places: Sequence[int], columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
        """Errors: InputError when the file is damaged or lacks a column."""
        for number in range(len(self._files)):
            inside = sorted(place for place in places if self._file(place) == number)
            if inside:
                with _parquet_errors([self._files[number]]):
                    yield from self._of_file(number, inside, columns)

    def _of_file(self, number: int, places: list[int], columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
        table, first = self._tables[number], self._starts[number]
        present = [name for name in columns if name in table.schema_arrow.names]
        for group in range(table.num_row_groups):
            end = first + table.metadata.row_group(group).num_rows
            if any(first <= place < end for place in places):
                for batch in table.iter_batches(BATCH, row_groups=[group], columns=present):
                    inside = [place for place in places if first <= place < first + len(batch)]
                    rows = batch.take(_array([place - first for place in inside])).to_pylist() if inside else []
                    yield from zip(inside, rows, strict=True)
                    first += len(batch)
            first = end


def _array(values: list[int]) -> Any:
    return importlib.import_module("pyarrow").array(values)


def _pyarrow(module: str, where: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError("reading parquet needs pyarrow", where=where, next="pip install pyarrow") from None


@contextmanager
def _parquet_errors(files: Sequence[DataFile]) -> Iterator[None]:
    arrow = _pyarrow("pyarrow", files[0].label)
    try:
        yield
    except (arrow.ArrowException, OSError) as error:
        where = " or ".join(file.label for file in files[:3])
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"not a readable parquet file: {reason}", where=where, next=OWN_FILE) from None
