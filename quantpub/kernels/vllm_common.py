"""What the kernels of vLLM share: whether this machine has them, and integer checkpoints as vLLM's loader sees them.

Legend: N, K as ever; G groups of a row; b bits; W = 32 / b codes an int32 word. Every integer layout comes down to
    words    int32 [K/W, N]   the codes of a column from the lowest bits up, stored as code + 2^(b−1)
    scales   bf16 [G, N]
    zeros    int32 [G, N]     unsigned, or None
ct-pack is that transposed, GPTQ is that; AWQ interleaves columns, and is undone and packed anew as vLLM does on loading.
Nothing of vLLM is imported before it is used. What differs between its versions is asked of the functions' signatures.
Source: vLLM's compressed_tensors_wNa16.py, auto_awq.py and kernels/linear/mixed_precision.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import torch

from quantpub.hardware import misfit
from quantpub.kernels.base import Weight
from quantpub.scheme import Scheme

Capability = tuple[int, int]
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble that holds column j of eight
WTYPES = {(4, False): "uint4b8", (4, True): "uint4", (8, False): "uint8b128", (8, True): "uint8"}


@cache
def vllm(path: str) -> Any:
    """A module of vLLM, imported when it is first used."""
    return importlib.import_module(f"vllm.{path}")


def ops() -> Any:
    return vllm("_custom_ops")


def utils(name: str) -> Any:
    return vllm(f"model_executor.layers.quantization.utils.{name}")


def wtype(bits: int, zeros: bool) -> Any:
    """vLLM's name of a packed number format."""
    return getattr(vllm("scalar_type").scalar_types, WTYPES[bits, zeros])


@cache
def takes(function: Callable[..., Any], parameter: str) -> bool:
    return parameter in inspect.signature(function).parameters


def absent(package: str, title: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"{title} is not installed in this Python"


def incapable(low: Capability, below: Capability | None = None) -> str | None:
    """Why the GPU here has no code of a kernel for compute capabilities from `low` on and below `below`, or None."""
    if not torch.cuda.is_available():
        return "it needs a CUDA GPU, and PyTorch sees none here"
    found = torch.cuda.get_device_capability()
    if found < low:
        return f"it needs compute capability {low[0]}.{low[1]}, this is {found[0]}.{found[1]}"
    if below is not None and found >= below:
        return f"it has code for compute capabilities below {below[0]}.{below[1]}, this is {found[0]}.{found[1]}"
    return None


def unavailable(op: str, low: Capability, below: Capability | None = None) -> str | None:
    """Why vLLM's `op` cannot run here, or None."""
    return absent("vllm", "vLLM") or incapable(low, below) or _unbuilt(op)


def _unbuilt(op: str) -> str | None:
    try:
        ops()
    except Exception as error:  # whatever a package that does not fit this machine says
        said = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return f"vLLM cannot be imported: {said:.200}"
    return None if hasattr(torch.ops._C, op) else f"this vLLM was built without {op}"


def misfits(row: str, scheme: Scheme, n: int, k: int) -> str | None:
    """Why a kernel, named as in the kernel tables, does not take the shape as it is; vLLM would pad or look elsewhere."""
    found = misfit(row, n, k, scheme.group_size, "vllm", "0.25.1")
    if found:
        return f"{found.reason}; {found.effect}"
    if scheme.group_size > 0 and k % scheme.group_size:
        return f"in_features {k} is not a multiple of the group size {scheme.group_size}"
    return None


def refuse_integers(row: str, kinds: Collection[tuple[str, str]], scheme: Scheme, n: int, k: int) -> str | None:
    """What Marlin and Machete refuse. kinds: the numbers and zero domains they have code for."""
    weight = scheme.weight
    if (weight.num, weight.zero_domain) not in kinds or weight.block[0] != 1 or scheme.act is not None:
        return f"it multiplies int4 or int8 weights with whole zeros or none by 16-bit activations, not {scheme.name}"
    return misfits(row, scheme, n, k)


def fields(words_RW: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """int32 [R, C·bits/32] → int32 [R, C], unsigned. order: which field of a word holds column j of its own."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words_RW.device)
    found = (words_RW.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return (found if order is None else found[..., list(order)]).flatten(1)


def join(fields_RC: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `fields`: unsigned int32 [R, C] → int32 [R, C·bits/32]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=fields_RC.device)
    words_RW: torch.Tensor = (fields_RC.unflatten(1, (-1, 32 // bits)) << shifts).sum(-1, dtype=torch.int32)
    return words_RW


def words_KN(weight: Weight) -> torch.Tensor:
    """int32 [K/W, N], of any strides."""
    if weight.layout == "awq":
        return join(fields(weight.packed["qweight"], 4, AWQ_ORDER).t(), 4).t()
    return weight.packed["qweight"] if weight.layout == "gptq" else weight.packed["weight_packed"].t()


def scales_GN(weight: Weight) -> torch.Tensor:
    """bf16 [G, N], as the activations are: the scales of an fp16 model are rounded."""
    scale = weight.packed["weight_scale"].t() if weight.layout == "ct-pack" else weight.packed["scales"]
    return scale.to(torch.bfloat16).contiguous()


def zeros_GN(weight: Weight) -> torch.Tensor | None:
    """int32 [G, N], unsigned. AWQ always has them; GPTQ version 1 is read as symmetric."""
    if weight.layout == "awq":
        return fields(weight.packed["qzeros"], 4, AWQ_ORDER)
    if "weight_zero_point" not in weight.packed:
        return None
    bits, n = weight.q.scheme.weight.number.bits, weight.q.shape[0]
    return fields(weight.packed["weight_zero_point"].t().contiguous(), bits)[:, :n].contiguous()
