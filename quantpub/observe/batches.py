"""Samples cut into batches of rows of one length: no padding, so that nothing but real tokens is ever seen.

How they are cut hangs on the samples alone, not on how many processes share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

TOKENS = {"cpu": 1024, "cuda": 16384}  # in a batch: on a CPU its tensors should stay in the cache


def cut(rows: Sequence[torch.Tensor], device: str) -> list[torch.Tensor]:
    """Token ids [B, T] of every batch, shortest rows first."""
    found = []
    for length, same in groupby(sorted(rows, key=len), key=len):
        members, size = list(same), max(1, TOKENS[device] // length)
        found += [torch.stack(members[i : i + size]) for i in range(0, len(members), size)]
    return found
