"""Which files the Hub keeps in LFS, which it refuses to take as text, and which it ignores.

A new model repository begins with one commit that holds a `.gitattributes`; its patterns, and nothing else, say what is
LFS. The Hub adds two rules of its own: a file over 10 MB, or one that is not text, is LFS whatever its name. Patterns
are the plain ones that occur in practice (no negation); `.gitignore` is read the same way.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import PurePosixPath

REGULAR_LIMIT = 10 * 1000 * 1000
SAMPLE = 512  # the client sends this many first bytes of each file
_LFS = """
*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz *.onnx *.ot
*.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz *.wasm *.xz
*.zip *.zst *tfevents*
"""
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in _LFS.split()).encode()


def lfs_patterns(gitattributes: str) -> list[str]:
    lines = (line.split() for line in gitattributes.splitlines())
    return [words[0] for words in lines if len(words) > 1 and "filter=lfs" in words[1:]]


def ignore_patterns(gitignore: str) -> list[str]:
    lines = (line.strip() for line in gitignore.splitlines())
    return [line for line in lines if line and not line.startswith(("#", "!"))]


def matches(path: str, patterns: list[str]) -> bool:
    """Whether one of the patterns names `path`, its last part, or a folder above it."""
    parts = PurePosixPath(path)
    above = [str(parent) + "/" for parent in parts.parents]
    return any(fnmatchcase(name, pattern.lstrip("/")) for pattern in patterns for name in (path, parts.name, *above))


def is_lfs(path: str, size: int, sample: bytes, patterns: list[str]) -> bool:
    return matches(path, patterns) or size > REGULAR_LIMIT or b"\0" in sample
