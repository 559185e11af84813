"""Workloads: what a served model is asked for. Lengths in tokens; `concurrency` is how many requests are in flight at once.

All requests of a workload have one prompt length and one output length, greedy, no two with a common prefix. They arrive
at once, as vLLM's offline `LLM` class sends them; with fewer in flight than there are, the next starts when one ends.
A custom one is written PROMPT:OUTPUT@CONCURRENCY, with xREQUESTS where more requests than that are sent: 1024:256@64x512.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from quantpub.errors import UsageError, closest

WRITTEN = re.compile(r"(?P<prompt>\d+):(?P<output>\d+)@(?P<concurrency>\d+(?:,\d+)*)(?:x(?P<requests>\d+))?")
FORM = "a workload is a name or PROMPT:OUTPUT@CONCURRENCY, such as 1024:256@64"
LONGEST = 1 << 20  # tokens of one request
MOST_REQUESTS = 1 << 16
MOST_WORK = 1 << 24  # tokens of a workload: a simulation takes up to a microsecond for each, and `advise` runs several
DIGITS = 9  # of a number


@dataclass(frozen=True)
class Workload:
    """prompt, output: tokens of a request. concurrency: one run for each entry. requests: sent in every run."""

    name: str
    prompt: int
    output: int
    concurrency: tuple[int, ...]
    requests: int
    summary: str

    @property
    def tokens(self) -> int:
        """Prompt and output tokens of one run."""
        return self.requests * (self.prompt + self.output)

    def runs(self) -> list[Workload]:
        """One workload for each level of concurrency, which then is its only one."""
        if len(self.concurrency) == 1:
            return [self]
        return [replace(self, name=f"{self.name}@{n}", concurrency=(n,)) for n in self.concurrency]

    def written(self) -> str:
        """The text that `parse` reads back."""
        levels = ",".join(map(str, self.concurrency))
        more = f"x{self.requests}" if self.requests != max(self.concurrency) else ""
        return f"{self.prompt}:{self.output}@{levels}{more}"


_ALL = (
    Workload("interactive", 128, 128, (1, 2, 4, 8), 8, "one to eight people who wait for every token"),
    Workload("serving", 512, 128, (100,), 100, "a hundred chats at once, short answers"),
    Workload("prefill-heavy", 2048, 128, (256,), 256, "long documents, short answers"),
    Workload("decode-heavy", 128, 2048, (256,), 256, "short questions, long answers"),
)
WORKLOADS = {workload.name: workload for workload in _ALL}


def parse(text: str) -> Workload:
    """A workload by its name, or a custom one. Errors: UsageError with the closest names or the form."""
    text = text.strip()
    if text in WORKLOADS:
        return WORKLOADS[text]
    match = WRITTEN.fullmatch(text)
    if match is None:
        looks_written = any(sign in text for sign in ":@") or text[:1].isdigit()
        raise UsageError(f"unknown workload {text!r}", next=FORM if looks_written else closest(text, WORKLOADS))
    return _custom(text, match)


def _custom(text: str, match: re.Match[str]) -> Workload:
    if max(map(len, re.findall(r"\d+", text))) > DIGITS:
        raise UsageError(f"workload {text!r:.60}: a number has more than {DIGITS} digits", next=FORM)
    prompt, output = int(match["prompt"]), int(match["output"])
    levels = tuple(map(int, match["concurrency"].split(",")))
    requests = int(match["requests"] or max(levels))
    problem = _problem(prompt, output, levels, requests)
    if problem:
        raise UsageError(f"workload {text!r}: {problem}", next=FORM)
    return Workload(text, prompt, output, levels, requests, "as written on the command line")


def _problem(prompt: int, output: int, levels: tuple[int, ...], requests: int) -> str | None:
    if min(prompt, output, *levels, requests) < 1:
        return "every number must be at least 1"
    if prompt + output > LONGEST or requests > MOST_REQUESTS or requests * (prompt + output) > MOST_WORK:
        return (
            f"it is too large: at most {LONGEST} tokens a request, {MOST_REQUESTS} requests, {MOST_WORK} tokens in all"
        )
    if max(levels) > requests:
        return f"{max(levels)} cannot be in flight when only {requests} are sent"
    if len(set(levels)) < len(levels):
        return "a level of concurrency is there twice"
    return None
