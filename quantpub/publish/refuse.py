"""What may never be published: code and pickles, links, secrets, and paths of the machine that made the artifact.

Secrets and paths are looked for in the texts that quantpub or a user writes. Tokenizer files are data: a vocabulary may
hold any string, a path or a key prefix among them, so they are not searched.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from quantpub.artifact import META, Artifact
from quantpub.publish.headers import SUFFIX, header_problem, read_header

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
    "a private key": re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"),
    "a local path": re.compile(rf"{_PATH}/(?:home|root|tmp|Users)/|\b[A-Za-z]:\\+Users\b"),
}


def refusals(artifact: Artifact) -> list[str]:
    """Every reason not to publish this directory, each naming its file."""
    files = artifact.files()
    named = [f"{path}: {reason}" for path in files if (reason := bad_name(path))]
    found = [reason for path in files for reason in (*_found_in(artifact, path), *_unreadable(artifact, path))]
    return [*_card(artifact), *_links(artifact), *artifact.foreign_evidence(), *named, *found]


def _card(artifact: Artifact) -> list[str]:
    try:
        (artifact.path / CARD).read_text("utf-8")
    except FileNotFoundError:
        return [f"{CARD} is missing: write it with `quantpub card`"]
    except UnicodeDecodeError:
        return [f"{CARD}: not UTF-8"]
    return []


def _links(artifact: Artifact) -> list[str]:
    links = sorted(path for path in artifact.path.rglob("*") if path.is_symlink())
    return [f"{path.relative_to(artifact.path).as_posix()}: a symbolic link" for path in links]


def bad_name(path: str) -> str | None:
    """Why a file of this name is not published."""
    parts = PurePosixPath(path)
    if parts.suffix.lower() in EXECUTED_ON_LOAD:
        return f"{parts.suffix.lower()} files can run code when they are loaded"
    if parts.name in RESERVED_NAMES or RESERVED_PARTS & set(parts.parts):
        return "the name is reserved by the Hub"
    return None


def _found_in(artifact: Artifact, path: str) -> list[str]:
    if not is_searched(path) or (artifact.path / path).is_symlink():
        return []
    text = (artifact.path / path).read_text("utf-8", "replace")
    return [f"{path}:{line}: {kind}" for line, kind in secrets_in(text)]


def _unreadable(artifact: Artifact, path: str) -> list[str]:
    if not path.endswith(SUFFIX):
        return []
    source = artifact.path / path
    problem = header_problem(read_header(source), source.stat().st_size)
    return [f"{path}: {problem}"] if problem else []


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


def failed_gates(artifact: Artifact) -> list[str]:
    """Every gate that the evidence says failed. What was not measured is stated on the card; what failed is not published."""
    found = []
    for name in ("verify.json", "profile.json", "eval.json"):
        verdict = artifact.read_json(name).get("verdict") if artifact.has(name) else None
        gate = verdict.get("gate") if isinstance(verdict, dict) else verdict
        if gate == "failed":
            reason = verdict.get("reason") if isinstance(verdict, dict) else "see its checks"
            found.append(f"{name}: {reason}")
    return found
