"""The rule of merged linears: engines keep one number for q/k/v, and one for gate/up, whatever the members hold.

Known failure: global scales that differ between members. vLLM keeps the largest with a warning, SGLang without one, and
the other members' weights are then wrong by the ratio. Calibrated scales of activations go further: one for the gate and up
projections of all experts of a layer, and one for their down projections.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from quantpub.decode import Decoder
from quantpub.gemms import EXPERT, fuse
from quantpub.qtensor import same_bits
from quantpub.scheme import WHOLE
from quantpub.verify.base import Finding, Subject, counted, first

GLOBAL = (".weight_global_scale", ".weight_scale_2")


def merged(subject: Subject) -> Finding:
    decoder = subject.decoder
    if not subject.quantized_here:
        return _adopted(subject)
    sets = [members for members in fuse(dict(decoder.modules()), decoder.family()).values() if len(members) > 1]
    problems = [problem for members in sets if (problem := _differ(decoder, members))]
    inputs = one_input(decoder)
    problems += [problem for members in inputs if (problem := _scaled_apart(decoder, members))]
    scaled = f"; one scale of activations in each of {len(inputs)}" if inputs else ""
    return first(problems, f"{counted(len(sets), 'set')} of linears that engines merge{scaled}")


def _adopted(subject: Subject) -> Finding:
    """Of another tool's only what engines do not make good: FP8 members they rescale, and torchao merges nothing."""
    decoder = subject.decoder
    sets = [members for members in fuse(dict(decoder.modules()), decoder.family()).values() if len(members) > 1]
    method = subject.opened.adopted.method.name
    problems = [] if method == "torchao" else [p for members in sets if (p := _global_apart(subject, members))]
    return first(problems, f"{counted(len(sets), 'set')} of linears that engines merge")


def _global_apart(subject: Subject, members: Sequence[str]) -> str | None:
    decoder = subject.decoder
    if not all(decoder.treated(member).scheme.weight.global_scale for member in members):
        return None
    own = [[decoder.tensor(n) for n in decoder.outputs(m) if n.endswith(GLOBAL)] for m in members]
    odd = next((m for m, found in zip(members, own, strict=True) if not all(map(same_bits, found, own[0]))), None)
    return odd and f"{odd}: its scale of the whole tensor is not that of {members[0]}, which engines merge it with"


def one_input(decoder: Decoder) -> list[tuple[str, ...]]:
    """Sets of linears whose activations engines give one calibrated scale."""
    shapes, family = dict(decoder.modules()), decoder.family()
    acts = {module: decoder.treated(module).scheme.act for module in shapes}
    sets: dict[str, list[str]] = {}
    for name, members in fuse(shapes, family).items():
        for module in members:
            if (act := acts[module]) is not None and act.calibrated:
                sets.setdefault(EXPERT.sub(".experts.", name), []).append(module)
    return [tuple(members) for members in sets.values() if len(members) > 1]


def _scaled_apart(decoder: Decoder, members: Sequence[str]) -> str | None:
    due = decoder.input_scale(members[0])
    odd = next((module for module in members if not same_bits(decoder.input_scale(module), due)), None)
    return odd and f"{odd}: its scale of activations is not that of {members[0]}, and engines keep one"


def _differ(decoder: Decoder, members: tuple[str, ...]) -> str | None:
    schemes = {decoder.treated(member).scheme for member in members}
    if len(schemes) > 1:
        return f"{members[0]} and those merged with it have {len(schemes)} schemes"
    weight = schemes.pop().weight
    if not weight.global_scale and weight.block[0] != WHOLE:
        return None
    own = [_whole(decoder, member) for member in members]
    odd = next((m for m, found in zip(members, own, strict=True) if not _alike(found, own[0])), None)
    return odd and f"{odd}: its scale of the whole tensor is not that of {members[0]}, which engines merge it with"


def _whole(decoder: Decoder, module: str) -> dict[str, torch.Tensor]:
    """suffix → the numbers on disk that a weight has one of; no codes are read. Those of its input are another matter."""
    found = {name.removeprefix(f"{module}."): name for name in decoder.outputs(module)}
    numbers = {s: name for s, name in found.items() if "input" not in s and math.prod(decoder.shape(name)) == 1}
    return {suffix: decoder.tensor(name) for suffix, name in numbers.items()}


def _alike(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[suffix], b[suffix]) for suffix in a)
