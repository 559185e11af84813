"""Machete's operands, as vLLM's machete_mm eats them on Hopper: codes in the order in which wgmma's threads hold them.

No engine loads these from disk. vLLM makes them when it loads ct-pack, gptq or awq, with machete_prepack_B; the words here
are equal to its, in the order of memory.

Legend: b bits, W = 32 / b codes a word, g columns a group, G groups. Codes are stored as value + 2^(b−1).
    b_q             int32 [K/W, N]      words in the order of memory: blocks of 128 × 64 (N × K), those along N first; in
                                        a block row 64w + 16u + 8v + x, column 16m + 8y + 2z + e are with thread
                                        128w + 32u + 4x + z, its word m, nibble 4e + 2y + v (int4); or word 2m + y,
                                        byte 2v + e (int8)
    b_group_scales  A's dtype [G, N]    (the kernel's, too, where a whole row shares a scale)
    b_group_zeros   A's dtype [G, N]    with zeros only: −scale · (zero + 2^(b−1)), rounded once
    zero            int8 [G, N]         with zeros only, for the way back: a product does not say its factors
Source: vLLM's csrc/quantization/machete (machete_prepacked_layout.cuh) and its MacheteLinearKernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from quantpub.layouts.base import Config, Layout, Spec, Tensors, reject_integers, reject_rest
from quantpub.layouts.words import pack_bytes, pack_words, unpack_bytes, unpack_words
from quantpub.qtensor import QTensor
from quantpub.scheme import WHOLE, Scheme

GROUPS = (WHOLE, 64, 128)
DTYPES = ("BF16", "F16")
BLOCK_N, BLOCK_K = 128, 64
Words = Callable[[torch.Tensor], torch.Tensor]
PACK: dict[int, Words] = {4: pack_words, 8: pack_bytes}
UNPACK: dict[int, Words] = {4: unpack_words, 8: unpack_bytes}
# The axes of codes [N, K] seen as [N/128, w2, u4, v2, x8, K/64, m4, y2, z4, e2], in the order in which they are stored
ORDER = {4: (5, 0, 1, 2, 4, 8, 6, 9, 7, 3), 8: (5, 0, 1, 2, 4, 8, 6, 7, 3, 9)}
KINDS = {(num, zero) for num in ("int4", "int8") for zero in ("none", "int")}


def reject(scheme: Scheme, n: int, k: int, dtype: str) -> str | None:
    if reason := reject_integers("machete", scheme, dtype, KINDS, DTYPES, GROUPS):
        return reason
    if n % BLOCK_N or k % BLOCK_K:
        return f"shape [{n}, {k}] is not made of Machete's blocks of {BLOCK_N}×{BLOCK_K}"
    return reject_rest(k, scheme.group_size)


def spec(scheme: Scheme, n: int, k: int, dtype: str) -> Spec:
    shape = scheme.weight.scale_shape(n, k)[1], n
    found: Spec = {
        "b_q": ("I32", (k * scheme.weight.number.bits // 32, n)),
        "b_group_scales": (dtype, shape),
    }
    if scheme.weight.zero_domain == "int":
        found |= {"b_group_zeros": (dtype, shape), "zero": ("I8", shape)}
    return found


def pack(q: QTensor) -> Tensors:
    (n, k), bits = q.shape, q.scheme.weight.number.bits
    stored = q.codes_NK.reshape(n // BLOCK_N, 2, 4, 2, 8, k // BLOCK_K, 4, 2, 4, 2).permute(ORDER[bits])
    scale_GN = q.scale.T.contiguous()
    tensors = {"b_q": PACK[bits](stored.reshape(-1, n)).reshape(-1, n), "b_group_scales": scale_GN}
    if q.zero is not None:
        zero_GN = q.zero.T.contiguous()
        unsigned = zero_GN.to(scale_GN.dtype) + (1 << (bits - 1))
        tensors |= {"b_group_zeros": -scale_GN * unsigned, "zero": zero_GN}
    return tensors


def unpack(tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    (n, k), order = shape, ORDER[scheme.weight.number.bits]
    axes = torch.empty(n // BLOCK_N, 2, 4, 2, 8, k // BLOCK_K, 4, 2, 4, 2, device="meta").permute(order).shape
    stored = UNPACK[scheme.weight.number.bits](tensors["b_q"].reshape(-1, 1)).reshape(axes)
    codes_NK = stored.permute(sorted(range(len(order)), key=order.__getitem__)).reshape(n, k)
    scale_NG = tensors["b_group_scales"].T.contiguous()
    if scheme.weight.zero_domain == "none":
        return QTensor(scheme, codes_NK, scale_NG)
    return QTensor(scheme, codes_NK, scale_NG, tensors["zero"].T.contiguous())


def config(scheme: Scheme, ignore: Sequence[str]) -> Config:
    raise AssertionError("machete is what a kernel eats: no engine loads it from disk, so nothing declares it")


def tp_multiple(scheme: Scheme) -> tuple[int, int]:
    return BLOCK_N, BLOCK_K if scheme.group_size == WHOLE else max(BLOCK_K, scheme.group_size)


LAYOUT = Layout("machete", "kernel", "none", reject, spec, pack, unpack, config, tp_multiple)
