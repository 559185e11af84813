"""What a kernel is. Legend: M tokens, N out_features, K in_features.

    y_MN = run(x_MK, prepare(weight)) ≈ x_MK @ dequantize(weight.q).T

Activations come and go in bf16. `prepare` is what an engine does once when it loads a weight, and is never timed. It takes
the artifact's own tensors as they lie on disk, so that a kernel which reads them otherwise than we do is found out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quantpub.layouts.base import Tensors
from quantpub.qtensor import QTensor
from quantpub.scheme import Scheme

Operands = tuple[torch.Tensor, ...]  # a tuple of tensors, so that a timer can clone it and rotate the clones
BF16 = "bf16"
OP_ERRORS = (RuntimeError, AssertionError, ValueError, TypeError, NotImplementedError)  # what an op says no with


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight as an engine meets it. q: what it means. packed: suffix → tensor, as `layout` wrote it.

    Members that engines merge are stacked along N in both. All tensors are on the device that runs the kernel.
    """

    q: QTensor
    packed: Tensors
    layout: str


@dataclass(frozen=True)
class Split:
    """A kernel that quantizes its activations, in its two steps: gemm(quantize(x_MK), operands) is its `run`.

    num: the activations' number format, a key of NUMBERS.
    dequantize(quantize(x_MK)) → what the GEMM sees, float32 [M, K].
    calibrated(x_MK, operands) quantizes with the scale of activations among the operands, where the scheme has one:
    gemm(calibrated(x_MK, operands), operands) is then the kernel's `run`, and `quantize` takes a scale of its own instead,
    which costs the same.
    """

    num: str
    quantize: Callable[[torch.Tensor], Operands]
    dequantize: Callable[[Operands], torch.Tensor]
    gemm: Callable[[Operands, Operands], torch.Tensor]
    calibrated: Callable[[torch.Tensor, Operands], Operands] | None = None

    def activations(self, x_MK: torch.Tensor, operands: Operands) -> Operands:
        """What `run` multiplies."""
        return self.quantize(x_MK) if self.calibrated is None else self.calibrated(x_MK, operands)


@dataclass(frozen=True)
class Kernel:
    """name; layout: how its weight lies in memory. devices: torch device types it runs on.

    unavailable() → why this machine or its packages lack it, or None.
    reject(scheme, n, k) → why it refuses such a weight, or None.
    reads: checkpoint layouts whose tensors `prepare` takes; none named: any, it starts from the QTensor.
    package: where the op comes from. row: what the engines' kernel tables call it, "" when they do not know it.
    symbol: regex of the device kernel that must be seen to run, "" when none is known.
    """

    name: str
    layout: str
    devices: tuple[str, ...]
    unavailable: Callable[[], str | None]
    reject: Callable[[Scheme, int, int], str | None]
    prepare: Callable[[Weight], Operands]
    run: Callable[[torch.Tensor, Operands], torch.Tensor]
    split: Split | None = None
    reads: tuple[str, ...] = ()
    package: str = "torch"
    row: str = ""
    symbol: str = ""

    def refuses(self, scheme: Scheme, layout: str, n: int, k: int) -> str | None:
        """Why it does not multiply by such a weight, stored so, or None."""
        if self.reads and layout not in self.reads:
            return f"it reads {' or '.join(self.reads)}, not {layout}"
        return self.reject(scheme, n, k)


def attempt(call: Callable[[], object]) -> str | None:
    """None when a tiny `call` of an op works here, else the first line of what it says."""
    try:
        call()
    except (RuntimeError, AttributeError, NotImplementedError, TypeError) as error:
        return f"torch {torch.__version__} cannot run it here: {str(error).strip().splitlines()[0]:.240}"
    return None
