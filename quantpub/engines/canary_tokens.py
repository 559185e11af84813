"""The token ids that a canary is run on: windows of the bundled text, or random ids where no tokenizer is at hand.

The bundled text is Python with its English documentation. Every window starts with the tokenizer's bos token, if it has one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantpub.errors import InputError

WINDOWS, WINDOW, PROMPT, SEED = 4, 256, 32, 0
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model")
PACKAGE = Path(__file__).resolve().parent.parent
TEXTS = (PACKAGE / "_data" / "demo" / "eval.jsonl", PACKAGE.parent / "demo" / "eval.jsonl")


@dataclass(frozen=True)
class Tokens:
    """windows: of equal length. prompt: what is continued. source: `text`, or why the ids are random."""

    windows: tuple[tuple[int, ...], ...]
    prompt: tuple[int, ...]
    source: str

    @property
    def is_text(self) -> bool:
        return self.source == "text"


def canary_tokens(
    folder: Path, base: Path | None = None, windows: int = WINDOWS, window: int = WINDOW, prompt: int = PROMPT
) -> Tokens:
    """By the base's tokenizer, else the checkpoint's; shorter windows where the model has fewer positions.

    Errors: InputError when the checkpoint has no configuration that names a vocabulary.
    """
    config = _config(folder)
    positions = config.get("max_position_embeddings")
    width = min(window, positions - 2) if isinstance(positions, int) else window
    home = next((at for at in (base, folder) if at is not None and has_tokenizer(at)), None)
    why, ids = "random ids, there is no tokenizer", list[list[int]]()
    if home is not None:
        try:
            ids = _of_text(home, windows, width)
            why = "text"
        except Exception as error:  # of every kind: what transformers makes of files that it does not understand
            why = f"random ids, the tokenizer does not load: {type(error).__name__}"
    if not ids:
        ids = _random(int(config["vocab_size"]), windows, width)
    return Tokens(tuple(map(tuple, ids)), tuple(ids[0][:prompt]), why)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZERS)


def _config(folder: Path) -> dict[str, Any]:
    try:
        whole: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
        config: dict[str, Any] = whole | whole.get("text_config", {})
        if not isinstance(config["vocab_size"], int):
            raise KeyError("vocab_size")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        where, advice = str(folder / "config.json"), "name the folder of a checkpoint"
        raise InputError("not a model's configuration", where=where, next=advice) from None
    return config


def _of_text(home: Path, windows: int, width: int) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(home), local_files_only=True)
    start = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    step, ids = width - len(start), list[int]()
    for line in next(text for text in TEXTS if text.is_file()).read_text("utf-8").splitlines():
        ids += tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
        if len(ids) >= windows * step:
            break
    return [start + ids[at * step : (at + 1) * step] for at in range(min(windows, len(ids) // step))]


def _random(vocabulary: int, windows: int, width: int) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(SEED)
    return [list(map(int, row)) for row in torch.randint(vocabulary, (windows, width), generator=generator)]
