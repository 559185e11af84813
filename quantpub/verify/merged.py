"""The rule of merged linears: engines keep one number for q/k/v, and one for gate/up, whatever the members hold.

Known failure: global scales that differ between members. vLLM keeps the largest with a warning, SGLang without one, and
the other members' weights are then wrong by the ratio.
"""

from __future__ import annotations

from quantpub.decode import Decoder
from quantpub.gemms import fuse
from quantpub.qtensor import QTensor, same_bits
from quantpub.scheme import WHOLE
from quantpub.verify.base import Finding, Subject, first


def merged(subject: Subject) -> Finding:
    decoder = subject.decoder
    sets = [members for members in fuse(dict(decoder.modules()), decoder.family()).values() if len(members) > 1]
    problems = [problem for members in sets if (problem := _differ(decoder, members))]
    return first(problems, f"{len(sets)} sets of linears that engines merge")


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
    return whole and same_bits(a.global_scale, b.global_scale) and same_bits(a.input_scale, b.input_scale)
