"""The rule of scales: finite, not zero, positive where they must be, and in the convention that their names state.

Known failures: experts that no sample reached, with zeros or NaN for scales; global scales in the other convention, divisor
for multiplier, which engines serve as noise. No source is needed. Of a checkpoint on the Hub only single numbers are read,
unless its weights were asked for.
"""

from __future__ import annotations

import torch

from quantpub.layouts.base import Tensors
from quantpub.verify.base import Finding, Subject, first

SMALL = 64  # bytes of a tensor that is read over the network all the same
SCALES = ("scale", "scales", "SCB", "zero", "absmax")
LARGEST = (
    1.0  # of a global scale, as a multiplier: weights up to 2688 are sound, and none of a language model is as large
)


def scales(subject: Subject) -> Finding:
    decoder, problems, seen = subject.decoder, [], 0
    for module, _ in decoder.modules():
        tensors = {suffix: decoder.tensor(name) for suffix, name in _read(subject, module)}
        seen += len(tensors)
        problems += [f"{module}.{suffix}: {reason}" for suffix, reason in unsound(tensors)]
        if (odd := _convention(subject, module, tensors)) is not None:
            problems.append(f"{module}: {odd}")
    return first(problems, f"{seen} scales: finite, none is zero")


def _read(subject: Subject, module: str) -> list[tuple[str, str]]:
    """(suffix, name) of the scales of a module that may be read."""
    names = ((name.rpartition(".")[2], name) for name in subject.decoder.outputs(module))
    found = [(suffix, name) for suffix, name in names if suffix.endswith(SCALES) or "scale" in suffix]
    return [(s, name) for s, name in found if subject.weights or subject.held.info(name).nbytes <= SMALL]


def unsound(tensors: Tensors) -> list[tuple[str, str]]:
    found = []
    for suffix, tensor in tensors.items():
        if tensor.dtype.is_floating_point and (reason := _unsound(suffix, tensor.float())):
            found.append((suffix, reason))
    return found


def _unsound(suffix: str, scale: torch.Tensor) -> str | None:
    if suffix.endswith("scale_and_zero"):
        scale = scale[..., 0] if torch.isfinite(scale).all() else scale
    if not bool(torch.isfinite(scale).all()):
        return "it is not finite" if scale.numel() == 1 else "a scale is not finite"
    if bool((scale == 0).any()):
        return "it is zero" if scale.numel() == 1 else "a scale is zero"
    if scale.numel() == 1 and float(scale) < 0:
        return "it is negative"
    return None


def _convention(subject: Subject, module: str, tensors: Tensors) -> str | None:
    """A global scale of FP4 is far from one, below as a multiplier, above as a divisor."""
    for suffix, divisor in (
        ("weight_global_scale", True),
        ("weight_scale_2", False),
        ("_weight_per_tensor_scale", False),
    ):
        if suffix in tensors:
            value = float(tensors[suffix].reshape(()))
            multiplier = 1 / value if divisor and value else value
            if multiplier > LARGEST:
                kind, other = ("divisor", "multiplier") if divisor else ("multiplier", "divisor")
                return f"{suffix} {value:.3g} is a {other} by its size, where the name states a {kind}"
    return None
