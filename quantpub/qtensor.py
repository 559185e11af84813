"""The canonical quantized tensor, in memory only, and the one definition of what it means.

Legend: N out_features, K in_features, G = K / group_size.

    w ≈ dequantize(q) = codes * scale          (law 1: kernels, evaluation, cards and tests all use this)

Codes are signed (int4: −8…7 in int8) or float8_e4m3fn. The scale is rounded to the dtype it is stored in *before* the
codes are computed from it, so that nothing downstream needs a tolerance. A scale may be negative: then code −8, the
longer side of the int4 range, serves the larger side of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from quantpub.scheme import Scheme

CODE_DTYPES = {"int4": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}


@dataclass(frozen=True, eq=False)
class QTensor:
    """codes_NK in CODE_DTYPES[scheme.weight.num]; scale [N/bn, K/bk] in the stored dtype."""

    scheme: Scheme
    codes_NK: torch.Tensor
    scale: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.codes_NK.shape
        return n, k


def dequantize(q: QTensor) -> torch.Tensor:
    """The weight that `q` stands for: float32 [N, K]. A product of two short mantissas, hence exact before any cast."""
    (n, k), (sn, sk) = q.shape, q.scale.shape
    blocks = q.codes_NK.float().view(sn, n // sn, sk, k // sk)
    return blocks.mul_(q.scale.float()[:, None, :, None]).view(n, k)


def same(a: QTensor, b: QTensor) -> bool:
    """Bit-for-bit equality of scheme, codes and scale."""
    pairs = ((a.codes_NK, b.codes_NK), (a.scale, b.scale))
    return a.scheme == b.scheme and all(
        x.dtype == y.dtype
        and x.shape == y.shape
        and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in pairs
    )
