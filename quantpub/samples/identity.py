"""Who the calibration data is: everything that decides which token ids come out, without making them.

A file is its bytes; a dataset is its commit (asked of the Hub only when the name does not hold one) and its split. Beside
it stand the files of the model's tokenizer, chat template included, and the settings. transformers is not imported.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from quantpub.checkpoint import Checkpoint
from quantpub.errors import UsageError
from quantpub.files import sha256_file
from quantpub.samples.dataset import commit_of
from quantpub.samples.request import DEFAULT, FORMATS, Request, named
from quantpub.sources import read_errors

SAMPLING = 1  # of the rules by which documents are picked and cut; part of the identity
_TOKENIZER = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "additional_chat")
_ENDINGS = (".model", ".tiktoken", ".jinja", ".vocab")


def identify(request: Request, checkpoint: Checkpoint) -> dict[str, Any]:
    """JSON that is equal exactly when the samples are. Errors: InputError, AuthError, UnavailableError."""
    data, who = named(request.data), dict[str, Any]()
    if isinstance(data, Path):
        with read_errors(data):
            who = {"kind": "file", "format": FORMATS[data.suffix], "sha256": sha256_file(data)}
    else:
        who = {"kind": "hub", "repo": data.repo, "commit": commit_of(data, request), "split": data.split}
    return {
        **who,
        "tokenizer": _tokenizer_files(checkpoint),
        "num_samples": request.num_samples,
        "max_seq_len": length(request, checkpoint),
        "seed": request.seed,
        "sampling": SAMPLING,
    }


def default_data(checkpoint: Checkpoint) -> str:
    """The data for a chat model when none was named. Errors: UsageError when the model has no chat template."""
    if has_chat_template(checkpoint):
        return DEFAULT
    raise UsageError(
        "the model has no chat template, and so no default calibration data",
        where=checkpoint.source.label,
        next="name a calibration text with --calibration: a jsonl, txt or parquet file, or a dataset id of the Hub",
    )


def has_chat_template(checkpoint: Checkpoint) -> bool:
    """Whether the tokenizer's own files hold one."""
    if "chat_template.jinja" in checkpoint.source.files:
        return True
    if "tokenizer_config.json" not in checkpoint.source.files:
        return False
    try:
        config = json.loads(checkpoint.source.read("tokenizer_config.json"))
    except (ValueError, RecursionError):
        return False
    return isinstance(config, dict) and bool(config.get("chat_template"))


def length(request: Request, checkpoint: Checkpoint) -> int:
    """Tokens a sample may have: what was asked for, or the positions that the model has where they are fewer."""
    config = checkpoint.config
    positions = config.get("max_position_embeddings") or text_config(config).get("max_position_embeddings")
    return min(request.max_seq_len, positions) if isinstance(positions, int) and positions > 1 else request.max_seq_len


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a configuration that has several parts."""
    part = config.get("text_config")
    return part if isinstance(part, dict) else {}


def _tokenizer_files(checkpoint: Checkpoint) -> dict[str, str]:
    names = (name for name in checkpoint.companions if name.startswith(_TOKENIZER) or name.endswith(_ENDINGS))
    return {name: hashlib.sha256(checkpoint.source.read(name)).hexdigest() for name in names}
