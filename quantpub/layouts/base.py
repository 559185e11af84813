"""What a layout is, and the compressed-tensors configuration that several of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantpub.qtensor import QTensor
from quantpub.scheme import WHOLE, Scheme

Spec = dict[str, tuple[str, tuple[int, ...]]]  # suffix → (safetensors dtype, shape)
Tensors = dict[str, torch.Tensor]  # suffix → tensor


@dataclass(frozen=True)
class Layout:
    """name; kind: `checkpoint` (an engine loads it) or `kernel` (a kernel eats it).

    reject(scheme, n, k) → why this weight cannot be written so, or None: reject or exact, never neither.
    spec(scheme, n, k, dtype) → what `pack` makes of a weight of that dtype, known before any weight is read.
    pack(q) → tensors by suffix; unpack(tensors, scheme) → the same QTensor, bit for bit.
    config(scheme, ignore) → `quantization_config` of config.json. metadata: safetensors header entries of every shard.
    tp_multiple(scheme) → (n, k): a tensor-parallel shard's sides must be multiples of these.
    """

    name: str
    kind: str
    reject: Callable[[Scheme, int, int], str | None]
    spec: Callable[[Scheme, int, int, str], Spec]
    pack: Callable[[QTensor], Tensors]
    unpack: Callable[[Mapping[str, torch.Tensor], Scheme], QTensor]
    config: Callable[[Scheme, Sequence[str]], dict[str, Any]]
    tp_multiple: Callable[[Scheme], tuple[int, int]]
    metadata: Mapping[str, str]


def ct_arguments(num_bits: int, kind: str, strategy: str, dynamic: bool, group_size: int = WHOLE) -> dict[str, Any]:
    """QuantizationArgs with the keys that compressed-tensors 0.17 parses; one more would refuse the checkpoint."""
    arguments: dict[str, Any] = {"num_bits": num_bits, "type": kind, "symmetric": True, "strategy": strategy}
    if group_size != WHOLE:
        arguments["group_size"] = group_size
    return arguments | {"dynamic": dynamic}


def ct_config(
    form: str, weights: dict[str, Any], inputs: dict[str, Any] | None, ignore: Sequence[str]
) -> dict[str, Any]:
    """One group for every Linear. `ignore` names each unquantized Linear in full: SGLang refuses one that nothing names."""
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": form,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
