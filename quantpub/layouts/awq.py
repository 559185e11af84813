"""AWQ `gemm`: int4 codes with integer zeros in interleaved int32 words along N, for vLLM, SGLang and GPTQModel.

Legend: g columns a group, G groups. Codes and zeros are stored unsigned, as value + 8. Per module:
    qweight   int32 [K, N/8]   the nibbles of word v, from the lowest, hold columns 8v + 0, 2, 4, 6, 1, 3, 5, 7
    qzeros    int32 [G, N/8]   the same interleave
    scales    model dtype [G, N]
The codes 0 … 7 make the word 0x75316420. A symmetric scheme has the zero 8 everywhere; engines' AWQ kernels know no other
way to say it. Scales stay in the model's dtype: vLLM and GPTQModel read fp16 and bf16; AWQ's own CUDA kernels are fp16
only, and there a bf16 scale is exact in fp16 from 2^-17 up. Source: AutoAWQ's WQLinear_GEMM, GPTQModel's packing_utils.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from quantpub.layouts.base import Config, Cut, Layout, Spec, Tensors, reject_integers, reject_rest
from quantpub.layouts.gptq_words import NOT_MIDDLE
from quantpub.qtensor import QTensor
from quantpub.scheme import WHOLE, Scheme

METHOD = "awq"
WORD = 8  # int4 codes in an int32
GROUPS = (WHOLE, 32, 64, 128)  # vLLM's fast kernels; others fall back to AWQ's own, which is fp16 only
DTYPES = ("BF16", "F16")
KINDS = {("int4", "none"), ("int4", "int")}


def reject(scheme: Scheme, n: int, k: int, dtype: str) -> str | None:
    if reason := reject_integers("awq", scheme, dtype, KINDS, DTYPES, GROUPS):
        return reason
    if n % WORD:
        return f"out_features of [{n}, {k}] is not a multiple of {WORD}, the codes of one packed word"
    return reject_rest(k, scheme.group_size)


def spec(scheme: Scheme, n: int, k: int, dtype: str) -> Spec:
    groups = scheme.weight.scale_shape(n, k)[1]
    return {
        "qweight": ("I32", (k, n // WORD)),
        "qzeros": ("I32", (groups, n // WORD)),
        "scales": (dtype, (groups, n)),
    }


def pack_interleaved(codes_NR: torch.Tensor) -> torch.Tensor:
    """int8 codes −8…7 [N, R], N a multiple of 8 → int32 [R, N/8]: eight rows are folded, then words are transposed."""
    n, rows = codes_NR.shape
    x = (codes_NR + 8).view(n // WORD, WORD, rows)
    halves = [x[:, low] | (x[:, high] << 4) for low, high in ((0, 2), (4, 6), (1, 3), (5, 7))]
    return torch.stack(halves, -1).view(torch.int32).view(n // WORD, rows).T.contiguous()


def unpack_interleaved(words_RW: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_interleaved`: int32 [R, N/8] → int8 [N, R]."""
    rows, words = words_RW.shape
    x = words_RW.T.contiguous().view(-1).view(torch.int8).view(words, rows, 4)
    low, high = x & 0xF, (x >> 4) & 0xF
    columns = [half[..., byte] for first in (0, 1) for half in (low, high) for byte in (first, first + 2)]
    return torch.stack(columns, 1).view(words * WORD, rows) - 8


def pack(q: QTensor) -> Tensors:
    zero_NG = torch.zeros_like(q.scale, dtype=torch.int8) if q.zero is None else q.zero
    return {
        "qweight": pack_interleaved(q.codes_NK),
        "qzeros": pack_interleaved(zero_NG),
        "scales": q.scale.T.contiguous(),
    }


def unpack(tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    codes_NK, scale_NG = unpack_interleaved(tensors["qweight"]), tensors["scales"].T.contiguous()
    if scheme.weight.zero_domain == "none":
        return QTensor(scheme, codes_NK, scale_NG)
    return QTensor(scheme, codes_NK, scale_NG, unpack_interleaved(tensors["qzeros"]))


def ambiguous(tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> str | None:
    symmetric = scheme.weight.zero_domain == "none"
    return NOT_MIDDLE if symmetric and bool(unpack_interleaved(tensors["qzeros"]).any()) else None


def config(scheme: Scheme, ignore: Sequence[str]) -> Config:
    """`modules_to_not_convert`: vLLM takes an entry for part of a name, so a full name must not begin a quantized one."""
    return {
        "quant_method": METHOD,
        "bits": 4,
        "group_size": scheme.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(ignore),
    }


def tp_multiple(scheme: Scheme) -> tuple[int, int]:
    return WORD, 1 if scheme.group_size == WHOLE else scheme.group_size


def cut(scheme: Scheme) -> Cut:
    return Cut(WORD, {"qweight": (1, WORD), "qzeros": (1, WORD), "scales": (1, 1)})


LAYOUT = Layout(
    "awq", "checkpoint", METHOD, reject, spec, pack, unpack, config, tp_multiple, ambiguous=ambiguous, cut=cut
)
