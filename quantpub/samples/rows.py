"""What a row holds, decided by the columns of the first row; every row that is read must hold it too.

    input_ids                          token ids, used as they are
    messages: [{role, content}]        a conversation, through the chat template
    conversations: [{from, value}]     the same in ShareGPT's words
    text                               used as it is, whatever the model
    prompt + completion | response     one question and its answer: a conversation where the model has a chat template,
    question + answer                  otherwise both texts, a line break between them
    instruction (+ input) + output

The first of these that fits is taken; a conversation gives way to a text beside it when there is no chat template.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quantpub.errors import InputError
from quantpub.samples.documents import Row

Content = list[int] | list[dict[str, Any]] | str
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
WANTED = 'rows have "text", "messages", "conversations", "input_ids", or a pair such as "prompt" and "completion"'
IDS = ("id", "prompt_id")


@dataclass(frozen=True)
class Kind:
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def conversation(self) -> bool:
        return self.columns[0] in ("messages", "conversations")

    @property
    def pair(self) -> bool:
        return len(self.columns) == 2


KINDS = (
    Kind(("input_ids",)),
    Kind(("messages",)),
    Kind(("conversations",)),
    Kind(("text",)),
    Kind(("prompt", "completion")),
    Kind(("prompt", "response")),
    Kind(("question", "answer")),
    Kind(("instruction", "output"), ("input",)),
)


def kind_of(names: Sequence[str], has_template: Callable[[], bool], where: str) -> Kind:
    """What rows with these columns hold. Errors: InputError."""
    fits = [kind for kind in KINDS if set(kind.columns) <= set(names)]
    if not fits:
        found = ", ".join(map(repr, sorted(names)[:8])) or "nothing"
        raise InputError(f"the row holds no text; it has {found}", where=where, next=WANTED)
    if not fits[0].conversation or has_template():
        return fits[0]
    if plain := [kind for kind in fits if not kind.conversation]:
        return plain[0]
    raise InputError(
        "the rows are conversations, and the model's tokenizer has no chat template",
        where=where,
        next='give rows with "text", or put a chat_template.jinja into the model\'s folder',
    )


def content(kind: Kind, row: Row, has_template: bool, where: str) -> Content:
    """Token ids, messages or a text. Errors: InputError when the row does not hold what the first one held."""
    for name in kind.columns:
        if row.get(name) is None:
            raise InputError(f'the row has no "{name}", which the first row has', where=where, next="mend this row")
    if kind.pair:
        return _pair(kind, row, has_template, where)
    name = kind.columns[0]
    if name == "input_ids":
        return _ids(row[name], where)
    return _messages(row[name], name, where) if kind.conversation else _text(row[name], name, where)


def row_id(row: Row) -> tuple[str, str | int] | None:
    """(the column that names the row, its value), if one does."""
    for name in IDS:
        if isinstance(row.get(name), (str, int)) and not isinstance(row[name], bool):
            return name, row[name]
    return None


def _pair(kind: Kind, row: Row, has_template: bool, where: str) -> Content:
    question, answer = (_text(row[name], name, where) for name in kind.columns)
    more = [_text(row[name], name, where) for name in kind.optional if row.get(name)]
    question = "\n".join([question, *more])
    if not has_template:
        return f"{question}\n{answer}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(name, "a text", where)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f'"{name}" holds half a surrogate pair', where=where, next="mend this row") from None
    return value


def _ids(value: Any, where: str) -> list[int]:
    if not isinstance(value, list) or not all(type(entry) is int for entry in value):
        raise _wrong("input_ids", "a list of whole numbers", where)
    return value


def _messages(value: Any, name: str, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise _wrong(name, 'a list of {"role", "content"}', where)
    return [_message(entry, name, where) for entry in value]


def _message(entry: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """As the chat template wants it: role and content, and what else stands there (tool calls, names)."""
    words = ("role", "content") if "role" in entry else ("from", "value")
    role, said = (entry.get(word) for word in words)
    if not isinstance(role, str):
        raise _wrong(name, 'a list of {"role", "content"}', where)
    if said is None and not entry.get("tool_calls"):
        raise InputError(f'a message of "{name}" has no content', where=where, next="mend this row")
    others = {key: value for key, value in entry.items() if key not in words and value is not None}
    return {**others, "role": ROLES.get(role, role), "content": _said(said, name, where)}


def _said(value: Any, name: str, where: str) -> str:
    """The content of a message; of one in parts, their texts together."""
    parts = value if isinstance(value, list) else [{"type": "text", "text": "" if value is None else value}]
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise InputError(f'a message of "{name}" holds something else than text', where=where, next="mend this row")
    return "".join(_text(part["text"], name, where) for part in parts)


def _wrong(name: str, wanted: str, where: str) -> InputError:
    return InputError(f'"{name}" is not {wanted}', where=where, next="mend this row, as the first row has it")
