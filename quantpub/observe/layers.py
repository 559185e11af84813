"""One decoder layer over all batches, watched: the inner loop of calibration."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from quantpub.errors import InputError
from quantpub.families import LINEAR
from quantpub.observe.even_rows import EvenRows
from quantpub.observe.experts import Experts, Router
from quantpub.observe.hidden import Hidden
from quantpub.observe.names import EXPERT
from quantpub.observe.ranks import Ranks
from quantpub.observe.skeleton import Skeleton
from quantpub.observe.watch import Watch


@dataclass(frozen=True, eq=False)
class Seen:
    """watch: what was gathered. routed: experts' module → tokens that the router sent to each expert."""

    watch: Watch
    routed: dict[str, list[int]]


def watched(
    skeleton: Skeleton,
    layer: int,
    hidden: Hidden,
    ranks: Ranks,
    batches: Sequence[int],
    total: int,
    *,
    hessian: bool,
    keep: bool,
) -> Seen:
    """Run a loaded layer over this process's batches. keep: its output becomes what the next layer reads.

    batches: the numbers of this process's among `total`. Errors: InputError when activations are not finite.
    """
    weights, experts = _linears(skeleton, layer)
    watch = Watch(weights, f"model.layers.{layer}.self_attn", total, hessian)
    routers = [Router(each, watch) for each in experts]
    with EvenRows(), watch:
        for i, batch in enumerate(batches):
            watch.batch = batch
            out = skeleton.run(layer, hidden.get(i, skeleton.device))
            if keep:
                hidden.put(i, out)
    ranks.merge(watch)
    watch.batch = total
    with EvenRows(), watch:
        for router in routers:
            router.finish()
    _require_finite(watch, layer)
    return Seen(watch, {router.experts.name: router.routed for router in routers})


def run(skeleton: Skeleton, layer: int, hidden: Hidden) -> None:
    """Run a loaded layer without looking: only what leaves it is wanted."""
    with EvenRows():
        for i in range(len(hidden.shapes)):
            hidden.put(i, skeleton.run(layer, hidden.get(i, skeleton.device)))


def _linears(skeleton: Skeleton, layer: int) -> tuple[dict[tuple[int, int], tuple[str, ...]], list[Experts]]:
    """(address, elements) → linears of the checkpoint; and the modules that run experts."""
    module, stacked = skeleton.module(layer), {}
    weights: dict[tuple[int, int], tuple[str, ...]] = {}
    for name, (part, place) in skeleton.parts(layer).items():
        if not name.endswith(".weight") or skeleton.family.role(part.name) != LINEAR:
            continue
        value = module.get_parameter(place.parameter)
        held = value if place.expert is None else value[place.expert]
        at = (held.data_ptr(), held.numel())
        weights[at] = (*weights.get(at, ()), part.name.removesuffix(".weight"))
        if place.expert is not None:
            stacked[place.parameter.rpartition(".")[0]] = part.name
    return weights, [_experts(module, path, name, weights.values()) for path, name in stacked.items()]


def _experts(module: torch.nn.Module, path: str, example: str, linears: Collection[tuple[str, ...]]) -> Experts:
    match = EXPERT.fullmatch(example)
    assert match is not None
    name = match[1]
    firsts = {}
    for names in linears:
        found = EXPERT.fullmatch(f"{names[0]}.weight")
        if found and found[1] == name and len(names) == 2:
            firsts[int(found[2])] = names[0]
    return Experts(module.get_submodule(path), name, [firsts[expert] for expert in sorted(firsts)])


def _require_finite(watch: Watch, layer: int) -> None:
    for name, gathered in watch.gathered.items():
        if not bool(torch.isfinite(gathered.sum_K).all()):
            what = f"activations of layer {layer} are not finite"
            raise InputError(
                what, where=name, next="the source model overflows in its own dtype: take another revision"
            )
