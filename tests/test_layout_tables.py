"""What a layout states of itself, written out: configs whole, and the multiples a tensor-parallel shard must keep."""

from __future__ import annotations

import pytest

from quantpub.layouts import LAYOUTS
from quantpub.registry import load
from quantpub.scheme import preset

# (layout, scheme) → rows and columns, by section 6 of each engine's rules; None: no engine cuts it
MULTIPLES = {
    ("ct-pack", "W4A16"): (1, 128),
    ("ct-pack", "W4A16_ASYM"): (8, 128),
    ("ct-pack", "W8A16"): (1, 4),
    ("ct-int", "W8A8"): (1, 1),
    ("ct-float", "FP8_DYNAMIC"): (1, 1),
    ("ct-float", "FP8_BLOCK"): (128, 128),
    ("ct-nvfp4", "NVFP4A16"): (1, 16),
    ("ct-mxfp4", "MXFP4A16"): (1, 32),
    ("hf-fp8", "FP8_BLOCK"): (128, 128),
    ("modelopt-fp8", "FP8"): (1, 1),
    ("modelopt-fp8-channel", "FP8_DYNAMIC"): (1, 1),
    ("modelopt-fp8-block", "FP8_BLOCK"): (128, 128),
    ("modelopt-nvfp4", "NVFP4A16"): (1, 16),
    ("gptq", "W4A16"): (8, 128),
    ("gptq-v2", "W4A16_ASYM"): (8, 128),
    ("awq", "W4A16_ASYM"): (8, 128),
    ("torchao-tile", "W4A16_FLOAT_ZERO"): (8, 1024),
    ("torchao-nvfp4", "NVFP4A16"): (128, 64),
    ("bnb-int8", "LLM_INT8"): None,
}


@pytest.mark.parametrize(("layout", "scheme"), MULTIPLES)
def test_multiples_of_a_tensor_parallel_shard(layout: str, scheme: str) -> None:
    assert load(LAYOUTS, "layout", layout).tp_multiple(preset(scheme)) == MULTIPLES[layout, scheme]


def test_every_layout_is_in_the_table() -> None:
    assert {layout for layout, _ in MULTIPLES} == set(LAYOUTS)


def test_gptq_says_version_1() -> None:
    """Version 2 would shift every zero by one for engines that believe it."""
    config = load(LAYOUTS, "layout", "gptq").config(preset("W4A16"), ["lm_head", "model.layers.0.mlp.gate"])
    assert config.pop("dynamic").keys() == {r"-:^model\.layers\.0\.mlp\.gate$", r"-:^lm_head$"}
    assert config == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
    } | {key: config[key] for key in ("modules_in_block_to_quantize", "meta", "pack_dtype") if key in config}
