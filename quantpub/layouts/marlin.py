"""Marlin's operands, as vLLM's marlin_gemm eats them: int4 or int8 codes in the order of its tensor-core fragments.

No engine loads these from disk. vLLM makes them when it loads ct-pack, gptq or awq, with gptq_marlin_repack,
marlin_permute_scales and marlin_zero_points; the bytes here are equal to theirs.

Legend: b bits, W = 32 / b codes a word, g columns a group, G groups. Codes and zeros are stored as value + 2^(b−1).
    qweight   int32 [K/16, 16N/W]   blocks of 16 × 64 (K × N); row 8h + 2r + a, column 16j + 8t + c of a block are with
                                    thread 4c + r, its word j (int4), nibble 4a + 2t + h; or word 2j + t (int8), byte 2a + h
    scales    A's dtype [G, N]      of several groups, column 8j + i of 64 at 8i + j; of one, 8t + 2i + a of 32 at 8i + 2t + a
    qzeros    int32 [G, N/8]        int4 with zeros only: column 16x + 8y + i of 64 in word i, nibble 4y + x
Source: vLLM's csrc/quantization/marlin and its marlin_utils.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from quantpub.layouts.base import Config, Layout, Spec, Tensors, reject_integers, reject_rest
from quantpub.layouts.words import pack_bytes, pack_words, unpack_bytes, unpack_words
from quantpub.qtensor import QTensor
from quantpub.scheme import WHOLE, Scheme

GROUPS = (WHOLE, 32, 64, 128)
DTYPES = ("BF16", "F16")
Words = Callable[[torch.Tensor], torch.Tensor]
PACK: dict[int, Words] = {4: pack_words, 8: pack_bytes}
UNPACK: dict[int, Words] = {4: unpack_words, 8: unpack_bytes}
# The axes of codes [N, K] seen as [N/64, j4, t2, c8, K/16, h2, r4, a2], in the order in which they are stored
ORDER = {4: (4, 0, 3, 6, 1, 7, 2, 5), 8: (4, 0, 3, 6, 1, 2, 7, 5)}
KINDS = {("int4", "none"), ("int4", "int"), ("int8", "none")}


def reject(scheme: Scheme, n: int, k: int, dtype: str) -> str | None:
    if reason := reject_integers("marlin", scheme, dtype, KINDS, DTYPES, GROUPS):
        return reason
    if n % 64 or k % 64 or (n % 128 and k % 128):
        return (
            f"shape [{n}, {k}] is not made of Marlin's tiles of 64×128 or 128×64: an engine would pad it at every step"
        )
    return reject_rest(k, scheme.group_size)


def spec(scheme: Scheme, n: int, k: int, dtype: str) -> Spec:
    groups = scheme.weight.scale_shape(n, k)[1]
    found: Spec = {
        "qweight": ("I32", (k // 16, n * scheme.weight.number.bits // 2)),
        "scales": (dtype, (groups, n)),
    }
    if scheme.weight.zero_domain == "int":
        found["qzeros"] = ("I32", (groups, n // 8))
    return found


def pack(q: QTensor) -> Tensors:
    (n, k), bits = q.shape, q.scheme.weight.number.bits
    stored = q.codes_NK.reshape(n // 64, 4, 2, 8, k // 16, 2, 4, 2).permute(ORDER[bits])
    tensors = {
        "qweight": PACK[bits](stored.reshape(k // 16, 16 * n)),
        "scales": permute_scales(q.scale.T),
    }
    if q.zero is not None:
        tensors["qzeros"] = pack_zeros(q.zero.T)
    return tensors


def unpack(tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    (n, k), bits = shape, scheme.weight.number.bits
    axes = torch.empty(n // 64, 4, 2, 8, k // 16, 2, 4, 2, device="meta").permute(ORDER[bits]).shape
    stored = UNPACK[bits](tensors["qweight"]).reshape(axes)
    codes_NK = stored.permute(_inverse(ORDER[bits])).reshape(n, k)
    scale_NG = unpermute_scales(tensors["scales"]).T.contiguous()
    if scheme.weight.zero_domain == "none":
        return QTensor(scheme, codes_NK, scale_NG)
    return QTensor(scheme, codes_NK, scale_NG, unpack_zeros(tensors["qzeros"]).T.contiguous())


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def permute_scales(scale_GN: torch.Tensor) -> torch.Tensor:
    groups, n = scale_GN.shape
    if groups > 1:
        return scale_GN.reshape(groups, n // 64, 8, 8).transpose(2, 3).reshape(groups, n)
    return scale_GN.reshape(groups, n // 32, 4, 4, 2).transpose(2, 3).reshape(groups, n)


unpermute_scales = permute_scales  # a transposition of 8 × 8, or of 4 × 4 pairs, undoes itself


def pack_zeros(zero_GN: torch.Tensor) -> torch.Tensor:
    """int8 −8…7 [G, N] → int32 [G, N/8]."""
    groups, n = zero_GN.shape
    return pack_words(zero_GN.reshape(groups, n // 64, 4, 2, 8).permute(0, 1, 4, 3, 2).reshape(groups, n))


def unpack_zeros(words_GW: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_zeros`: int32 [G, N/8] → int8 [G, N]."""
    groups, words = words_GW.shape
    return unpack_words(words_GW).reshape(groups, words // 8, 8, 2, 4).permute(0, 1, 4, 3, 2).reshape(groups, words * 8)


def config(scheme: Scheme, ignore: Sequence[str]) -> Config:
    raise AssertionError("marlin is what a kernel eats: no engine loads it from disk, so nothing declares it")


def tp_multiple(scheme: Scheme) -> tuple[int, int]:
    return 64, 128


LAYOUT = Layout("marlin", "kernel", "none", reject, spec, pack, unpack, config, tp_multiple)
