"""What linears share because an engine merges them: the largest magnitude of a set, known before any of it is quantized.

NVFP4's global scale and FP8's scale of a whole tensor must be bit-identical over q/k/v and over gate/up: engines keep one
number for the merged weight. Finding it reads every such weight once, before the straight line starts (law 4: after that
no tensor needs another). A scheme that shares nothing reads nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from quantpub.checkpoint import Slice, read_slice
from quantpub.gemms import fuse
from quantpub.plan import Plan
from quantpub.scheme import WHOLE, Scheme


def shares(scheme: Scheme) -> bool:
    """Whether a weight of this scheme has one number for all of it."""
    return scheme.weight.global_scale or scheme.weight.block[0] == WHOLE


Folded = Callable[[str, torch.Tensor], torch.Tensor]  # a tensor's name and its values → them, transformed


def fused_amax(plan: Plan, folded: Folded = lambda name, w: w) -> dict[str, float]:
    """module → the largest magnitude in the set that it is merged with, itself included, where its scheme shares one.

    folded: what a transform makes of a weight before it is quantized.
    """
    parts = {action.module: action.part for action in plan.actions}
    own = {module: _amax(plan, parts[module], folded) for module, t in plan.treated.items() if shares(t.scheme)}
    found: dict[str, float] = {}
    for members in fuse(plan.shapes, plan.family).values():
        if members[0] in own:
            found |= dict.fromkeys(members, max(own[member] for member in members))
    return found


def _amax(plan: Plan, part: Slice, folded: Folded) -> float:
    low, high = torch.aminmax(folded(part.name, read_slice(plan.checkpoint.source, part)))
    return max(-float(low), float(high))
