"""What a model that vLLM has loaded tells of itself: the kernel of each layer, and parameters that nothing was loaded into.

Nothing is imported of vLLM: modules, methods and kernels are told by their classes' names and by where these are defined.
Read in vLLM 0.25.1 and 0.33.0: a layer has a `quant_method`, some have a `scheme`, and the kernel is an attribute of either,
or of what runs a layer's experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from quantpub.engines.vllm_rows import EXPERTS, LINEARS, row

DEEP = 4  # levels of attributes between a layer and its kernel
# what a checkpoint need not carry: vLLM registers it always, derives it, or has a value for it. A static scale of
# activations that is missing shows in the logits.
BUILT = ("input", "g_idx", "sort_indices", "chan_scale", "weight_shape", "azp")
# number formats of experts' weights, by what a method's name says
FORMATS = (
    *(("nvfp4", "NVFP4"), ("mxfp4", "MXFP4"), ("w4a8", None), ("fp8", "FP8"), ("w8a8int8", "INT8")),
    *(("na16", ""), ("gptq", ""), ("awq", "")),
)


def kernels(model: Any) -> tuple[dict[str, str], dict[str, int]]:
    """(module → class of its kernel, or of its method where no kernel is one; row of the kernel tables → modules)."""
    classes: dict[str, str] = {}
    rows: dict[str, int] = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is None or _of_no_gemm(module, method):
            continue
        kernel = kernel_of(getattr(module, "scheme", None), method)
        classes[name] = kernel or type(method).__name__
        if kernel and (named := _row(kernel, type(method).__name__)):
            rows[named] = rows.get(named, 0) + 1
    return classes, rows


def _of_no_gemm(module: Any, method: Any) -> bool:
    """A plain embedding, and an attention whose cache is not quantized: both have a method all the same."""
    name = type(method).__name__
    return name == "UnquantizedEmbeddingMethod" or (
        "KVCache" in name and getattr(module, "kv_cache_dtype", "auto") == "auto"
    )


def kernel_of(*roots: Any) -> str | None:
    """The kernel's class nearest to a layer's scheme or method among their attributes."""
    level = [root for root in roots if root is not None]
    for _ in range(DEEP):
        for thing in level:
            kind = thing if isinstance(thing, type) else type(thing)
            if _is_kernel(kind):
                return kind.__name__
        level = [value for thing in level for value in _inside(thing)]
    return None


def _is_kernel(kind: type) -> bool:
    name, module = kind.__name__, kind.__module__
    if name in LINEARS or name in EXPERTS:
        return True
    dense = module.startswith("vllm.model_executor.kernels.") and name.endswith("Kernel")
    return dense or (
        ".fused_moe." in module and module.startswith("vllm.") and "Experts" in name and "Config" not in name
    )


def _inside(thing: Any) -> Iterator[Any]:
    """Its attributes that are vLLM's own objects, and classes, but no modules."""
    values = () if isinstance(thing, type) else getattr(thing, "__dict__", {}).values()
    for value in values:
        kind = value if isinstance(value, type) else type(value)
        if kind.__module__.startswith("vllm.") and not hasattr(value, "named_modules"):
            yield value


def _row(kernel: str, method: str) -> str | None:
    if kernel in LINEARS:
        return row(kernel)
    if kernel not in EXPERTS or "Unquantized" in method:
        return None
    experts_of = next((named for word, named in FORMATS if word in method.lower()), None)
    return None if experts_of is None else row(kernel, experts_of)


def never_loaded(model: Any, loaded: Iterable[str]) -> list[str]:
    """Parameters that no tensor of the checkpoint was put in, but for those that none can be for."""
    there, missing = {_plain(name) for name in loaded}, []
    methods = {name: getattr(module, "quant_method", None) for name, module in model.named_modules()}
    for name, parameter in model.named_parameters():
        at, _, leaf = name.rpartition(".")
        method = methods.get(at)
        made = getattr(method, "uses_meta_device", False) or "KVCache" in type(method).__name__
        if _plain(name) not in there and not made and parameter.numel() and not any(word in leaf for word in BUILT):
            missing.append(name)
    return sorted(missing)


def _plain(name: str) -> str:
    """vLLM 0.25 loads experts by the name of their layer, and keeps them in a module of their own inside it."""
    return name.replace(".routed_experts.", ".")
