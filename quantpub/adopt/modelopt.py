"""ModelOpt: one algorithm for the whole model, or one a layer (MIXED_PRECISION), flat in config.json or nested in a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantpub.adopt.base import Method, Module, Read, Undeclared, Unreadable, shape_of
from quantpub.held import Held
from quantpub.scheme import PRESETS, Scheme, preset

# quant_algo → (layout, preset)
ALGORITHMS = {
    "FP8": ("modelopt-fp8", "FP8"),
    "FP8_PER_CHANNEL_PER_TOKEN": ("modelopt-fp8-channel", "FP8_DYNAMIC"),
    "FP8_PB_WO": ("modelopt-fp8-block", "FP8_BLOCK"),
    "NVFP4": ("modelopt-nvfp4", "NVFP4"),
    "W4A16_NVFP4": ("modelopt-nvfp4", "NVFP4A16"),
    "W4A16_AWQ": ("modelopt-int4", "W4A16"),
    "W4A16": ("modelopt-int4", "W4A16"),
}


def method(held: Held) -> Method:
    stated = held.quantization
    nested = stated.get("quantization")
    config: Mapping[str, Any] = nested if isinstance(nested, dict) else stated
    layers = config.get("quantized_layers") or {}

    def read(module: Module) -> Read:
        own = _own(layers, module.name) if layers else config
        if own is None:
            raise Undeclared("it is quantized, and quantized_layers does not name it")
        algorithm, size = str(own.get("quant_algo")).upper(), own.get("group_size") or _group_size(config)
        if algorithm not in ALGORITHMS:
            raise Unreadable(f"ModelOpt's {algorithm} is not read")
        layout, name = ALGORITHMS[algorithm]
        scheme = preset(name, int(size)) if layout == "modelopt-int4" and size else PRESETS[name]
        if name == "NVFP4" and "input_scale" not in module.tensors:
            scheme = _weight_only(config)
        return Read(layout, scheme, shape_of(layout, scheme, module, {}))

    producer = stated.get("producer") or config.get("producer") or {}
    return Method("modelopt", " ".join(str(producer[key]) for key in ("name", "version") if key in producer), read)


def _own(layers: Mapping[str, Any], name: str) -> Any:
    """The entry of a linear, or of a module that it is part of, as experts are of theirs."""
    parts = name.split(".")
    return next((layers[whole] for n in range(len(parts), 0, -1) if (whole := ".".join(parts[:n])) in layers), None)


def _group_size(config: Mapping[str, Any]) -> Any:
    groups = config.get("config_groups") or {}
    return next((size for g in groups.values() if (size := (g.get("weights") or {}).get("group_size"))), None)


def _weight_only(config: Mapping[str, Any]) -> Scheme:
    """NVFP4 whose groups state no activations is weight-only, as vLLM reads it; else its scales are missing."""
    groups = config.get("config_groups") or {}
    none_stated = groups and not any(group.get("input_activations") for group in groups.values())
    return PRESETS["NVFP4A16"] if none_stated else replace(PRESETS["NVFP4"])
