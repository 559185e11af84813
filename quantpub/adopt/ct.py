"""compressed-tensors, as llm-compressor and others write it: groups of targets, each with weights and activations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from quantpub.adopt.base import Method, Module, Read, Undeclared, Unreadable, in_order, named, shape_of
from quantpub.held import Held
from quantpub.scheme import PRESETS, WHOLE, ActFormat, Scheme, WeightFormat

LAYOUTS = {
    "pack-quantized": "ct-pack",
    "int-quantized": "ct-int",
    "float-quantized": "ct-float",
    "nvfp4-pack-quantized": "ct-nvfp4",
    "mxfp4-pack-quantized": "ct-mxfp4",
}
NUMBERS = {"int8": "int8", "float8": "fp8_e4m3", "float4": "fp4_e2m1"}
FALSE = ("false", "0", "0.0", "no", "n", "off", "f", "none")  # as the library's parser takes them, and null
Arguments = Mapping[str, Any]


def method(held: Held) -> Method:
    config = held.quantization
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise Unreadable("quantization_config has no config_groups")

    def read(module: Module) -> Read:
        group = find(groups, module.name)
        if group is None:
            raise Undeclared("it is quantized, and no group of quantization_config names it")
        form = str(group.get("format") or config.get("format"))
        if form == "naive-quantized":  # what the library called both before
            form = "float-quantized" if (group.get("weights") or {}).get("type") == "float" else "int-quantized"
        if form not in LAYOUTS:
            raise Unreadable(f"compressed-tensors' format {form} is not read")
        scheme = scheme_of(group)
        if "weight_g_idx" in module.tensors and not in_order(held, module, "weight_g_idx", scheme.group_size):
            raise Unreadable(
                "its columns are in the order of their activations (weight_g_idx), which no other layout holds"
            )
        return Read(LAYOUTS[form], scheme, shape_of(LAYOUTS[form], scheme, module, {}), ("weight_g_idx",))

    version = config.get("version")
    return Method("compressed-tensors", f"compressed-tensors{f' {version}' if version else ''}", read)


def find(groups: Mapping[str, Any], module: str) -> Mapping[str, Any] | None:
    """The group of a linear: named in full, then by a pattern, then by its class."""
    entries = [(str(target), group) for group in groups.values() for target in group.get("targets") or ()]
    patterns = [(target[3:], group) for target, group in entries if target.startswith("re:")]
    exact = (group for target, group in entries if target == module)
    by_pattern = (group for pattern, group in patterns if re.match(pattern, module))
    by_class = (group for target, group in entries if target == "Linear")
    return next(exact, None) or next(by_pattern, None) or next(by_class, None)


def scheme_of(group: Mapping[str, Any]) -> Scheme:
    """The scheme of a group. Errors: Unreadable."""
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, dict):
        raise Unreadable("its group has no weights in quantization_config")
    act = None if inputs is None else activations(inputs)
    bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy")
    if kind == "int":
        return named(_integers(weights), act)
    if bits == 8 and strategy in ("channel", "tensor", "block"):
        return named(_fp8(weights), act)
    if bits == 4 and strategy == "tensor_group":
        return named(PRESETS["NVFP4"].weight, act)
    if bits == 4 and strategy == "group" and weights.get("group_size") == 32:
        return named(PRESETS["MXFP4A16"].weight, act)
    raise Unreadable(f"weights of {bits} bits, type {kind}, strategy {strategy} are not read")


def _integers(weights: Arguments) -> WeightFormat:
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    if bits not in (4, 8) or strategy not in ("group", "channel"):
        raise Unreadable(f"integer weights of {bits} bits, strategy {strategy} are not read")
    size = int(weights.get("group_size") or WHOLE) if strategy == "group" else WHOLE
    return WeightFormat(f"int{bits}", (1, size), zero_domain="none" if _symmetric(weights) else "int")


def _fp8(weights: Arguments) -> WeightFormat:
    strategy = weights["strategy"]
    if strategy != "block":
        return PRESETS["FP8_DYNAMIC" if strategy == "channel" else "FP8"].weight
    if list(weights.get("block_structure") or ()) != [128, 128]:
        raise Unreadable(f"blocks of {weights.get('block_structure')} are not read, [128, 128] is")
    return PRESETS["FP8_BLOCK"].weight


def activations(inputs: Arguments) -> ActFormat:
    """Errors: Unreadable."""
    bits, kind, strategy, dynamic = (inputs.get(key) for key in ("num_bits", "type", "strategy", "dynamic"))
    if not _symmetric(inputs):
        raise Unreadable("activations with a zero are not read")
    num = NUMBERS.get(f"{kind}{bits}")
    if num == "fp4_e2m1" and strategy == "tensor_group":
        preset = PRESETS["NVFP4"].act
        assert preset is not None
        return preset
    if num and strategy in ("token", "tensor"):
        return ActFormat(num, strategy, bool(dynamic))
    if num and strategy == "group" and dynamic:
        return ActFormat(num, "group", True, int(inputs.get("group_size") or WHOLE))
    raise Unreadable(f"activations of {bits} bits, type {kind}, strategy {strategy} are not read")


def _symmetric(arguments: Arguments) -> bool:
    return str(arguments.get("symmetric", True)).lower() not in FALSE
