"""The rule of merged linears: engines keep one number for q/k/v, and one for gate/up, whatever the members hold.

Known failure: global scales that differ between members. vLLM keeps the largest with a warning, SGLang without one, and
the other members' weights are then wrong by the ratio. Calibrated scales of activations go further: one for the gate and up
projections of all experts of a layer, and one for their down projections.
"""

from __future__ import annotations

from collections.abc import Sequence

from quantpub.decode import Decoder
from quantpub.gemms import EXPERT, fuse
from quantpub.qtensor import QTensor, same_bits
from quantpub.scheme import WHOLE
from quantpub.verify.base import Finding, Subject, first

GLOBAL = (".weight_global_scale", ".weight_scale_2")


def merged(subject: Subject) -> Finding:
    decoder = subject.decoder
    if not subject.ours:
        return _adopted(subject)
    sets = [members for members in fuse(dict(decoder.modules()), decoder.family()).values() if len(members) > 1]
    problems = [problem for members in sets if (problem := _differ(decoder, members))]
    inputs = one_input(decoder)
    problems += [problem for members in inputs if (problem := _scaled_apart(decoder, members))]
    scaled = f"; one scale of activations in each of {len(inputs)}" if inputs else ""
    return first(problems, f"{len(sets)} sets of linears that engines merge{scaled}")


def _adopted(subject: Subject) -> Finding:
    """Of another tool's only what engines do not make good: FP8 members they rescale, and torchao merges nothing."""
    decoder = subject.decoder
    sets = [members for members in fuse(dict(decoder.modules()), decoder.family()).values() if len(members) > 1]
    method = subject.opened.adopted.method.name
    problems = [] if method == "torchao" else [p for members in sets if (p := _global_apart(subject, members))]
    return first(problems, f"{len(sets)} sets of linears that engines merge")


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
    parts = [decoder.qtensor(member) for member in members]
    odd = next((m for m, part in zip(members, parts, strict=True) if not _alike(part, parts[0])), None)
    return odd and f"{odd}: its scale of the whole tensor is not that of {members[0]}, which engines merge it with"


def _alike(a: QTensor, b: QTensor) -> bool:
    whole = a.scheme.weight.block[0] != WHOLE or same_bits(a.scale, b.scale)
    return whole and same_bits(a.global_scale, b.global_scale)
