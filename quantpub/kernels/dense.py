"""bf16 matmul: the baseline, and what is left of a quantized weight that is decompressed when it is loaded.

Time does not depend on values, so the artifact's own dequantized weights stand in for the source's. `dequantized` is
what transformers does with a compressed checkpoint: int4 on disk, bf16 in memory, no speed gained. It is the same call
as the baseline, and so the control: its speedup should be 1, and how far it is off says how far to trust the others.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from quantpub.kernels import BASELINE
from quantpub.kernels.base import Kernel, Operands, Weight
from quantpub.qtensor import dequantize
from quantpub.scheme import Scheme


def unavailable() -> str | None:
    return None


def reject(scheme: Scheme, n: int, k: int) -> str | None:
    return None


def prepare(weight: Weight) -> Operands:
    q = weight.q
    return (dequantize(q).to(torch.bfloat16),)


def run(x_MK: torch.Tensor, operands: Operands) -> torch.Tensor:
    return torch.nn.functional.linear(x_MK, operands[0])


BF16 = Kernel(BASELINE, "dense", ("cpu", "cuda"), unavailable, reject, prepare, run)
DEQUANTIZED = replace(BF16, name="dequantized")
