"""What a serving engine asks a quantization config about: its own modules, by their own names; and what it is told.

Engines merge linears (q, k and v → qkv_proj) and hold the experts of a layer in one module, and each looks up its scheme by
the merged name first. `Answer` is what a config says of one module; lookup_ct.py and lookup_others.py find it, method by
method, as vLLM 0.33 (`vllm`), vLLM 0.25 (`vllm-0.25`) and SGLang 0.5.23 (`sglang`) do.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

VLLM, VLLM_25, SGLANG = "vllm", "vllm-0.25", "sglang"
TITLES = {VLLM: "vLLM", VLLM_25: "vLLM 0.25", SGLANG: "SGLang"}
LINEAR, HEAD, EXPERTS = "linear", "head", "experts"
Fused = Mapping[str, Collection[str]]  # engine module → the linears it merges, by their last names

_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(\w+)")
_HEAD = re.compile(r"(.*\.)?(lm_head|shared_head\.head)")
_ROUTER = re.compile(r".*\.(gate|wg|router|shared_expert_gate)")
_NOT_LINEAR = re.compile(r".*\.(eh_proj|embed_tokens|wte)")  # plain or looked up otherwise, in every engine
ROUTER_ASKED = {VLLM: {"qwen3_moe"}, VLLM_25: {"qwen3_moe"}, SGLANG: frozenset[str]()}


@dataclass(frozen=True)
class Answer:
    """kind: `quantized`, `ignored`, `nothing` (no entry reaches it) or `error`. by: the entry that decided, or the error.

    scheme: of the quantized, what they are quantized as; equal schemes of two groups have one name.
    """

    kind: str
    by: str = ""
    scheme: str = ""

    def described(self) -> str:
        if self.kind == "quantized":
            return f"quantized as {self.scheme}" + (f", by {self.by!r}" if self.by else "")
        if self.kind == "ignored":
            return "not quantized" + (f", by {self.by!r}" if self.by else "")
        return "not quantized: no entry reaches it" if self.kind == "nothing" else self.by


NOTHING = Answer("nothing")


def ignored(entry: str) -> Answer:
    return Answer("ignored", entry)


def error(sentence: str) -> Answer:
    return Answer("error", sentence)


@dataclass(frozen=True)
class Module:
    """A module that an engine looks up. members: the checkpoint's linears in it, in the engine's order.

    shards: the members of a merged linear; none for what the checkpoint stores under this name, and for experts.
    """

    name: str
    kind: str
    members: tuple[str, ...]

    @property
    def shards(self) -> tuple[str, ...]:
        return self.members if self.kind == LINEAR and self.members != (self.name,) else ()

    def leaves(self) -> frozenset[str]:
        return frozenset(member.rpartition(".")[2] for member in self.members)


def alone(member: str, kind: str = LINEAR) -> Module:
    """A member as if the engine asked for it by itself."""
    return Module(member, kind, (member,))


def engine_modules(linears: Iterable[str], fused: Fused) -> list[Module]:
    """What engines make of the checkpoint's linears: merged where all members are there, experts of a layer in one."""
    names = list(dict.fromkeys(linears))
    there, found = set(names), dict[str, tuple[str, list[str]]]()
    for name in names:
        if expert := _EXPERT.fullmatch(name):
            found.setdefault(expert[1], (EXPERTS, []))[1].append(name)
        elif _HEAD.fullmatch(name):
            found[name] = (HEAD, [name])
        elif not _NOT_LINEAR.fullmatch(name):
            merged, members = _merged(name, there, fused)
            found.setdefault(merged, (LINEAR, list(members)))
    return [Module(name, kind, tuple(members)) for name, (kind, members) in found.items()]


def _merged(name: str, there: Collection[str], fused: Fused) -> tuple[str, tuple[str, ...]]:
    prefix, dot, leaf = name.rpartition(".")
    for whole, leaves in fused.items():
        members = tuple(f"{prefix}{dot}{other}" for other in leaves)
        if leaf in leaves and all(member in there for member in members):
            return f"{prefix}{dot}{whole}", members
    return name, (name,)


def asks(engine: str, module: Module, model_type: str) -> bool:
    """Whether the engine looks the module up at all: most models give their routers no quantization config."""
    return not _ROUTER.fullmatch(module.name) or model_type in ROUTER_ASKED[engine]


class Entries:
    """Names and `re:` patterns in their order. Errors: ValueError for a pattern that is none."""

    def __init__(self, entries: Iterable[str]) -> None:
        self._order: dict[str, int] = {}
        for entry in entries:
            self._order.setdefault(entry, len(self._order))
        self._patterns = [(entry, pattern(entry[3:])) for entry in self._order if entry.startswith("re:")]

    def __contains__(self, entry: str) -> bool:
        return entry in self._order

    def __iter__(self) -> Iterator[str]:
        return iter(self._order)

    def first(self, name: str) -> str | None:
        """The first entry that is the name, or a pattern that matches it from its start: nothing anchors the end."""
        exact = name if name in self._order and not name.startswith("re:") else None
        until = self._order[name] if exact else len(self._order)
        for entry, compiled in self._patterns:
            if self._order[entry] > until:
                break
            if compiled.match(name):
                return entry
        return exact

    def suffix(self, name: str) -> str | None:
        """The first in the order of `name`'s suffixes, longest first, that an entry is whole."""
        parts = name.split(".")
        tails = (".".join(parts[start:]) for start in range(len(parts)))
        return next((tail for tail in tails if tail in self._order), None)


def pattern(text: str) -> re.Pattern[str]:
    """Errors: ValueError where it is no regular expression."""
    try:
        return re.compile(text)
    except re.error as problem:
        raise ValueError(f"{text!r} is not a regular expression: {problem}") from problem
