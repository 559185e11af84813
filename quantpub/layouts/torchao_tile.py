"""torchao's `tile_packed_to_4d`: int4 codes as tinygemm's tensor-core tiles hold them, with a float zero, in bf16.

Legend: N' = N up to 8, K' = K up to 1024, g columns a group. Codes are stored unsigned, as c = code + 8. Per module:
    _weight_qdata            int32 [N'/8, K'/128, 32, 4]   word [i, j, lane, m] holds row 8i + lane/4; its nibbles, from
                             the lowest, columns k, k+8, k+16, k+24, k+1, k+9, k+17, k+25 of k = 128j + 32m + 2(lane mod 4)
    _weight_scale_and_zero   bf16 [K'/g, N', 2]            (s, z): w = (c − 8)·s + z
Padding is what torchao makes of a weight of zeros: c = 0 with s = bf16(1/20000) and z = 8s, which stands for exactly 0.
The lanes are those of CUDA's: on ROCm a tensor of the same shape means something else.
Sources: torchao's Int4TilePackedTo4dTensor and its safetensors_support; PyTorch's _convert_weight_to_int4pack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn.functional import pad

from quantpub.layouts import torchao_parts
from quantpub.layouts.base import Config, Cut, Layout, Modules, Spec, Tensors, reject_integers, reject_rest
from quantpub.layouts.words import in_blocks, join, split
from quantpub.qtensor import QTensor
from quantpub.scheme import Scheme

CLASS = "Int4TilePackedTo4dTensor"
GROUPS = (32, 64, 128, 256)
ROWS, COLUMNS, TILE = 8, 1024, 128  # what sides are padded to; columns of a tile
PAD_SCALE = 1 / 20000  # the smallest scale that torchao's HQQ gives, and so that of a group of zeros
KINDS = {("int4", "none"), ("int4", "float")}


def _up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def reject(scheme: Scheme, n: int, k: int, dtype: str) -> str | None:
    if scheme.weight.zero_domain == "int":
        return f"torchao-tile stores zeros as bf16 numbers, which would round scale times zero of {scheme.name}"
    if reason := reject_integers("torchao-tile", scheme, dtype, KINDS, ("BF16",), GROUPS):
        return reason
    return reject_rest(k, scheme.group_size)


def spec(scheme: Scheme, n: int, k: int, dtype: str) -> Spec:
    rows, columns = _up(n, ROWS), _up(k, COLUMNS)
    return {
        "_weight_qdata": ("I32", (rows // 8, columns // TILE, 32, 4)),
        "_weight_scale_and_zero": ("BF16", (columns // scheme.group_size, rows, 2)),
    }


def pack_tiles(codes_NK: torch.Tensor) -> torch.Tensor:
    """int8 codes −8…7 [N', K'] → int32 [N'/8, K'/128, 32, 4].

    A row is 8i + r, a column 128j + 32m + 8a + 2c + d; word [i, j, 4r + c, m] holds it in nibble 4d + a. So of 32 columns
    (d within c within a) four words are made (a within d, one for each c): bytes are turned over 4×4, then nibbles.
    """
    return in_blocks(_tiles, codes_NK, ROWS)


def _tiles(codes_NK: torch.Tensor) -> torch.Tensor:
    n, k = codes_NK.shape
    words = join(codes_NK + 8).view(-1).view(torch.int32).view(n // 8, 8, k // TILE, 4, 4)
    turned = torch.stack(turn(words.unbind(-1)), -2)  # [i, r, j, c, m]
    return shuffled(turned.transpose(1, 2).contiguous(), LAST, FIRST).view(n // 8, k // TILE, 32, 4)


def unpack_tiles(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_tiles`: int32 [N'/8, K'/128, 32, 4] → int8 [N', K']."""
    return in_blocks(_codes, words)


def _codes(words: torch.Tensor) -> torch.Tensor:
    rows, tiles = words.shape[:2]
    x = shuffled(words.contiguous().view(rows, tiles, 8, 4, 4), FIRST, LAST).transpose(1, 2)
    turned = torch.stack(turn(x.unbind(3)), -1)  # [i, r, j, m, a]
    return split(turned.view(rows * 8, -1).view(torch.uint8)).view(torch.int8).sub_(8)


# What is exchanged with its neighbour: (bits, those of the lower). Bytes of a word, then nibbles of both its halves
FIRST, LAST = (8, 0x0000FF00), (4, 0x00F000F0)


def shuffled(words: torch.Tensor, *exchanges: tuple[int, int]) -> torch.Tensor:
    """Words whose nibbles run a within d → d within a, by FIRST and LAST; by the other order back."""
    for bits, lower in exchanges:
        upper = lower << bits
        moved = (words & lower) << bits
        moved |= (words & upper) >> bits
        words = (words & ~(lower | upper)) | moved
    return words


def turn(planes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Four int32 planes: byte y of plane x becomes byte x of plane y. Its own inverse."""
    a, b, c, d = planes
    low, high, half = 0x00FF00FF, ~0x00FF00FF, 0xFFFF
    even, odd = (a & low) | ((b & low) << 8), ((a >> 8) & low) | (b & high)
    even2, odd2 = (c & low) | ((d & low) << 8), ((c >> 8) & low) | (d & high)
    return [
        (even & half) | (even2 << 16),
        (odd & half) | (odd2 << 16),
        ((even >> 16) & half) | (even2 & ~half),
        ((odd >> 16) & half) | (odd2 & ~half),
    ]


def pack(q: QTensor) -> Tensors:
    n, k = q.shape
    rows, columns = _up(n, ROWS) - n, _up(k, COLUMNS) - k
    margin = (0, columns // q.scheme.group_size, 0, rows)
    smallest = torch.tensor(PAD_SCALE, dtype=q.scale.dtype).item()
    zero = torch.zeros_like(q.scale) if q.zero is None else q.zero
    pairs = pad(q.scale, margin, value=smallest), pad(zero, margin, value=8 * smallest)
    return {
        "_weight_qdata": pack_tiles(pad(q.codes_NK, (0, columns, 0, rows), value=-8)),
        "_weight_scale_and_zero": torch.stack(pairs, -1).transpose(0, 1).contiguous(),
    }


def unpack(tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    n, k = shape
    codes_NK = unpack_tiles(tensors["_weight_qdata"])[:n, :k].contiguous()
    scale, zero = tensors["_weight_scale_and_zero"].transpose(0, 1)[:n, : k // scheme.group_size].unbind(-1)
    floats = scheme.weight.zero_domain == "float"
    return QTensor(scheme, codes_NK, scale.contiguous(), zero.contiguous() if floats else None)


def config(scheme: Scheme, ignore: Sequence[str]) -> Config:
    """What transformers' TorchAoConfig writes. Loaders read the packing and the group; HQQ is a word about the origin."""
    quantization = {
        "group_size": scheme.group_size,
        "set_inductor_config": True,
        "int4_packing_format": {"_type": "Int4PackingFormat", "_data": "TILE_PACKED_TO_4D"},
        "int4_choose_qparams_algorithm": {"_type": "Int4ChooseQParamsAlgorithm", "_data": "HQQ"},
        "int4_tile_packed_ntile": ROWS,
    }
    return torchao_parts.config("Int4WeightOnlyConfig", 2, quantization, ignore)


def header(modules: Modules, copied: Sequence[str]) -> dict[str, str]:
    """The entries of every shard's header: of quantized modules with scheme and shape, and of other tensors' names."""
    return torchao_parts.header({module: _class(*found) for module, found in modules.items()}, copied)


def _class(scheme: Scheme, shape: tuple[int, int]) -> str:
    data = f'{{"block_size": [1, {scheme.group_size}], "shape": [{shape[0]}, {shape[1]}]}}'
    return f'{{"_type": "{CLASS}", "_data": {data}, "_tensor_data_names": ["qdata", "scale_and_zero"]}}'


def tp_multiple(scheme: Scheme) -> tuple[int, int]:
    """vLLM cuts padded tensors in proportion to their unpadded sides: only sides without padding cut right."""
    return ROWS, COLUMNS


def cut(scheme: Scheme) -> Cut:
    return Cut(ROWS, {"_weight_qdata": (0, ROWS), "_weight_scale_and_zero": (1, 1)})


LAYOUT = Layout(
    "torchao-tile",
    "checkpoint",
    torchao_parts.METHOD,
    reject,
    spec,
    pack,
    unpack,
    config,
    tp_multiple,
    metadata=header,
    cut=cut,
)
