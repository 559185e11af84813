"""Stage `observe`: one pass of calibration data through the model gathers what every recipe needs, once for all.

    samples ─► embed ─► layer 0 ─► layer 1 ─► …          one layer's weights in memory at a time
                          │          │
                          ▼          ▼
                     statistics of every input, a file a layer, in the cache

A second recipe on the same source, data and settings reads the cache. A killed run goes on with the last layer whose
input is on disk. Several processes under `torchrun` share the batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from quantpub.checkpoint import Checkpoint
from quantpub.layer_store import LayerStore
from quantpub.observe.layers import Seen, watched
from quantpub.observe.passing import Pass, begun, settings
from quantpub.observe.ranks import join
from quantpub.samples import Request, identify, read_samples
from quantpub.statistics import Statistics, folder_of, statistics_key

Progress = Callable[[int, int], None]  # layers done, layers in all


def observe(
    checkpoint: Checkpoint, request: Request, device: str = "cpu", progress: Progress = lambda done, total: None
) -> Statistics:
    """The statistics of `checkpoint` on the data asked for: out of the cache, or gathered now.

    Errors: InputError (data, model), AuthError and UnavailableError (a dataset of the Hub, the disk), ConflictError
    (another process gathers the same).
    """
    ranks = join(device)
    key = statistics_key(checkpoint, identify(request, checkpoint), settings(device))
    if found := Statistics.open(key):
        return found
    store = LayerStore(folder_of("observed", key))
    with begun(store, ranks):
        run = Pass(checkpoint, read_samples(request, checkpoint), store, ranks)
        for layer in run.layers(progress):
            seen = watched(run.skeleton, layer, run.hidden, ranks, run.mine, run.batches, hessian=False, keep=True)
            run.store(layer, *described(seen))
        return Statistics(store, run.end(key, "observe"))


def described(seen: Seen) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A layer's statistics as they are kept: tensors, and what is JSON."""
    gathered = seen.watch.gathered
    tensors = {}
    for name, found in gathered.items():
        tensors[f"{name}.amax_K"] = found.amax_K
        tensors[f"{name}.second_moment_K"] = (found.sum_K / found.tokens).float()
        tensors[f"{name}.sample_RK"] = found.sample()
    return tensors, {
        "inputs": dict(sorted(seen.watch.inputs.items())),
        "tokens": {name: found.tokens for name, found in gathered.items()},
        "experts": seen.routed,
        "kv": {name: list(pair) for name, pair in seen.watch.kv.items()},
    }
