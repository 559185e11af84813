"""The canonical quantized tensor, in memory only, and the one definition of what it means.

Legend: N out_features, K in_features, G = K / group_size, B blocks of rows.

    w ≈ dequantize(q)      (law 1: kernels, evaluation, cards and tests all use this)

    zero_domain none    codes * scale * global_scale
                int     (codes - zero) * scale
                float   codes * scale + zero

Codes are signed (int4: −8…7 in int8; int zeros too), float8_e4m3fn, or, of E2M1, the 4-bit patterns 0…15 in uint8: sign
in bit 3, then an index into 0, .5, 1, 1.5, 2, 3, 4, 6. Scales and zeros are rounded to the dtype they are stored in
*before* the codes are computed, so that nothing downstream needs a tolerance. A scale may be negative: then code −8, the
longer side of the int4 range, serves the larger side of the weights.

A global scale is a power of two: its reciprocal is exact, so that the conventions of compressed-tensors (divisor) and
ModelOpt (multiplier) say the same, and every product of code, scale and global scale is exact in bf16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from quantpub.scheme import Scheme

CODE_DTYPES = {
    "int4": torch.int8,
    "int8": torch.int8,
    "fp4_e2m1": torch.uint8,
    "fp8_e4m3": torch.float8_e4m3fn,
}
SCALE_DTYPES = {
    "float32": torch.float32,
    "absmax127": torch.float32,
    "fp8_e4m3": torch.float8_e4m3fn,
    "e8m0": torch.float8_e8m0fnu,
}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitudes of the codes 0…7


def scale_dtype(scheme: Scheme, weight: torch.dtype) -> torch.dtype:
    """The dtype of the scale of a weight that came in dtype `weight`."""
    return SCALE_DTYPES.get(scheme.weight.scale_dtype, weight)


@dataclass(frozen=True, eq=False)
class QTensor:
    """codes_NK in CODE_DTYPES[scheme.weight.num]; scale [ceil(N/bn), ceil(K/bk)] in `scale_dtype`.

    zero: int8 (int domain) or the scale's dtype (float domain), of the scale's shape. global_scale: float32 scalar, a
    multiplier. input_scale: float32 scalar, a multiplier, where activations have a calibrated scale.
    """

    scheme: Scheme
    codes_NK: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.codes_NK.shape
        return n, k


def dequantize(q: QTensor) -> torch.Tensor:
    """The weight that `q` stands for: float32 [N, K]. Products of short mantissas are exact; a float zero rounds once."""
    codes_NK = code_values(q.codes_NK, q.scheme.weight.num)
    if q.scheme.weight.zero_domain == "int":
        assert q.zero is not None
        codes_NK = codes_NK - spread(q.zero, q)
    w_NK = codes_NK.mul_(spread(q.scale, q))
    if q.scheme.weight.zero_domain == "float":
        assert q.zero is not None
        w_NK = w_NK.add_(spread(q.zero, q))
    return w_NK if q.global_scale is None else w_NK.mul_(q.global_scale)


def code_values(codes_NK: torch.Tensor, num: str) -> torch.Tensor:
    """What codes stand for, before any scale: a new float32 tensor."""
    if num != "fp4_e2m1":
        return codes_NK.to(torch.float32, copy=True)
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=codes_NK.device)
    return table[codes_NK.int()]


def spread(value: torch.Tensor, q: QTensor) -> torch.Tensor:
    """A scale or zero of every block as float32, broadcastable to [N, K]; blocks at the edge are cut off."""
    (n, k), wide = q.shape, value.float()
    bn, bk = q.scheme.weight.block
    if bk not in (-1, 1) and wide.shape[1] > 1:
        wide = wide.repeat_interleave(bk, 1)[:, :k]
    if bn not in (-1, 1) and wide.shape[0] > 1:
        wide = wide.repeat_interleave(bn, 0)[:n]
    return wide


def same(a: QTensor, b: QTensor) -> bool:
    """Bit-for-bit equality of scheme, codes, scales and zeros."""
    fields = ("codes_NK", "scale", "zero", "global_scale", "input_scale")
    return a.scheme == b.scheme and all(same_bits(getattr(a, name), getattr(b, name)) for name in fields)


def same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(a: torch.Tensor) -> torch.Tensor:
    """As stored, in words of 8 bytes where they fit: comparing is then eight times as fast.

    One element alone counts as contiguous whatever its stride, and is copied to be viewed as bytes.
    """
    a = a.detach()
    if a.numel() < 2 or not a.is_contiguous():
        a = a.clone(memory_format=torch.contiguous_format)
    whole = a.nbytes % 8 == 0 and a.storage_offset() * a.element_size() % 8 == 0
    return a.view(-1).view(torch.int64 if whole else torch.uint8)
