"""What a kernel for experts is: everything between the router and the residual, as engines run it. Legend:

M tokens, T experts of a token (top-k), E experts of a layer, K hidden features, I intermediate features of an expert.

    y_MK = run(x_MK, topk_weights_MT, topk_ids_MT, prepare(weights))

x and y are bf16, router weights float32, ids int32; the ids of a token differ. `prepare` is what an engine does once when it
loads a layer, and is never timed. `run` allocates what it needs, so that a CUDA graph can hold it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quantpub.experts import ExpertLayer, ExpertWeights
from quantpub.kernels.base import BF16, Operands
from quantpub.qtensor import QTensor, dequantize
from quantpub.scheme import Scheme

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Operands], torch.Tensor]
Reject = Callable[[Scheme, int, int, int], str | None]


@dataclass(frozen=True)
class MoeKernel:
    """name; layout: how its weights lie in memory. devices: torch device types it runs on.

    unavailable() → why this machine or its packages lack it, or None.
    reject(scheme, E, K, I) → why it refuses such experts, or None.
    acts: the number formats that it rounds activations to before w13 and before w2, `bf16` where it does not.
    reads, package, row, symbol: as of a `Kernel`.
    """

    name: str
    layout: str
    devices: tuple[str, ...]
    unavailable: Callable[[], str | None]
    reject: Reject
    prepare: Callable[[ExpertWeights], Operands]
    run: Run
    acts: tuple[str, str] = (BF16, BF16)
    reads: tuple[str, ...] = ()
    package: str = "torch"
    row: str = ""
    symbol: str = ""

    def refuses(self, layer: ExpertLayer) -> str | None:
        """Why it does not run these experts, or None."""
        if self.reads and layer.layout not in self.reads:
            return f"it reads {' or '.join(self.reads)}, not {layer.layout}"
        return self.reject(layer.scheme, layer.experts, layer.hidden, layer.intermediate)


def any_experts(scheme: Scheme, experts: int, hidden: int, intermediate: int) -> str | None:
    return None


def dense(weights: ExpertWeights) -> Operands:
    """(w13 [E, 2I, K], w2 [E, K, I]) in bf16: what the weights mean, decompressed."""
    experts, (i, k) = len(weights.gate), weights.gate[0].shape
    w13 = torch.empty(experts, 2 * i, k, dtype=torch.bfloat16, device=weights.device)
    w2 = torch.empty(experts, k, i, dtype=torch.bfloat16, device=weights.device)
    for e in range(experts):
        _into(w13[e, :i], weights.gate[e])
        _into(w13[e, i:], weights.up[e])
        _into(w2[e], weights.down[e])
    return w13, w2


def _into(w_NK: torch.Tensor, q: QTensor) -> None:
    w_NK.copy_(dequantize(q))


def rows(packed13: torch.Tensor) -> torch.Tensor:
    """[E, 2, I, …] → [E, 2I, …]: gate's rows over up's."""
    return packed13.flatten(1, 2)
