"""How fast an engine will serve a model: the steps of a workload, each with the time of what it runs.

A step's time on the GPU is its quantized linears (measured, by M), attention, head with sampling, and elementwise kernels;
where a measurement is missing the roofline stands in, with the fraction of it that such kernels reach, and the prediction
says so. On the host the engine prepares the next step meanwhile: with asynchronous scheduling a step takes the longer of the
two (vLLM 0.25.1: v1/engine/core.py, step_with_batch_queue, two batches in flight). Times in microseconds unless they say seconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

from quantpub.curves import Curve, Level, Surface
from quantpub.gpus import BF16
from quantpub.roofline import Machine, Work, decode_attention, elementwise, head, pairs, prefill_attention, seen
from quantpub.schedule import EAGER, Chunk, Limits, Step, steps
from quantpub.served import Served
from quantpub.serving_costs import HOPPER, VLLM, EngineCosts, Rest, StandIns
from quantpub.workloads import Workload

LINEAR, ATTENTION, HEAD, ELEMENTWISE, QUANTIZE, HOST = (
    "linear", "attention", "head", "elementwise", "activation quantization", "host",
)  # fmt: skip
MEASURED = {  # fields of `Rest` whose want is said
    "decode": "decode attention", "prefill": "prefill attention", "head": "head", "elementwise": "elementwise kernels",
    "sustained": "sustained clock",
}  # fmt: skip
STOOD_IN = "torch's own kernels stood in"
PARTS = (LINEAR, QUANTIZE, ATTENTION, HEAD, ELEMENTWISE, HOST)


@dataclass(frozen=True)
class ByM:
    """The part of a workload that runs with M rows, padded."""

    m: int
    steps: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Prediction:
    """parts: seconds by PARTS; `host` is what the GPU waits for it. stands_in: what was estimated for want of a measurement.

    runs: one prediction for each level of concurrency, when there are several; the whole is all of them one after another.
    """

    workload: Workload
    seconds: float
    output_tokens: int
    total_tokens: int
    parts: Mapping[str, float]
    by_m: tuple[ByM, ...]
    stands_in: tuple[str, ...]
    runs: tuple[Prediction, ...] = ()

    @property
    def output_per_s(self) -> float:
        return self.output_tokens / self.seconds

    @property
    def total_per_s(self) -> float:
        return self.total_tokens / self.seconds

    def share(self, part: str) -> float:
        return self.parts[part] / self.seconds

    def as_json(self) -> dict[str, Any]:
        return {
            "workload": self.workload.name,
            "seconds": round(self.seconds, 4),
            "output_tokens_per_s": round(self.output_per_s, 1),
            "total_tokens_per_s": round(self.total_per_s, 1),
            "shares": {part: round(self.share(part), 4) for part in PARTS},
            "by_m": [[row.m, row.steps, row.tokens, round(row.seconds, 4)] for row in self.by_m],
            "stands_in": list(self.stands_in),
        } | ({"runs": [run.as_json() for run in self.runs]} if self.runs else {})


@dataclass(frozen=True)
class Model:
    """Everything that a step's time is made of. linear_us(m): all quantized linears of a forward pass, of a short burst.

    quantize_us(m): the part of it that quantizes activations. num: the number format that the GEMMs multiply in.
    baseline_us(m): the same linears in bf16, timed in the same way; needed only for `Rest.steady`.
    """

    served: Served
    machine: Machine
    linear_us: Callable[[int], float]
    rest: Rest = field(default_factory=Rest)
    engine: EngineCosts = VLLM
    num: str = BF16
    quantize_us: Callable[[int], float] | None = None
    baseline_us: Callable[[int], float] | None = None
    stand_ins: StandIns = HOPPER


def predict(workload: Workload, limits: Limits, model: Model) -> Prediction:
    """Seconds and tokens/s of a workload. Errors: InputError when a request does not fit into the KV cache."""
    runs = tuple(_one(run, limits, model) for run in workload.runs())
    return runs[0] if len(runs) == 1 else _together(workload, runs)


def _one(workload: Workload, limits: Limits, model: Model) -> Prediction:
    clock, parts = Clock(model), dict.fromkeys(PARTS, 0.0)
    by_m: dict[int, list[float]] = defaultdict(lambda: [0, 0, 0.0])
    for step in steps(workload, limits):
        took = clock.parts_us(step)
        row = by_m[step.m]
        row[0], row[1] = row[0] + step.repeat, row[1] + step.repeat * step.tokens
        row[2] += step.repeat * sum(took.values()) / 1e6
        for part, us in took.items():
            parts[part] += step.repeat * us / 1e6
    parts[HOST] += model.engine.start_us / 1e6
    rows = tuple(ByM(m, int(n), int(tokens), s) for m, (n, tokens, s) in sorted(by_m.items()))
    output = workload.requests * workload.output
    return Prediction(workload, sum(parts.values()), output, workload.tokens, parts, rows, missing(model.rest))


def _together(workload: Workload, runs: Sequence[Prediction]) -> Prediction:
    rows: dict[int, ByM] = {}
    for row in (row for run in runs for row in run.by_m):
        old = rows.get(row.m, ByM(row.m, 0, 0, 0.0))
        rows[row.m] = ByM(row.m, old.steps + row.steps, old.tokens + row.tokens, old.seconds + row.seconds)
    return Prediction(
        workload,
        sum(run.seconds for run in runs),
        sum(run.output_tokens for run in runs),
        sum(run.total_tokens for run in runs),
        {part: sum(run.parts[part] for run in runs) for part in PARTS},
        tuple(rows[m] for m in sorted(rows)),
        runs[0].stands_in,
        tuple(runs),
    )


def missing(rest: Rest) -> tuple[str, ...]:
    """What the roofline stands in for, and what was measured of other kernels than the engine's."""
    found = []
    for part, name in MEASURED.items():
        if not getattr(rest, part):
            found.append(name)
        elif part in rest.stood_in:
            found.append(f"{name} ({STOOD_IN})")
    return tuple(found)


def operations(served: Served, m: int) -> float:
    """Of all linears of a forward pass, the head's apart."""
    return float(sum(2 * m * linear.n * linear.k * linear.count for linear in served.linears))


class Clock:
    """Microseconds of a step, by part."""

    def __init__(self, model: Model) -> None:
        self.model, rest = model, model.rest
        self.linear = cache(self._linear)
        self.decode = Surface(rest.decode) if rest.decode else None
        self.prefill = Curve(rest.prefill) if rest.prefill else None
        self.head = Curve(rest.head) if rest.head else None
        self.elementwise = Curve(rest.elementwise) if rest.elementwise else None

    def parts_us(self, step: Step) -> dict[str, float]:
        """PARTS of one of the steps that `step` stands for. What the host makes the GPU wait is its own part."""
        linear = self.linear(step.m)
        quantize = self.model.quantize_us(step.m) if self.model.quantize_us else 0.0
        found = {
            LINEAR: linear - quantize,
            QUANTIZE: quantize,
            ATTENTION: self.model.served.layers * self._attention(step),
            HEAD: self._head(step.rows),
            ELEMENTWISE: self.model.served.layers * self._elementwise(step.m),
        }
        together = self.together(step)
        found |= {part: us * together for part, us in found.items() if part != HEAD}
        return found | {HOST: self._host(step, sum(found.values()))}

    def together(self, step: Step) -> float:
        """How much longer a bf16 layer takes than its parts do one by one; taken to be so with other linears, too."""
        if step.graph == EAGER:
            return self._prompts_together
        return self._decodes_together(max(1, step.rows)) if self._decodes_together else 1.0

    @cached_property
    def _prompts_together(self) -> float:
        rest, layers = self.model.rest, self.model.served.layers
        if not (rest.prompts and self.prefill and self.elementwise and self.model.baseline_us):
            return 1.0
        prompt, m, whole = rest.prompts
        linear = self._lasting(self.model.baseline_us(m), m, BF16) / layers
        return whole / (linear + m // prompt * self._prompt(self.prefill, prompt) + self.elementwise(m))

    @cached_property
    def _decodes_together(self) -> Curve | None:
        rest, layers = self.model.rest, self.model.served.layers
        if not (rest.decodes and self.decode and self.elementwise and self.model.baseline_us):
            return None
        base = self.model.baseline_us
        parts = {
            (b, c): self._lasting(base(b), b, BF16) / layers + self.decode(b, c) + self.elementwise(b)
            for b, c in rest.decodes
        }
        return Level({b: us / parts[b, c] for (b, c), us in rest.decodes.items()})

    def _linear(self, m: int) -> float:
        return self._lasting(self.model.linear_us(m), m, self.model.num)

    def _lasting(self, burst: float, m: int, num: str) -> float:
        """Large GEMMs draw more power than a GPU may use for long: its clock falls in the measure that they keep it busy."""
        model = self.model
        busy = min(1.0, 1e6 * operations(model.served, m) / model.machine.rate(num) / burst)
        return burst * (1 + busy * (1 / self.sustained - 1))

    @cached_property
    def sustained(self) -> float:
        """The part of a burst's rate that lasts."""
        rest, model = self.model.rest, self.model
        if rest.steady and model.baseline_us:
            m, us = rest.steady
            return min(1.0, model.baseline_us(m) / us)
        return rest.sustained or model.stand_ins.sustained

    def _attention(self, step: Step) -> float:
        """One layer. Decodes beside prompts run in the same kernel."""
        decode = self._decode(step.decodes, step.context) if step.decodes else 0.0
        prefill = sum(self._prefill(chunk) for chunk in step.chunks)
        both = bool(decode and prefill)
        return (decode + prefill) * ((self.model.rest.mixed or 1.0) if both else 1.0)

    def _decode(self, sequences: int, context: float) -> float:
        served, stand_ins = self.model.served, self.model.stand_ins
        if self.decode:
            return self.decode(sequences, seen(served, context))
        waves = sequences * served.kv_heads / self.model.machine.gpu.multiprocessors
        floor = self._floor(decode_attention(served, sequences, context), stand_ins.decode)
        return stand_ins.attention_us + waves * stand_ins.tile_us + floor

    def _prefill(self, chunk: Chunk) -> float:
        """A piece that follows others is as fast a pair as the whole prompt would be up to its end."""
        served, end = self.model.served, chunk.before + chunk.tokens
        if self.prefill:  # measured without a window
            whole = pairs(replace(served, window=None), Chunk(end, 0, 1))
            return self._prompt(self.prefill, end) * pairs(served, chunk) / whole
        stand_ins = self.model.stand_ins
        return stand_ins.attention_us / 2 + self._floor(prefill_attention(served, chunk), stand_ins.prefill)

    def _prompt(self, prefill: Curve, tokens: int) -> float:
        """A whole prompt. Beyond the longest that was measured as fast a pair as that one: attention grows with the square.

        Below the shortest as fast a token: there the bytes of queries, keys and values count.
        """
        shortest, longest = prefill.x[0], prefill.x[-1]
        if tokens <= longest:
            return prefill(tokens) * min(1.0, tokens / shortest)
        return prefill(longest) * tokens * (tokens + 1) / (longest * (longest + 1))

    def _head(self, rows: int) -> float:
        stand_ins = self.model.stand_ins
        return self.head(rows) if self.head else self._floor(head(self.model.served, rows), stand_ins.streams)

    def _elementwise(self, m: int) -> float:
        if self.elementwise:
            return self.elementwise(m)
        stand_ins = self.model.stand_ins
        least = stand_ins.elementwise * stand_ins.kernel_us
        return least + self._floor(elementwise(self.model.served, m), stand_ins.streams)

    def _floor(self, work: Work, part: float) -> float:
        return work.us(self.model.machine) / part

    def _host(self, step: Step, gpu: float) -> float:
        engine = self.model.engine
        busy = engine.step_us + engine.sequence_us * step.rows + self.model.served.layers * engine.layer_us[step.graph]
        waits = max(0.0, busy - gpu) if engine.asynchronous else busy
        return engine.gap_us + waits
