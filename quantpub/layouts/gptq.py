"""GPTQ v1 (`checkpoint_format: gptq`): int4 or int8 codes in int32 words along K, for GPTQModel, vLLM and SGLang.

Legend: b bits, W = 32 / b codes a word, g columns a group, G groups. Per module:
    qweight   int32 [K/W, N]   element k in bits b·(k mod W) … of word k/W, stored as code + 2^(b−1)
    scales    model dtype [G, N]
    qzeros    int32 [G, N/W]   zero − 1 of every column, packed along N: 0x77777777 or 0x7f7f7f7f, as all is symmetric
    g_idx     int32 [K]        the group of column k: k / g, for there is no act order
Integer zeros are refused. Version 1 stores zero − 1, so that of 16 zeros it holds 15, and the engines' fast kernels take
symmetric weights only. A scale may be negative: kernels multiply by it as by any number.
Source: GPTQModel's BaseQuantLinear and its conversion of version 1 to version 2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch

from quantpub.layouts.base import Config, Layout, Spec, Tensors, reject_integers, reject_rest
from quantpub.layouts.words import pack_bytes, pack_words, unpack_bytes, unpack_words
from quantpub.qtensor import QTensor
from quantpub.scheme import WHOLE, Scheme

METHOD = "gptq"
GROUPS = (WHOLE, 32, 64, 128)  # vLLM refuses a checkpoint of any other
DTYPES = ("BF16", "F16")
PACK = {4: pack_words, 8: pack_bytes}
UNPACK = {4: unpack_words, 8: unpack_bytes}
QZEROS = {4: 0x77777777, 8: 0x7F7F7F7F}  # version 1's words for a zero in the middle
KINDS = {("int4", "none"), ("int8", "none")}


def _word(scheme: Scheme) -> int:
    """Codes in an int32."""
    return 32 // scheme.weight.number.bits


def reject(scheme: Scheme, n: int, k: int, dtype: str) -> str | None:
    if scheme.weight.zero_domain != "none":
        return f"gptq version 1 cannot store every zero of {scheme.name}, and engines read its symmetric weights only"
    if reason := reject_integers("gptq", scheme, dtype, KINDS, DTYPES, GROUPS):
        return reason
    if k % _word(scheme) or n % _word(scheme):
        return f"shape [{n}, {k}] is not made of multiples of {_word(scheme)}, the codes of one packed word"
    return reject_rest(k, scheme.group_size)


def spec(scheme: Scheme, n: int, k: int, dtype: str) -> Spec:
    word, groups = _word(scheme), scheme.weight.scale_shape(n, k)[1]
    return {
        "qweight": ("I32", (k // word, n)),
        "scales": (dtype, (groups, n)),
        "qzeros": ("I32", (groups, n // word)),
        "g_idx": ("I32", (k,)),
    }


def pack(q: QTensor) -> Tensors:
    (n, k), bits = q.shape, q.scheme.weight.number.bits
    words_NW, device = PACK[bits](q.codes_NK), q.codes_NK.device
    groups = q.scale.shape[1]
    return {
        "qweight": words_NW.T.contiguous(),
        "scales": q.scale.T.contiguous(),
        "qzeros": torch.full((groups, n * bits // 32), QZEROS[bits], dtype=torch.int32, device=device),
        "g_idx": torch.arange(k, dtype=torch.int32, device=device) // (k // groups),
    }


def unpack(tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    codes_NK = UNPACK[scheme.weight.number.bits](tensors["qweight"].T.contiguous())
    return QTensor(scheme, codes_NK, tensors["scales"].T.contiguous())


def config(scheme: Scheme, ignore: Sequence[str]) -> Config:
    """`dynamic` names each Linear in high precision for GPTQModel, which matches from the start of a name: hence `$`.

    vLLM does the same with names of merged modules, and beyond that goes by the dtypes that the checkpoint holds.
    """
    return {
        "quant_method": METHOD,
        "bits": scheme.weight.number.bits,
        "group_size": scheme.group_size,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in ignore},
    }


def files(config: Config) -> dict[str, Config]:
    """GPTQModel looks for its own file before it looks into config.json."""
    return {"quantize_config.json": config}


def tp_multiple(scheme: Scheme) -> tuple[int, int]:
    """Whole words along both sides, and whole groups."""
    word = _word(scheme)
    return word, word if scheme.group_size == WHOLE else math.lcm(word, scheme.group_size)


LAYOUT = Layout("gptq", "checkpoint", METHOD, reject, spec, pack, unpack, config, tp_multiple, files=files)
