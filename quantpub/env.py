"""Environment variables, read in one place. Only `QUANTPUB_*` here, and those by which torchrun tells its processes apart.

The `HF_*` ones belong to huggingface_hub.
"""

from __future__ import annotations

import os
from pathlib import Path


def flag(name: str) -> bool:
    """True when the variable is set to anything but an empty string, 0, false or no."""
    return os.environ.get(name, "").lower() not in ("", "0", "false", "no")


def debug() -> bool:
    """QUANTPUB_DEBUG=1 prints the traceback beneath an error's one line."""
    return flag("QUANTPUB_DEBUG")


def crash_at() -> str | None:
    """QUANTPUB_CRASH_AT=POINT:N kills the process at the N-th passage of a write point (tests of resume)."""
    return os.environ.get("QUANTPUB_CRASH_AT")


def cache() -> Path:
    """QUANTPUB_CACHE=DIR is where calibrations are kept; `~/.cache/quantpub` otherwise."""
    return Path(os.environ.get("QUANTPUB_CACHE") or "~/.cache/quantpub").expanduser()


def torchrun() -> tuple[int, int, int]:
    """(rank, rank on this machine, number of processes) as torchrun tells it; (0, 0, 1) for a process on its own."""
    return tuple(int(os.environ.get(name) or default) for name, default in _TORCHRUN)  # type: ignore[return-value]


_TORCHRUN = (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))


def first() -> bool:
    """Whether this is the process that writes and talks: the only one, or torchrun's first."""
    return torchrun()[0] == 0
