"""What all of GPTQ's layouts share: int4 or int8 codes in int32 words along K, zeros in words along N.

Legend: b bits, W = 32 / b codes a word, g columns a group, G groups. Per module:
    qweight   int32 [K/W, N]   element k in bits b·(k mod W) … of word k/W, stored as code + 2^(b−1)
    scales    model dtype [G, N]
    qzeros    int32 [G, N/W]   zero + 2^(b−1) − `less` of every column, column n in bits b·(n mod W) … of word n/W
    g_idx     int32 [K]        the group of column k, k / g where there is no act order; auto-round writes none
Version 1 stores a zero less one, version 2 as it is. Less one, a zero of code −2^(b−1) goes around to 2^b − 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from quantpub.layouts.base import Cut, Spec, Tensors, reject_rest
from quantpub.layouts.words import PACK, UNPACK, shifted
from quantpub.qtensor import QTensor
from quantpub.scheme import WHOLE, Scheme

SYMMETRIC = {("int4", "none"), ("int8", "none")}
NOT_MIDDLE = "its zeros are not those of symmetric weights, as its configuration says"
ANY_ZERO = SYMMETRIC | {("int4", "int"), ("int8", "int")}


def codes_a_word(scheme: Scheme) -> int:
    return 32 // scheme.weight.number.bits


def reject_shape(scheme: Scheme, n: int, k: int) -> str | None:
    word = codes_a_word(scheme)
    if k % word or n % word:
        return f"shape [{n}, {k}] is not made of multiples of {word}, the codes of one packed word"
    return reject_rest(k, scheme.group_size)


def tp_multiple(scheme: Scheme) -> tuple[int, int]:
    """Whole words along both sides, and whole groups."""
    word = codes_a_word(scheme)
    return word, word if scheme.group_size == WHOLE else math.lcm(word, scheme.group_size)


@dataclass(frozen=True)
class Words:
    """less: what is taken off a zero when it is stored. ordered: whether g_idx stands beside."""

    less: int
    ordered: bool = True

    def spec(self, scheme: Scheme, n: int, k: int, dtype: str) -> Spec:
        word, groups = codes_a_word(scheme), scheme.weight.scale_shape(n, k)[1]
        found: Spec = {
            "qweight": ("I32", (k // word, n)),
            "scales": (dtype, (groups, n)),
            "qzeros": ("I32", (groups, n // word)),
        }
        return found | {"g_idx": ("I32", (k,))} if self.ordered else found

    def pack(self, q: QTensor) -> Tensors:
        bits, zero_NG = q.scheme.weight.number.bits, q.zero
        if zero_NG is None:
            zero_NG = torch.zeros(q.scale.shape, dtype=torch.int8, device=q.scale.device)
        tensors = {
            "qweight": PACK[bits](q.codes_NK).T.contiguous(),
            "scales": q.scale.T.contiguous(),
            "qzeros": PACK[bits](shifted(zero_NG, -self.less, bits).T.contiguous()),
        }
        return tensors | {"g_idx": in_order(q.shape[1], q.scale.shape[1], q.scale.device)} if self.ordered else tensors

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> QTensor:
        bits = scheme.weight.number.bits
        codes_NK = UNPACK[bits](tensors["qweight"].T.contiguous())
        zero_NG = None
        if scheme.weight.zero_domain == "int":
            zero_NG = shifted(UNPACK[bits](tensors["qzeros"]), self.less, bits).T.contiguous()
        return QTensor(scheme, codes_NK, tensors["scales"].T.contiguous(), zero_NG)

    def ambiguous(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Zeros where there should be none, a last zero less one, which may be a borrow, and columns out of order."""
        bits = scheme.weight.number.bits
        stored, last = UNPACK[bits](tensors["qzeros"]), (1 << bits - 1) - 1  # signed, as zeros are: 0 is the middle
        if scheme.weight.zero_domain == "none":
            if bool((stored != -self.less).any()):
                return NOT_MIDDLE
        elif self.less and bool((stored == last).any()):
            return f"a zero is stored as {(1 << bits) - 1}, which GPTQ's version 1 does not tell from a borrow of the next zero"
        return _order(tensors)


def _order(tensors: Mapping[str, torch.Tensor]) -> str | None:
    g_idx = tensors.get("g_idx")
    if g_idx is None or torch.equal(g_idx, in_order(len(g_idx), len(tensors["scales"]), g_idx.device)):
        return None
    return "its groups are made of columns in the order of their activations (g_idx), which no other layout holds"


def cut(scheme: Scheme) -> Cut:
    word = codes_a_word(scheme)
    return Cut(word, {"qweight": (1, 1), "scales": (1, 1), "qzeros": (1, word)})


def in_order(k: int, groups: int, device: torch.device) -> torch.Tensor:
    """g_idx of columns whose groups follow one another."""
    return torch.arange(k, dtype=torch.int32, device=device) // (k // groups)
