"""KV-cache scales: both conventions of names, what is missing, what was never calibrated."""

from __future__ import annotations

import math
from typing import Any

import pytest

from quantpub.kv_check import declared_cache, kv_problems, scale_of
from quantpub.layouts import LAYOUTS
from quantpub.layouts.base import Layout
from quantpub.registry import load

ATTENTIONS = [f"model.layers.{layer}.self_attn" for layer in range(4)]
CT = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
MODELOPT = {"dynamic": False, "num_bits": 8, "type": "float"}
DECLARED: list[dict[str, Any]] = [
    {"kv_cache_scheme": CT},
    {"kv_cache_scheme": MODELOPT},
    {"kv_cache_quant_algo": "FP8"},
    {"quant_method": "fp8", "activation_scheme": "static", "kv_cache_scheme": "static"},
    {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": []}},
]
NONE: list[dict[str, Any]] = [
    {},
    {"kv_cache_scheme": None},
    {"kv_cache_scheme": {}},
    {"kv_cache_quant_algo": "auto"},
    {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None}},
]


def scales(pattern: str = "{a}.{l}_scale", value: float | None = 0.02) -> dict[str, float | None]:
    return {pattern.format(a=a, l=letter): value for a in ATTENTIONS for letter in "kv"}


@pytest.mark.parametrize("config", DECLARED)
@pytest.mark.parametrize(
    "pattern", ["{a}.{l}_scale", "{a}.{l}_proj.{l}_scale", "{a}.qkv_proj.{l}_scale", "{a}.{l}_proj.output_scale"]
)
def test_calibrated_scales_in_any_convention_are_no_problem(config: dict[str, Any], pattern: str) -> None:
    assert kv_problems(config, scales(pattern), ATTENTIONS) == []
    assert kv_problems(config, scales(pattern, None), ATTENTIONS) == [], "a vector of them is not judged here"
    assert kv_problems(config, {f"{a}.kv_scale": 0.02 for a in ATTENTIONS}, ATTENTIONS) == []


@pytest.mark.parametrize("config", NONE)
def test_scales_and_scheme_come_together_or_not_at_all(config: dict[str, Any]) -> None:
    assert declared_cache(config) is None
    assert kv_problems(config, {"model.layers.0.self_attn.k_proj.weight_scale": 0.1}, ATTENTIONS) == []
    found = kv_problems(config, scales(), ATTENTIONS)
    assert found == [f"{ATTENTIONS[0]}.k_scale and 7 more: a scale of the KV cache, but the config declares none"]


@pytest.mark.parametrize("config", DECLARED)
def test_a_missing_scale_counts_as_one(config: dict[str, Any]) -> None:
    found = kv_problems(config, {}, ATTENTIONS)
    assert found == [f"{ATTENTIONS[0]}: no scale of k, and engines take 1.0 for it (8 scales are missing)"]
    held = scales()
    del held[f"{ATTENTIONS[2]}.v_scale"]
    assert kv_problems(config, held, ATTENTIONS) == [f"{ATTENTIONS[2]}: no scale of v, and engines take 1.0 for it"]
    renamed = {name.replace("k_scale", "key_scale"): value for name, value in scales().items()}
    assert "(4 scales are missing)" in kv_problems(config, renamed, ATTENTIONS)[0]


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -0.5])
def test_a_scale_that_is_none_is_found(value: float) -> None:
    held = scales() | {f"{ATTENTIONS[1]}.v_scale": value}
    found = kv_problems(DECLARED[0], held, ATTENTIONS)
    assert found == [f"{ATTENTIONS[1]}.v_scale: a scale must be finite and positive, not {value}"]


def test_scales_of_one_throughout_were_never_calibrated() -> None:
    found = kv_problems(DECLARED[0], scales(value=1.0), ATTENTIONS)
    assert found == [f"{ATTENTIONS[0]}.k_scale and 7 more: every scale of the KV cache is 1.0: nothing was calibrated"]
    assert kv_problems(DECLARED[0], scales(value=1.0) | {f"{ATTENTIONS[0]}.k_scale": 0.5}, ATTENTIONS) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"type": "int"}, "not with type 'int'"),
        ({"num_bits": 4, "symmetric": False}, "not with num_bits 4, symmetric False"),
        ({"strategy": "channel"}, "vLLM refuses the strategy 'channel'"),
        ({"dynamic": True}, "SGLang ignores one whose scales are dynamic"),
    ],
)
def test_schemes_that_no_engine_keeps_a_cache_by(change: dict[str, Any], says: str) -> None:
    found = kv_problems({"kv_cache_scheme": CT | change}, scales(), ATTENTIONS)
    assert len(found) == 1 and says in found[0]


def test_an_algorithm_that_no_engine_knows() -> None:
    assert kv_problems({"kv_cache_quant_algo": "INT8"}, scales(), ATTENTIONS) == [
        "kv_cache_quant_algo 'INT8' is none that an engine knows"
    ]


def test_every_layout_of_ours_with_a_cache_is_read_back() -> None:
    seen = 0
    for name in LAYOUTS:
        layout: Layout = load(LAYOUTS, "layout", name)
        if layout.kv_cache is not None:
            config = layout.kv_cache.declare({"quant_method": layout.method})
            held = {layout.kv_cache.name(a, letter): 0.02 for a in ATTENTIONS for letter in "kv"}
            assert kv_problems(config, held, ATTENTIONS) == []
            assert kv_problems({}, held, ATTENTIONS) and kv_problems(config, {}, ATTENTIONS)
            seen += 1
    assert seen >= 2


def test_names_that_are_no_scale_of_a_cache() -> None:
    for name in ("a.k_proj.weight_scale", "a.k_proj.input_scale", "a.weight", "a.q_scale", "a.k_zero_point"):
        assert scale_of(name) is None
    assert scale_of("m.self_attn.attn.k_scale") == ("m.self_attn", "k")
