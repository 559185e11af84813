"""transformers' own FP8, torchao's tensor classes, and bitsandbytes' LLM.int8()."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantpub.adopt.base import Headless, Method, Module, Read, Unreadable, named, shape_of
from quantpub.held import Held
from quantpub.scheme import PRESETS, WHOLE, ActFormat, Scheme, WeightFormat

TOKEN8 = ActFormat("int8", "token", True)
TOKEN_FP8 = ActFormat("fp8_e4m3", "token", True)


def fp8(held: Held) -> Method:
    config = held.quantization
    block, static = config.get("weight_block_size"), config.get("activation_scheme") == "static"

    def read(module: Module) -> Read:
        if block is not None and list(block) != [128, 128]:
            raise Unreadable(f"blocks of {block} are not read, [128, 128] is")
        if block is not None:
            layout, scheme = "hf-fp8", PRESETS["FP8_BLOCK"]
        elif static:
            layout, scheme = "modelopt-fp8", PRESETS["FP8"]
        else:
            layout, scheme = "ct-float", named(PRESETS["FP8"].weight, TOKEN_FP8)
        return Read(layout, scheme, shape_of(layout, scheme, module, {}))

    return Method("fp8", "FP8", read)


def bitsandbytes(held: Held) -> Method:
    eight = held.quantization.get("load_in_8bit", False)

    def read(module: Module) -> Read:
        if not eight:
            raise Unreadable("bitsandbytes' 4-bit weights are not read: their scales are quantized, too")
        return Read("bnb-int8", PRESETS["LLM_INT8"], shape_of("bnb-int8", PRESETS["LLM_INT8"], module, {}))

    return Method("bitsandbytes", "bitsandbytes", read)


def torchao(held: Held) -> Method:
    def read(module: Module) -> Read:
        entry = _entry(held.metadata, f"{module.name}.weight")
        kind, data = str(entry.get("_type")), entry.get("_data") or {}
        if "_type" not in entry:
            raise Headless("the header says no class of its weight, by which loaders put its parts together")
        if kind not in CLASSES:
            raise Unreadable(f"torchao's {kind} is not read")
        layout, scheme = CLASSES[kind](data, held.quantization)
        return Read(layout, scheme, shape_of(layout, scheme, module, data))

    return Method("torchao", "torchao", read)


def _entry(metadata: Mapping[str, str], weight: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata.get(weight, "{}"))
    except ValueError:
        raise Headless("the header's entry of its weight is not valid JSON") from None
    return value if isinstance(value, dict) else {}


def _size(data: Mapping[str, Any]) -> int:
    block = data.get("block_size")
    if not isinstance(block, list) or len(block) != 2 or block[0] != 1:
        raise Unreadable(f"blocks of {block} are not read")
    return int(block[1])


def _tile(data: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, Scheme]:
    size = _size(data)
    return "torchao-tile", replace(
        PRESETS["W4A16_FLOAT_ZERO"], weight=WeightFormat("int4", (1, size), zero_domain="float")
    )


def _float8(data: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, Scheme]:
    whole_rows = list(data.get("block_size") or ())[:1] == [1]
    weight = replace(PRESETS["FP8_DYNAMIC"].weight, block=(1 if whole_rows else WHOLE, WHOLE))
    return "torchao-float8", named(weight, TOKEN_FP8 if data.get("act_quant_kwargs") else None)


def _int8(data: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, Scheme]:
    inputs = (data.get("act_quant_kwargs") or {}).get("_data") or {}
    if (inputs.get("mapping_type") or {}).get("_data", "SYMMETRIC") != "SYMMETRIC":
        raise Unreadable("activations with a zero are not read")
    if (inputs.get("granularity") or {}).get("_type", "PerRow") != "PerRow":
        raise Unreadable("int8 activations with a scale for all tokens are not read")
    return "torchao-int8", named(WeightFormat("int8", (1, WHOLE)), TOKEN8 if data.get("act_quant_kwargs") else None)


def _intx(data: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, Scheme]:
    num = str((data.get("target_dtype") or {}).get("_data"))
    if num not in ("int4", "int8") or data.get("activation_quantization"):
        raise Unreadable(f"torchao's {num} with its activations is not read")
    default = ((config.get("quant_type") or {}).get("default") or {}).get("_data") or {}
    mapping = (default.get("mapping_type") or {}).get("_data", "SYMMETRIC")
    weight = WeightFormat(num, (1, _size(data)), zero_domain="int" if mapping == "ASYMMETRIC" else "none")
    return "torchao-intx", named(weight, None)


def _nvfp4(data: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, Scheme]:
    if data.get("act_quant_kwargs"):
        raise Unreadable("torchao's NVFP4 with FP4 activations is not read")
    return "torchao-nvfp4", PRESETS["NVFP4A16"]


CLASSES = {
    "Int4TilePackedTo4dTensor": _tile,
    "Float8Tensor": _float8,
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
    "NVFP4Tensor": _nvfp4,
}
