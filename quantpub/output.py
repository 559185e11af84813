"""The one object that talks to the user: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

FORMATS = ("auto", "human", "json", "quiet")


class OutputClosed(Exception):
    """stdout cannot be written any more: a closed pipe, a full disk."""


def plain_streams() -> None:
    """Signs that the terminal's encoding lacks are escaped instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


Advance = Callable[..., None]


class Output:
    """format: human prints lines and tables, json exactly one object, quiet the one value a script wants."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """As at the start of a command."""
        self.format, self._printed = "human", False
        self._object: dict[str, Any] = {}

    def use(self, format: str) -> None:
        if format != "auto":
            self.format = format

    def result(self, value: dict[str, Any], human: Callable[[], Any], quiet: str, ok: bool = True) -> None:
        """The command's result, in the chosen format. Once a command.

        ok: false when it ends with a failed gate: then the object waits for the error, which it is to hold too.
        """
        self._printed = True
        if self.format == "json":
            self._object = {"ok": ok, **value}
            if ok:
                self.finish()
        elif self.format == "quiet":
            self._write(quiet)
        else:
            human()

    def line(self, text: str = "") -> None:
        self._write(text)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """A table on stdout; the first column is left-aligned, the others right."""
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for i, name in enumerate(columns):
            table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 0)
        for row in rows:
            table.add_row(*row)
        console = Console(highlight=False)
        with console.capture() as rendered:
            console.print(table)
        self._write(rendered.get().rstrip())

    def talk(self, text: str) -> None:
        """A remark on stderr, for people only."""
        if self.format == "human":
            sys.stderr.write(text + "\n")

    def error(self, line: str, error: dict[str, object]) -> None:
        """One line on stderr; with --json also in the one object on stdout, unless that was printed already."""
        sys.stderr.write(f"error: {line}\n")
        if self.format == "json" and (self._object or not self._printed):
            self._object = {"ok": False, **self._object, "error": error}
            self.finish()

    def finish(self) -> None:
        """Print the object, where one waits."""
        waiting, self._object = self._object, {}
        if waiting:
            self._write(json.dumps(waiting, allow_nan=False))

    def confirm(self, question: str) -> bool:
        if self.format != "human" or not sys.stdin.isatty():
            return False
        sys.stderr.write(f"{question} [y/N] ")
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """A spinner while something of unknown length runs."""
        if not self._live():
            yield
            return
        from rich.console import Console

        with Console(stderr=True).status(what):
            yield

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Advance]:
        """A progress bar. The callback takes a step, or (done, total) where the total is only known later."""
        if not self._live():
            yield lambda *_: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        ) as progress:
            task = progress.add_task(what, total=total or None)

            def advance(step: int, new_total: int | None = None) -> None:
                if new_total is None:
                    progress.advance(task, step)
                else:
                    progress.update(task, completed=step, total=new_total)

            yield advance

    def _live(self) -> bool:
        return self.format == "human" and sys.stderr.isatty()

    def _write(self, text: str) -> None:
        """Errors: OutputClosed when nobody reads any more, or the output's disk is full."""
        if sys.stdout is None:
            return
        try:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
        except OSError as error:
            raise OutputClosed((error.strerror or str(error)).lower()) from None
