"""What compressed-tensors 0.17.0 refuses of a quantization config, and what it parses but engines do not load.

vLLM 0.25 to 0.33 pin that release, and one unknown key among the arguments of weights or activations refuses the whole
checkpoint. The parser is pydantic's with its conversions: "4" counts as 4, 1 and "yes" as true. Sources: compressed-tensors
quantization/quant_{args,scheme,config}.py; vllm .../compressed_tensors.py; sglang .../compressed_tensors_wNa16.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from quantpub.method_config import problems_of_method

__all__ = ["ct_problems", "ct_refusals", "problems_of_method", "unloaded"]

STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
GROUPED = ("group", "tensor_group")
DYNAMIC = ("token", "tensor", "tensor_group", "group")  # strategies that a dynamic scale may have
INPUTS = ("token", "tensor", "group", "tensor_group", "attn_head")  # strategies that input_activations may have
ORDERS = ("group", "weight", "dynamic", "static")
STATUSES = ("initialized", "calibration", "frozen", "compressed", "decompressed")
MIXED = "mixed-precision"
LOADED = (
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
)
FORMATS = (*LOADED, MIXED, "dense", "sparse-bitmask", "sparse-24-bitmask", "marlin-24")
_WEIGHT_ONLY = ("W8A16", "W4A16", "W4A16_ASYM", "NVFP4A16", "MXFP4A16", "MXFP8A16")
_EIGHT = ("W8A8", "INT8", "W4A8", "W4AFP8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK")
PRESETS = ("UNQUANTIZED", *_WEIGHT_ONLY, *_EIGHT, "NVFP4", "MXFP4", "MXFP8")
_PARTS = ("weights", "input_activations", "output_activations")

_TRUE, _FALSE = ("1", "on", "t", "true", "y", "yes"), ("0", "off", "f", "false", "n", "no")
_INTEGER = re.compile(r"[+-]?\d+(_\d+)*(\.0+)?")


def ct_problems(config: Mapping[str, Any]) -> list[str]:
    """One sentence for each thing that compressed-tensors 0.17 refuses; where there is none, for each that engines do."""
    return [f"compressed-tensors 0.17: {text}" for text in ct_refusals(config)] or unloaded(config)


def ct_refusals(config: Mapping[str, Any]) -> list[str]:
    """What its QuantizationConfig refuses. Keys at the top that it does not know are passed over."""
    found = [
        f"{key}: {config[key]!r} is no {what}"
        for key, (ok, what) in _TOP.items()
        if key in config and not ok(config[key])
    ]
    groups, cache = config.get("config_groups"), config.get("kv_cache_scheme")
    if not isinstance(groups, Mapping):
        found.append("config_groups is missing, or no mapping")
    else:
        found += [f"{name}{text}" for name, group in groups.items() for text in _group(name, group)]
    return found + ([f"kv_cache_scheme{text}" for text in arguments(cache)] if cache is not None else [])


def _group(name: str, group: Any) -> Iterator[str]:
    if isinstance(group, list):
        if not _strings(group):
            yield ": targets of a preset must be names"
        elif name.upper() not in PRESETS:
            yield f": a list of targets stands for a preset, and there is none of the name {name!r}"
        return
    if not isinstance(group, Mapping):
        yield ": neither a scheme nor a list of targets"
        return
    yield from (f": unknown key {key!r}" for key in group if key not in (*_PARTS, "targets", "format"))
    if not _strings(group.get("targets")):
        yield ": targets must be a list of names"
    if group.get("format") is not None and group["format"] not in [each for each in FORMATS if each != MIXED]:
        yield f": format {group['format']!r} is none that a group may have"
    for part in _PARTS:
        if group.get(part) is not None:
            yield from (f".{part}{text}" for text in [*arguments(group[part]), *_activations(part, group[part])])


def _activations(part: str, given: Any) -> Iterator[str]:
    """What activations may not have besides what no arguments may have."""
    if part == "weights" or not isinstance(given, Mapping):
        return
    if given.get("actorder") not in (None, False) or (given.get("actorder") == 0 and given["actorder"] is not False):
        yield ": actorder is for weights"
    strategy = _strategy(given)
    if part == "input_activations" and strategy in STRATEGIES and strategy not in INPUTS:
        yield f": strategy {strategy} is not for activations"


def arguments(given: Any) -> list[str]:
    """What QuantizationArgs refuses; each text begins with what follows the place."""
    if not isinstance(given, Mapping):
        return [": no mapping"]
    unknown = [f": unknown key {key!r}" for key in given if key not in _ARGUMENTS]
    bad = [
        f".{key}: {given[key]!r} is no {what}"
        for key, (ok, what) in _ARGUMENTS.items()
        if key in given and not ok(given[key])
    ]
    return unknown + (bad or [f": {text}" for text in _together(given)])


def _together(given: Mapping[str, Any]) -> Iterator[str]:
    """What is well said by itself and does not go together."""
    strategy, size, blocks = _strategy(given), _size(given), given.get("block_structure")
    dynamic, order = given.get("dynamic", False), given.get("actorder")
    local = isinstance(dynamic, str)
    if strategy is None:
        yield f"group_size {size} without a strategy"
        return
    if strategy == "token" and not dynamic:
        yield "a scale of a token must be dynamic"
    if strategy in GROUPED and (size is None or size <= 0):
        yield f"strategy {strategy} wants a group_size"
    if size is not None and size > 0 and strategy not in GROUPED:
        yield f"group_size {size} goes with strategy group, not {strategy}"
    if (strategy == "block") != (blocks is not None):
        yield f"strategy {strategy} {'without' if blocks is None else 'with'} a block_structure"
    if _reorders(order) and strategy not in GROUPED:
        yield f"actorder {order!r} goes with groups, not with strategy {strategy}"
    if dynamic and strategy not in DYNAMIC:
        yield f"strategy {strategy} has no dynamic scales"
    elif local and strategy != "tensor_group":
        yield f"dynamic 'local' goes with strategy tensor_group, not {strategy}"
    if (
        str(given.get("type", "int")).lower() == "float"
        and _bits(given) not in (4, 8)
        and given.get("zp_dtype") is None
    ):
        yield f"there are no floats of {given.get('num_bits')} bits"


def _bits(given: Mapping[str, Any]) -> int:
    bits = given.get("num_bits", 8)
    return int(bits.split(".")[0]) if isinstance(bits, str) else int(bits)


def _reorders(order: Any) -> bool:
    return order is True or (isinstance(order, str) and order.lower() in ("group", "dynamic"))


def _strategy(given: Mapping[str, Any]) -> str | None:
    """The strategy, or the one that the group size implies; None where it implies none."""
    stated, size = given.get("strategy"), _size(given)
    if stated is not None:
        return stated.lower() if isinstance(stated, str) else None
    return "tensor" if size is None else "group" if size > 0 else "channel" if size == -1 else None


def _size(given: Mapping[str, Any]) -> int | None:
    size = given.get("group_size")
    return int(size) if isinstance(size, int | float) and size == size // 1 else None


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _integer(value: Any) -> bool:
    if isinstance(value, str):
        return _INTEGER.fullmatch(value.strip()) is not None
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


def _number(value: Any) -> bool:
    try:
        return isinstance(value, int | float | str) and float(value) is not None
    except (ValueError, OverflowError):
        return False


def _boolean(value: Any) -> bool:
    if isinstance(value, str):
        return value.lower() in (*_TRUE, *_FALSE)
    return isinstance(value, int | float) and value in (0, 1)


def _group_size(value: Any) -> bool:
    return value is None or (not isinstance(value, str) and _integer(value) and value >= -1)


def _block(value: Any) -> bool:
    if isinstance(value, str):
        return all(re.fullmatch(r"\s*[+-]?\d+(_\d+)*\s*", side) for side in value.split("x"))
    return value is None or (
        isinstance(value, list) and len(value) == 2 and all(isinstance(side, int) for side in value)
    )


def _dtype(value: Any) -> bool:
    return value is None or (
        isinstance(value, str) and isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype)
    )


def _word(*words: str, optional: bool = False) -> Callable[[Any], bool]:
    return lambda value: (optional and value is None) or (isinstance(value, str) and value.lower() in words)


def _order(value: Any) -> bool:
    return value is None or _word(*ORDERS)(value) or (not isinstance(value, str) and _boolean(value))


def _text(value: Any) -> bool:
    return isinstance(value, str)


_Rules = dict[str, tuple[Callable[[Any], bool], str]]
_ARGUMENTS: _Rules = {
    "num_bits": (_integer, "number of bits"),
    "type": (_word("int", "float"), "type: int or float"),
    "symmetric": (_boolean, "truth value"),
    "group_size": (_group_size, "size of a group"),
    "strategy": (_word(*STRATEGIES, optional=True), f"strategy: {', '.join(STRATEGIES)}"),
    "block_structure": (_block, "pair of rows and columns"),
    "dynamic": (
        lambda value: _word("local")(value) or (not _text(value) and _boolean(value)),
        "truth value, nor 'local'",
    ),
    "actorder": (_order, f"order: {', '.join(ORDERS)}"),
    "scale_dtype": (_dtype, "dtype of torch"),
    "zp_dtype": (_dtype, "dtype of torch"),
    "observer": (lambda value: value is None or _text(value), "name of an observer"),
    "observer_kwargs": (lambda value: isinstance(value, Mapping), "mapping"),
}
_TOP: _Rules = {
    "quant_method": (_text, "name of a method"),
    "format": (_text, "name of a format"),
    "quantization_status": (lambda value: value in STATUSES, f"status: {', '.join(STATUSES)}"),
    "global_compression_ratio": (lambda value: value is None or _number(value), "number"),
    "ignore": (lambda value: value is None or _strings(value), "list of names"),
}


def unloaded(config: Mapping[str, Any]) -> list[str]:
    """What parses and no engine, or not every one, loads. Of a config that `ct_refusals` finds nothing in."""
    sparse = config.get("sparsity_config") or {}
    found = []
    if isinstance(sparse, Mapping) and (sparse.get("targets") or sparse.get("format", "dense") != "dense"):
        found.append("vLLM: sparsity_config: sparse checkpoints are no longer loaded")
    for name, group in config["config_groups"].items():
        if isinstance(group, list):
            found.append(f"vLLM and SGLang: {name}: the name of a preset is not loaded: state the scheme")
        elif not (len(group["targets"]) == 1 and group["targets"][0].endswith("Attention")):
            found += [f"{who}: {name}: {text}" for who, text in _unloaded(config, group)]
    return found


def _unloaded(config: Mapping[str, Any], group: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    weights, form = group.get("weights"), group.get("format") or config.get("format", "fakequant")
    if weights is None:
        yield "vLLM and SGLang", "a group without weights is not loaded"
        return
    if form not in LOADED:
        own = " without a format of its own" if form == MIXED else ""
        yield "vLLM and SGLang", f"format {form!r}{own} is none that is loaded"
    bits = _bits(weights)
    if form == "pack-quantized" and bits in (3, 5, 6, 7):
        yield (
            "every engine",
            f"{bits}-bit words are packed differently by releases of compressed-tensors; SGLang loads none",
        )
    elif form == "pack-quantized" and bits not in (4, 8):
        yield "SGLang", f"packed weights of {bits} bits are not loaded"
    if _reorders(weights.get("actorder")):
        yield "vLLM 0.30 and later", f"weights.actorder {weights['actorder']!r} is refused"
