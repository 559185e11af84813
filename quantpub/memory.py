"""Keep freed memory for the next tensor instead of giving it back to the kernel.

glibc maps every large block anew and unmaps it when it is freed, so each tensor pays for fresh, zeroed pages. Blocks up to
32 MiB (the largest the allocator takes) now stay in its heaps. Measured on 0.55B weights: 10 % less wall time, 45 MB more
at the peak. Source: mallopt(3).
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Whether the allocator took the settings; another C library keeps its own ways."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 1 << 30, _TOP_PAD: 16 << 20}
    return all(mallopt(option, value) == 1 for option, value in settings.items())


def give_back() -> None:
    """What was freed goes back to the kernel, whatever `keep_freed_memory` said: between stages of different needs."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return
