"""Small codes in bigger words: what several layouts share, each function with its inverse.

Legend: R rows, C columns, W = C / 8 words, B = C / 2 bytes.

    words of 4 bits   element c in bits 4·(c mod 8) … +3 of int32 word c/8, stored as code + 8
    words of 8 bits   element c in byte c mod 4 of int32 word c/4, stored as code + 128
    nibbles           element c in the low (c even) or high (c odd) half of byte c/2, stored as it is

Packing −8…7 gives the words 0x76543210, 0xfedcba98. Sources: compressed-tensors' pack_quantized and nvfp4 compressors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

BLOCK_ELEMENTS = 1 << 19  # half a MiB of codes: the temporaries stay in the cache


def pack_words(codes_RC: torch.Tensor) -> torch.Tensor:
    """int8 codes −8…7 [R, C], C a multiple of 8 → int32 [R, C/8].

    Two codes are one 16-bit integer, and one byte of a word: 0.15 ns a weight, where shifting within 64-bit integers takes 0.32.
    """
    return _absent(codes_RC, torch.int32) if codes_RC.is_meta else in_blocks(_fold, codes_RC)


def _fold(codes_RC: torch.Tensor) -> torch.Tensor:
    return _as(join(codes_RC + 8), torch.int32)


def unpack_words(words_RW: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_words`: int32 [R, C/8] → int8 [R, C]."""
    return _absent(words_RW, torch.int8) if words_RW.is_meta else in_blocks(_unfold, words_RW)


def _unfold(words_RW: torch.Tensor) -> torch.Tensor:
    return _as(split(_as(words_RW, torch.uint8)), torch.int8).sub_(8)


def _absent(x_RC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What int4 codes or their words would become. torch imports its compiler to shift tensors that are not there, 1.3 s."""
    columns = 8 * x_RC.shape[1] if dtype == torch.int8 else x_RC.shape[1] // 8
    return x_RC.new_empty((len(x_RC), columns), dtype=dtype)


def join(codes_RC: torch.Tensor) -> torch.Tensor:
    """Codes 0…15 in bytes [R, C], C even → uint8 [R, C/2], the even column in the low half."""
    x = _as(codes_RC, torch.int16)
    return (x >> 4).bitwise_or_(x).to(torch.uint8)  # the cast keeps the low byte


def split(bytes_RB: torch.Tensor) -> torch.Tensor:
    """The inverse of `join`: uint8 [R, B] → uint8 [R, 2B]. A new tensor."""
    x = bytes_RB.to(torch.int16)
    return _as((x << 4).bitwise_or_(x).bitwise_and_(0x0F0F), torch.uint8)


def pack_bytes(codes_RC: torch.Tensor) -> torch.Tensor:
    """int8 codes −128…127 [R, C], C a multiple of 4 → int32 [R, C/4]. Adding 128 flips the highest bit."""
    return _as(codes_RC ^ -128, torch.int32)


def unpack_bytes(words_RW: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_bytes`: int32 [R, C/4] → int8 [R, C]."""
    return _as(words_RW, torch.int8) ^ -128


PACK = {4: pack_words, 8: pack_bytes}
UNPACK = {4: unpack_words, 8: unpack_bytes}


def shifted(codes: torch.Tensor, by: int, bits: int) -> torch.Tensor:
    """codes + by as int8, around the end of the 2^bits codes −2^(bits−1) … 2^(bits−1) − 1."""
    half = 1 << bits - 1
    return (((codes.to(torch.int16) + half + by) & (2 * half - 1)) - half).to(torch.int8)


def pack_nibbles(codes_RC: torch.Tensor) -> torch.Tensor:
    """uint8 codes 0…15 [R, C], C even → uint8 [R, C/2], the even column in the low half."""
    return in_blocks(join, codes_RC)


def unpack_nibbles(bytes_RB: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_nibbles`: uint8 [R, C/2] → uint8 [R, C]."""
    return in_blocks(split, bytes_RB)


def in_blocks(pack: Callable[[torch.Tensor], torch.Tensor], x_RC: torch.Tensor, rows: int = 1) -> torch.Tensor:
    """`pack` of blocks of rows, a multiple of `rows` each, put under one another.

    Temporaries of a whole weight cost more than the packing: memory, and 0.30 in place of 0.05 seconds at 4096×14336.
    """
    step = max(1, BLOCK_ELEMENTS // max(1, x_RC[:1].numel()) // rows) * rows
    if len(x_RC) <= step or x_RC.device.type != "cpu":
        return pack(x_RC)
    first = pack(x_RC[:step])
    out = first.new_empty((len(x_RC) * len(first) // step, *first.shape[1:]))
    for start in range(0, len(x_RC), step):
        made = first if start == 0 else pack(x_RC[start : start + step])
        at = start * len(first) // step
        out[at : at + len(made)] = made
    return out


def _as(x_RC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bytes of every row read as `dtype`. Flat in between: a side of 1 may have any stride and still be contiguous."""
    return x_RC.contiguous().reshape(-1).view(dtype).view(len(x_RC), -1)
