"""What a kernel is. Legend: M tokens, N out_features, K in_features.

    y_MN = run(x_MK, prepare(q)) ≈ x_MK @ dequantize(q).T

Activations come and go in bf16. `prepare` is what an engine does once when it loads a weight, and is never timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quantpub.qtensor import QTensor
from quantpub.scheme import Scheme

Operands = tuple[torch.Tensor, ...]  # a tuple of tensors, so that a timer can clone it and rotate the clones
BF16 = "bf16"


@dataclass(frozen=True)
class Split:
    """A kernel that quantizes its activations, in its two steps: gemm(quantize(x_MK), operands) is its `run`.

    num: the activations' number format, a key of NUMBERS.
    dequantize(quantize(x_MK)) → what the GEMM sees, float32 [M, K].
    """

    num: str
    quantize: Callable[[torch.Tensor], Operands]
    dequantize: Callable[[Operands], torch.Tensor]
    gemm: Callable[[Operands, Operands], torch.Tensor]


@dataclass(frozen=True)
class Kernel:
    """name; layout: how its weight lies in memory. devices: torch device types it runs on.

    unavailable() → why this machine or this torch lacks it, or None.
    reject(scheme, n, k) → why it refuses such a weight, or None.
    """

    name: str
    layout: str
    devices: tuple[str, ...]
    unavailable: Callable[[], str | None]
    reject: Callable[[Scheme, int, int], str | None]
    prepare: Callable[[QTensor], Operands]
    run: Callable[[torch.Tensor, Operands], torch.Tensor]
    split: Split | None = None


def attempt(call: Callable[[], object]) -> str | None:
    """None when a tiny `call` of an op works here, else the first line of what it says."""
    try:
        call()
    except (RuntimeError, AttributeError, NotImplementedError, TypeError) as error:
        return f"torch {torch.__version__} cannot run it here: {str(error).strip().splitlines()[0]:.240}"
    return None
