"""How a command ends: the one place where errors become a line (what | where | what next) and an exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NoReturn

from quantpub import env
from quantpub.errors import INTERRUPTED, QuantpubError
from quantpub.options import out
from quantpub.output import OutputClosed, plain_streams

AGAIN = "run the same command again: it resumes"
REPORT = "please report it with the output of QUANTPUB_DEBUG=1"


class Interrupted(BaseException):
    """Ctrl-C. Not KeyboardInterrupt, which typer would turn into a silent exit."""


def _interrupt(*_: object) -> None:
    raise Interrupted


def run(command: Callable[[], Any]) -> None:
    """Run a command line and end the process: every error is one line on stderr and its exit code."""
    out.reset()
    if _asks_for_json(sys.argv[1:]):
        out.use("json")  # before anything is parsed: what cannot be parsed is told as one object, too
    plain_streams()
    former = signal.signal(signal.SIGINT, _interrupt) if threading.current_thread() is threading.main_thread() else None
    try:
        code = command()
        out.finish()
    except QuantpubError as error:
        _fail(str(error), error.as_json(), error.exit_code)
    except Interrupted:
        _fail(f"interrupted | {AGAIN}", _object("interrupted", INTERRUPTED, "interrupted", None, AGAIN), INTERRUPTED)
    except OutputClosed as error:
        _leave_quietly(error)
    except Exception as error:
        _unexpected(error)
    else:
        sys.exit(code if isinstance(code, int) else 0)
    finally:
        if former is not None:
            signal.signal(signal.SIGINT, former)


def _leave_quietly(error: OutputClosed) -> None:
    """A reader that left is no news to anyone; the exit code says that the output was not taken."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - what Python flushes when it ends goes nowhere
    if "pipe" not in str(error):
        sys.stderr.write(f"error: stdout: {error} | free some space, or write elsewhere\n")
    sys.exit(6)


def _unexpected(error: Exception) -> None:
    """Typer's own errors (a wrong option, a missing argument) are usage; anything else is a bug."""
    message, code = getattr(error, "format_message", None), getattr(error, "exit_code", None)
    if callable(message) and isinstance(code, int):
        text = str(message())
        if "Usage:" in text:  # a command without arguments shows its help
            sys.stdout.write(text + "\n")
            sys.exit(code)
        where = getattr(getattr(error, "ctx", None), "command_path", None)
        advice = f"see `{where or 'quantpub'} --help`"
        _fail(f"{' '.join(text.split())} | {advice}", _object("usage", 2, text, where, advice), 2)
    what = f"this is a bug in quantpub: {type(error).__name__}: {' '.join(str(error).split())}"
    _fail(f"{what} | {REPORT}", _object("bug", 1, what, None, REPORT), 1)


def _object(code: str, exit: int, what: str, where: str | None, next: str) -> dict[str, object]:
    """As `QuantpubError.as_json`."""
    return {"code": code, "exit": exit, "what": what, "where": where, "next": next}


def _asks_for_json(arguments: Sequence[str]) -> bool:
    """Whether the command line holds --json, or --format json, wherever that is."""
    return bool({"--json", "--format=json"} & {*arguments}) or ("--format", "json") in pairwise(arguments)


def _fail(line: str, error: dict[str, object], code: int) -> NoReturn:
    if env.debug():
        traceback.print_exc()
    with contextlib.suppress(OutputClosed):
        out.error(line, error)
    sys.exit(code)
