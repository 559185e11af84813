"""How vLLM's MoE methods ask for the experts' kernel, by checkpoint layout: one answer for both GEMMs of a layer.

Read in 0.25.1 and 0.33.0: compressed_tensors_moe/*.py, fused_moe/oracle/*.py, fp8.py, modelopt.py, auto_gptq.py, auto_awq.py.
The layer is taken to be gated SiLU with softmax routing over renormalized top-k, without bias, shared experts or expert
parallelism. A route returns the class that was chosen, or its name where a method has no choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from quantpub.engines.choice import Ask
from quantpub.engines.hearing import Hearing
from quantpub.engines.vllm_linears import QUANTIZATION, call, fp8_keys, vllm, weight_type
from quantpub.scheme import WHOLE

FUSED = "model_executor.layers.fused_moe"
METHODS = f"{QUANTIZATION}.compressed_tensors.compressed_tensors_moe"
Route = Callable[[Ask, Hearing], Any]


def layer_config(ask: Ask) -> Any:
    """FusedMoEConfig of the layer."""
    config, engine = vllm(f"{FUSED}.config"), vllm("config").get_current_vllm_config()
    hidden, width = ask.expert_sides
    return call(
        config.FusedMoEConfig,
        num_experts=ask.experts,
        experts_per_token=max(1, ask.top_k),
        hidden_dim=hidden,
        intermediate_size=width * ask.tp,
        num_local_experts=ask.experts,
        num_logical_experts=ask.experts,
        activation=vllm(f"{FUSED}.activation").MoEActivation.SILU,
        device=engine.device_config.device,
        routing_method=config.RoutingMethodType.Renormalize,
        moe_parallel_config=replace(config.FusedMoEParallelConfig.make_no_parallel(), tp_size=ask.tp),
        in_dtype=engine.model_config.dtype,
        moe_backend=engine.kernel_config.moe_backend,
    )


def oracle(name: str, hearing: Hearing) -> Any:
    """The module that chooses. Classes are made known to it backend by backend: so they are overheard from then on."""
    module = vllm(f"{FUSED}.oracle.{name}")
    hearing.after(module, "backend_to_kernel_cls", lambda classes, backend: hearing.listen(classes))
    hearing.after(
        module, "_backend_incompatibility_reason", lambda reason, backend, *rest: _note(hearing, backend, reason)
    )
    return module


def _note(hearing: Hearing, backend: Any, reason: str | None) -> None:
    if reason is not None:
        hearing.reject(str(backend.value), reason)


def marlin_takes(ask: Ask, hearing: Hearing, moe: Any) -> bool:
    """0.25.1 asks Marlin about the layer before it asks its oracle; 0.33.0 leaves that to the oracle."""
    utils = vllm(f"{QUANTIZATION}.utils.marlin_utils")
    check = getattr(utils, "check_moe_marlin_supports_layer", None)
    if check is None:
        return True
    hidden, width = ask.expert_sides
    layer = SimpleNamespace(
        hidden_size=hidden,
        intermediate_size_per_partition=width,
        moe_config=moe,
        apply_router_weight_on_input=False,
    )
    if call(check, layer=layer, group_size=ask.scheme.group_size, allow_tile_padding=True):
        return True
    hearing.reject(
        "MarlinExperts", f"not for a hidden size of {hidden}, experts {width} wide, groups of {ask.scheme.group_size}"
    )
    return False


def integer_key(ask: Ask) -> Any:
    utils = vllm(f"{QUANTIZATION}.utils.quant_utils")
    if ask.scheme.weight.num == "int8":
        scale = utils.kInt8StaticGroupScale
    else:
        scale = utils.kInt4Static32GroupScale if ask.scheme.group_size == 32 else utils.kInt4StaticGroupScale
    return utils.QuantKey(weight_type(ask), scale, symmetric=ask.scheme.weight.zero_domain == "none")


def ct_pack(ask: Ask, hearing: Hearing) -> Any:
    return integer(ask, hearing, integer_key(ask), "CompressedTensorsWNA16MoEMethod", ct_arguments, False)


def gptq(ask: Ask, hearing: Hearing) -> Any:
    utils = vllm(f"{QUANTIZATION}.utils.quant_utils")
    scale = utils.kInt4StaticGroupScale if ask.scheme.weight.num == "int4" else utils.kInt8StaticGroupScale
    return integer(ask, hearing, utils.QuantKey(weight_type(ask), scale), "MoeWNA16Method", gptq_config, True)


def awq(ask: Ask, hearing: Hearing) -> Any:
    key = vllm(f"{QUANTIZATION}.utils.quant_utils").kInt4Static
    return integer(ask, hearing, key, "MoeWNA16Method", awq_config, True)


def integer(ask: Ask, hearing: Hearing, key: Any, other: str, stated: Callable[[Ask], Any], bias: bool) -> Any:
    """other: the method that vLLM falls back to. stated: what the checkpoint says of itself, for versions that ask for it."""
    moe, module = layer_config(ask), oracle("int_wna16", hearing)
    if not marlin_takes(ask, hearing, moe):
        return other
    return call(
        module.select_wna16_moe_backend,
        config=moe,
        weight_key=key,
        quant_config=stated(ask),
        may_have_zp=ask.scheme.weight.zero_domain != "none",
        may_have_bias=bias,
        allow_tile_padding=True,
    )[1]


def ct_arguments(ask: Ask) -> Any:
    whole = ask.scheme.group_size == WHOLE
    return import_module("compressed_tensors.quantization").QuantizationArgs(
        num_bits=ask.scheme.weight.number.bits,
        type="int",
        symmetric=ask.scheme.weight.zero_domain == "none",
        strategy="channel" if whole else "group",
        group_size=None if whole else ask.scheme.group_size,
        dynamic=False,
    )


def gptq_config(ask: Ask) -> Any:
    stated = {
        "bits": ask.scheme.weight.number.bits,
        "group_size": ask.scheme.group_size,
        "desc_act": False,
        "sym": True,
    }
    return vllm(f"{QUANTIZATION}.auto_gptq").AutoGPTQConfig.from_config(stated)


def awq_config(ask: Ask) -> Any:
    stated = {"bits": ask.scheme.weight.number.bits, "group_size": ask.scheme.group_size, "zero_point": True}
    return vllm(f"{QUANTIZATION}.auto_awq").AutoAWQConfig.from_config(stated)


def ct_int(ask: Ask, hearing: Hearing) -> Any:
    utils, module = vllm(f"{QUANTIZATION}.utils.quant_utils"), oracle("int8", hearing)
    keys = {"weight_key": utils.kInt8StaticChannelSym, "activation_key": utils.kInt8DynamicTokenSym}
    return call(module.select_int8_moe_backend, config=layer_config(ask), **keys)[1]


def ct_float(ask: Ask, hearing: Hearing) -> Any:
    return _fp8(ask, hearing, allow_vllm_cutlass=True)


def fp8(ask: Ask, hearing: Hearing) -> Any:
    return _fp8(ask, hearing, allow_vllm_cutlass=False)


def _fp8(ask: Ask, hearing: Hearing, allow_vllm_cutlass: bool) -> Any:
    keys, module = fp8_keys(ask), oracle("fp8", hearing)
    return call(
        module.select_fp8_moe_backend,
        config=layer_config(ask),
        weight_key=keys["weight_quant_key"],
        activation_key=keys["activation_quant_key"],
        allow_vllm_cutlass=allow_vllm_cutlass,
    )[1]


def nvfp4(ask: Ask, hearing: Hearing) -> Any:
    utils, module = vllm(f"{QUANTIZATION}.utils.quant_utils"), oracle("nvfp4", hearing)
    act = None if ask.scheme.act is None else utils.kNvfp4Dynamic
    return call(
        module.select_nvfp4_moe_backend, config=layer_config(ask), weight_key=utils.kNvfp4Static, activation_key=act
    )[1]


def ct_mxfp4(ask: Ask, hearing: Hearing) -> Any:
    """The method chooses when it is made, between two classes and without an oracle."""
    method = vllm(f"{METHODS}.compressed_tensors_moe_w4a4_mxfp4").CompressedTensorsW4A4Mxfp4MoEMethod
    return method(layer_config(ask)).experts_cls


# layout → its route, and the number format in its row's name
ROUTES: dict[str, tuple[Route, str]] = {
    "ct-pack": (ct_pack, ""),
    "gptq": (gptq, ""),
    "gptq-v2": (gptq, ""),
    "awq": (awq, ""),
    "ct-int": (ct_int, "INT8"),
    "ct-float": (ct_float, "FP8"),
    "hf-fp8": (fp8, "FP8"),
    "modelopt-fp8": (fp8, "FP8"),
    "ct-nvfp4": (nvfp4, "NVFP4"),
    "modelopt-nvfp4": (nvfp4, "NVFP4"),
    "ct-mxfp4": (ct_mxfp4, "MXFP4"),
}
