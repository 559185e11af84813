"""The exception tree. Every error that a user can mend says what happened, where, and what to do next.

QuantpubError            1   a bug, unless it is one of these
├── UsageError           2   the command line, or a name that does not exist
├── InputError           3   a checkpoint, recipe or data file that cannot be used as it is
│   └── GateError        3   the input is sound, but it was not shown to be worth publishing
├── AuthError            4   no token, or one without the right
├── ConflictError        5   the place to write to holds something else
└── UnavailableError     6   disk, network or service; running again is safe and resumes
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

INTERRUPTED = 130


class QuantpubError(Exception):
    """what: the fact. where: file, tensor, option or address. next: what the user should do."""

    exit_code = 1
    code = "bug"

    def __init__(self, what: str, *, where: str | None = None, next: str | None = None) -> None:
        super().__init__(what)
        self.what, self.where, self.next = what, where, next

    def __str__(self) -> str:
        parts = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.next:
            parts.append(self.next)
        return " | ".join(" ".join(part.split()) for part in parts)

    def as_json(self) -> dict[str, object]:
        return {"code": self.code, "exit": self.exit_code, "what": self.what, "where": self.where, "next": self.next}


class UsageError(QuantpubError):
    exit_code, code = 2, "usage"


class InputError(QuantpubError):
    exit_code, code = 3, "input"


class GateError(InputError):
    code = "gate"


class AuthError(QuantpubError):
    exit_code, code = 4, "auth"


class ConflictError(QuantpubError):
    exit_code, code = 5, "conflict"


class UnavailableError(QuantpubError):
    exit_code, code = 6, "unavailable"


def closest(name: str, known: Iterable[str]) -> str:
    """One sentence that offers the nearest known names, or all of them when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
