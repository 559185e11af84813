"""What a rule is given, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from quantpub.artifact import Artifact
from quantpub.checkpoint import Checkpoint, Slice, read_slice
from quantpub.decode import Decoder
from quantpub.smoothing import Smoothing, smoothing_of

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

    @cached_property
    def smoothing(self) -> Smoothing | None:
        """Errors: InputError when the recipe has a transform and its vectors are missing, or not of this model."""
        return smoothing_of(self.artifact, self.decoder)

    def due(self, part: Slice) -> torch.Tensor:
        """A tensor of the source as it was quantized or copied: with what was folded into it."""
        assert self.source is not None
        found = read_slice(self.source.source, part)
        return found if self.smoothing is None else self.smoothing.apply(part.name, found)


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
