"""What a rule is given, and what it answers.

A checkpoint is ours, with a `.quantpub/` that says what it should be, or another tool's: then rules go by what it declares.
It lies in a folder or on the Hub; there whole weights are read only when that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from quantpub.actions import QUANTIZE
from quantpub.artifact import Artifact
from quantpub.checkpoint import Checkpoint, Slice, read_slice
from quantpub.decode import Decoder
from quantpub.families import HEAD, LINEAR, ROUTER
from quantpub.held import Held, open_held
from quantpub.opened import Opened
from quantpub.smoothing import Smoothing, smoothing_of

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
NO_SOURCE = "not looked at: no --source was given"


@dataclass
class Subject:
    """What is under test, the source where one was given, and figures that rules leave for the evidence file.

    checkpoint: ours by its folder, or anything opened. weights: whether whole weights may be read. tp: GPUs that it must be
    cut for.
    """

    checkpoint: Artifact | Opened
    source: Checkpoint | None
    progress: Callable[[int, int], None] = lambda done, total: None
    figures: dict[str, Any] = field(default_factory=dict)
    weights: bool = True
    tp: int | None = None

    @property
    def ours(self) -> bool:
        return isinstance(self.checkpoint, Artifact) or self.checkpoint.artifact is not None

    @cached_property
    def quantized_here(self) -> bool:
        """Whether quantpub made its weights; what it only repacked came as another tool had left it."""
        return self.ours and "quantized_by" not in self.artifact.run().get("source", {})

    @property
    def artifact(self) -> Artifact:
        """Of one of ours."""
        found = self.checkpoint if isinstance(self.checkpoint, Artifact) else self.checkpoint.artifact
        assert found is not None, "rules of ours are asked of ours"
        return found

    @cached_property
    def opened(self) -> Opened:
        """Errors: InputError when it cannot even be opened."""
        if isinstance(self.checkpoint, Opened):
            return self.checkpoint
        return Opened(open_held(str(self.checkpoint.path)), self.checkpoint)

    @property
    def held(self) -> Held:
        return self.opened.held

    @cached_property
    def decoder(self) -> Decoder:
        return Decoder(self.checkpoint) if isinstance(self.checkpoint, Artifact) else self.checkpoint.decoder

    @cached_property
    def stated(self) -> dict[str, Any]:
        """What the checkpoint says of its quantization."""
        return self.held.quantization

    @cached_property
    def quantized(self) -> dict[str, str]:
        """module → its scheme and how its layout holds it, in words: equal where they are equal."""
        treated = ((module, self.decoder.treated(module)) for module, _ in self.decoder.modules())
        return {module: f"{t.scheme.name} g{t.scheme.group_size}" for module, t in treated}

    @cached_property
    def plain(self) -> list[str]:
        """Every linear, router and head that is not quantized."""
        lines = (line for line in self.decoder.actions if line["action"] != QUANTIZE and len(line["shape"]) == 2)
        return [str(line["as"]).removesuffix(".weight") for line in lines if line["role"] in (LINEAR, ROUTER, HEAD)]

    @cached_property
    def smoothing(self) -> Smoothing | None:
        """Of ours as it is recorded, of another tool's as it is found.

        Errors: InputError when the recipe has a transform and its vectors are missing, or not of this model.
        """
        if self.quantized_here:
            return smoothing_of(self.artifact, self.decoder)
        from quantpub.verify.folded import folded
        from quantpub.verify.source import source_parts

        return folded(self, source_parts(self.source)) if self.source is not None else None

    def due(self, part: Slice) -> torch.Tensor:
        """A tensor of the source as it was quantized or copied: with what was folded into it."""
        assert self.source is not None
        found = read_slice(self.source.source, part)
        return found if self.smoothing is None else self.smoothing.apply(part.name, found)


@dataclass(frozen=True)
class Finding:
    """detail says what was seen: how much was compared, or which tensor failed and why, or why it was not looked at.

    next: what to do about it, where that is not what the rule says.
    """

    status: str
    detail: str
    next: str | None = None

    def as_json(self) -> dict[str, str]:
        return {"status": self.status, "detail": self.detail} | ({"next": self.next} if self.next else {})


class Problem(str):
    """A sentence, and what to do about this one."""

    next: str | None = None

    def __new__(cls, text: str, next: str) -> Problem:
        made = super().__new__(cls, text)
        made.next = next
        return made


def passed(detail: str) -> Finding:
    return Finding(PASSED, detail)


def failed(detail: str) -> Finding:
    return Finding(FAILED, detail)


def skipped(detail: str, next: str | None = None) -> Finding:
    return Finding(SKIPPED, detail, next)


def first(problems: Sequence[str], fine: str) -> Finding:
    """Passed with `fine`, or failed with the first problem and the number of the others."""
    if not problems:
        return passed(fine)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return Finding(FAILED, f"{problems[0]}{more}", problems[0].next if isinstance(problems[0], Problem) else None)


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
