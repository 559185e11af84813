"""Tensor parallelism by hand: groups, blocks, merged members, key and value heads, experts, and Marlin's tiles."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import DEMO_MODEL
from hypothesis import given
from hypothesis import strategies as st

from quantpub.checkpoint import open_checkpoint
from quantpub.families import FAMILIES, Family
from quantpub.layouts import LAYOUTS
from quantpub.layouts.base import Layout
from quantpub.plan import make_plan
from quantpub.plan_facts import tensor_parallel
from quantpub.recipe import load_recipe
from quantpub.registry import load
from quantpub.scheme import preset
from quantpub.tp_cut import TP_SIZES, padded, tp_table

LLAMA = FAMILIES["llama"]
AT, MLP = "model.layers.0.self_attn.", "model.layers.0.mlp."
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8}


def of(
    shapes: dict[str, tuple[int, int]], scheme: str = "W4A16", layout: str = "ct-pack", group: int | None = None
) -> Any:
    held: Layout = load(LAYOUTS, "layout", layout)
    return {module: (preset(scheme, group), held, n, k) for module, (n, k) in shapes.items()}


def table(modules: Any, config: dict[str, int] | None = None, family: Family = LLAMA) -> dict[int, list[str]]:
    return tp_table(modules, family, HEADS if config is None else config)


def test_llama_8b_is_cut_for_eight() -> None:
    shapes = {AT + "q_proj": (4096, 4096), AT + "k_proj": (1024, 4096), AT + "v_proj": (1024, 4096)}
    shapes |= {AT + "o_proj": (4096, 4096), MLP + "gate_proj": (14336, 4096), MLP + "up_proj": (14336, 4096)}
    shapes[MLP + "down_proj"] = (4096, 14336)
    for scheme, layout in (
        ("W4A16", "ct-pack"),
        ("W4A16_ASYM", "awq"),
        ("FP8_BLOCK", "ct-float"),
        ("NVFP4", "ct-nvfp4"),
    ):
        assert table(of(shapes, scheme, layout)) == {size: [] for size in TP_SIZES}


def test_no_group_lies_on_two_gpus() -> None:
    found = table(of({MLP + "down_proj": (4096, 11008)}))
    assert [bool(found[size]) for size in TP_SIZES] == [11008 // size % 128 != 0 for size in TP_SIZES]
    assert found[4] == [f"{MLP}down_proj: 11008 in_features / 4 is not a multiple of 128"]
    assert table(of({MLP + "down_proj": (4096, 11008)}, group=32))[4] == []
    assert table(of({MLP + "up_proj": (11008, 4096)}))[8] == [], "columns of K stay whole where N is shared out"


def test_blocks_are_cut_on_both_sides_and_where_members_meet() -> None:
    block = of({MLP + "gate_proj": (4160, 4096), MLP + "up_proj": (4160, 4096)}, "FP8_BLOCK", "ct-float")
    found = table(block)
    assert found[1] == [f"{MLP}gate_proj: 4160 out_features / 1 is not a multiple of 128"], "up follows gate"
    assert [reason.split(":")[0] for reason in found[2]] == [MLP + "gate_proj", MLP + "up_proj"]
    alone = of({MLP + "up_proj": (4160, 4096)}, "FP8_BLOCK", "ct-float")
    assert table(alone)[1] == [] and table(alone)[2] != []
    down = of({MLP + "down_proj": (4096, 1920)}, "FP8_BLOCK", "ct-float")
    assert {size: bool(reasons) for size, reasons in table(down).items()} == {1: False, 2: True, 4: True, 8: True}


def test_key_and_value_heads_are_held_by_several_gpus() -> None:
    """Two heads of 128: on eight GPUs each holds one of them, never a part of one."""
    modules = of({AT + "k_proj": (256, 2048), AT + "v_proj": (256, 2048)}, "FP8_BLOCK", "ct-float")
    assert table(modules, {"num_attention_heads": 16, "num_key_value_heads": 2}) == {size: [] for size in TP_SIZES}
    assert table(modules, {"num_attention_heads": 16, "num_key_value_heads": 16})[4] != []
    assert table(modules, {})[4] != [], "without heads every GPU has a part"


def test_what_every_gpu_holds_whole_is_not_cut() -> None:
    family = FAMILIES["deepseek_v3"]
    shapes = {AT + "q_a_proj": (1536, 7168), AT + "kv_a_proj_with_mqa": (576, 7168)}
    assert table(of(shapes, "FP8_BLOCK", "ct-float"), family=family)[8] == []
    shapes[AT + "kv_a_proj_with_mqa"], shapes[AT + "q_a_proj"] = (512, 7168), (1500, 7168)
    assert table(of(shapes, "FP8_BLOCK", "ct-float"), family=family)[1] == [
        f"{AT}q_a_proj: 1500 out_features / 1 is not a multiple of 128"
    ]


def test_experts_are_cut_like_linears() -> None:
    expert = "model.layers.0.mlp.experts.7."
    shapes = {expert + "gate_proj": (768, 2048), expert + "up_proj": (768, 2048), expert + "down_proj": (2048, 768)}
    found = table(of(shapes, "FP8_BLOCK", "ct-float"), family=FAMILIES["qwen3_moe"])
    assert found[2] == [] and found[1] == []
    assert found[4][0] == f"{expert}gate_proj: 768 out_features / 4 is not a multiple of 128" and len(found[4]) == 3


def test_a_layout_that_no_engine_cuts_says_so_once() -> None:
    assert table(of({AT + "o_proj": (4096, 4096), AT + "q_proj": (4096, 4096)}, "LLM_INT8", "bnb-int8"))[2] == [
        "no engine cuts layout bnb-int8"
    ]


@pytest.mark.parametrize("recipe", ["w4a16", "fp8-dynamic"])
def test_the_plan_shows_the_first_reason(recipe: str) -> None:
    plan = make_plan(open_checkpoint(str(DEMO_MODEL)), load_recipe(recipe), load_recipe(recipe).layouts([], [])[0])
    modules = {m: (t.scheme, t.layout, *plan.shapes[m]) for m, t in plan.treated.items()}
    found = tp_table(modules, plan.family, plan.checkpoint.config)
    assert tensor_parallel(plan) == {size: reasons[0] if reasons else None for size, reasons in found.items()}


@given(n=st.integers(1, 64), k=st.integers(1, 64), size=st.sampled_from(TP_SIZES), leaf=st.sampled_from(["o", "q"]))
def test_every_size_that_is_named_fits_the_layout(n: int, k: int, size: int, leaf: str) -> None:
    """Where there is no reason against it, the share of one GPU is a weight that the layout holds."""
    module, shape = f"{AT}{leaf}_proj", (n * 32, k * 128)
    modules = of({module: shape}, "W4A16_ASYM")
    scheme, layout, _, _ = modules[module]
    share = (shape[0] // size, shape[1]) if leaf == "q" else (shape[0], shape[1] // size)
    whole = (shape[0] if leaf == "q" else shape[1]) % size == 0
    holds = whole and layout.reject(scheme, *share, "BF16") is None
    zeros = leaf == "o" or share[0] % 8 == 0  # engines cut words of eight packed zeros, which the layout fills up
    assert (table(modules)[size] == []) == (holds and (zeros or size == 1))


def test_marlin_pads_what_its_tiles_do_not_fill() -> None:
    shapes = {
        AT + "q_proj": (896, 896),
        AT + "k_proj": (128, 896),
        AT + "v_proj": (128, 896),
        AT + "o_proj": (896, 896),
    }
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2}
    modules = of(shapes, group=64)
    assert padded(modules, LLAMA, heads, 1) == [], "1152 × 896 and 896 × 896 fill tiles of 64 × 128"
    assert padded(modules, LLAMA, heads, 2) == [], "576 × 896, and 896 × 448 in tiles of 128 × 64"
    assert padded(of({AT + "o_proj": (896, 896)}, group=32), LLAMA, heads, 4) == [AT + "o_proj"], "224 columns"
    assert padded(of({MLP + "down_proj": (896, 4864)}, group=64), LLAMA, heads, 4) == []
    assert padded(of({MLP + "down_proj": (896, 4832)}, group=32), LLAMA, heads, 1) == [MLP + "down_proj"]
    assert padded(of({MLP + "down_proj": (896, 4832)}, "FP8_DYNAMIC", "ct-float"), LLAMA, heads, 1) == []
