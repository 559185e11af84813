"""Kernel times measured on real GPUs that came with quantpub: what was timed, on which shapes, and what made it.

The files in stored_profiles/ are made by scripts/store_profile.py, which says what of a profile is kept. Several may hold the
same GPU. `derived` takes the times of other shapes from them.

Legend: M tokens, N out_features, K in_features, x rows that one weight matrix meets: M, of experts fewer. Times in microseconds.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from quantpub.gpus import BF16, Gpu, find
from quantpub.roofline import Machine, Work, gemm, machine, touched
from quantpub.scheme import Scheme, preset
from quantpub.served import Linear

FOLDER = Path(__file__).parent / "stored_profiles"
QUALITY = "KL to bf16 in nats a token of a 28M Llama trained on program text (docs/quality.md); of another model it is another"
KL_28M = {
    "w4a16-rtn": 0.04741,
    "w4a16": 0.03483,
    "w4a16-asym": 0.03361,
    "w4a16-hqq": 0.03356,
    "int4-hqq-tile": 0.03058,
    "nvfp4a16": 0.02396,
    "mxfp4": 0.04646,
    "w4a16-fp8-down": 0.02726,
    "fp8-dynamic": 0.00600,
    "fp8-dynamic-search": 0.00572,
    "fp8-block": 0.00558,
    "int8-dynamic": 0.00195,
    "w8a16": 0.00021,
    "int8-smoothquant": 0.00158,
    "fp8-static": 0.00628,
    "nvfp4": 0.07127,
    "w4a16-gptq": 0.02292,
}  # recipe → QUALITY; a test compares it with that table


@dataclass(frozen=True)
class Part:
    """A weight of a measured call. experts: how many such weights there are, of which a token goes through top_k."""

    n: int
    k: int
    experts: int = 0
    top_k: int = 0

    @property
    def linear(self) -> Linear:
        """One layer of it."""
        return Linear("", self.n, self.k, max(1, self.top_k), 1, self.experts)

    def work(self, m: int, scheme: Scheme | None) -> Work:
        return gemm(self.linear, m, scheme, self.top_k)

    def rows(self, m: int) -> float:
        """x"""
        return m * max(1, self.top_k) / touched(self.linear, m, self.top_k)


@dataclass(frozen=True)
class Point:
    """One of a series' GEMMs at x: its floor, its measured time, and whether memory is what bounds it."""

    x: float
    floor: float
    us: float
    by_memory: bool


@dataclass(frozen=True, eq=False)
class Series:
    """A kernel on one shape, or on several summed. row: its name in the kernel tables. scheme: None for bf16. us: by M."""

    gpu: str
    kernel: str
    row: str
    scheme: Scheme | None
    parts: tuple[Part, ...]
    us: Mapping[int, float]
    machine: Machine

    @property
    def experts(self) -> bool:
        return self.parts[0].experts > 0

    @property
    def of_one_shape(self) -> bool:
        return len(self.parts) == 1

    @property
    def name(self) -> str:
        return " ".join(dict.fromkeys((self.row or self.kernel, self.scheme.name if self.scheme else BF16)))

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """By M. Of several shapes that were summed, their mean."""
        return tuple(self._point(m, us / len(self.parts)) for m, us in sorted(self.us.items()))

    def _point(self, m: int, us: float) -> Point:
        works = [part.work(m, self.scheme) for part in self.parts]
        floor = sum(work.us(self.machine) for work in works) / len(works)
        moved = 1e6 * sum(work.bytes for work in works) / len(works) / self.machine.bandwidth
        return Point(self.parts[0].rows(m), floor, us, moved > 0.99 * floor)


@dataclass(frozen=True, eq=False)
class Stored:
    """What was measured on one GPU. rest: what runs beside the linears, of the model whose dimensions `model` holds."""

    gpu: Gpu
    machine: Machine
    series: tuple[Series, ...]
    rest: Mapping[str, Any]
    model: Mapping[str, Any]
    evidence: tuple[str, ...]


@cache
def stored() -> Mapping[str, Stored]:
    """Those that came with quantpub, by GPU."""
    return read(sorted(FOLDER.glob("*.json")))


def read(paths: Iterable[Path]) -> dict[str, Stored]:
    """GPU → everything that the files hold of it. The first file with rates of the GPU gives them for all of its series."""
    files: dict[str, list[dict[str, Any]]] = {}
    for path in paths:
        content = json.loads(path.read_text("utf-8"))
        files.setdefault(find(content["gpu"]).name, []).append(content)
    return {name: _stored(find(name), contents) for name, contents in files.items()}


def _stored(gpu: Gpu, contents: Sequence[Mapping[str, Any]]) -> Stored:
    arounds: list[Mapping[str, Any]] = [content.get("around") or {} for content in contents]
    around: Mapping[str, Any] = next((found for found in arounds if "machine" in found), {"machine": {}})
    rates = around["machine"]
    on = machine(gpu, rates.get("bandwidth"), rates.get("compute"))
    pairs = [_series(gpu.name, entry, on) for content in contents for entry in content["series"]]
    series = (*(kernel for kernel, _ in pairs), *_medians([base for _, base in pairs]))
    evidence = tuple(source["evidence"] for content in contents for source in content["made_by"]["from"])
    return Stored(gpu, on, series, around.get("rest", {}), around.get("model", {}), evidence)


def _series(gpu: str, entry: Mapping[str, Any], on: Machine) -> tuple[Series, Series]:
    """The kernel's, and bf16's in the same rounds."""
    parts, scheme = tuple(Part(*part) for part in entry["parts"]), preset(entry["scheme"], entry.get("group"))
    own, base = (
        {int(m): float(us) for m, us in zip(entry["m"], entry[side], strict=True)} for side in ("us", "bf16_us")
    )
    kernel = Series(gpu, entry["kernel"], entry["row"], scheme, parts, own, on)
    return kernel, Series(gpu, BF16, BF16, None, parts, base, on)


def _medians(bases: Sequence[Series]) -> list[Series]:
    """One bf16 series a shape, of the kernels that it was timed beside."""
    shapes: dict[tuple[Part, ...], list[Series]] = {}
    for base in bases:
        shapes.setdefault(base.parts, []).append(base)
    found = []
    for parts, same in shapes.items():
        sizes = sorted({m for base in same for m in base.us})
        us = {m: statistics.median(base.us[m] for base in same if m in base.us) for m in sizes}
        found.append(Series(same[0].gpu, BF16, BF16, None, parts, us, same[0].machine))
    return found
