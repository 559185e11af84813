"""GPTQ (GPTQModel, AutoGPTQ), AWQ (AutoAWQ and others) and auto-round: integers in words, one setting for the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpub.adopt.base import Method, Module, Read, Unreadable, in_order, shape_of
from quantpub.held import Held
from quantpub.scheme import WHOLE, Scheme, preset

ACT_ORDER = "its columns are in the order of their activations (desc_act), which no other layout holds"


def gptq(held: Held) -> Method:
    config = held.quantization
    version, symmetric = str(config.get("checkpoint_format") or "gptq"), bool(config.get("sym", True))
    layouts = {("gptq", True): "gptq", ("gptq", False): "gptq-zeros"}
    layout = "gptq-v2" if version == "gptq_v2" else layouts.get((version, symmetric))

    def read(module: Module) -> Read:
        if layout is None:
            raise Unreadable(f"GPTQ's checkpoint_format {version} is not read")
        scheme = _integers(config, symmetric)
        ordered = config.get("desc_act") and scheme.group_size != WHOLE and "g_idx" in module.tensors
        if ordered and not in_order(held, module, "g_idx", scheme.group_size):
            raise Unreadable(ACT_ORDER)
        return Read(layout, scheme, shape_of(layout, scheme, module, {}))

    return Method("gptq", _gptq_tool(config), read)


def _gptq_tool(config: Mapping[str, Any]) -> str:
    meta = config.get("meta")
    quantizer = meta.get("quantizer") if isinstance(meta, dict) else None
    return str((quantizer[0] if isinstance(quantizer, list) and quantizer else quantizer) or "GPTQ")


def awq(held: Held) -> Method:
    config = held.quantization
    version = str(config.get("version") or "gemm").lower()

    def read(module: Module) -> Read:
        if version != "gemm":
            raise Unreadable(f"AWQ's version {version} is not read, gemm is")
        scheme = _integers(config, not config.get("zero_point", True))
        return Read("awq", scheme, shape_of("awq", scheme, module, {}))

    return Method("awq", "AWQ", read)


# auto-round's packing_format → ours. Only auto_gptq stores zeros less one
PACKINGS = {
    "auto_round:auto_gptq": "auto-gptq",
    "auto_round:gptqmodel": "auto-round",
    "auto_round": "auto-round",
    "auto_round:auto_awq": "awq",
    "auto_round:awq": "awq",
}


def auto_round(held: Held) -> Method:
    config = held.quantization
    packing = str(config.get("packing_format") or config.get("backend") or "")
    layout = PACKINGS.get(packing)
    layers = config.get("extra_config") or {}

    def read(module: Module) -> Read:
        own = {**config, **(layers.get(module.name) or {})}
        if layout is None or own.get("data_type", "int") != "int":
            raise Unreadable(f"auto-round's packing {packing or 'unknown'} of {own.get('data_type')} is not read")
        scheme = _integers(own, bool(own.get("sym", True)))
        return Read(layout, scheme, shape_of(layout, scheme, module, {}))

    return Method("auto-round", f"auto-round {config.get('autoround_version', '')}".strip(), read)


def _integers(config: Mapping[str, Any], symmetric: bool) -> Scheme:
    bits, size = (
        config.get("bits", config.get("w_bit")),
        int(config.get("group_size", config.get("q_group_size", 128)) or WHOLE),
    )
    if bits == 4:
        return preset("W4A16" if symmetric else "W4A16_ASYM", size)
    if bits == 8 and symmetric:
        return preset("W8A16", size)
    raise Unreadable(f"{bits}-bit {'symmetric' if symmetric else 'asymmetric'} weights are not read")
