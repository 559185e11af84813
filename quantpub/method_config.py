"""What engines refuse of the configs of methods other than compressed-tensors: mandatory keys, and values they do not load.

Each sentence begins with the engines and names the key. As the config classes of vLLM 0.33 and SGLang 0.5.23 have it
(sources: lookup_others.py); of ModelOpt's two files also that they say the same, for TensorRT-LLM reads hf_quant_config.json
before config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Config = Mapping[str, Any]
BOTH = "vLLM and SGLang"
GROUPS = (-1, 32, 64, 128)  # of Marlin, which holds GPTQ and AWQ in both engines
_FP8 = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO")
ALGORITHMS = {
    "vLLM": (*_FP8, "NVFP4", "W4A16_NVFP4", "MXFP8", "MIXED_PRECISION"),
    "SGLang": ("FP8", "NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "MXFP8", "MIXED_PRECISION"),
}
NESTED = ("group_size", "kv_cache_quant_algo", "exclude_modules")


def problems_of_method(config: Config, nested: Config | None = None) -> list[str]:
    """One sentence for each thing that an engine refuses of a quantization config; none for methods not known here.

    nested: the content of hf_quant_config.json, where the checkpoint has one.
    """
    method = str(config.get("quant_method") or ("modelopt" if "quantization" in config else "")).lower()
    name = "modelopt" if method.startswith("modelopt") else method
    try:
        problems = list(_METHODS[name](config)) if name in _METHODS else []
        if nested is not None and name == "modelopt" and isinstance(nested.get("quantization"), Mapping):
            problems += [*_modelopt(nested), *_agree(config, nested["quantization"])]
    except (TypeError, AttributeError, ValueError) as problem:  # not made as the method makes them
        return [f"{BOTH}: the config cannot be read: {problem}"]
    return list(dict.fromkeys(problems))


def _absent(config: Config, *keys: str) -> Iterator[str]:
    """Of keys, each with its other spellings after a bar, those that are not there."""
    for key in keys:
        if not any(name in config for name in key.split("|")):
            yield f"{BOTH}: {key.split('|')[0]} is missing"


def _gptq(config: Config) -> Iterator[str]:
    yield from _absent(config, "bits", "group_size", "desc_act", "sym")
    if config.get("bits", 4) not in (4, 8):
        yield f"{BOTH}: bits: {config['bits']!r} is neither 4 nor 8"
    if not config.get("sym", True):
        yield f"{BOTH}: sym: only symmetric weights are loaded"
    yield from _group_size(config, "group_size")
    if config.get("checkpoint_format") == "marlin" or config.get("is_marlin_format"):
        yield f"{BOTH}: checkpoint_format: 'marlin' is no longer loaded: store GPTQ's own"
    yield from _ordered(config)


def _ordered(config: Config) -> Iterator[str]:
    base, size = config.get("desc_act"), config.get("group_size")
    if base and size != -1:
        yield "vLLM 0.30 and later: desc_act: groups in the order of activations are refused"
    for key, rule in (config.get("dynamic") or {}).items():
        own = rule if isinstance(rule, Mapping) and not key.startswith("-:") else None
        if own and own.get("desc_act", base) and own.get("group_size", size) != -1:
            yield f"vLLM 0.30 and later: dynamic {key!r}: groups in the order of activations are refused"


def _group_size(config: Config, *names: str) -> Iterator[str]:
    size = next((config[name] for name in names if name in config), -1)
    if size not in GROUPS:
        yield f"{BOTH}: group_size: {size!r} is none of {', '.join(map(str, GROUPS))}"


def _awq(config: Config) -> Iterator[str]:
    yield from _absent(config, "bits|w_bit", "group_size|q_group_size", "zero_point")
    bits = config.get("w_bit", config.get("bits", 4))
    if bits != 4:
        yield f"{'vLLM' if bits == 8 else BOTH}: bits: {bits!r} is not 4"
    yield from _group_size(config, "q_group_size", "group_size")
    version = config.get("version")
    if version is not None and str(version).lower() != "gemm":
        yield f"{BOTH}: version: {version!r} would be read as gemm, which orders its words otherwise"


def _fp8(config: Config) -> Iterator[str]:
    yield from _absent(config, "activation_scheme")
    scheme, block = config.get("activation_scheme", "dynamic"), config.get("weight_block_size")
    if scheme not in ("static", "dynamic"):
        yield f"{BOTH}: activation_scheme: {scheme!r} is neither static nor dynamic"
    if block is not None and not (isinstance(block, list) and len(block) == 2):
        yield f"{BOTH}: weight_block_size: {block!r} is no pair of rows and columns"
    if block is not None and scheme == "static":
        yield f"{BOTH}: weight_block_size: blocks go with activation_scheme dynamic, not static"


def _torchao(config: Config) -> Iterator[str]:
    kind = config.get("quant_type")
    if not (isinstance(kind, Mapping) and set(kind) == {"default"}):
        yield "vLLM: quant_type: it must be a mapping with the one key 'default'"


def _modelopt(config: Config) -> Iterator[str]:
    inner = config.get("quantization")
    source, place = (inner, "quantization.") if isinstance(inner, Mapping) else (config, "")
    algorithm = source.get("quant_algo")
    if not algorithm:
        yield f"{BOTH}: {place}quant_algo is missing"
        return
    for engine, known in ALGORITHMS.items():
        if str(algorithm).upper() not in known:
            yield f"{engine}: {place}quant_algo: {algorithm!r} is not loaded"
    if str(algorithm).upper() == "MIXED_PRECISION" and not source.get("quantized_layers"):
        yield f"{BOTH}: {place}quantized_layers is missing or empty"
    key = "exclude_modules" if place or "ignore" not in source else "ignore"
    if not isinstance(source.get(key, []), list):
        yield f"vLLM: {place}{key}: {source[key]!r} is no list"
    if place and "NVFP4" in str(algorithm).upper():
        yield from (
            f"vLLM: {place}{name} is missing: NVFP4 wants it, if only null" for name in NESTED if name not in source
        )


def _agree(flat: Config, nested: Config) -> Iterator[str]:
    """What config.json and hf_quant_config.json say otherwise."""
    says = _flat(flat)
    for key, value in says.items():
        other = sorted(nested.get(key) or []) if key == "exclude_modules" else nested.get(key) or None
        if value != other and not (key == "group_size" and None in (value, other)):
            text = f"its {key} is not that of config.json: {_short(other)} there, {_short(value)} here"
            yield f"TensorRT-LLM: hf_quant_config.json is read first, and {text}"


def _flat(config: Config) -> dict[str, Any]:
    """A flat config in the nested one's keys."""
    scheme = config.get("kv_cache_scheme")
    eight = isinstance(scheme, Mapping) and (scheme.get("type"), scheme.get("num_bits")) == ("float", 8)
    sizes = [(group.get("weights") or {}).get("group_size") for group in (config.get("config_groups") or {}).values()]
    return {
        "quant_algo": config.get("quant_algo"),
        "exclude_modules": sorted(config.get("ignore", config.get("exclude_modules")) or []),
        "kv_cache_quant_algo": "FP8" if eight else config.get("kv_cache_quant_algo"),
        "group_size": config.get("group_size") or next((size for size in sizes if size), None),
    }


def _short(value: Any) -> str:
    return f"{len(value)} names" if isinstance(value, list) and len(value) > 3 else repr(value)


_METHODS: dict[str, Callable[[Config], Iterator[str]]] = {
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "torchao": _torchao,
    "modelopt": _modelopt,
}
