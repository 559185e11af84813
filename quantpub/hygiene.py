"""What no checkpoint may hold: files that run code when they are loaded, secrets, and paths of the machine that made it.

Secrets and paths are looked for in the texts that quantpub or a user writes. Tokenizer files are data: a vocabulary may
hold any string, a path or a key prefix among them, so they are not searched. A secret is one by its issuer's own form.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from quantpub.artifact import META

CARD = "README.md"
EXECUTED_ON_LOAD = frozenset(
    {
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".pkl",
        ".pickle",
        ".joblib",
        ".dill",
        ".npy",
        ".npz",
        ".h5",
        ".hdf5",
        ".keras",
        ".py",
        ".pyc",
        ".sh",
        ".so",
        ".dll",
        ".exe",
    }
)
RESERVED_PARTS = frozenset({".git", ".cache"})  # the client refuses them
RESERVED_NAMES = frozenset({".gitattributes", ".gitignore"})  # they decide at the Hub what is LFS and what is left out
SEARCHED = frozenset(
    {
        CARD,
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "hf_quant_config.json",
        "quantize_config.json",
        "recipe.yaml",
    }
)
TEXTS = frozenset({"", ".json", ".jsonl", ".yaml", ".yml", ".md", ".txt", ".csv", ".svg", ".log"})

_PATH = r"(?<![\w.~-])"  # not within a longer path or an address
SECRETS = {
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}"),
    "an AWS access key": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "an AWS secret key": re.compile(r"(?i)\baws_secret_access_key\W{1,10}[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+])"),
    "an OpenAI key": re.compile(r"\bsk-[A-Za-z0-9_-]{16,200}T3BlbkFJ[A-Za-z0-9_-]{16}"),
    "an Anthropic key": re.compile(r"\bsk-ant-[a-z]+\d{2}-[A-Za-z0-9_-]{80,}"),
    "a GitHub token": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{36}\b|\bgithub_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}\b"),
    "a GitLab token": re.compile(r"\bglpat-[A-Za-z0-9_-]{20,}"),
    "a Slack token": re.compile(r"\bxox[abeoprs]-\d{6,}-[A-Za-z0-9-]{10,}"),
    "a Google key": re.compile(r"\bAIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])"),
    "an NVIDIA key": re.compile(r"\bnvapi-[A-Za-z0-9_-]{60,}"),
    # forty hexadecimal digits are a commit as well: only where the name says what they are
    "a Weights & Biases key": re.compile(r"(?i)\bwandb[_-]?(?:api[_-]?)?key\W{1,10}[0-9a-f]{40}\b"),
    "a private key": re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"),
    "a local path": re.compile(rf"{_PATH}/(?:home|root|tmp|Users)/|\b[A-Za-z]:\\+Users\b"),
}

CODE_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code", "custom_code")


def bad_name(path: str) -> str | None:
    """Why a file of this name is not published."""
    parts = PurePosixPath(path)
    if parts.suffix.lower() in EXECUTED_ON_LOAD:
        return f"{parts.suffix.lower()} files can run code when they are loaded"
    if parts.name in RESERVED_NAMES or RESERVED_PARTS & set(parts.parts):
        return "the name is reserved by the Hub"
    return None


def is_searched(path: str) -> bool:
    parts = PurePosixPath(path)
    return path in SEARCHED or (parts.parts[0] == META and parts.suffix.lower() in TEXTS)


def secrets_in(text: str) -> list[tuple[int, str]]:
    """(line, kind) of everything that must not leave the machine. The finding itself is not repeated."""
    return [
        (number, kind)
        for number, line in enumerate(text.splitlines(), 1)
        for kind, pattern in SECRETS.items()
        if pattern.search(line)
    ]


def remote_code(config: Mapping[str, Any]) -> list[str]:
    """One sentence for each key of a config, at any depth, by which loading the model runs code that comes with it."""
    return list(_code(config, ""))


def _code(config: Mapping[str, Any], place: str) -> Iterator[str]:
    for key, value in config.items():
        if key in CODE_KEYS and value and str(value).lower() != "false":
            yield f"{place}{key}: {_asked_for(value)}"
        elif isinstance(value, Mapping):
            yield from _code(value, f"{place}{key}.")


def _asked_for(value: Any) -> str:
    """What is run, and whose it is: `repository--module.Class` names another repository."""
    if not isinstance(value, Mapping):
        return "it asks for code that comes with the model"
    entries = [entry["impl"] if isinstance(entry, Mapping) and "impl" in entry else entry for entry in value.values()]
    names = [str(name) for entry in entries for name in (entry if isinstance(entry, list) else [entry]) if name]
    others = sorted({name.partition("--")[0] for name in names if "--" in name})
    return f"{', '.join(names)} is code" + (f" of {', '.join(others)}" if others else " that comes with the model")
