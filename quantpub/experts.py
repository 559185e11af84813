"""A layer's experts as engines run them: one grouped operation, w13 then w2, for all tokens and all experts at once.

    h = silu(x·gateᵀ) · (x·upᵀ)      y = Σ over the token's top-k experts of weight · (h·downᵀ)

Legend: E experts of a layer, I intermediate features of an expert, K hidden features. Engines stack gate over up into w13
[E, 2I, K] and down into w2 [E, K, I]; tensor parallelism shares out I. Layers of the same shape, scheme and layout are one
entry with a count. One layer is loaded at a time; it is decoded on the device that it is for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from quantpub.artifact import Artifact
from quantpub.decode import AGAIN, Decoder
from quantpub.errors import InputError
from quantpub.families import Family
from quantpub.gemms import EXPERT, LAYER, TOP_K, Shapes, cut_shape
from quantpub.layouts.base import Tensors
from quantpub.merged import on, share
from quantpub.qtensor import QTensor
from quantpub.scheme import Scheme

Leaves = tuple[str, str, str]  # gate, up and down


@dataclass(frozen=True)
class ExpertLayer:
    """name: the experts' module without its layer, and what tells it apart where a model has several kinds.

    members: (gate, up, down) of every expert of the first such layer.
    intermediate: of one of `tp` GPUs. count: layers like it, each of which every token goes through.
    """

    name: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    scheme: Scheme
    layout: str
    members: tuple[Leaves, ...]
    count: int = 1
    tp: int = 1

    def as_json(self) -> dict[str, Any]:
        facts = {name: getattr(self, name) for name in ("name", "experts", "top_k", "hidden", "intermediate", "count")}
        return facts | ({"tp": self.tp} if self.tp > 1 else {})


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """gate, up, down: what the weights mean, expert by expert: [I, K], [I, K] and [K, I].

    packed13: suffix → [E, 2, …], gate's tensor and up's as the layout wrote them; packed2: suffix → [E, …].
    """

    layer: ExpertLayer
    gate: tuple[QTensor, ...]
    up: tuple[QTensor, ...]
    down: tuple[QTensor, ...]
    packed13: Tensors
    packed2: Tensors

    @property
    def device(self) -> torch.device:
        return self.down[0].codes_NK.device


def expert_layers(artifact: Artifact, decoder: Decoder, tp: int = 1) -> list[ExpertLayer]:
    """The artifact's layers of experts on each of `tp` GPUs, the first of every kind.

    Errors: InputError when config.json does not say what they need, experts of a layer are not alike, or their
    intermediate size cannot be cut into so many parts.
    """
    shapes = dict(decoder.modules())
    found = _by_layer(shapes)
    if not found:
        return []
    top_k = artifact.config().get(TOP_K)
    if not isinstance(top_k, int):
        what, where = f"it has experts, but config.json lacks {TOP_K}", str(artifact.path / "config.json")
        raise InputError(what, where=where, next="copy config.json from the source model")
    kinds: dict[Any, ExpertLayer] = {}
    for prefix, modules in found.items():
        layer = _layer(prefix, modules, shapes, decoder, top_k, tp)
        kind = replace(layer, members=())
        kinds[kind] = replace(kinds[kind], count=kinds[kind].count + 1) if kind in kinds else layer
    names = Counter(layer.name for layer in kinds.values())
    return [layer if names[layer.name] == 1 else replace(layer, name=_longer(layer)) for layer in kinds.values()]


def _longer(layer: ExpertLayer) -> str:
    """Where a model has layers of several kinds."""
    return f"{layer.name} {layer.experts}×{layer.intermediate}×{layer.hidden} {layer.scheme.name}"


def _by_layer(shapes: Shapes) -> dict[str, dict[int, set[str]]]:
    """The module that holds experts → number of an expert → its leaves."""
    found: dict[str, dict[int, set[str]]] = {}
    for module in shapes:
        if match := EXPERT.search(module):
            experts = found.setdefault(f"{module[: match.start()]}.experts", {})
            experts.setdefault(int(match[1]), set()).add(module[match.end() :])
    return found


def _layer(
    prefix: str, found: Mapping[int, set[str]], shapes: Shapes, decoder: Decoder, top_k: int, tp: int
) -> ExpertLayer:
    where = str(decoder.artifact.path)
    gate, up, down = _leaves(found.values(), decoder.family(), prefix, where)
    members = tuple((f"{prefix}.{e}.{gate}", f"{prefix}.{e}.{up}", f"{prefix}.{e}.{down}") for e in sorted(found))
    _require_alike(members, found, shapes, decoder, prefix)
    n, k = cut_shape(shapes[members[0][0]], "out", tp, members[0][0])
    treatment = decoder.treated(members[0][0])
    least = min(top_k, len(found))
    return ExpertLayer(
        LAYER.sub("", prefix), len(found), least, k, n, treatment.scheme, treatment.layout.name, members, tp=tp
    )


def _leaves(found: Iterable[set[str]], family: Family, prefix: str, where: str) -> Leaves:
    """Errors: InputError when the family does not say which linears of an expert are gate, up and down."""
    names: set[str] = set().union(*found)
    for pair in family.fused.values():
        rest = names - set(pair)
        if len(pair) == 2 and len(names) == 3 and len(rest) == 1:
            return pair[0], pair[1], rest.pop()
    what = f"{prefix} holds {', '.join(sorted(names))}, which are no gate, up and down of {family.name}"
    raise InputError(what, where=where, next=AGAIN)


def _require_alike(
    members: Sequence[Leaves], found: Mapping[int, set[str]], shapes: Shapes, decoder: Decoder, prefix: str
) -> None:
    """Errors: InputError for what engines cannot stack. A plan of today has no such experts."""
    whole = sorted(found) == list(range(len(found))) and all(len(leaves) == 3 for leaves in found.values())
    if whole and len({decoder.place(module) for trio in members for module in trio}) == 1:
        sides = {tuple(shapes[module] for module in trio) for trio in members}
        n, k = shapes[members[0][0]]
        if sides == {((n, k), (n, k), (k, n))}:
            return
    what, where = f"the experts of {prefix} are not all of one shape and one scheme", str(decoder.artifact.path)
    raise InputError(what, where=where, next=AGAIN)


def load(decoder: Decoder, layer: ExpertLayer, device: str = "cpu") -> ExpertWeights:
    """The weights of `layer`, as the first of its GPUs holds them. Errors: InputError when a tensor is not as planned."""
    shapes = dict(decoder.modules())
    return assemble(layer, [[_member(decoder, m, shapes[m], layer.tp, device) for m in trio] for trio in layer.members])


def _member(
    decoder: Decoder, module: str, shape: tuple[int, int], tp: int, device: str
) -> tuple[QTensor, Mapping[str, torch.Tensor]]:
    treatment = decoder.treated(module)
    packed = on(device, decoder.packed(module))
    q = treatment.layout.unpack(packed, treatment.scheme, shape)
    if tp == 1:
        return q, packed
    q = share(q, decoder.family().cut(module), tp, module)
    return q, treatment.layout.pack(q)


def assemble(
    layer: ExpertLayer, members: Sequence[Sequence[tuple[QTensor, Mapping[str, torch.Tensor]]]]
) -> ExpertWeights:
    """members: of every expert (meaning, tensors by suffix) of gate, up and down, on one device."""
    gate, up, down = (tuple(trio[place][0] for trio in members) for place in range(3))
    suffixes = list(members[0][0][1])
    packed13 = {s: _stack([_stack([trio[0][1][s], trio[1][1][s]]) for trio in members]) for s in suffixes}
    packed2 = {s: _stack([trio[2][1][s] for trio in members]) for s in suffixes}
    return ExpertWeights(layer, gate, up, down, packed13, packed2)


def _stack(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """By their bytes: torch.stack has no kernel for 8-bit floats everywhere."""
    flat = torch.stack([part.contiguous().reshape(-1).view(torch.uint8) for part in parts])
    return flat.view(parts[0].dtype).view(len(parts), *parts[0].shape)
