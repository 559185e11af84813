"""What calibration data was asked for, and what its name names.

A name is a file when one of that name exists. Otherwise it is a dataset of the Hub, `owner/name[@revision][:split]`,
where a split of one of several configurations is `configuration/split`. What looks like a path (it ends like a file's
name, or starts with `.`, `/` or `~`) and does not exist is an error, never a question to the Hub.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from quantpub.errors import InputError, UsageError
from quantpub.sources import HUB_ID

# 207865 conversations in three parquet files, 732 MB
DEFAULT = "HuggingFaceH4/ultrachat_200k@8049631c405ae6576f93f445c6b8166f76f5505a:train_sft"
OWN_FILE = "`--calibration FILE` takes a jsonl, txt or parquet file"
FORMATS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "text"}
COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"(?P<repo>[^@:]+)(?:@(?P<revision>[^:]+))?(?::(?P<split>.+))?")
_FILE_ENDING = re.compile(r"\.[A-Za-z][A-Za-z0-9]{0,7}")


@dataclass(frozen=True)
class Request:
    """data: a file or a dataset id. num_samples: at most so many. max_seq_len: of each, in tokens. seed: which ones."""

    data: str
    num_samples: int = 512
    max_seq_len: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        """Errors: UsageError."""
        if self.num_samples < 1:
            raise UsageError(f"{self.num_samples} samples are none", next="--num-samples is 1 or more")
        if self.max_seq_len < 2:
            raise UsageError(f"samples of {self.max_seq_len} tokens are too short", next="--max-seq-len is 2 or more")


@dataclass(frozen=True)
class Dataset:
    """A dataset of the Hub, as it was named. revision, split: None where the name says nothing."""

    repo: str
    revision: str | None = None
    split: str | None = None

    @property
    def pinned(self) -> bool:
        """Whether the revision is a whole commit id: then it says all, and the Hub need not be asked."""
        return bool(self.revision and COMMIT.fullmatch(self.revision))

    def __str__(self) -> str:
        revision = f"@{self.revision[:7] if self.pinned else self.revision}" if self.revision else ""
        return f"{self.repo}{revision}{':' + self.split if self.split else ''}"


def named(data: str) -> Path | Dataset:
    """The file that exists, or the dataset. Errors: InputError."""
    path = Path(data).expanduser()
    if path.exists():
        return _usable(path, data)
    match = _NAME.fullmatch(data)
    if data.startswith((".", "/", "~")) or _FILE_ENDING.fullmatch(path.suffix):
        raise InputError("no such file", where=data, next=f"check the path: {OWN_FILE}")
    if not match or not HUB_ID.fullmatch(match["repo"]) or Path(match["repo"]).suffix in FORMATS:
        raise InputError(
            "neither a file nor a dataset id",
            where=data,
            next=f"{OWN_FILE}, or a Hub id like owner/name@revision:split",
        )
    return Dataset(match["repo"], match["revision"], match["split"])


def _usable(path: Path, data: str) -> Path:
    if path.is_dir():
        raise InputError("a folder is no calibration data", where=data, next=f"name a file in it: {OWN_FILE}")
    if path.suffix not in FORMATS:
        raise InputError(f"{path.suffix or 'no ending'} is no kind of calibration data", where=data, next=OWN_FILE)
    return path
