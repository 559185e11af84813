"""Several processes at one calibration, as `torchrun` starts them: each takes its share of the batches, and they add up.

Batches are cut the same whatever the number of processes, and dealt out in turn. Process 0 alone writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from quantpub import env
from quantpub.observe.watch import Gathered, Watch


@dataclass(frozen=True)
class Ranks:
    """rank: this process among `world`. device: the one that it computes on."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mine(self, batches: int) -> list[int]:
        return list(range(self.rank, batches, self.world))

    def agree(self, value: int) -> int:
        """The smallest that any process names."""
        if self.world == 1:
            return value
        found = torch.tensor(value, device=self.device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN)
        return int(found)

    def share(self, value: Any) -> Any:
        """What process 0 holds."""
        if self.world == 1:
            return value
        held = [value]
        torch.distributed.broadcast_object_list(held, 0)
        return held[0]

    def merge(self, watch: Watch) -> None:
        """Every process ends with what all of them gathered."""
        if self.world == 1:
            return
        everybody: list[Any] = [None] * self.world
        shapes = {name: g.sum_K.shape[0] for name, g in watch.gathered.items()}
        torch.distributed.all_gather_object(everybody, (shapes, watch.inputs, watch.kv))
        for theirs, inputs, kv in everybody:
            watch.inputs |= inputs
            for attention, pair in kv.items():
                mine = watch.kv.get(attention, (0.0, 0.0))
                watch.kv[attention] = (max(mine[0], pair[0]), max(mine[1], pair[1]))
            for name, k in theirs.items():
                if name not in watch.gathered:
                    watch.gathered[name] = Gathered(k, watch.batches, torch.device(self.device), watch.hessian)
        for name in sorted(watch.gathered):
            self._merge(watch.gathered[name])

    def _merge(self, gathered: Gathered) -> None:
        count = torch.tensor(gathered.tokens, device=self.device)
        torch.distributed.all_reduce(count)
        gathered.tokens = int(count)
        torch.distributed.all_reduce(gathered.amax_K, torch.distributed.ReduceOp.MAX)
        torch.distributed.all_reduce(gathered.sum_K)
        if gathered.sum_KK is not None:
            torch.distributed.all_reduce(gathered.sum_KK)
        everybody: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(everybody, {i: rows.cpu() for i, rows in gathered.samples.items()})
        gathered.samples = {i: rows.to(self.device) for theirs in everybody for i, rows in theirs.items()}


def join(device: str) -> Ranks:
    """The processes that torchrun started this one among; one alone where it did not."""
    rank, local, world = env.torchrun()
    if world == 1:
        return Ranks(device=device)
    if device == "cuda":
        torch.cuda.set_device(local)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    return Ranks(rank, world, device)
