"""Whether a checkpoint that declares an FP8 KV cache holds what that takes: one scale of k and one of v for every attention.

    compressed-tensors, llm-compressor     <attention>.k_scale, .v_scale
    ModelOpt                               <attention>.k_proj.k_scale, .v_proj.v_scale
    older: Quark .k_proj.output_scale; AutoFP8 one <attention>.kv_scale for both, which it declares with the word `static`

A declared cache is the engines' default when the checkpoint loads; a scale that is missing counts as 1.0, and keys beyond 448
are then cut off without a word (vLLM issues 11906, 54623, 54705). Sources: vllm model_loader/weight_utils.py
(maybe_remap_kv_scale_name), compressed_tensors.py (validate_kv_cache_scheme); sglang compressed_tensors.py (is_supported_scheme).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

_NAMES = (
    re.compile(r"(.+?)(?:\.(?:[qkv]_proj|qkv_proj|qkqkv_proj|attn))?\.([kv])_scale"),
    re.compile(r"(.+)\.([kv])_proj\.output_scale"),
    re.compile(r"(.+)\.(kv)_scale"),
)
_WANTED = {"num_bits": 8, "type": "float", "symmetric": True}


def declared_cache(config: Mapping[str, Any]) -> Any:
    """What a quantization config, flat or nested, says of the cache: `kv_cache_scheme`, else `kv_cache_quant_algo`; or None."""
    inner = config.get("quantization") if isinstance(config.get("quantization"), dict) else {}
    found = (source.get(key) for source in (config, inner or {}) for key in ("kv_cache_scheme", "kv_cache_quant_algo"))
    return next((value for value in found if value and str(value).lower() not in ("none", "auto")), None)


def scale_of(tensor: str) -> tuple[str, str] | None:
    """(attention, `k`, `v` or `kv`) of a tensor that is the scale of a cache, by any convention; None for every other."""
    matches = (name.fullmatch(tensor) for name in _NAMES)
    return next(((match[1], match[2]) for match in matches if match), None)


def kv_problems(
    config: Mapping[str, Any], tensors: Mapping[str, float | None], attentions: Collection[str]
) -> list[str]:
    """One sentence for each way in which cache and scales do not belong together.

    config: a quantization_config. tensors: of the checkpoint, at least those of scales → value; None where it holds more than
    one number. attentions: module names of those that keep a cache.
    """
    scheme = declared_cache(config)
    held = {name: value for name, value in tensors.items() if scale_of(name)}
    if scheme is None:
        return (
            [f"{next(iter(held))}{_more(held)}: a scale of the KV cache, but the config declares none"] if held else []
        )
    return [*_scheme(scheme), *_missing(held, attentions), *_values(held)]


def _scheme(scheme: Any) -> list[str]:
    """What engines refuse or pass over of a scheme in the words of compressed-tensors; ModelOpt's leaves most words out."""
    if not isinstance(scheme, dict):
        known = str(scheme).upper() in ("FP8", "FLOAT8", "NVFP4", "FP4", "FLOAT4", "STATIC")
        return [] if known else [f"kv_cache_quant_algo {scheme!r} is none that an engine knows"]
    odd = [f"{key} {scheme[key]!r}" for key, value in _WANTED.items() if key in scheme and scheme[key] != value]
    found = (
        [f"kv_cache_scheme: engines keep a cache in symmetric 8-bit floats, not with {', '.join(odd)}"] if odd else []
    )
    if scheme.get("dynamic"):
        found.append("kv_cache_scheme: SGLang ignores one whose scales are dynamic")
    strategy = scheme.get("strategy")
    if strategy not in (None, "tensor", "attn_head"):
        found.append(f"kv_cache_scheme: vLLM refuses the strategy {strategy!r}; it knows tensor and attn_head")
    return found


def _missing(held: Mapping[str, Any], attentions: Collection[str]) -> list[str]:
    there: dict[str, str] = {}
    for name in held:
        attention, letters = scale_of(name) or ("", "")
        there[attention] = there.get(attention, "") + letters
    without = [f"{a}: no scale of {letter}" for a in attentions for letter in "kv" if letter not in there.get(a, "")]
    if not without:
        return []
    more = f" ({len(without)} scales are missing)" if len(without) > 1 else ""
    return [f"{without[0]}, and engines take 1.0 for it{more}"]


def _values(held: Mapping[str, float | None]) -> list[str]:
    known = {name: value for name, value in held.items() if value is not None}
    wrong = {name: value for name, value in known.items() if not (math.isfinite(value) and value > 0)}
    if wrong:
        name = next(iter(wrong))
        return [f"{name}{_more(wrong)}: a scale must be finite and positive, not {wrong[name]}"]
    if known and len(known) == len(held) and set(known.values()) == {1.0}:
        return [f"{next(iter(known))}{_more(known)}: every scale of the KV cache is 1.0: nothing was calibrated"]
    return []


def _more(names: Collection[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
