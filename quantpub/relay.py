"""One weight from a layout to another, by blocks of rows: no tensor of its codes is ever whole, and what works on it stays
in the cache. Every block that is packed is unpacked again and compared, bit for bit. Between layouts that keep int4 codes in
words of eight, words are handed over as they are, and taken back to compare.

Legend: N out_features, K in_features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from quantpub.layouts.base import Cut, Layout, Spec, Tensors
from quantpub.qtensor import QTensor, same, same_bits
from quantpub.scheme import Scheme
from quantpub.shards import DTYPES

BLOCK = 1 << 22  # codes worked on at a time: fewer, and threads wait for one another; more, and they leave the cache
IN_WORDS = 16  # times as many where words are handed over: they are only turned


@dataclass(frozen=True)
class Side:
    """A layout, and the scheme that it holds the weight in."""

    layout: Layout
    scheme: Scheme


class Unlike(Exception):
    """What was packed does not read back as what it was made of."""


def relay(
    found: Tensors,
    before: Side,
    after: Side,
    shape: tuple[int, int],
    spec: Spec,
    through: Callable[[QTensor], QTensor],
    converts: bool = False,
) -> Tensors:
    """found: the tensors by suffix of a weight [N, K]. spec: of what is made. through(a block of rows) → what it becomes;
    converts: whether it looks at codes.

    Errors: Unlike; what `through` raises.
    """
    cuts = before.layout.cut(before.scheme), after.layout.cut(after.scheme)
    rows = _rows(shape, *cuts)
    if rows is None or cuts[0] is None or cuts[1] is None:
        return _made(before.layout.unpack(found, before.scheme, shape), after, through)
    if not converts and _in_words(before, after):
        return _handed_over(found, before, after, shape, spec, through)
    made = {suffix: torch.empty(size, dtype=DTYPES[dtype]) for suffix, (dtype, size) in spec.items()}
    for start, stop in _blocks(shape[0], rows):
        part = {suffix: _part(tensor, cuts[0], suffix, start, stop) for suffix, tensor in found.items()}
        tensors = _made(before.layout.unpack(part, before.scheme, (stop - start, shape[1])), after, through)
        for suffix, tensor in tensors.items():
            _part(made[suffix], cuts[1], suffix, start, stop).copy_(tensor)
    if "weight_shape" in made:
        made["weight_shape"] = torch.tensor(shape, dtype=made["weight_shape"].dtype)
    return made


def _rows(shape: tuple[int, int], *cuts: Cut | None, block: int | None = None) -> int | None:
    """Rows of a block; None: the weight goes through whole."""
    if any(cut is None for cut in cuts):
        return None
    least = math.lcm(*(cut.rows for cut in cuts if cut is not None))
    return None if shape[0] % least else max(1, (block or BLOCK) // (shape[1] * least)) * least


def _blocks(n: int, rows: int) -> Iterator[tuple[int, int]]:
    return ((start, min(n, start + rows)) for start in range(0, n, rows))


def _part(tensor: torch.Tensor, cut: Cut, suffix: str, start: int, stop: int) -> torch.Tensor:
    if suffix not in cut.parts:
        return tensor
    axis, per = cut.parts[suffix]
    return tensor.narrow(axis, start // per, (stop - start) // per)


def _made(q: QTensor, after: Side, through: Callable[[QTensor], QTensor]) -> Tensors:
    q = through(q)
    tensors = after.layout.pack(q)
    if not same(after.layout.unpack(tensors, after.scheme, q.shape), q):
        raise Unlike
    return tensors


def _handed_over(
    found: Tensors,
    before: Side,
    after: Side,
    shape: tuple[int, int],
    spec: Spec,
    through: Callable[[QTensor], QTensor],
) -> Tensors:
    """Codes stay in their words, block by block: what is unpacked and packed has codes that are not there (device meta)."""
    taken, given = before.layout.words, after.layout.words
    cuts = before.layout.cut(before.scheme), after.layout.cut(after.scheme)
    rows = _rows(shape, *cuts, block=IN_WORDS * BLOCK)
    assert taken is not None and given is not None and rows and cuts[0] is not None and cuts[1] is not None
    absent = found | {taken.suffix: found[taken.suffix].to("meta")}
    q = through(before.layout.unpack(absent, before.scheme, shape))
    made = after.layout.pack(q)
    back = after.layout.unpack(made, after.scheme, shape)
    if not all(same_bits(getattr(back, name), getattr(q, name)) for name in ("scale", "zero")):
        raise Unlike
    dtype, size = spec[given.suffix]
    made[given.suffix] = torch.empty(size, dtype=DTYPES[dtype])
    for start, stop in _blocks(shape[0], rows):
        block = (stop - start, shape[1])
        words = taken.take(_part(found[taken.suffix], cuts[0], taken.suffix, start, stop), block).contiguous()
        into = _part(made[given.suffix], cuts[1], given.suffix, start, stop)
        into.copy_(given.give(words, block))
        if not torch.equal(given.take(into, block).contiguous(), words):
            raise Unlike
    return made


def _in_words(before: Side, after: Side) -> bool:
    """Whether codes can be handed over in words: int4 in both layouts, under one scheme."""
    known = before.layout.words is not None and after.layout.words is not None
    return known and before.scheme == after.scheme and before.scheme.weight.num == "int4"
