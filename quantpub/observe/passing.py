"""A pass through the model, layer by layer: what observing and solving share. It begins where a killed one can go on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from quantpub.checkpoint import Checkpoint
from quantpub.evidence import made_by
from quantpub.forward import quiet_transformers
from quantpub.layer_store import LayerStore
from quantpub.memory import give_back, keep_freed_memory
from quantpub.observe.batches import cut
from quantpub.observe.hidden import Hidden
from quantpub.observe.ranks import Ranks
from quantpub.observe.skeleton import Skeleton
from quantpub.samples import Samples

SHARE = 4  # hidden states stay in memory while they take at most one part in so many of what is free


def settings(device: str) -> dict[str, Any]:
    """What statistics hang on beside source and data."""
    return {"device": torch.device(device).type}


@contextlib.contextmanager
def begun(store: LayerStore, ranks: Ranks) -> Iterator[None]:
    """What a pass goes on in: the store to itself, no gradients, no talk of others."""
    lock = store.locked() if ranks.first else contextlib.nullcontext()
    with lock, torch.inference_mode(), quiet_transformers():
        keep_freed_memory()
        yield


class Pass:
    """skeleton: the model. hidden: what enters the present layer. mine: numbers of this process's batches."""

    def __init__(self, checkpoint: Checkpoint, samples: Samples, store: LayerStore, ranks: Ranks) -> None:
        """Errors: InputError when transformers does not build the model, UnavailableError for a full disk."""
        self._store, self._ranks, self._data = store, ranks, samples.record
        folder = checkpoint.source.path("config.json").parent
        self.skeleton = Skeleton(checkpoint, folder, ranks.device)
        batches = cut(samples.rows, ranks.device)
        self.batches, self.mine = len(batches), ranks.mine(len(batches))
        self.tokens = sum(batch.numel() for batch in batches)
        self._rows = [batches[i] for i in self.mine]
        self.hidden = self._hidden(store.folder)
        self.experts: dict[str, list[int]] = {}

    def _hidden(self, folder: Path) -> Hidden:
        shapes = [(int(rows.shape[0]), int(rows.shape[1])) for rows in self._rows]
        name = f"{self._ranks.rank}of{self._ranks.world}"
        args = (folder, shapes, self.skeleton.hidden_size, self.skeleton.dtype)
        return Hidden(*args, _where(Hidden(*args, None, name).nbytes, self._ranks.device), name)

    def layers(self, progress: Callable[[int, int], None]) -> Iterator[int]:
        """Each layer still to do, loaded; afterwards its output is what enters the next."""
        first = self._begin()
        for layer in range(first, self.skeleton.layers):
            progress(layer, self.skeleton.layers)
            self.skeleton.load(layer)
            yield layer
            self.skeleton.unload(layer)
            self.hidden.next(save=layer + 1 < self.skeleton.layers)
        progress(self.skeleton.layers, self.skeleton.layers)

    def _begin(self) -> int:
        """Where to go on: the layer whose input every process has on disk and before which every layer is finished."""
        saved = self.hidden.saved()
        finished = len(self._store.finished()) if self._ranks.first else 0
        first = self._ranks.agree(-1 if saved is None else saved)
        first = self._ranks.share(first if first <= finished else -1)
        if self._ranks.agree(int(0 < first == saved)):  # otherwise every process begins anew: none may be a layer ahead
            self.hidden.resume()
            for layer in range(first):
                self._count(self._store.read(layer)[1])
        else:
            first = 0
            for i, hidden_BTH in enumerate(self.skeleton.embed(self._rows)):
                self.hidden.put(i, hidden_BTH)
            self.hidden.start()
        if self._ranks.first:
            self._store.begin(first)
        return first

    def store(self, layer: int, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
        """Keep what was found of a layer."""
        self._count(metadata)
        if self._ranks.first:
            self._store.add(layer, {name: tensor.cpu() for name, tensor in tensors.items()}, metadata)

    def _count(self, metadata: Mapping[str, Any]) -> None:
        self.experts |= metadata.get("experts", {})

    def end(self, key: str, stage: str) -> dict[str, Any]:
        """The record, written; what was only there to go on from is gone."""
        record = {
            "key": key,
            "made_by": made_by(stage, settings(self._ranks.device), ("torch", "transformers")),
            "data": self._data,
            "tokens": self.tokens,
            "experts": self.experts,
        }
        whole = self._store.end(record) if self._ranks.first else None
        self.hidden.remove()
        for path in self._store.folder.glob("hidden-*") if self._ranks.first else ():
            path.unlink(missing_ok=True)  # of a killed run of another number of processes
        give_back()
        found: dict[str, Any] = self._ranks.share(whole)
        return found


def _where(nbytes: int, device: str) -> str | None:
    """The device in whose memory hidden states of this size stay, or None."""
    if device == "cuda" and nbytes * SHARE <= torch.cuda.mem_get_info()[0]:
        return device
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    free = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), 0)
    return "cpu" if nbytes * SHARE <= free else None
