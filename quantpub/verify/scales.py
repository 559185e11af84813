"""The rule of scales: finite, not zero, positive where they must be, and in the convention that their names state.

Known failures: experts that no sample reached, with zeros or NaN for scales; global scales in the other convention, divisor
for multiplier, which engines serve as noise; scales of activations that were never calibrated. A group of zeros may have a
scale of zero, a whole tensor may not. No source is needed. Of a checkpoint on the Hub only single numbers are read, unless
its weights were asked for.
"""

from __future__ import annotations

import torch

from quantpub.layouts.base import Tensors
from quantpub.qtensor import code_values, spread
from quantpub.verify.base import Finding, Subject, first

SMALL = 64  # bytes of a tensor that is read over the network all the same
SCALES = ("scale", "scales", "SCB", "zero", "absmax")
# suffix → (the largest that a global scale of FP4 may be as a multiplier, whether the suffix states a divisor). It is the
# largest number over 2688: weights stay under 2688 by far, and activations under a hundred times that.
GLOBAL = {
    "weight_global_scale": (1.0, True),
    "weight_scale_2": (1.0, False),
    "_weight_per_tensor_scale": (1.0, False),
    "input_global_scale": (100.0, True),
    "input_scale": (100.0, False),
}
INPUTS = ("input_scale", "input_global_scale")
NAN_E8M0, ZERO = 255, "a scale is zero"


def scales(subject: Subject) -> Finding:
    decoder, problems, seen = subject.decoder, [], 0
    inputs: list[float] = []
    for module, _ in decoder.modules():
        tensors = {suffix: decoder.tensor(name) for suffix, name in _read(subject, module)}
        seen += len(tensors)
        problems += [f"{module}.{suffix}: {reason}" for suffix, reason in _of_module(subject, module, tensors)]
        inputs += [float(tensors[suffix].flatten()[0]) for suffix in INPUTS if suffix in tensors]
    if len(inputs) > 1 and set(inputs) == {1.0}:
        problems.append(f"each of the {len(inputs)} scales of activations is 1.0: nothing was calibrated")
    larger = "" if subject.weights else "; larger ones were not looked at: they need --download"
    return first(problems, f"{seen} scales: finite, none is zero{larger}")


def _of_module(subject: Subject, module: str, tensors: Tensors) -> list[tuple[str, str]]:
    found = unsound(tensors)
    if subject.weights and any(reason == ZERO for _, reason in found) and _dead(subject, module):
        found = [(suffix, reason) for suffix, reason in found if reason != ZERO]
    act = subject.decoder.treated(module).scheme.act
    fp4_inputs = act is not None and act.num == "fp4_e2m1"
    return found + _convention({s: t for s, t in tensors.items() if s not in INPUTS or fp4_inputs})


def _dead(subject: Subject, module: str) -> bool:
    """Whether scales of zero stand over nothing but codes of zero, and not over a whole tensor."""
    try:
        q = subject.decoder.qtensor(module)
    except AssertionError:
        return False
    zero = q.scale.float() == 0
    if bool(zero.all()) or q.zero is not None:
        return False
    zero_NK = spread(zero, q).bool().expand(q.shape)
    return not bool(code_values(q.codes_NK, q.scheme.weight.num)[zero_NK].any())


def _read(subject: Subject, module: str) -> list[tuple[str, str]]:
    """(suffix, name) of the scales of a module that may be read."""
    names = ((name.rpartition(".")[2], name) for name in subject.decoder.outputs(module))
    found = [(suffix, name) for suffix, name in names if suffix.endswith(SCALES) or "scale" in suffix]
    return [(s, name) for s, name in found if subject.weights or subject.held.info(name).nbytes <= SMALL]


def unsound(tensors: Tensors) -> list[tuple[str, str]]:
    found = []
    for suffix, tensor in tensors.items():
        if suffix == "weight_scale" and tensor.dtype == torch.uint8 and bool((tensor == NAN_E8M0).any()):
            found.append((suffix, "a scale is not a number"))
        if tensor.dtype.is_floating_point and (reason := _unsound(suffix, tensor.float(), tensor.itemsize == 1)):
            found.append((suffix, reason))
    return found


def _unsound(suffix: str, scale: torch.Tensor, fp8: bool) -> str | None:
    if suffix.endswith("scale_and_zero"):
        scale = scale[..., 0] if torch.isfinite(scale).all() else scale
    if not bool(torch.isfinite(scale).all()):
        return "it is not finite" if scale.numel() == 1 else "a scale is not finite"
    if bool((scale == 0).any()):
        return "it is zero" if scale.numel() == 1 else ZERO
    negative = bool((scale < 0).any())
    if negative and scale.numel() == 1:
        return "it is negative"
    return "a scale is negative, and kernels read FP8 scales without a sign" if negative and fp8 else None


def _convention(tensors: Tensors) -> list[tuple[str, str]]:
    """A global scale of FP4 is far from one, below as a multiplier, above as a divisor."""
    found = []
    for suffix in GLOBAL.keys() & tensors.keys():
        largest, divisor = GLOBAL[suffix]
        value = float(tensors[suffix].flatten()[0])
        if value and (1 / value if divisor else value) > largest:
            kind, other = ("divisor", "multiplier") if divisor else ("multiplier", "divisor")
            found.append((suffix, f"{value:.3g} is a {other} by its size, where the name states a {kind}"))
    return found
