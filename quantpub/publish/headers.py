"""The head of a safetensors file: eight bytes of length, unsigned and little-endian, and a JSON object of that length.

It names each tensor with its dtype, shape and place; `data_offsets` count from the end of the header, so the largest
end is the size of the rest of the file (safetensors, format specification).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SUFFIX = ".safetensors"
LENGTH_BYTES = 8


def read_header(path: Path) -> bytes:
    """The length field and the JSON header; less when the file is shorter than it says."""
    with path.open("rb") as f:
        length = f.read(LENGTH_BYTES)
        return length + f.read(min(int.from_bytes(length, "little"), path.stat().st_size))


def header_problem(header: bytes, size: int) -> str | None:
    """Why a file of `size` bytes that opens with `header` cannot be loaded; None when it can."""
    if len(header) < LENGTH_BYTES or len(header) != LENGTH_BYTES + int.from_bytes(header[:LENGTH_BYTES], "little"):
        return "not a safetensors file: the header is not as long as it says"
    try:
        tensors: dict[str, Any] = json.loads(header[LENGTH_BYTES:])
        ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        return f"its header cannot be read: {error}"
    if max(ends, default=0) != size - len(header):
        return f"its header describes {max(ends, default=0)} bytes of tensors, the file holds {size - len(header)}"
    return None
