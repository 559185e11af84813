"""transformers' own FP8, `quant_method: fp8`: E4M3 in blocks of 128×128, as DeepSeek-V3 was published.

Per module:
    weight             float8_e4m3fn [N, K]
    weight_scale_inv   float32 [ceil(N/128), K/128], multiplicative in spite of its name; element (n, k) has scale
                       (n div 128, k div 128)
Read by transformers (FineGrainedFP8), vLLM and SGLang (Fp8Config). All three take names in full in
`modules_to_not_convert`: vLLM compares whole names, SGLang and transformers at the dots, so that `mlp.gate` does not
mean `mlp.gate_proj`. transformers reads a name as a regular expression, where a dot is any character.

Activations are scaled in groups of 128 columns of K, so that K is a multiple of 128. The last block of N may be a part
of one, as in DeepSeek's own checkpoints; but where transformers computes in 16 bits, it takes N / ceil(N/128) for the
height of a block: 96 for N = 192, and the weights would be wrong without a word. N = 576 it refuses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from quantpub.layouts.base import Config, Layout, Spec, Tensors
from quantpub.qtensor import QTensor
from quantpub.scheme import PRESETS, Scheme

SIDE = 128  # of a block
BLOCK = PRESETS["FP8_BLOCK"]


def reject(scheme: Scheme, n: int, k: int, dtype: str) -> str | None:
    if (scheme.weight, scheme.act) != (BLOCK.weight, BLOCK.act):
        return f"hf-fp8 holds FP8 weights in blocks of 128×128 with dynamic FP8 activations, not {scheme.name}"
    if k % SIDE:
        return f"in_features {k} is not a multiple of {SIDE}, the columns that share a scale of activations"
    blocks = -(-n // SIDE)
    if blocks > 1 and n % SIDE and n % blocks == 0:
        return f"transformers would read out_features {n} (in_features {k}) as {blocks} blocks of {n // blocks} rows"
    return None


def spec(scheme: Scheme, n: int, k: int, dtype: str) -> Spec:
    return {"weight": ("F8_E4M3", (n, k)), "weight_scale_inv": ("F32", scheme.weight.scale_shape(n, k))}


def pack(q: QTensor) -> Tensors:
    return {"weight": q.codes_NK, "weight_scale_inv": q.scale}


def unpack(tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    return QTensor(scheme, tensors["weight"], tensors["weight_scale_inv"])


def config(scheme: Scheme, ignore: Sequence[str]) -> Config:
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [SIDE, SIDE],
        "modules_to_not_convert": list(ignore),
    }


def tp_multiple(scheme: Scheme) -> tuple[int, int]:
    return SIDE, SIDE


LAYOUT = Layout("hf-fp8", "checkpoint", "fp8", reject, spec, pack, unpack, config, tp_multiple)
