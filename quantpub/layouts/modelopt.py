"""ModelOpt's checkpoints, `quant_method: modelopt`: FP8 with a scale a tensor, and NVFP4.

Per module, in FP8:
    weight           float8_e4m3fn [N, K]
    weight_scale     float32 ()           multiplier
    input_scale      float32 ()           multiplier of FP8 activations, calibrated
in NVFP4, and in W4A16_NVFP4 without the last:
    weight           uint8 [N, K/2]       element k in the low (k even) or high (k odd) half of byte k/2; sign in bit 3
    weight_scale     float8_e4m3fn [N, K/16], row-major
    weight_scale_2   float32 ()           multiplier of the whole tensor
    input_scale      float32 ()           multiplier of FP4 activations, calibrated

The configuration stands twice, with one content: flat in config.json, which vLLM and SGLang read, and nested in
hf_quant_config.json, which TensorRT-LLM reads first. Engines know the nested file by the name of its producer, and so it
is ModelOpt's: the file is of the kind that this version of ModelOpt writes. A KV cache scheme is stated only with its scales:
alone it would turn an uncalibrated FP8 cache on. Its scales, of an attention:
    self_attn.k_proj.k_scale, self_attn.v_proj.v_scale     float32 ()     multipliers, whatever the projections are called

Modules left out are named in full. vLLM takes such a name as a part of longer ones too. SGLang, of a name that ends in
q_a_proj, q_b_proj, kv_a_proj_with_mqa or kv_b_proj, takes only that end: left out in one layer means in all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from quantpub.layouts.base import Config, InputScale, KvCache, Layout, Spec, Tensors
from quantpub.layouts.words import pack_nibbles, unpack_nibbles
from quantpub.qtensor import QTensor
from quantpub.scheme import PRESETS, WHOLE, Scheme

METHOD = "modelopt"
PRODUCER = {"name": "modelopt", "version": "0.47.0"}
ALGORITHMS = {"FP8": "FP8", "NVFP4": "NVFP4", "NVFP4A16": "W4A16_NVFP4"}  # scheme → quant_algo
GROUP = 16  # NVFP4's


def reject_fp8(scheme: Scheme, n: int, k: int, dtype: str) -> str | None:
    if _algorithm(_grouped(scheme, WHOLE)) != "FP8":
        return f"modelopt-fp8 holds FP8 weights and activations with a scale a tensor each, not {scheme.name}"
    if scheme.group_size != WHOLE:
        return f"modelopt-fp8 holds FP8 weights with a scale a tensor, not one for every {scheme.group_size} columns"
    return None


def reject_nvfp4(scheme: Scheme, n: int, k: int, dtype: str) -> str | None:
    if _algorithm(_grouped(scheme, GROUP)) not in ("NVFP4", "W4A16_NVFP4"):
        return f"modelopt-nvfp4 holds FP4 weights in groups of {GROUP} with a global scale, not {scheme.name}"
    if scheme.group_size != GROUP:
        given = "whole rows" if scheme.group_size == WHOLE else scheme.group_size
        return f"modelopt-nvfp4 holds FP4 weights in groups of {GROUP} columns, not of {given}"
    if k % GROUP:
        return f"in_features {k} is not a multiple of the group size {GROUP}"
    return None


def _grouped(scheme: Scheme, columns: int) -> Scheme:
    return replace(scheme, weight=replace(scheme.weight, block=(scheme.weight.block[0], columns)))


def _algorithm(scheme: Scheme) -> str | None:
    """ModelOpt's name of a scheme, if it has one. By content: a recipe may give a scheme any name."""
    for name, algorithm in ALGORITHMS.items():
        if (scheme.weight, scheme.act) == (PRESETS[name].weight, PRESETS[name].act):
            return algorithm
    return None


def spec_fp8(scheme: Scheme, n: int, k: int, dtype: str) -> Spec:
    return {"weight": ("F8_E4M3", (n, k)), "weight_scale": ("F32", ()), "input_scale": ("F32", ())}


def spec_nvfp4(scheme: Scheme, n: int, k: int, dtype: str) -> Spec:
    weight: Spec = {
        "weight": ("U8", (n, k // 2)),
        "weight_scale": ("F8_E4M3", (n, k // GROUP)),
        "weight_scale_2": ("F32", ()),
    }
    return weight if scheme.act is None else weight | {"input_scale": ("F32", ())}


def pack_fp8(q: QTensor) -> Tensors:
    assert q.input_scale is not None, "the scale of static activations is calibrated"
    return {"weight": q.codes_NK, "weight_scale": q.scale.reshape(()), "input_scale": q.input_scale}


def pack_nvfp4(q: QTensor) -> Tensors:
    assert q.global_scale is not None
    assert (q.input_scale is None) == (q.scheme.act is None), "activations have a calibrated scale, 16-bit ones none"
    weight = {"weight": pack_nibbles(q.codes_NK), "weight_scale": q.scale, "weight_scale_2": q.global_scale}
    return weight if q.input_scale is None else weight | {"input_scale": q.input_scale}


def unpack_fp8(tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    scale = tensors["weight_scale"].reshape(1, 1)
    return QTensor(scheme, tensors["weight"], scale, input_scale=tensors["input_scale"])


def unpack_nvfp4(tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    return QTensor(
        scheme,
        unpack_nibbles(tensors["weight"]),
        tensors["weight_scale"],
        global_scale=tensors["weight_scale_2"],
        input_scale=tensors.get("input_scale"),
    )


def config(scheme: Scheme, ignore: Sequence[str]) -> Config:
    """The flat form, with the keys that ModelOpt makes of the nested one."""
    algorithm = _algorithm(scheme)
    assert algorithm is not None
    arguments: Config = {"dynamic": False, "num_bits": scheme.weight.number.bits, "type": "float"}
    if algorithm != "FP8":
        arguments["group_size"] = GROUP
    inputs = {} if scheme.act is None else {"input_activations": dict(arguments)}
    return {
        "config_groups": {"group_0": inputs | {"weights": arguments, "targets": ["Linear"]}},
        "ignore": list(ignore),
        "quant_algo": algorithm,
        "producer": dict(PRODUCER),
        "quant_method": METHOD,
    }


def files(config: Config) -> dict[str, Config]:
    """The nested form of a flat one. vLLM wants every key of `quantization` that NVFP4 has here."""
    group_size = config["config_groups"]["group_0"]["weights"].get("group_size")
    cache = "FP8" if config.get("kv_cache_scheme") else None
    quantization = {"quant_algo": config["quant_algo"], "kv_cache_quant_algo": cache}
    if group_size is not None:
        quantization["group_size"] = group_size
    quantization["exclude_modules"] = list(config["ignore"])
    return {"hf_quant_config.json": {"producer": dict(config["producer"]), "quantization": quantization}}


def _with_cache(config: Config) -> Config:
    return config | {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}


def _kv_name(attention: str, letter: str) -> str:
    return f"{attention}.{letter}_proj.{letter}_scale"


KV_CACHE = KvCache(_kv_name, (), _with_cache)
INPUT_SCALE = InputScale("input_scale", lambda scale: scale)


def tp_multiple_fp8(scheme: Scheme) -> tuple[int, int]:
    return 1, 1


def tp_multiple_nvfp4(scheme: Scheme) -> tuple[int, int]:
    return 1, GROUP


FP8 = Layout(
    "modelopt-fp8",
    "checkpoint",
    METHOD,
    reject_fp8,
    spec_fp8,
    pack_fp8,
    unpack_fp8,
    config,
    tp_multiple_fp8,
    files=files,
    input_scale=INPUT_SCALE,
    kv_cache=KV_CACHE,
)
NVFP4 = Layout(
    "modelopt-nvfp4",
    "checkpoint",
    METHOD,
    reject_nvfp4,
    spec_nvfp4,
    pack_nvfp4,
    unpack_nvfp4,
    config,
    tp_multiple_nvfp4,
    files=files,
    input_scale=INPUT_SCALE,
    kv_cache=KV_CACHE,
)
