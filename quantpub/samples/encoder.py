"""The model's tokenizer: texts to token ids, conversations through its chat template.

A plain text gets the tokenizer's own special tokens, a rendered conversation only those that its template writes. Some
templates write today's date; here it is always DATE, so that the same data are the same ids on any day.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from quantpub.checkpoint import Checkpoint
from quantpub.errors import InputError
from quantpub.samples.identity import text_config

DATE = datetime.date(2024, 7, 26)
CHARACTERS = 8  # so many for each token that is wanted are tokenized at first; more only where they do not suffice
_NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


class Refused(Exception):
    """The chat template does not take this conversation."""


class Encoder:
    """limit: tokens that a sample may have. The tokenizer is loaded when it is first needed."""

    def __init__(self, checkpoint: Checkpoint, limit: int) -> None:
        self._checkpoint, self.limit = checkpoint, limit
        size = checkpoint.config.get("vocab_size") or text_config(checkpoint.config).get("vocab_size")
        self._vocabulary = size if isinstance(size, int) else None

    @cached_property
    def tokenizer(self) -> Any:
        """Errors: InputError when there is none that transformers loads."""
        from quantpub.forward import load_tokenizer

        source = self._checkpoint.source
        for name in self._checkpoint.companions:
            source.path(name)
        return load_tokenizer(source.path("config.json").parent)

    @cached_property
    def template(self) -> str | None:
        """The chat template, of several the default one."""
        found = self.tokenizer.chat_template
        chosen = found.get("default") if isinstance(found, dict) else found
        return chosen if isinstance(chosen, str) and chosen else None

    def has_template(self) -> bool:
        return self.template is not None

    def template_record(self, applied: bool) -> dict[str, Any]:
        """For evidence: whether the template was applied, which, and the date it was given."""
        if not applied or self.template is None:
            return {"applied": False}
        record = {"applied": True, "sha256": hashlib.sha256(self.template.encode()).hexdigest()}
        return {**record, "date": DATE.isoformat()} if _NOW.search(self.template) else record

    def render(self, messages: list[dict[str, Any]]) -> str:
        """The conversation as the model reads it. Errors: Refused."""
        from jinja2 import TemplateError

        assert self.template is not None
        dated = _NOW.sub(lambda found: f'"{DATE.strftime(found[2])}"', self.template)
        try:
            return str(self.tokenizer.apply_chat_template(messages, chat_template=dated, tokenize=False))
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise Refused(" ".join(str(error).split())[:160]) from error

    def encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        """The ids of each text, at most `limit`; with the tokenizer's special tokens or without."""
        enough = CHARACTERS * self.limit
        found = self._ids([text[:enough] for text in texts], special)
        for place, text in enumerate(texts):
            if len(text) > enough and len(found[place]) < self.limit:
                found[place] = self._ids([text], special)[0]
        return [ids[: self.limit] for ids in found]

    def encode_long(self, text: str) -> list[int]:
        """All ids of a text, without special tokens."""
        return self._ids([text], special=False)[0]

    def _ids(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=special)["input_ids"] if texts else []
        return found

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts before a text, and after it."""
        inner, whole = self._ids(["a"], special=False)[0], self._ids(["a"], special=True)[0]
        for start in range(len(whole) - len(inner) + 1):
            if whole[start : start + len(inner)] == inner:
                return whole[:start], whole[start + len(inner) :]
        return [], []

    def require_known(self, ids: Sequence[int], where: str) -> None:
        """Errors: InputError when the model has no embedding for an id."""
        wrong = next((i for i in ids if i < 0 or (self._vocabulary is not None and i >= self._vocabulary)), None)
        if wrong is not None:
            raise InputError(
                f"token id {wrong} is none of the model's {self._vocabulary}",
                where=where,
                next="was it tokenized for another model? give its text instead",
            )
