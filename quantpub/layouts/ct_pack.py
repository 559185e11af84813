"""compressed-tensors `pack-quantized`: int4 or int8 codes in int32 words, for vLLM and SGLang (Marlin, Machete).

Legend: b bits, W = 32 / b codes a word, g columns a group. Per module:
    weight_packed      int32 [N, K/W]          element k in bits b·(k mod W) … of word k/W, stored as code + 2^(b−1)
    weight_scale       model dtype [N, K/g], or [N, 1] where a whole row shares one
    weight_shape       int64 [2] = (N, K)
    weight_zero_point  int32 [ceil(N/W), K/g]  asymmetric only: zeros packed the same way, but down the rows; what is
                                               missing of the last word is zero bits
Widths of 3, 5, 6 and 7 bits are left out: compressed-tensors packs them differently before and after 0.17.
Source: compressed-tensors' pack_quantized compressor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from quantpub.layouts.base import (
    CT,
    CT_KV_CACHE,
    Config,
    Cut,
    Layout,
    RowWords,
    Spec,
    Tensors,
    as_stored,
    ct_arguments,
    ct_config,
    ct_group,
    reject_integers,
    reject_rest,
)
from quantpub.layouts.words import pack_bytes, pack_words, unpack_bytes, unpack_words
from quantpub.qtensor import QTensor
from quantpub.scheme import WHOLE, Scheme

FORMAT = "pack-quantized"
Words = Callable[[torch.Tensor], torch.Tensor]
PACK: dict[int, Words] = {4: pack_words, 8: pack_bytes}
UNPACK: dict[int, Words] = {4: unpack_words, 8: unpack_bytes}
KINDS = {(num, zero) for num in ("int4", "int8") for zero in ("none", "int")}


def _word(scheme: Scheme) -> int:
    """Codes in an int32."""
    return 32 // scheme.weight.number.bits


def _asymmetric(scheme: Scheme) -> bool:
    return scheme.weight.zero_domain == "int"


def reject(scheme: Scheme, n: int, k: int, dtype: str) -> str | None:
    if reason := reject_integers("ct-pack", scheme, dtype, KINDS):
        return reason
    if k % _word(scheme):
        return f"in_features {k} is not a multiple of {_word(scheme)}, the codes of one packed word"
    return reject_rest(k, scheme.group_size)


def spec(scheme: Scheme, n: int, k: int, dtype: str) -> Spec:
    word, scale = _word(scheme), scheme.weight.scale_shape(n, k)
    found: Spec = {
        "weight_packed": ("I32", (n, k // word)),
        "weight_scale": (dtype, scale),
        "weight_shape": ("I64", (2,)),
    }
    if _asymmetric(scheme):
        found["weight_zero_point"] = ("I32", (-(-n // word), scale[1]))
    return found


def pack(q: QTensor) -> Tensors:
    bits = q.scheme.weight.number.bits
    tensors = {
        "weight_packed": PACK[bits](q.codes_NK),
        "weight_scale": q.scale,
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }
    if _asymmetric(q.scheme):
        assert q.zero is not None
        tensors["weight_zero_point"] = _pack_down(q.zero, bits)
    return tensors


def unpack(tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    bits = scheme.weight.number.bits
    zero = _unpack_down(tensors["weight_zero_point"], bits, shape[0]) if _asymmetric(scheme) else None
    return QTensor(scheme, UNPACK[bits](tensors["weight_packed"]), tensors["weight_scale"], zero)


def ambiguous(tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """Some loaders go by its shape, others by its words."""
    said = tensors["weight_shape"].tolist()
    return f"its weight_shape is {said}, its words hold {list(shape)}" if tuple(said) != shape else None


def _pack_down(zero_NG: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 [N, G] → int32 [ceil(N/W), G]. The lowest code is stored as zero bits, so it pads."""
    missing = -len(zero_NG) % (32 // bits)
    padded_GN = torch.nn.functional.pad(zero_NG.T, (0, missing), value=-(1 << (bits - 1)))
    return PACK[bits](padded_GN).T.contiguous()


def _unpack_down(words_WG: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    return UNPACK[bits](words_WG.T.contiguous())[:, :n].T.contiguous()


def group(scheme: Scheme) -> Config:
    bits, strategy = scheme.weight.number.bits, "channel" if scheme.group_size == WHOLE else "group"
    weights = ct_arguments(bits, "int", strategy, False, scheme.group_size, symmetric=not _asymmetric(scheme))
    return ct_group(FORMAT, weights, None)


def config(scheme: Scheme, ignore: Sequence[str]) -> Config:
    return ct_config([group(scheme)], ignore)


def tp_multiple(scheme: Scheme) -> tuple[int, int]:
    """Whole words and whole groups along K; zeros are packed down the rows."""
    word = _word(scheme)
    columns = word if scheme.group_size == WHOLE else math.lcm(word, scheme.group_size)
    return word if _asymmetric(scheme) else 1, columns


def cut(scheme: Scheme) -> Cut:
    word = _word(scheme)
    return Cut(word, {"weight_packed": (0, 1), "weight_scale": (0, 1), "weight_zero_point": (0, word)})


LAYOUT = Layout(
    "ct-pack",
    "checkpoint",
    CT,
    reject,
    spec,
    pack,
    unpack,
    config,
    tp_multiple,
    group,
    kv_cache=CT_KV_CACHE,
    ambiguous=ambiguous,
    cut=cut,
    words=RowWords("weight_packed", as_stored, as_stored),
)
