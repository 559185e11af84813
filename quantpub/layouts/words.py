"""Small codes in bigger words: what several layouts share, each function with its inverse.

Legend: R rows, C columns, W = C / 8 words, B = C / 2 bytes.

    words of 4 bits   element c in bits 4·(c mod 8) … +3 of int32 word c/8, stored as code + 8
    words of 8 bits   element c in byte c mod 4 of int32 word c/4, stored as code + 128
    nibbles           element c in the low (c even) or high (c odd) half of byte c/2, stored as it is

Packing −8…7 gives the words 0x76543210, 0xfedcba98. Sources: compressed-tensors' pack_quantized and nvfp4 compressors.
"""

from __future__ import annotations

import torch


def pack_words(codes_RC: torch.Tensor) -> torch.Tensor:
    """int8 codes −8…7 [R, C], C a multiple of 8 → int32 [R, C/8].

    Eight bytes are read as one 64-bit integer, and its low nibbles are folded together in three steps: an eighth of the
    elements of a shift-and-add over single codes.
    """
    x = _as(codes_RC + 8, torch.int64)
    x = (x | (x >> 4)) & 0x00FF00FF00FF00FF
    x = (x | (x >> 8)) & 0x0000FFFF0000FFFF
    return (x | (x >> 16)).to(torch.int32)  # the cast keeps the low 32 bits


def unpack_words(words_RW: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_words`: int32 [R, C/8] → int8 [R, C]."""
    x = words_RW.to(torch.int64) & 0xFFFFFFFF
    x = (x | (x << 16)) & 0x0000FFFF0000FFFF
    x = (x | (x << 8)) & 0x00FF00FF00FF00FF
    x = (x | (x << 4)) & 0x0F0F0F0F0F0F0F0F
    return _as(x, torch.int8) - 8


def pack_bytes(codes_RC: torch.Tensor) -> torch.Tensor:
    """int8 codes −128…127 [R, C], C a multiple of 4 → int32 [R, C/4]. Adding 128 flips the highest bit."""
    return _as(codes_RC ^ -128, torch.int32)


def unpack_bytes(words_RW: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_bytes`: int32 [R, C/4] → int8 [R, C]."""
    return _as(words_RW, torch.int8) ^ -128


def pack_nibbles(codes_RC: torch.Tensor) -> torch.Tensor:
    """uint8 codes 0…15 [R, C], C even → uint8 [R, C/2], the even column in the low half."""
    return codes_RC[:, ::2] | (codes_RC[:, 1::2] << 4)


def unpack_nibbles(bytes_RB: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_nibbles`: uint8 [R, C/2] → uint8 [R, C]."""
    return torch.stack((bytes_RB & 0xF, bytes_RB >> 4), -1).view(len(bytes_RB), -1)


def _as(x_RC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bytes of every row read as `dtype`. Flat in between: a side of 1 may have any stride and still be contiguous."""
    return x_RC.contiguous().reshape(-1).view(dtype).view(len(x_RC), -1)
