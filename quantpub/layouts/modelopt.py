"""ModelOpt's checkpoints, `quant_method: modelopt`: FP8 with a scale a tensor, a row or a block, and NVFP4.

Per module, in FP8:
    weight           float8_e4m3fn [N, K]
    weight_scale     float32 ()           multiplier
    input_scale      float32 ()           multiplier of FP8 activations, calibrated
in FP8_PER_CHANNEL_PER_TOKEN, where activations are scaled at run time, a token at once:
    weight           float8_e4m3fn [N, K]
    weight_scale     [N]                  multiplier: ModelOpt writes float32; a bf16 or fp16 one is stored as it is, which
                                          engines widen when they load it
in FP8_PB_WO, which ModelOpt calls weight-only and writes in small letters; engines scale activations at run time, in groups
of 128 columns, as for any FP8 in blocks:
    weight           float8_e4m3fn [N, K]
    weight_scale     float32 [N/128, 1, K/128, 1]      multiplier; ModelOpt writes () for a weight of one block
in NVFP4, and in W4A16_NVFP4 without the last:
    weight           uint8 [N, K/2]       element k in the low (k even) or high (k odd) half of byte k/2; sign in bit 3
    weight_scale     float8_e4m3fn [N, K/16], row-major
    weight_scale_2   float32 ()           multiplier of the whole tensor
    input_scale      float32 ()           multiplier of FP4 activations, calibrated

Of FP8 a row or a block ModelOpt states no `config_groups`, only the algorithm.

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

from quantpub.layouts.base import Config, Cut, InputScale, KvCache, Layout, Spec, Tensors
from quantpub.layouts.words import pack_nibbles, unpack_nibbles
from quantpub.qtensor import QTensor
from quantpub.scheme import PRESETS, WHOLE, Scheme

METHOD = "modelopt"
PRODUCER = {"name": "modelopt", "version": "0.47.0"}
CHANNEL_ALGORITHM, BLOCK_ALGORITHM = "FP8_PER_CHANNEL_PER_TOKEN", "fp8_pb_wo"
ALGORITHMS = {  # scheme → quant_algo
    "FP8": "FP8",
    "FP8_DYNAMIC": CHANNEL_ALGORITHM,
    "FP8_BLOCK": BLOCK_ALGORITHM,
    "NVFP4": "NVFP4",
    "NVFP4A16": "W4A16_NVFP4",
}
GROUPED = ("FP8", "NVFP4", "W4A16_NVFP4")  # of which the flat configuration states groups
GROUP = 16  # NVFP4's
SIDE = 128  # of a block of FP8


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


def reject_channel(scheme: Scheme, n: int, k: int, dtype: str) -> str | None:
    if _algorithm(_grouped(_in_model_dtype(scheme), WHOLE)) != CHANNEL_ALGORITHM:
        return (
            f"modelopt-fp8-channel holds FP8 weights with a scale a row and dynamic FP8 activations, not {scheme.name}"
        )
    if scheme.group_size != WHOLE:
        return (
            f"modelopt-fp8-channel holds FP8 weights with a scale a row, not one for every {scheme.group_size} columns"
        )
    return None


def reject_block(scheme: Scheme, n: int, k: int, dtype: str) -> str | None:
    if _algorithm(_grouped(scheme, SIDE)) != BLOCK_ALGORITHM or scheme.group_size != SIDE:
        return f"modelopt-fp8-block holds FP8 weights in blocks of {SIDE}×{SIDE}, not {scheme.name}"
    for side, length in (("out_features", n), ("in_features", k)):
        if length % SIDE:
            return f"{side} {length} is not a multiple of {SIDE}: vLLM 0.25.1 refuses a part of a block"
    return None


def _in_model_dtype(scheme: Scheme) -> Scheme:
    """The same with a scale of the model's dtype, where it has a float32 one."""
    plain = scheme.weight.scale_dtype == "float32"
    return replace(scheme, weight=replace(scheme.weight, scale_dtype="model")) if plain else scheme


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


def spec_channel(scheme: Scheme, n: int, k: int, dtype: str) -> Spec:
    stored = dtype if scheme.weight.scale_dtype == "model" else "F32"
    return {"weight": ("F8_E4M3", (n, k)), "weight_scale": (stored, (n,))}


def spec_block(scheme: Scheme, n: int, k: int, dtype: str) -> Spec:
    rows, columns = n // SIDE, k // SIDE
    return {"weight": ("F8_E4M3", (n, k)), "weight_scale": ("F32", (rows, 1, columns, 1))}


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


def pack_channel(q: QTensor) -> Tensors:
    return {"weight": q.codes_NK, "weight_scale": q.scale.reshape(-1)}


def pack_block(q: QTensor) -> Tensors:
    return {"weight": q.codes_NK, "weight_scale": q.scale[:, None, :, None]}


def pack_nvfp4(q: QTensor) -> Tensors:
    assert q.global_scale is not None
    assert (q.input_scale is None) == (q.scheme.act is None), "activations have a calibrated scale, 16-bit ones none"
    weight = {"weight": pack_nibbles(q.codes_NK), "weight_scale": q.scale, "weight_scale_2": q.global_scale}
    return weight if q.input_scale is None else weight | {"input_scale": q.input_scale}


def unpack_fp8(tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    scale = tensors["weight_scale"].reshape(1, 1)
    return QTensor(scheme, tensors["weight"], scale, input_scale=tensors["input_scale"])


def unpack_channel(tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    return QTensor(scheme, tensors["weight"], tensors["weight_scale"].reshape(-1, 1))


def unpack_block(tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    return QTensor(scheme, tensors["weight"], tensors["weight_scale"].reshape(scheme.weight.scale_shape(*shape)))


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
    algorithm = _algorithm(_in_model_dtype(scheme)) or _algorithm(scheme)
    assert algorithm is not None
    stated: Config = {
        "ignore": list(ignore),
        "quant_algo": algorithm,
        "producer": dict(PRODUCER),
        "quant_method": METHOD,
    }
    return {"config_groups": {"group_0": _group(scheme)}} | stated if algorithm in GROUPED else stated


def _group(scheme: Scheme) -> Config:
    arguments: Config = {"dynamic": False, "num_bits": scheme.weight.number.bits, "type": "float"}
    if scheme.weight.num == "fp4_e2m1":
        arguments["group_size"] = GROUP
    inputs = {} if scheme.act is None else {"input_activations": dict(arguments)}
    return inputs | {"weights": arguments, "targets": ["Linear"]}


def files(config: Config) -> dict[str, Config]:
    """The nested form of a flat one. vLLM wants every key of `quantization` that NVFP4 has here."""
    groups = config.get("config_groups", {})
    group_size = groups["group_0"]["weights"].get("group_size") if groups else None
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


def tp_multiple_block(scheme: Scheme) -> tuple[int, int]:
    return SIDE, SIDE


def tp_multiple_nvfp4(scheme: Scheme) -> tuple[int, int]:
    return 1, GROUP


def cut_nvfp4(scheme: Scheme) -> Cut:
    return Cut(1, {"weight": (0, 1), "weight_scale": (0, 1)})


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
CHANNEL = Layout(
    "modelopt-fp8-channel",
    "checkpoint",
    METHOD,
    reject_channel,
    spec_channel,
    pack_channel,
    unpack_channel,
    config,
    tp_multiple_fp8,
    files=files,
    kv_cache=KV_CACHE,
)
BLOCK = Layout(
    "modelopt-fp8-block",
    "checkpoint",
    METHOD,
    reject_block,
    spec_block,
    pack_block,
    unpack_block,
    config,
    tp_multiple_block,
    files=files,
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
    cut=cut_nvfp4,
)
