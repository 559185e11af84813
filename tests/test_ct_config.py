"""Configs against compressed-tensors 0.17.0's own parser: mutated at random, of other tools, of every layout of ours."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import compressed_tensors
import pytest
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpub.ct_config import PRESETS, ct_problems, ct_refusals
from quantpub.kv_check import kv_problems
from quantpub.layouts import LAYOUTS
from quantpub.layouts.base import CT, Layout
from quantpub.lookup import name_problems
from quantpub.method_config import problems_of_method
from quantpub.registry import load
from quantpub.scheme import PRESETS as SCHEMES

PEERS = json.loads((Path(__file__).parent / "golden" / "peer_configs.json").read_text())["configs"]
CT_PEERS = {name: row for name, row in PEERS.items() if row["quantization_config"].get("quant_method") == CT}


def parses(config: dict[str, Any]) -> bool:
    """Whatever the parser raises refuses the checkpoint: a ValidationError, or an error that its validators let through."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            QuantizationConfig.model_validate(copy.deepcopy(config))
    except Exception:
        return False
    return True


def of(weights: dict[str, Any] | None = None, **group: Any) -> dict[str, Any]:
    base = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False}
    scheme = {"targets": ["Linear"], "weights": base | (weights or {}), "format": "pack-quantized"} | group
    return {
        "quant_method": CT,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
    }


def ours() -> dict[str, dict[str, Any]]:
    found = {}
    for name in LAYOUTS:
        layout: Layout = load(LAYOUTS, "layout", name)
        for scheme in SCHEMES.values():
            if not layout.reject(scheme, 1024, 1024, "BF16"):
                config = layout.config(scheme, ["lm_head"])
                found[f"{name} {scheme.name}"] = config
                if layout.kv_cache is not None:
                    found[f"{name} {scheme.name} kv"] = layout.kv_cache.declare(config)
    return found


OURS = ours()


def test_the_parser_is_the_release_that_engines_pin() -> None:
    assert compressed_tensors.__version__ == "0.17.0"
    assert set(PRESET_SCHEMES) == set(PRESETS)


@pytest.mark.parametrize("name", sorted(CT_PEERS))
def test_what_llm_compressor_writes_is_loaded(name: str) -> None:
    config = CT_PEERS[name]["quantization_config"]
    assert parses(config) and ct_problems(config) == []


def test_every_layout_of_ours_is_loaded() -> None:
    seen = [name for name, config in OURS.items() if config.get("quant_method") == CT]
    assert len(seen) > 10
    for name in seen:
        assert parses(OURS[name]) and ct_problems(OURS[name]) == [], name


VALUES: dict[str, list[Any]] = {
    "num_bits": [2, 3, 4, 6, 8, 16, "4", "x", 4.0, 4.5, None, True, []],
    "type": ["int", "float", "FLOAT", "fp8", None, 1],
    "symmetric": [True, False, None, "yes", "maybe", 1, 2],
    "group_size": [None, -1, 0, 1, 16, 128, -2, 128.0, 2.5, "128", True, [128]],
    "strategy": [None, "tensor", "channel", "group", "block", "token", "tensor_group", "attn_head", "GROUP", "row", 3],
    "block_structure": [None, [128, 128], [128], [128, 128.0], "128x128", "2x4x8", "128", "a", 5, [0, -1], ["1", "2"]],
    "dynamic": [True, False, "local", "LOCAL", "true", None, 0, 1, 2],
    "actorder": [None, True, False, "group", "weight", "dynamic", "static", "GROUP", "first", 1, 0, 2],
    "scale_dtype": [None, "torch.float8_e4m3fn", "float16", "torch.uint8", "torch.nn", "fp8", "", 3],
    "zp_dtype": [None, "torch.int8", "int8", "torch.torch.int8", "torch.float8_e4m3fn", "e4m3"],
    "observer": [None, "minmax", "static_minmax", 3],
    "observer_kwargs": [{}, {"a": 1}, None, []],
    "scale_rounding": [None, "up"],
}
GROUP: dict[str, list[Any]] = {
    "targets": [["Linear"], [], "Linear", None, [3], ["re:.*q_proj"]],
    "format": [None, "pack-quantized", "mixed-precision", "dense", "marlin-24", "DENSE", "packed", 3],
    "weights": [None, {}, [], {"num_bits": 8}],
    "input_activations": [
        None,
        {},
        {"strategy": "token", "dynamic": True},
        {"strategy": "channel"},
        {"actorder": "weight"},
    ],
    "output_activations": [None, {}, {"strategy": "channel"}, {"actorder": "weight"}, {"actorder": False}],
    "quantize": [True],
}
TOP: dict[str, list[Any]] = {
    "format": ["pack-quantized", "fancy", None, 3],
    "quantization_status": ["compressed", "frozen", "COMPRESSED", None, "done"],
    "ignore": [None, [], ["lm_head"], "lm_head", [3]],
    "kv_cache_scheme": [
        None,
        {},
        {"num_bits": 8, "type": "float"},
        {"strategy": "channel", "dynamic": True},
        [],
        "fp8",
    ],
    "global_compression_ratio": [None, 1.5, "1.5", "x", True, []],
    "quant_method": [CT, "x", None, 3],
    "version": ["0.19.0", 3],
    "config_groups": [
        {},
        None,
        [],
        {"W4A16": ["Linear"]},
        {"w8a8": ["re:.*"]},
        {"X9": ["Linear"]},
        {"g": {}},
        {"g": None},
    ],
}
PARTS = ("weights", "input_activations", "output_activations")


@st.composite
def mutations(draw: st.DrawFn) -> dict[str, Any]:
    """A valid config with up to three values changed, mostly among the arguments."""
    names = [name for name in sorted(OURS) if OURS[name].get("quant_method") == CT]
    rows = [CT_PEERS[name]["quantization_config"] for name in sorted(CT_PEERS)]
    config = copy.deepcopy(draw(st.sampled_from([OURS[name] for name in names] + rows + [of()])))
    for _ in range(draw(st.integers(1, 3))):
        groups = config.get("config_groups")
        group = next(iter(groups.values()), None) if isinstance(groups, dict) else None
        table = draw(st.sampled_from([VALUES] * 6 + [GROUP, TOP]))
        key = draw(st.sampled_from(sorted(table)))
        value = copy.deepcopy(draw(st.sampled_from(table[key])))
        part = draw(st.sampled_from([*PARTS, "weights", "kv_cache_scheme"]))
        if table is TOP:
            config[key] = value
        elif isinstance(group, dict):
            home: Any = group if table is GROUP else config.get(part) if part == "kv_cache_scheme" else group.get(part)
            if isinstance(home, dict):
                home[key] = value
                if draw(st.integers(0, 5)) == 0:
                    del home[key]
    return config


@pytest.mark.slow
@settings(max_examples=800, deadline=None)
@given(mutations())
def test_what_is_refused_is_what_the_parser_refuses(config: dict[str, Any]) -> None:
    assert (ct_refusals(config) == []) == parses(config), ct_refusals(config)


@pytest.mark.parametrize("key", sorted(VALUES))
@pytest.mark.parametrize("part", PARTS)
def test_each_value_by_itself(key: str, part: str) -> None:
    seen = set()
    for value in VALUES[key]:
        config = of(**{part: {"num_bits": 8} | {key: value}})
        assert (ct_refusals(config) == []) == parses(config), (value, ct_refusals(config))
        seen.add(parses(config))
    assert False in seen


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.sampled_from(["", "re:(", "Linear", "4"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*VALUES, *GROUP, *TOP]), inner, max_size=4)
    ),
    max_leaves=12,
)
KEYS = ["modules_to_not_convert", "ignored_layers", "exclude_modules", "quantized_layers", "quant_algo", "extra_config"]
KEYS += ["quant_type", "modules_in_block_to_quantize", "block_name_to_quantize", "desc_act", "sym", "weight_block_size"]


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from([*TOP, "quantization", "dynamic", "bits", "group_size"]), JSON), st.data())
def test_whatever_stands_there_is_judged(config: dict[str, Any], data: st.DataObject) -> None:
    assert (ct_refusals(config) == []) == parses(config), ct_refusals(config)
    assert isinstance(ct_problems(config), list)
    for method in (CT, "gptq", "awq", "fp8", "torchao", "modelopt", "auto-round"):
        stated = config | {"quant_method": method} | data.draw(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3))
        assert isinstance(problems_of_method(stated, {"quantization": stated}), list)
        assert isinstance(
            name_problems(stated, {"a.q_proj": 1, "a.experts.0.w1": 1}, ["lm_head", "b.o_proj"], {}), list
        )
        assert isinstance(kv_problems(stated, {"a.k_scale": 0.1}, ["a"]), list)


@pytest.mark.parametrize("name", sorted(PRESET_SCHEMES))
def test_presets_parse_as_schemes(name: str) -> None:
    group = preset_name_to_scheme(name, ["Linear"]).model_dump(mode="json")
    config = of() | {"config_groups": {"group_0": group}}
    assert parses(config) and ct_refusals(config) == []


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (of({"scale_rounding": "up"}), "group_0.weights: unknown key 'scale_rounding'"),
        (of({"type": "fp8"}), "group_0.weights.type: 'fp8' is no type: int or float"),
        (of({"group_size": None}), "group_0.weights: strategy group wants a group_size"),
        (of({"strategy": "channel", "group_size": None, "actorder": "group"}), "actorder 'group' goes with groups"),
        (of({"strategy": "block", "group_size": None}), "strategy block without a block_structure"),
        (of({"block_structure": [128, 128]}), "strategy group with a block_structure"),
        (of({"scale_dtype": "e4m3"}), "group_0.weights.scale_dtype: 'e4m3' is no dtype of torch"),
        (of(input_activations={"strategy": "token"}), "a scale of a token must be dynamic"),
        (
            of(input_activations={"strategy": "channel"}),
            "group_0.input_activations: strategy channel is not for activations",
        ),
        (of(format="packed"), "group_0: format 'packed' is none that a group may have"),
        ({"quant_method": CT}, "config_groups is missing"),
    ],
)
def test_sentences_name_the_place(config: dict[str, Any], says: str) -> None:
    (found,) = ct_problems(config)
    assert found.startswith("compressed-tensors 0.17: ") and says in found and not parses(config)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (of() | {"sparsity_config": {"format": "sparse-24-bitmask", "targets": ["Linear"]}}, "vLLM: sparsity_config"),
        (of(format="marlin-24"), "vLLM and SGLang: group_0: format 'marlin-24' is none that is loaded"),
        (of(format=None) | {"format": "mixed-precision"}, "'mixed-precision' without a format of its own"),
        (of(format=None) | {"format": "fancy"}, "format 'fancy' is none that is loaded"),
        (of({"num_bits": 3}), "3-bit words are packed differently by releases"),
        (of({"num_bits": 2}), "SGLang: group_0: packed weights of 2 bits are not loaded"),
        (of({"actorder": "group"}), "vLLM 0.30 and later: group_0: weights.actorder 'group' is refused"),
        (of({"actorder": True}), "weights.actorder True is refused"),
        (of() | {"config_groups": {"W4A16": ["Linear"]}}, "W4A16: the name of a preset is not loaded"),
        (of(weights=None), "a group without weights is not loaded"),
    ],
)
def test_what_parses_and_is_not_loaded(config: dict[str, Any], says: str) -> None:
    if says.startswith("a group"):
        config["config_groups"]["group_0"]["weights"] = None
    assert parses(config) and ct_refusals(config) == []
    (found,) = ct_problems(config)
    assert says in found


def test_what_is_loaded_although_it_looks_odd() -> None:
    assert ct_problems(of({"actorder": "weight"}) | {"sparsity_config": {}, "transform_config": {}}) == []
    assert ct_problems(of() | {"sparsity_config": {"format": "dense"}}) == []
    assert ct_problems(of() | {"format": "mixed-precision"}) == [], "its only group has a format of its own"
    attention = {"targets": ["LlamaAttention"], "weights": None, "input_activations": {"num_bits": 8, "type": "float"}}
    both = of()
    both["config_groups"]["group_1"] = attention
    assert ct_problems(both) == []


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
AO = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_data": {}}}}
MO = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
NESTED = {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}


def without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != key}


@pytest.mark.parametrize("config", [GPTQ, AWQ, FP8, AO, MO, {"quantization": NESTED}, {"quant_method": "mxfp4"}, {}])
def test_methods_that_are_loaded(config: dict[str, Any]) -> None:
    assert problems_of_method(config) == []


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (without(GPTQ, "desc_act"), "vLLM and SGLang: desc_act is missing"),
        (GPTQ | {"sym": False}, "vLLM and SGLang: sym: only symmetric weights are loaded"),
        (GPTQ | {"bits": 3}, "vLLM and SGLang: bits: 3 is neither 4 nor 8"),
        (GPTQ | {"desc_act": True}, "vLLM 0.30 and later: desc_act: groups in the order of activations are refused"),
        (GPTQ | {"dynamic": {"+:.*q_proj": {"desc_act": True}}}, "vLLM 0.30 and later: dynamic '+:.*q_proj'"),
        (GPTQ | {"group_size": 256}, "vLLM and SGLang: group_size: 256 is none of -1, 32, 64, 128"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format: 'marlin' is no longer loaded"),
        (without(AWQ, "zero_point"), "vLLM and SGLang: zero_point is missing"),
        (AWQ | {"bits": 8}, "vLLM: bits: 8 is not 4"),
        (AWQ | {"version": "gemv"}, "vLLM and SGLang: version: 'gemv' would be read as gemm"),
        (without(FP8, "activation_scheme"), "vLLM and SGLang: activation_scheme is missing"),
        (FP8 | {"activation_scheme": "static"}, "weight_block_size: blocks go with activation_scheme dynamic"),
        (FP8 | {"weight_block_size": [128]}, "weight_block_size: [128] is no pair"),
        (FP8 | {"activation_scheme": "none"}, "activation_scheme: 'none' is neither static nor dynamic"),
        (AO | {"quant_type": "int4_weight_only"}, "vLLM: quant_type: it must be a mapping with the one key 'default'"),
        (
            AO | {"quant_type": {"default": {}, "x": {}}},
            "vLLM: quant_type: it must be a mapping with the one key 'default'",
        ),
        (without(MO, "quant_algo"), "vLLM and SGLang: quant_algo is missing"),
        (MO | {"quant_algo": "W4A16_AWQ"}, "vLLM: quant_algo: 'W4A16_AWQ' is not loaded"),
        (MO | {"quant_algo": "FP8_PB_WO"}, "SGLang: quant_algo: 'FP8_PB_WO' is not loaded"),
        (MO | {"ignore": "lm_head"}, "vLLM: ignore: 'lm_head' is no list"),
        (MO | {"quant_algo": "MIXED_PRECISION"}, "vLLM and SGLang: quantized_layers is missing"),
        ({"quantization": without(NESTED, "kv_cache_quant_algo")}, "vLLM: quantization.kv_cache_quant_algo is missing"),
        ({"quantization": NESTED | {"exclude_modules": "x"}}, "vLLM: quantization.exclude_modules: 'x' is no list"),
    ],
)
def test_methods_name_engine_and_key(config: dict[str, Any], says: str) -> None:
    assert any(sentence.startswith(says) or says in sentence for sentence in problems_of_method(config))


def test_gptq_in_one_group_a_row_may_say_desc_act() -> None:
    assert problems_of_method(GPTQ | {"desc_act": True, "group_size": -1}) == []


@pytest.mark.parametrize(
    "change", [{"quant_algo": "FP8"}, {"exclude_modules": []}, {"kv_cache_quant_algo": "FP8"}, {"group_size": 32}]
)
def test_modelopts_two_files_must_agree(change: dict[str, Any]) -> None:
    weights = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 16}}}}
    assert problems_of_method(MO | weights, {"quantization": NESTED}) == []
    (found,) = problems_of_method(MO | weights, {"quantization": NESTED | change})
    assert found.startswith("TensorRT-LLM: hf_quant_config.json is read first, and its") and next(iter(change)) in found


def test_methods_of_ours_and_of_other_tools_are_loaded_by_vllm() -> None:
    for name, config in OURS.items():
        found = [p for p in problems_of_method(config) if not p.startswith("SGLang: ")]
        asymmetric = config.get("quant_method") == "gptq" and not config["sym"]
        assert found == (["vLLM and SGLang: sym: only symmetric weights are loaded"] if asymmetric else []), name
    for name, row in PEERS.items():
        found = problems_of_method(row["quantization_config"], row.get("hf_quant_config"))
        if "mo-int4" in name:  # ModelOpt's AWQ is for TensorRT-LLM alone
            assert any("W4A16_AWQ" in sentence for sentence in found)
        else:
            assert [sentence for sentence in found if not sentence.startswith("SGLang: ")] == [], name
