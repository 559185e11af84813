"""GPTQ, versions 1 and 2: int4 or int8 codes in int32 words along K, for GPTQModel, vLLM and SGLang.

The tensors are those of `gptq_words`, with g_idx = k / g: there is no act order.

    gptq      version 1, `checkpoint_format: gptq`: qzeros hold zero − 1, 0x77777777 or 0x7f7f7f7f where all is symmetric
    gptq-v2   version 2, `checkpoint_format: gptq_v2`: qzeros hold the zero, 0x88888888 or 0x80808080 where symmetric

Version 1 refuses integer zeros: of 16 it holds 15. Version 2 holds each, for GPTQModel and through it transformers; the
engines' fast kernels take symmetric weights only, and for these look at no zeros and at no version. A scale may be
negative: kernels multiply by it as by any number.
Source: GPTQModel's BaseQuantLinear and its conversion of version 1 to version 2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

from quantpub.layouts.base import Config, Layout, RowWords, reject_integers, turned
from quantpub.layouts.gptq_words import ANY_ZERO, SYMMETRIC, Words, cut, reject_shape, tp_multiple
from quantpub.scheme import WHOLE, Scheme

METHOD = "gptq"
GROUPS = (WHOLE, 32, 64, 128)  # vLLM refuses a checkpoint of any other
DTYPES = ("BF16", "F16")


def reject(scheme: Scheme, n: int, k: int, dtype: str) -> str | None:
    if scheme.weight.zero_domain != "none":
        return f"gptq version 1 cannot store every zero of {scheme.name}, and engines read its symmetric weights only"
    return reject_integers("gptq", scheme, dtype, SYMMETRIC, DTYPES, GROUPS) or reject_shape(scheme, n, k)


def reject_v2(scheme: Scheme, n: int, k: int, dtype: str) -> str | None:
    return reject_integers("gptq-v2", scheme, dtype, ANY_ZERO, DTYPES, GROUPS) or reject_shape(scheme, n, k)


def config(scheme: Scheme, ignore: Sequence[str], version: str = "gptq") -> Config:
    """`dynamic` names each Linear in high precision for GPTQModel, which matches from the start of a name: hence `$`.

    vLLM does the same with names of merged modules, and beyond that goes by the dtypes that the checkpoint holds.
    """
    return {
        "quant_method": METHOD,
        "bits": scheme.weight.number.bits,
        "group_size": scheme.group_size,
        "desc_act": False,
        "sym": scheme.weight.zero_domain == "none",
        "lm_head": False,
        "checkpoint_format": version,
        "pack_dtype": "int32",
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in ignore},
    }


def files(config: Config) -> dict[str, Config]:
    """GPTQModel looks for its own file before it looks into config.json."""
    return {"quantize_config.json": config}


def _layout(name: str, words: Words, reject: Callable[[Scheme, int, int, str], str | None], version: str) -> Layout:
    return Layout(
        name,
        "checkpoint",
        METHOD,
        reject,
        words.spec,
        words.pack,
        words.unpack,
        partial(config, version=version),
        tp_multiple,
        files=files,
        ambiguous=words.ambiguous,
        cut=cut,
        words=RowWords("qweight", turned, turned),
    )


LAYOUT = _layout("gptq", Words(less=1), reject, "gptq")
V2 = _layout("gptq-v2", Words(less=0), reject_v2, "gptq_v2")
pack, unpack, spec = LAYOUT.pack, LAYOUT.unpack, LAYOUT.spec
