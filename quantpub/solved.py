"""Linears that a sequential algorithm solved, each layer with the layers before it quantized: kept as their layout packs them.

A Hessian is as large as a weight and is gone when its layer is done, so what is kept is the result. `unpack` undoes `pack`
bit for bit, whatever the layout, so it serves other layouts too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from quantpub.actions import Action
from quantpub.errors import InputError
from quantpub.files import sha256_json
from quantpub.gemms import LAYER
from quantpub.layer_store import LayerStore
from quantpub.plan import Plan
from quantpub.qtensor import QTensor
from quantpub.statistics import folder_of
from quantpub.treatments import Treatment

VERSION = 1  # of how layers are gone through


def solved_key(plan: Plan, statistics_key: str) -> str:
    """sha256 of source, data and settings (`statistics_key`), and of the recipe and its layouts."""
    layouts = [treatment.layout.name for treatment in plan.treatments]
    return sha256_json([VERSION, statistics_key, plan.recipe.digest(), layouts])


class Solved:
    """record: what made it."""

    def __init__(self, store: LayerStore, record: dict[str, Any], treatments: Sequence[Treatment]) -> None:
        self.record, self._treatments = record, treatments
        self._layer = lru_cache(maxsize=2)(store.read)

    @staticmethod
    def open(key: str, treatments: Sequence[Treatment]) -> Solved | None:
        """What is in the cache, or None where there is none, or it is not whole and unharmed."""
        store = LayerStore(folder_of("solved", key))
        record = store.whole()
        return None if record is None or record.get("key") != key else Solved(store, record, treatments)

    def qtensor(self, action: Action) -> QTensor:
        """Errors: InputError when the linear is in no decoder layer."""
        match = LAYER.match(action.module)
        if match is None or int(match[1]) >= self.record["layers"]:
            raise InputError("it is in no decoder layer, so it was not solved", where=action.module)
        assert action.treatment is not None
        treatment, (n, k) = self._treatments[action.treatment], action.part.info.shape
        tensors, _ = self._layer(int(match[1]))
        prefix = f"{action.module}."
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        return treatment.layout.unpack(own, treatment.scheme, (n, k))
