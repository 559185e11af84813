"""What a rule is given, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from quantpub.artifact import Artifact
from quantpub.checkpoint import Checkpoint
from quantpub.decode import Decoder

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass
class Subject:
    """The artifact under test, the source where one was given, and figures that rules leave for the evidence file."""

    artifact: Artifact
    source: Checkpoint | None
    progress: Callable[[int, int], None] = lambda done, total: None
    figures: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def decoder(self) -> Decoder:
        return Decoder(self.artifact)


@dataclass(frozen=True)
class Finding:
    """detail says what was seen: how much was compared, or which tensor failed and why, or why it was not looked at."""

    status: str
    detail: str

    def as_json(self) -> dict[str, str]:
        return {"status": self.status, "detail": self.detail}


def passed(detail: str) -> Finding:
    return Finding(PASSED, detail)


def failed(detail: str) -> Finding:
    return Finding(FAILED, detail)


def skipped(detail: str) -> Finding:
    return Finding(SKIPPED, detail)


def first(problems: list[str], fine: str) -> Finding:
    """Passed with `fine`, or failed with the first problem and the number of the others."""
    if not problems:
        return passed(fine)
    return failed(problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))
