"""How a stranger's modules are read, by headers of a few linears: what is missing, what is another's, and what is not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantpub.adopt import NONE, Adopted, adopt, ct
from quantpub.adopt.base import misfit
from quantpub.adopt.decoder import AdoptedDecoder
from quantpub.adopt.others import _int8
from quantpub.errors import InputError
from quantpub.held import open_held
from quantpub.layouts import LAYOUTS
from quantpub.layouts.base import Layout
from quantpub.qtensor import QTensor
from quantpub.registry import load
from quantpub.scheme import PRESETS
from quantpub.shards import DTYPES, TensorInfo
from quantpub.verify.base import Problem, first
from quantpub.verify.values import sqnr_db

MODULE = "model.layers.0.mlp.down_proj"
N, K, GROUP = 128, 256, 128
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
TOKEN8 = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
Spec = dict[str, tuple[str, tuple[int, ...]]]
PACKED: Spec = {
    "weight_packed": ("I32", (N, K // 8)),
    "weight_scale": ("BF16", (N, K // GROUP)),
    "weight_shape": ("I64", (2,)),
}
BYTES: Spec = {"weight": ("F8_E4M3", (N, K)), "weight_scale": ("BF16", (1,))}
CODES: Spec = {"weight": ("I8", (N, K)), "weight_scale": ("BF16", (N, 1))}
NVFP4: Spec = {
    "weight": ("U8", (N, K // 2)),
    "weight_scale": ("F8_E4M3", (N, K // 16)),
    "weight_scale_2": ("F32", ()),
}


def group(weights: dict[str, Any], inputs: dict[str, Any] | None, form: str) -> dict[str, Any]:
    held = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": form}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": held}, "ignore": []}


def read(folder: Path, config: dict[str, Any], spec: Spec, more: dict[str, torch.Tensor] | None = None) -> Adopted:
    """A checkpoint of one module."""
    tensors = {f"{MODULE}.{suffix}": torch.zeros(shape, dtype=DTYPES[dtype]) for suffix, (dtype, shape) in spec.items()}
    save_file(tensors | (more or {}), folder / "model.safetensors")
    stated = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": config}
    (folder / "config.json").write_text(json.dumps(stated))
    return adopt(open_held(str(folder)))


@pytest.mark.parametrize(
    ("weights", "inputs", "form", "spec"),
    [
        (INT8, TOKEN8 | {"strategy": "tensor", "dynamic": False}, "int-quantized", CODES),
        (INT4, STATIC, "pack-quantized", PACKED),
        (FP8, STATIC, "float-quantized", BYTES),
    ],
)
def test_scales_that_the_config_promises_are_missed_in_every_scheme(
    weights: dict[str, Any], inputs: dict[str, Any], form: str, spec: Spec, tmp_path: Path
) -> None:
    found = read(tmp_path, group(weights, inputs, form), spec)
    assert any("input_scale" in text and "missing" in text for text in found.said("tensors"))
    assert not found.said("readable")
    found = read(tmp_path, group(weights, inputs, form), spec | {"input_scale": ("BF16", (1,))})
    assert not found.said("tensors") and bool(found.said("readable")) == (form != "float-quantized")


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        group(FP8, TOKEN8 | {"type": "float"}, "float-quantized"),
    ],
)
def test_codes_by_the_name_of_another_format(config: dict[str, Any], tmp_path: Path) -> None:
    found = read(tmp_path, config, PACKED)
    assert f"{MODULE}.weight is missing" in found.said("tensors")
    assert f"{MODULE}.weight_packed belongs to no module" in found.said("tensors")
    assert not found.said("bits") + found.said("readable")


def test_a_config_of_nothing(tmp_path: Path) -> None:
    plain: Spec = {"weight": ("BF16", (N, K))}
    assert read(tmp_path, group(INT4, None, "pack-quantized"), plain).said("tensors") == [NONE]
    cache = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": STATIC}
    assert read(tmp_path, cache, plain).said("tensors") == [], "a cache alone may be quantized"


@pytest.mark.parametrize("order", ["own", "reversed", "of other groups"])
def test_an_order_of_columns_is_read_where_it_is_their_own(order: str, tmp_path: Path) -> None:
    due = torch.arange(K, dtype=torch.int32) // GROUP
    g_idx = {"own": due, "reversed": due.flip(0), "of other groups": torch.arange(K, dtype=torch.int32) // 64}[order]
    config = group(INT4 | {"actorder": "group"}, None, "pack-quantized")
    found = read(tmp_path, config, PACKED, {f"{MODULE}.weight_g_idx": g_idx})
    assert bool(found.said("readable")) == (order != "own") and not found.said("tensors")
    words: Spec = {"qweight": ("I32", (K // 8, N)), "qzeros": ("I32", (2, N // 8)), "scales": ("F16", (2, N))}
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "sym": True}
    found = read(tmp_path, gptq, words, {f"{MODULE}.g_idx": g_idx})
    assert bool(found.said("readable")) == (order != "own") and not found.said("tensors")


@pytest.mark.parametrize("name", ["gptq", "gptq-v2"])
def test_groups_of_columns_that_lie_apart_are_refused(name: str) -> None:
    layout: Layout = load(LAYOUTS, "layout", name)
    codes_NK = torch.randint(-8, 8, (N, K), dtype=torch.int8)
    tensors = layout.pack(QTensor(PRESETS["W4A16"], codes_NK, torch.ones(N, K // GROUP).bfloat16()))
    assert layout.ambiguous(tensors, PRESETS["W4A16"], (N, K)) is None
    due = tensors["g_idx"]
    tensors["g_idx"] = torch.cat([due[-1:], due[1:-1], due[:1]])
    assert "(g_idx)" in str(layout.ambiguous(tensors, PRESETS["W4A16"], (N, K)))


@pytest.mark.parametrize("symmetric", [False, "false", "no", 0, None])
def test_activations_with_a_zero_are_not_read_for_others(symmetric: Any, tmp_path: Path) -> None:
    found = read(tmp_path, group(INT8, TOKEN8 | {"symmetric": symmetric}, "int-quantized"), CODES)
    assert found.said("readable") == [f"{MODULE}: activations with a zero are not read"]
    assert not read(tmp_path, group(INT8, TOKEN8 | {"symmetric": "yes"}, "int-quantized"), CODES).problems


def test_those_of_torchao_neither() -> None:
    def data(mapping: str, granularity: str = "PerRow") -> dict[str, Any]:
        kind = {"_type": "MappingType", "_data": mapping}
        return {"act_quant_kwargs": {"_data": {"mapping_type": kind, "granularity": {"_type": granularity}}}}

    assert _int8(data("SYMMETRIC"), {})[1].act is not None
    assert _int8({"act_quant_kwargs": None}, {})[1].act is None
    for odd, says in ((data("ASYMMETRIC"), "with a zero"), (data("SYMMETRIC", "PerTensor"), "for all tokens")):
        with pytest.raises(Exception, match=says):
            _int8(odd, {})


def test_one_scale_of_keys_and_values_counts_as_both(tmp_path: Path) -> None:
    config = {"quant_method": "fp8", "activation_scheme": "static", "kv_cache_scheme": "static"}
    spec = BYTES | {"input_scale": ("F32", ())}
    name = "model.layers.0.self_attn"
    more = {f"{name}.k_proj.weight": torch.zeros(64, 64), f"{name}.kv_scale": torch.tensor(0.5)}
    found = read(tmp_path, config, spec, more)
    assert found.problems == [] and found.shared == (f"{name}.kv_scale",)
    (keys, values) = AdoptedDecoder(found).kv_scales()[name]
    assert float(keys) == float(values) == 0.5
    stray = read(tmp_path, config, spec, {f"{name}.kv_scale": torch.tensor(0.5)})
    assert stray.said("tensors") == [f"{name}.kv_scale belongs to no attention"]


def test_nvfp4_without_scales_of_activations_is_of_weights_alone_where_it_says_so(tmp_path: Path) -> None:
    weights = {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}
    flat = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": []}
    alone = flat | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    found = read(tmp_path, alone, NVFP4)
    assert not found.problems and found.treatments[0].scheme == PRESETS["NVFP4A16"]
    both = flat | {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": weights}}
    }
    for config in (flat, both):
        assert read(tmp_path, config, NVFP4).said("tensors") == [f"{MODULE}.input_scale is missing"]


def test_a_pattern_begins_where_the_name_does_and_ends_where_it_likes() -> None:
    def found(*targets: str) -> object:
        groups = {target: {"targets": [target]} for target in targets}
        return next(iter((ct.find(groups, MODULE) or {}).get("targets", [None])))

    assert found("re:model.layers.0.mlp") == "re:model.layers.0.mlp"
    assert found("re:mlp.down_proj") is None and found("re:.*down") == "re:.*down"
    assert found("Linear", "re:.*down", MODULE) == MODULE
    assert found("Linear", "re:.*down") == "re:.*down" and found("re:.*up", "Linear") == "Linear"


@pytest.mark.parametrize(
    ("held", "due", "fits"),
    [
        (("F32", (4, 1)), ("F32", (4,)), True),
        (("BF16", (4,)), ("F32", (4, 1)), True),
        (("F16", (1,)), ("F32", ()), True),
        (("F32", (1, 4)), ("F32", (4,)), False),
        (("F32", (4,)), ("BF16", (4,)), False),
        (("BF16", (4,)), ("F16", (4,)), False),
        (("I32", (4,)), ("F32", (4,)), False),
        (("F32", (2, 2)), ("F32", (4,)), False),
    ],
)
def test_what_counts_for_another_without_changing_a_number(
    held: tuple[str, tuple[int, ...]], due: tuple[str, tuple[int, ...]], fits: bool
) -> None:
    said = misfit(TensorInfo(*held, 0, 0), *due)
    assert (said is None) == fits
    assert fits or said == f"is {held[0]} {list(held[1])}, expected {due[0]} {list(due[1])}"


def test_rows_are_judged_beside_the_whole() -> None:
    """One large weight carries the power of a tensor whose other rows are noise."""
    scheme = PRESETS["W8A16"]
    w_NK = torch.ones(4, 128)
    w_NK[0, 0] = 1e4
    scale_N1 = torch.tensor([[1e4], [1.0], [1.0], [1.0]]) / 127
    codes_NK = (w_NK / scale_N1).round().to(torch.int8)
    codes_NK[1:] = -codes_NK[1:]
    whole, rows = sqnr_db(w_NK, QTensor(scheme, codes_NK, scale_N1))
    assert whole > 40 and rows < 0


def test_what_to_do_about_a_finding_is_that_of_its_first_problem() -> None:
    assert first([Problem("a", "mend a"), "b"], "").as_json() == {
        "status": "failed",
        "detail": "a (and 1 more)",
        "next": "mend a",
    }
    assert first(["b", Problem("a", "mend a")], "").as_json() == {"status": "failed", "detail": "b (and 1 more)"}


@pytest.mark.parametrize(
    ("config", "whose", "runs"),
    [
        ({"group_size": 64, "bits": 4, "mode": "affine"}, "MLX", "mlx-lm"),
        ({"quant_method": "hqq", "quant_config": {}}, "HQQ", "hqq"),
    ],
)
def test_whose_checkpoint_it_is_that_is_not_read(config: dict[str, Any], whose: str, runs: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"a checkpoint of {whose}, which is not read") as refused:
        read(tmp_path, config, PACKED)
    assert runs in str(refused.value.next) and "quantpub quantize" in str(refused.value.next)
    with pytest.raises(InputError, match="quant_method 'zap' is not read"):
        read(tmp_path, {"quant_method": "zap"}, PACKED)
