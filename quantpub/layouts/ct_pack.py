"""compressed-tensors `pack-quantized`: int4 codes in int32 words, for vLLM (Marlin, Machete) and SGLang (Marlin).

Per module, with b = 4 bits and g columns a group:
    weight_packed  int32 [N, K/8]   element k in bits 4·(k mod 8) … +3 of word k/8, stored as code + 8
    weight_scale   model dtype [N, K/g]
    weight_shape   int64 [2] = (N, K)
Packing −8…7 gives the words 0x76543210, 0xfedcba98. Source: compressed-tensors' pack_quantized compressor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quantpub.layouts.base import Layout, Spec, Tensors, ct_arguments, ct_config
from quantpub.qtensor import QTensor
from quantpub.scheme import WHOLE, Scheme

FORMAT = "pack-quantized"
WORD = 8  # int4 codes in an int32


def pack_words(codes_NK: torch.Tensor) -> torch.Tensor:
    """int8 codes −8…7 [N, K], K a multiple of 8 → int32 [N, K/8].

    Eight bytes are read as one 64-bit integer, and its low nibbles are folded together in three steps: an eighth of the
    elements of a shift-and-add over single codes.
    """
    x = (codes_NK.contiguous() + 8).view(torch.int64)
    x = (x | (x >> 4)) & 0x00FF00FF00FF00FF
    x = (x | (x >> 8)) & 0x0000FFFF0000FFFF
    return (x | (x >> 16)).to(torch.int32)  # the cast keeps the low 32 bits


def unpack_words(words_NW: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_words`: int32 [N, K/8] → int8 [N, K]."""
    x = words_NW.to(torch.int64) & 0xFFFFFFFF
    x = (x | (x << 16)) & 0x0000FFFF0000FFFF
    x = (x | (x << 8)) & 0x00FF00FF00FF00FF
    x = (x | (x << 4)) & 0x0F0F0F0F0F0F0F0F
    return x.view(torch.int8) - 8


def reject(scheme: Scheme, n: int, k: int) -> str | None:
    weight, group = scheme.weight, scheme.group_size
    if weight.num != "int4" or weight.block[0] != 1 or weight.zero_domain != "none" or scheme.act is not None:
        return f"ct-pack holds symmetric int4 weights with 16-bit activations, not {scheme.name}"
    if k % WORD:
        return f"in_features {k} is not a multiple of {WORD}, the codes of one packed word"
    if group != WHOLE and k % group:
        return f"in_features {k} is not a multiple of the group size {group}"
    return None


def spec(scheme: Scheme, n: int, k: int, dtype: str) -> Spec:
    scale = scheme.weight.scale_shape(n, k)
    return {"weight_packed": ("I32", (n, k // WORD)), "weight_scale": (dtype, scale), "weight_shape": ("I64", (2,))}


def pack(q: QTensor) -> Tensors:
    shape = torch.tensor(q.shape, dtype=torch.int64)
    return {"weight_packed": pack_words(q.codes_NK), "weight_scale": q.scale, "weight_shape": shape}


def unpack(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QTensor:
    return QTensor(scheme, unpack_words(tensors["weight_packed"]), tensors["weight_scale"])


def config(scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
    strategy = "channel" if scheme.group_size == WHOLE else "group"
    return ct_config(FORMAT, ct_arguments(4, "int", strategy, False, scheme.group_size), None, ignore)


def tp_multiple(scheme: Scheme) -> tuple[int, int]:
    return 1, max(WORD, scheme.group_size)


LAYOUT = Layout("ct-pack", "checkpoint", reject, spec, pack, unpack, config, tp_multiple, {})
