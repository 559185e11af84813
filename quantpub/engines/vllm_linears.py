"""How vLLM's own layers ask for a kernel, by checkpoint layout: the same call with the same configuration values.

Read in 0.25.1 and 0.33.0: compressed_tensors/schemes/*.py, auto_gptq.py, auto_awq.py, fp8.py, modelopt.py. A function takes
the ask and the hearing, and returns the class or an instance of the kernel that vLLM chose; it raises what vLLM raises.
K and N are those of one GPU: the whole weight's shape matters to vLLM only with activation order, which no layout has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from quantpub.engines.choice import Ask
from quantpub.engines.hearing import Hearing
from quantpub.scheme import WHOLE

KERNELS = "model_executor.kernels.linear"
QUANTIZATION = "model_executor.layers.quantization"
SCHEMES = f"{QUANTIZATION}.compressed_tensors.schemes"
Route = Callable[[Ask, Hearing], Any]


def vllm(path: str) -> Any:
    return import_module(f"vllm.{path}")


def call(function: Callable[..., Any], **arguments: Any) -> Any:
    """With those of the arguments that this version of the function knows."""
    known = inspect.signature(function).parameters
    return function(**{name: value for name, value in arguments.items() if name in known})


def bf16() -> Any:
    return import_module("torch").bfloat16


def capability() -> int | None:
    """As 90 for 9.0; None without a GPU."""
    found = vllm("platforms").current_platform.get_device_capability()
    return None if found is None else int(found[0] * 10 + found[1])


def candidates() -> Iterator[type]:
    """Every class on vLLM's lists of dense kernels, of all platforms."""
    for name, table in vars(vllm(KERNELS)).items():
        if name.startswith("_POSSIBLE_") and isinstance(table, dict):
            yield from (cls for classes in table.values() for cls in classes)


def require_capability(scheme_class: Any) -> None:
    """As vLLM's check of a compressed-tensors scheme, which refuses the checkpoint."""
    has, least = capability(), scheme_class.get_min_capability()
    if has is not None and has < least:
        raise Refusal(f"{scheme_class.__name__} asks for compute capability {least / 10}, this GPU has {has / 10}")


class Refusal(Exception):
    """vLLM would not load the layer, whatever the kernel."""


def weight_type(ask: Ask) -> Any:
    names = {
        ("int4", "none"): "uint4b8",
        ("int4", "int"): "uint4",
        ("int8", "none"): "uint8b128",
        ("int8", "int"): "uint8",
    }
    return getattr(vllm("scalar_type").scalar_types, names[ask.scheme.weight.num, ask.scheme.weight.zero_domain])


def ct_pack(ask: Ask, hearing: Hearing) -> Any:
    require_capability(vllm(SCHEMES).CompressedTensorsWNA16)
    return mixed_precision(ask)


def gptq(ask: Ask, hearing: Hearing) -> Any:
    """Its method refuses what Marlin has no code for, before any other kernel is asked."""
    vllm(f"{QUANTIZATION}.utils.marlin_utils").verify_marlin_supported(weight_type(ask), ask.scheme.group_size)
    return mixed_precision(ask)


def awq(ask: Ask, hearing: Hearing) -> Any:
    """What Marlin has no code for goes to AWQ's own kernels."""
    marlin, platform = vllm(f"{QUANTIZATION}.utils.marlin_utils"), vllm("platforms").current_platform
    if not platform.is_cpu() and not marlin.check_marlin_supported(weight_type(ask), ask.scheme.group_size, True):
        hearing.reject("MarlinLinearKernel", f"no code for groups of {ask.scheme.group_size}")
        return vllm(f"{QUANTIZATION}.auto_awq").AutoAWQLinearMethod
    return mixed_precision(ask)


def mixed_precision(ask: Ask) -> Any:
    linear, shape = vllm(KERNELS), (ask.k, ask.n)
    config = call(
        linear.MPLinearLayerConfig,
        full_weight_shape=shape,
        partition_weight_shape=shape,
        weight_type=weight_type(ask),
        act_type=bf16(),
        group_size=ask.scheme.group_size,
        zero_points=ask.scheme.weight.zero_domain != "none",
        has_g_idx=False,
    )
    return linear.choose_mp_linear_kernel(config)


def ct_int(ask: Ask, hearing: Hearing) -> Any:
    act = ask.scheme.act
    assert act is not None, "ct-int holds no weight-only scheme"
    require_capability(vllm(SCHEMES).CompressedTensorsW8A8Int8)
    return call(
        vllm(KERNELS).init_int8_linear_kernel,
        is_channelwise=ask.scheme.weight.block == (1, WHOLE),
        is_static_input_scheme=not act.dynamic,
        input_symmetric=True,
        module_name="CompressedTensorsW8A8Int8",
        is_fused_module=ask.members > 1,
    )


def fp8_keys(ask: Ask) -> dict[str, Any]:
    """weight_quant_key and activation_quant_key, as the methods of FP8 checkpoints make them."""
    act, (rows, columns) = ask.scheme.act, ask.scheme.weight.block
    assert act is not None, "no layout holds weight-only FP8"
    utils = vllm(f"{QUANTIZATION}.utils.quant_utils")
    if rows not in (1, WHOLE):
        shape = utils.GroupShape
        weight = utils.create_fp8_quant_key(static=True, group_shape=shape(rows, columns))
        return {
            "weight_quant_key": weight,
            "activation_quant_key": utils.create_fp8_quant_key(static=False, group_shape=shape(1, rows)),
        }
    weight = utils.kFp8StaticChannelSym if rows == 1 else utils.kFp8StaticTensorSym
    return {
        "weight_quant_key": weight,
        "activation_quant_key": utils.kFp8DynamicTokenSym if act.dynamic else utils.kFp8StaticTensorSym,
    }


def ct_float(ask: Ask, hearing: Hearing) -> Any:
    """Below the compute capability of its FP8 scheme, vLLM takes the weight-only one."""
    least, has = vllm(SCHEMES).CompressedTensorsW8A8Fp8.get_min_capability(), capability()
    if has is None or has >= least:
        return fp8(ask, hearing)
    hearing.reject("CompressedTensorsW8A8Fp8", f"it asks for compute capability {least / 10}, this GPU has {has / 10}")
    return _fp8(ask, vllm(KERNELS).init_wfp8_a16_linear_kernel)


def fp8(ask: Ask, hearing: Hearing) -> Any:
    return _fp8(ask, vllm(KERNELS).init_fp8_linear_kernel)


def _fp8(ask: Ask, choose: Callable[..., Any]) -> Any:
    return call(choose, **fp8_keys(ask), input_dtype=bf16(), out_dtype=bf16(), weight_shape=(ask.n, ask.k))


def modelopt_fp8(ask: Ask, hearing: Hearing) -> Any:
    require_capability(vllm(f"{QUANTIZATION}.modelopt").ModelOptFp8Config)
    return fp8(ask, hearing)


def ct_nvfp4(ask: Ask, hearing: Hearing) -> Any:
    """The scheme's class chooses when it is made."""
    scheme_class = vllm(SCHEMES).CompressedTensorsW4A4Fp4
    require_capability(scheme_class)
    return scheme_class(use_a16=ask.scheme.act is None).kernel


def ct_mxfp4(ask: Ask, hearing: Hearing) -> Any:
    scheme_class = vllm(SCHEMES).CompressedTensorsW4A4Mxfp4
    require_capability(scheme_class)
    return scheme_class().kernel


def modelopt_nvfp4(ask: Ask, hearing: Hearing) -> Any:
    """0.25.1 has a method of its own for weight-only NVFP4, with one kernel; 0.33.0 asks as compressed-tensors does."""
    modelopt, choose = vllm(f"{QUANTIZATION}.modelopt"), vllm(KERNELS).init_nvfp4_linear_kernel
    require_capability(modelopt.ModelOptNvFp4Config)
    pinned = getattr(modelopt, "ModelOptNvFp4W4A16LinearMethod", None)
    if ask.scheme.act is None and pinned is not None:
        return pinned(None).kernel
    return call(choose, use_a16=ask.scheme.act is None)


ROUTES: dict[str, Route] = {
    "ct-pack": ct_pack,
    "gptq": gptq,
    "gptq-v2": gptq,
    "awq": awq,
    "ct-int": ct_int,
    "ct-float": ct_float,
    "hf-fp8": fp8,
    "modelopt-fp8": modelopt_fp8,
    "modelopt-fp8-channel": modelopt_fp8,
    "modelopt-fp8-block": modelopt_fp8,
    "ct-nvfp4": ct_nvfp4,
    "ct-mxfp4": ct_mxfp4,
    "modelopt-nvfp4": modelopt_nvfp4,
}
