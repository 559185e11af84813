"""A merged weight of the artifact as one GPU of an engine holds it: members cut for tensor parallelism, then stacked.

Tensor parallelism cuts a weight along N (each GPU has rows of it) or along K; scales go with their block. What one member
gives is the artifact's own bytes; what is cut or stacked is packed anew from its meaning, and every member so used is first
packed whole and compared with its bytes, so that the two can only be the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from quantpub.decode import Decoder
from quantpub.errors import InputError
from quantpub.gemms import Gemm, cut_shape, side, stack
from quantpub.layouts.base import Tensors
from quantpub.qtensor import QTensor, same_bits
from quantpub.scheme import WHOLE

FIELDS = ("codes_NK", "scale", "zero", "global_scale", "input_scale")


def load(decoder: Decoder, gemm: Gemm, device: str = "cpu", tp: int = 1) -> tuple[QTensor, Tensors]:
    """(what it means, its tensors by suffix) on the first of `tp` GPUs.

    Errors: InputError when the bytes are not those that their meaning packs to, or cannot be cut.
    """
    layout = decoder.treated(gemm.members[0]).layout
    packed = {member: on(device, decoder.packed(member)) for member in gemm.members}
    parts = {member: to(device, decoder.qtensor(member)) for member in gemm.members}
    if len(parts) == 1 and tp == 1:
        (member,) = gemm.members
        return parts[member], packed[member]
    for member, q in parts.items():
        _require_same(layout.pack(q), packed[member], member, str(decoder.artifact.path))
    family, config = decoder.family(), decoder.artifact.config()
    cuts = [share(q, *side(family, member, tp, config), member) for member, q in parts.items()]
    merged = cuts[0] if len(cuts) == 1 else stack(cuts)
    return merged, layout.pack(merged)


def on(device: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def to(device: str, q: QTensor) -> QTensor:
    return replace(q, **{name: value.to(device) for name in FIELDS if (value := getattr(q, name)) is not None})


def _require_same(made: Tensors, found: Tensors, member: str, where: str) -> None:
    for name, tensor in made.items():
        if not same_bits(tensor.to(found[name].device), found[name]):
            what = f"{member}.{name} does not hold what its layout writes for these codes and scales"
            raise InputError(what, where=where, next="run `quantpub verify`, and quantize again")


def share(q: QTensor, cut: str | None, parts: int, member: str = "") -> QTensor:
    """The first GPU's part of a weight. cut: `out` (rows), `in` (columns) or None (whole on every GPU)."""
    if cut is None or parts == 1:
        return q
    place = 0 if cut == "out" else 1
    length, block = cut_shape(q.shape, cut, parts, member)[place], q.scheme.weight.block[place]
    if block != WHOLE and length % block:
        what = f"{length} {cut}_features on each of {parts} GPUs are no whole blocks of {block}"
        raise InputError(what, where=member, next="choose another number of GPUs")
    blocks = q.scale.shape[place] if block == WHOLE else length // block
    scales = {
        name: value.narrow(place, 0, blocks).contiguous()
        for name in ("scale", "zero")
        if (value := getattr(q, name)) is not None
    }
    return replace(q, codes_NK=_narrow(q.codes_NK, place, length), **scales)


def _narrow(codes_NK: torch.Tensor, place: int, length: int) -> torch.Tensor:
    """As bytes: not every 8-bit float has a copy kernel for slices everywhere."""
    return codes_NK.view(torch.uint8).narrow(place, 0, length).contiguous().view(codes_NK.dtype)
