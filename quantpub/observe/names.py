"""Where the weights of a decoder layer lie in a checkpoint: the parameters of transformers' module, from the plan's 2-D parts.

transformers 5 holds experts as 3-D parameters, [E, 2I, K] gate over up and [E, K, I] down, and renames some modules;
checkpoints keep the names that engines know. Tests hold every family's layer to transformers' own loading.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantpub.checkpoint import Checkpoint, Slice
from quantpub.families import Family

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")
# What checkpoints call otherwise than transformers' modules: (pattern of the name in a layer, replacement)
RENAMED = (
    (r"block_sparse_moe\.gate\.(.*)", r"mlp.router.\1"),
    (r"block_sparse_moe\.(.*)", r"mlp.\1"),
    (r"mlp\.moe_statics\.(.*)", r"mlp.gate.moe_statics.\1"),
    (r"mlp\.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),
)
DOWN = ("down_proj", "w2")


@dataclass(frozen=True)
class Place:
    """Where a tensor of the checkpoint goes: a parameter of the layer, or of a 3-D one the rows from `start` of an expert."""

    parameter: str
    expert: int | None = None
    start: int = 0

    def rows(self, part: Slice) -> slice:
        return slice(self.start, self.start + part.info.shape[0])


def layers_of(checkpoint: Checkpoint, family: Family) -> dict[int, dict[str, Slice]]:
    """layer → name within it → where it lies, for every decoder layer of the checkpoint."""
    found: dict[int, dict[str, Slice]] = {}
    for shard in checkpoint.shards:
        for part in checkpoint.slices(shard, family):
            if match := LAYER.fullmatch(part.name):
                found.setdefault(int(match[1]), {})[match[2]] = part
    return dict(sorted(found.items()))


def places(parts: Mapping[str, Slice], parameters: Mapping[str, tuple[int, ...]], family: Family) -> dict[str, Place]:
    """name within a layer → its place among `parameters` (name → shape); names that have none are left out."""
    found = {}
    for name, part in parts.items():
        place = _expert(name, part, parameters, family) if EXPERT.fullmatch(name) else _plain(name, parameters)
        if place is not None:
            found[name] = place
    return found


def _plain(name: str, parameters: Mapping[str, tuple[int, ...]]) -> Place | None:
    for candidate in _candidates(name):
        if candidate in parameters:
            return Place(candidate)
    return None


def _candidates(name: str) -> list[str]:
    renamed = [re.sub(f"^{old}$", new, name) for old, new in RENAMED if re.fullmatch(old, name)]
    return [name, *renamed]


def _expert(name: str, part: Slice, parameters: Mapping[str, tuple[int, ...]], family: Family) -> Place | None:
    if plain := _plain(name, parameters):  # experts that are modules of their own
        return plain
    match = EXPERT.fullmatch(name)
    assert match is not None
    experts, expert, leaf = match[1], int(match[2]), match[3]
    if leaf in DOWN:
        stacked, start = "down_proj", 0
    else:
        stacked, start = "gate_up_proj", _order(leaf, family) * part.info.shape[0]
    for candidate in _candidates(f"{experts}.{stacked}"):
        if candidate in parameters:
            return Place(candidate, expert, start)
    return None


def _order(leaf: str, family: Family) -> int:
    """0 for the gate, 1 for what it multiplies."""
    pairs: Sequence[tuple[str, ...]] = [pair for pair in family.fused.values() if leaf in pair]
    return pairs[0].index(leaf)
