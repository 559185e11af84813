"""What a source weight must be before it is quantized: finite, of a size that weights have, and as it was found."""

from __future__ import annotations

import torch

from quantpub.actions import COPY, Action
from quantpub.errors import InputError, UnavailableError
from quantpub.plan import Plan
from quantpub.stats import Stats

_INTEGERS = {"BF16": torch.int16, "F16": torch.int16, "F32": torch.int32}
_TOO_LARGE = {"BF16": (96 + 127) << 7, "F16": 0x7C00, "F32": (96 + 127) << 23}
_EXPONENT = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}


def require_as_found(plan: Plan, shard: str, data: torch.Tensor, stats: Stats) -> None:
    """What was found for merged weights before the first was quantized still holds. Errors: UnavailableError."""
    if stats.group_amax is None:
        return
    low, high = torch.aminmax(data)
    if max(-float(low), float(high)) > stats.group_amax:
        advice = "keep the source unchanged and run the same command again"
        where = plan.checkpoint.source.where(shard)
        raise UnavailableError("the file changed while it was read", where=where, next=advice)


def require_sound(plan: Plan, shard: str, action: Action, data: torch.Tensor) -> None:
    """A NaN or infinity has all exponent bits set: seen on the raw bits, in one pass. Errors: InputError.

    Nor is a magnitude of 2^96 or more a weight to quantize: squares of it overflow, and scales found from them. What is
    only copied may hold it, as masks do.
    """
    exponent = _EXPONENT.get(action.part.info.dtype)
    if exponent is None or not data.numel():
        return
    bits = data.view(-1).view(torch.uint8).view(_INTEGERS[action.part.info.dtype])
    largest = int((bits & exponent).amax())
    if largest >= (exponent if action.kind == COPY else _TOO_LARGE[action.part.info.dtype]):
        raise InputError(
            "holds NaN or infinite values" if largest == exponent else "holds values of 2^96 and more",
            where=f"{plan.checkpoint.source.where(shard)}, {action.part.source}",
            next="the source model is damaged or diverged: take another revision of it",
        )
