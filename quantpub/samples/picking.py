"""Which documents are samples: a permutation that a seed decides, and of it the first that are long enough.

The permutation is Fisher and Yates's, drawn lazily: step k swaps place k with place k + sha256("SEED:k") mod (n - k). It
is the same on every machine and with every version of Python, torch and numpy, and a request for fewer samples gets the
beginning of the same order.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
ORDER = 'Fisher-Yates by sha256("SEED:STEP"), first long enough, in file order'
ROUND = 16  # documents read at once at least, though fewer are missing


def permutation(count: int, seed: int) -> Iterator[int]:
    """The numbers below `count`, each once, in the seed's order."""
    moved: dict[int, int] = {}
    for step in range(count):
        draw = int.from_bytes(hashlib.sha256(f"{seed}:{step}".encode()).digest())
        place = step + draw % (count - step)
        yield moved.get(place, place)
        moved[place] = moved.pop(step, step)


@dataclass(frozen=True)
class Picked(Generic[T]):
    """samples: (place, sample) in file order. passed: places that came before the last sample, and were not fit."""

    samples: list[tuple[int, T]]
    passed: list[int]


def pick(
    count: int, wanted: int, seed: int, make: Callable[[Sequence[int]], dict[int, T]], progress: Callable[[int], None]
) -> Picked[T]:
    """The first `wanted` fit documents of the permutation.

    make: the samples of those of the given places that are fit. It is called for no more places than are needed, but
    for several at a time. progress: hears how many there are.
    """
    order, samples, passed = permutation(count, seed), dict[int, T](), list[int]()
    while len(samples) < wanted:
        places = list(itertools.islice(order, max(wanted - len(samples), ROUND)))
        if not places:
            break
        fit = make(places)
        for place in places:
            if place in fit and len(samples) < wanted:
                samples[place] = fit[place]
            elif place not in fit and len(samples) < wanted:
                passed.append(place)
        progress(len(samples))
    return Picked(sorted(samples.items(), key=lambda item: item[0]), passed)
