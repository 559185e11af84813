"""What happens to one tensor of the source: the line of plan.jsonl about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from quantpub.checkpoint import Slice
from quantpub.layouts.base import Spec

QUANTIZE, SMOOTH, COPY = "quantize", "smooth", "copy"
REJECTED = "rejected: "  # begins the reason of an action that no plan may be run with


@dataclass(frozen=True)
class Action:
    """What happens to one tensor. reason: why it is copied, or smoothed: copied but for a fold. outputs: as written.

    treatment: of a quantized tensor, its place in the plan's treatments. kv: scales of the KV cache that are written along
    with a projection of keys or values, quantized or not: output tensor → (dtype, shape).
    """

    kind: str
    part: Slice
    role: str
    outputs: Spec
    reason: str | None = None
    treatment: int | None = None
    kv: Spec = field(default_factory=dict)

    @property
    def module(self) -> str:
        return self.part.name.removesuffix(".weight")

    def as_json(self) -> dict[str, Any]:
        info = self.part.info
        return {
            "tensor": self.part.source,
            "as": self.part.name,
            "shard": self.part.shard,
            "dtype": info.dtype,
            "shape": list(info.shape),
            "role": self.role,
            "action": self.kind,
            "reason": self.reason,
            "treatment": self.treatment,
            "outputs": {name: [dtype, list(shape)] for name, (dtype, shape) in self.outputs.items()},
            **({"kv": {name: [dtype, list(shape)] for name, (dtype, shape) in self.kv.items()}} if self.kv else {}),
        }
