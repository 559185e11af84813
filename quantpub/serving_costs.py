"""What a served step costs beside its linears: as it was measured, else as an engine and kernels like these are known to take.

`Rest` is measured on a GPU for one model's dimensions (`around`), `EngineCosts` belongs to an engine's version, `StandIns`
say how far kernels stay behind the roofline where nothing was measured. Times in microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantpub.curves import Pairs, Points
from quantpub.schedule import EAGER, FULL, PIECES


@dataclass(frozen=True)
class Rest:
    """What was measured beside the linears. A part left empty is estimated.

    decode: (sequences, context) → µs of one layer's attention. prefill: prompt tokens → µs of one layer's attention, one of
    many sequences. mixed: a batch of both over the sum of its parts. head: rows → µs with sampling. elementwise: M → µs of
    one layer. sustained: the part of the rate of large GEMMs that is left when they run on and on. steady: (M, µs of all bf16
    linears of a forward pass) after a second of nothing else: with the baseline's own time of as many rows it says the same,
    whatever the clock was while that was taken. prompts: (tokens of a prompt, M, µs) and decodes: (sequences, context) → µs,
    of a whole bf16 layer among others like it. stood_in: the fields that torch's own kernels were timed for in place of the
    engine's.
    """

    decode: Pairs = field(default_factory=dict)
    prefill: Points = field(default_factory=dict)
    head: Points = field(default_factory=dict)
    elementwise: Points = field(default_factory=dict)
    sustained: float | None = None
    mixed: float | None = None
    steady: tuple[int, float] | None = None
    prompts: tuple[int, int, float] | None = None
    decodes: Pairs = field(default_factory=dict)
    stood_in: tuple[str, ...] = ()

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Rest:
        """From lists of points, as evidence holds them: `decode` [[sequences, context, µs], …], `head` [[rows, µs], …]."""
        decode = {(int(b), int(c)): float(us) for b, c, us in value.get("decode", ())}
        curves = {
            part: {int(x): float(us) for x, us in value.get(part, ())} for part in ("prefill", "head", "elementwise")
        }
        m, us = value.get("steady") or (0, 0.0)
        steady = (int(m), float(us)) if m else None
        prompt, tokens, took = value.get("prompts") or (0, 0, 0.0)
        return Rest(
            decode,
            **curves,
            sustained=value.get("sustained"),
            mixed=value.get("mixed"),
            steady=steady,
            prompts=(int(prompt), int(tokens), float(took)) if prompt else None,
            decodes={(int(b), int(c)): float(us) for b, c, us in value.get("decodes", ())},
            stood_in=tuple(value.get("stood_in", ())),
        )


@dataclass(frozen=True)
class EngineCosts:
    """What an engine adds. gap_us: small kernels of a step outside of its graph. step_us, sequence_us: the host's for a step.

    layer_us: the host's work for a layer when no graph, or one a piece, runs. start_us: from the call to the first step, and
    from the last to the return. asynchronous: the host prepares a step while the GPU runs the one before.
    """

    engine: str
    version: str
    gap_us: float
    step_us: float
    sequence_us: float
    layer_us: Mapping[str, float]
    start_us: float
    asynchronous: bool
    source: str


@dataclass(frozen=True)
class StandIns:
    """How kernels stand to the roofline where they were not measured.

    kernel_us: a kernel in a CUDA graph with next to nothing to do. elementwise: such kernels of a layer.
    attention_us: the least that attention of a layer takes, split and combined. tile_us: starting and ending the work on one
    head of one sequence, of which every multiprocessor does one at a time. decode, streams (parts of the bandwidth), prefill (of
    the rate of large GEMMs): what is reached. sustained: as in Rest.
    """

    kernel_us: float
    elementwise: int
    attention_us: float
    tile_us: float
    decode: float
    prefill: float
    streams: float
    sustained: float
    source: str


VLLM = EngineCosts(
    "vllm", "0.25.1", gap_us=100, step_us=700, sequence_us=8, layer_us={EAGER: 100, PIECES: 40, FULL: 0}, start_us=5000,
    asynchronous=True,
    source="about 30 small kernels a step that prepare inputs and sample (v1/worker/gpu/model_runner.py), 3 µs each; the "
    "host's work is assumed, and on an H200 hidden behind the GPU's in every workload here",
)  # fmt: skip
HOPPER = StandIns(
    kernel_us=2.5, elementwise=5, attention_us=9, tile_us=1, decode=0.95, prefill=0.5, streams=0.9, sustained=0.85,
    source="set on vLLM 0.25.1 serving Qwen3-8B's shapes in bf16 on an H200: kernel_us and attention_us, with gap_us, "
    "on one request at a time; decode and tile_us on decode-heavy; sustained on prefill-heavy. prefill and streams are assumed",
)  # fmt: skip
