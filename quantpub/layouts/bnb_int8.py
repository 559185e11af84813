"""bitsandbytes LLM.int8(), `quant_method: bitsandbytes`: int8 weights with the largest magnitude of every row.

Per module:
    weight          int8 [N, K], two's complement
    SCB             float32 [N]: absmax of each row of the weight
    weight_format   uint8 (): 0, row-major, the only format that is still written
The weight is code · (SCB · 1/127), constant and products in float32: the inner product is the canonical scale. So
bitsandbytes multiplies with whole weights (`MatMul8bitFp`). Its `int8_vectorwise_dequant` has the other order,
(code · SCB) · 1/127, which rounds once more: one or two units in the last place of a float32 away.

Source: Dettmers et al., LLM.int8(), 2022; bitsandbytes' Linear8bitLt. Read by transformers, and by vLLM on one
tensor-parallel rank. vLLM looks for the name of a merged module (qkv_proj) in `llm_int8_skip_modules`, not for those of
its parts, and has no int8 experts; names of modules are in lower case there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from quantpub.layouts.base import Config, Layout, Spec, Tensors
from quantpub.qtensor import QTensor
from quantpub.scheme import PRESETS, WHOLE, Scheme

INT8 = PRESETS["LLM_INT8"]
ROW_MAJOR = 0


def reject(scheme: Scheme, n: int, k: int, dtype: str) -> str | None:
    if (replace(scheme.weight, block=(scheme.weight.block[0], WHOLE)), scheme.act) != (INT8.weight, INT8.act):
        return f"bnb-int8 holds int8 weights with the absmax of a row, as LLM.int8() has them, not {scheme.name}"
    if scheme.group_size != WHOLE:
        return f"bnb-int8 holds int8 weights with the absmax of a row, not one for every {scheme.group_size} columns"
    return None


def spec(scheme: Scheme, n: int, k: int, dtype: str) -> Spec:
    return {"weight": ("I8", (n, k)), "SCB": ("F32", (n,)), "weight_format": ("U8", ())}


def pack(q: QTensor) -> Tensors:
    form = torch.tensor(ROW_MAJOR, dtype=torch.uint8)
    return {"weight": q.codes_NK, "SCB": absmax_of(q.scale[:, 0]), "weight_format": form}


def unpack(tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    assert int(tensors["weight_format"]) == ROW_MAJOR
    return QTensor(scheme, tensors["weight"], scale_of(tensors["SCB"])[:, None])


def scale_of(absmax_N: torch.Tensor) -> torch.Tensor:
    """absmax · 1/127, with both the constant and the product in float32."""
    return absmax_N * absmax_N.new_tensor(1 / 127)


def absmax_of(scale_N: torch.Tensor) -> torch.Tensor:
    """A float32 absmax that has exactly this scale: one of 16 bits where there is one, as the weights had.

    The float32 nearest to 127 times the scale, or one next to it, is one: so for every 24-bit mantissa.
    """
    near_N = scale_N * 127
    beside = [torch.nextafter(near_N, torch.full_like(near_N, end)) for end in (torch.inf, -torch.inf)]
    absmax_N = near_N
    for guess_N in (*beside, near_N, near_N.half().float(), near_N.bfloat16().float()):
        absmax_N = torch.where(scale_of(guess_N) == scale_N, guess_N, absmax_N)
    assert torch.equal(scale_of(absmax_N), scale_N), "a scale is not a float32 times 1/127"
    return absmax_N


def config(scheme: Scheme, ignore: Sequence[str]) -> Config:
    """Every key that transformers writes; those of 4 bits are its defaults."""
    assert scheme.act is not None
    return {
        "quant_method": "bitsandbytes",
        "_load_in_8bit": True,
        "_load_in_4bit": False,
        "llm_int8_threshold": scheme.act.outlier,
        "llm_int8_skip_modules": list(ignore),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "load_in_4bit": False,
        "load_in_8bit": True,
    }


def tp_multiple(scheme: Scheme) -> None:
    """vLLM loads it on one GPU only."""


LAYOUT = Layout("bnb-int8", "checkpoint", "bitsandbytes", reject, spec, pack, unpack, config, tp_multiple)
