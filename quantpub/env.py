"""Environment variables, read in one place. Only `QUANTPUB_*` here; the `HF_*` ones belong to huggingface_hub."""

from __future__ import annotations

import os


def flag(name: str) -> bool:
    """True when the variable is set to anything but an empty string, 0, false or no."""
    return os.environ.get(name, "").lower() not in ("", "0", "false", "no")


def debug() -> bool:
    """QUANTPUB_DEBUG=1 prints the traceback beneath an error's one line."""
    return flag("QUANTPUB_DEBUG")


def crash_at() -> str | None:
    """QUANTPUB_CRASH_AT=POINT:N kills the process at the N-th passage of a write point (tests of resume)."""
    return os.environ.get("QUANTPUB_CRASH_AT")
