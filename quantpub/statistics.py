"""A finished calibration: what was seen of the input of every linear, kept in a cache and read layer by layer.

Its key is who made it: the source, the data, and the settings, so that one calibration serves every recipe. Members of one
engine-merged weight read the same input, and share one entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from quantpub import env
from quantpub.checkpoint import Checkpoint, public_config
from quantpub.errors import InputError
from quantpub.files import sha256_json
from quantpub.gemms import EXPERT, LAYER
from quantpub.layer_store import LayerStore
from quantpub.stats import Observed

VERSION = 2  # of what is gathered, and how
FIELDS = ("amax_K", "second_moment_K", "sample_RK")


def statistics_key(checkpoint: Checkpoint, data: dict[str, Any], settings: dict[str, Any]) -> str:
    """sha256 of source, data and settings. Whole shards count: an edit of a few weights is another calibration."""
    weights = {shard: checkpoint.source.sha256(shard) for shard in checkpoint.shards}
    return sha256_json([VERSION, weights, public_config(checkpoint), data, settings])


def folder_of(kind: str, key: str) -> Path:
    """kind: `observed`, or `solved` for what sequential algorithms make."""
    return env.cache() / kind / key


class Statistics:
    """key: who it is. record: data, sample ids, settings, versions, token counts of experts."""

    def __init__(self, store: LayerStore, record: dict[str, Any]) -> None:
        self.key: str = record["key"]
        self.record = record
        self._layer = lru_cache(maxsize=2)(store.read)

    @staticmethod
    def open(key: str) -> Statistics | None:
        """The calibration in the cache, or None where there is none, or it is not whole and unharmed."""
        store = LayerStore(folder_of("observed", key))
        record = store.whole()
        return None if record is None or record.get("key") != key else Statistics(store, record)

    def input(self, module: str) -> Observed:
        """What was seen of a linear's input. Errors: InputError when the linear's input was not observed."""
        tensors, metadata = self._of(module)
        owner = metadata["inputs"].get(module)
        if owner is None:
            what = "calibration did not reach it"
            raise InputError(what, where=module, next="let the recipe ignore it, or take one that needs no calibration")
        return Observed(int(metadata["tokens"][owner]), *(tensors[f"{owner}.{field}"] for field in FIELDS))

    def has(self, module: str) -> bool:
        """Whether the linear's input was observed."""
        match = LAYER.match(module)
        return match is not None and int(match[1]) < self.record["layers"] and module in self._of(module)[1]["inputs"]

    def tokens(self, module: str) -> int:
        """How many tokens the model itself sent to the linear."""
        _, metadata = self._of(module)
        if expert := EXPERT.search(f"{module}."):
            return int(metadata["experts"][f"{module[: expert.start()]}.experts"][int(expert[1])])
        return int(metadata["tokens"].get(metadata["inputs"].get(module), 0))

    def modules(self) -> list[str]:
        """The linears whose input was observed."""
        return [module for layer in range(self.record["layers"]) for module in self._layer(layer)[1]["inputs"]]

    def kv(self, attention: str) -> tuple[float, float]:
        """Largest magnitude of keys, as the cache holds them, and of values. Errors: InputError when not observed."""
        found = self._of(attention + ".")[1]["kv"].get(attention)
        if found is None:
            what = "calibration saw no keys and values of it"
            raise InputError(what, where=attention, next="take a recipe without an FP8 KV cache")
        return float(found[0]), float(found[1])

    def _of(self, module: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        match = LAYER.match(module)
        layer = int(match[1]) if match else -1
        if not 0 <= layer < self.record["layers"]:
            raise InputError("it is in no decoder layer, so calibration did not reach it", where=module)
        return self._layer(layer)


def require_experts(record: Mapping[str, Any], minimum: int) -> None:
    """record: of statistics or of what was solved. Errors: InputError for the first expert that the model sent too little."""
    for name, counts in record.get("experts", {}).items():
        poor = [expert for expert, count in enumerate(counts) if count < minimum]
        if poor:
            what = f"expert {poor[0]} saw {counts[poor[0]]} of the calibration's tokens, fewer than {minimum}"
            more = f" ({len(poor)} of {len(counts)} experts there)" if len(poor) > 1 else ""
            advice = "calibrate with more or other samples, or lower calibration.min_expert_tokens in the recipe"
            raise InputError(what + more, where=name, next=advice)
