"""The work of a profile: the GEMMs, the kernels that take them, and the measuring of all of it on one device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from quantpub.around import around
from quantpub.artifact import Artifact
from quantpub.decode import Decoder
from quantpub.engines.ask import make_request, start
from quantpub.engines.choice import Ask
from quantpub.errors import InputError
from quantpub.experts import ExpertLayer, expert_layers
from quantpub.gemms import Gemm, engine_gemms
from quantpub.gpus import of_device
from quantpub.kernels import BASELINE
from quantpub.kernels.choices import Choice, baseline, choose, own_weight
from quantpub.kernels.cuda import gpu_bench
from quantpub.kernels.measure import Budget, GemmBench, Measured, failure, measure
from quantpub.kernels.measure_cuda import CudaGemm, Taken, measure_cuda, unprepared
from quantpub.kernels.measure_moe import MoeChoice, choose_moe, measure_experts
from quantpub.kernels.moe import MOE_KERNELS
from quantpub.kernels.serving import asks, cure_kernels, engine_block, expert_asks
from quantpub.roofline import computes_in, weight_bits
from quantpub.schedule import vllm_limits
from quantpub.served import served
from quantpub.timing import Bench, wall

Progress = Callable[[int, int], None]  # (done, total) of (GEMM, kernel, M)
Settings = Mapping[str, Any]
SEEN_AT = (1, 256)  # tokens: several kernels have another path for few of them


@dataclass(frozen=True)
class Work:
    """gemms: the dense ones, and on a CPU the experts' too. layers: experts that a GPU's kernels run as one operation."""

    decoder: Decoder
    gemms: list[Gemm]
    layers: list[ExpertLayer]
    choices: list[Choice]
    moe_choices: list[MoeChoice]
    device: str
    tp: int

    def asked(self) -> list[Choice | MoeChoice]:
        return [*self.choices, *self.moe_choices]

    def entries(self) -> list[dict[str, Any]]:
        """The evidence's `gemms`."""
        dense = [gemm.as_json() | self._made(gemm.members[0]) for gemm in self.gemms]
        sides = ({"n": 2 * layer.intermediate, "k": layer.hidden} for layer in self.layers)
        grouped = [
            layer.as_json() | side | self._made(layer.members[0][0])
            for layer, side in zip(self.layers, sides, strict=True)
        ]
        return dense + grouped

    def _made(self, module: str) -> dict[str, Any]:
        treatment = self.decoder.treated(module)
        scheme = treatment.scheme
        return {"scheme": scheme.name, "group": scheme.group_size, "layout": treatment.layout.name}

    def facts(self) -> dict[str, Any]:
        """Mean bits of a quantized weight with its scales, and the number format that most of them are multiplied in."""
        sizes: dict[str, float] = {}
        bits = total = 0.0
        for module, (n, k) in self.decoder.modules():
            scheme = self.decoder.treated(module).scheme
            bits, total = bits + n * k * weight_bits(scheme, n, k), total + n * k
            sizes[computes_in(scheme)] = sizes.get(computes_in(scheme), 0.0) + n * k
        return {"bits": round(bits / total, 4), "computes_in": max(sizes, key=lambda num: sizes[num])} if total else {}

    def taken(self) -> dict[str, list[str]]:
        """GEMM or layer → the kernels that take the artifact's own layout of it."""
        dense = {g.name: [c.kernel.name for c in self.choices if c.takes(g) and c.cure is None] for g in self.gemms}
        usable = [choice for choice in self.moe_choices if choice.unavailable is None]
        grouped = {layer.name: [c.kernel.name for c in usable if layer.name not in c.refused] for layer in self.layers}
        return dense | grouped

    def last_of(self, gemm: Gemm) -> set[str]:
        """The kernels that take this GEMM and none after it; with the last, the baseline."""
        after = self.gemms[self.gemms.index(gemm) + 1 :]
        last = {c.kernel.name for c in self.choices if c.takes(gemm) and not any(map(c.takes, after))}
        return last if after else last | {BASELINE}

    def series(self) -> int:
        dense = sum(choice.takes(gemm) for choice in self.choices for gemm in self.gemms)
        usable = [choice for choice in self.moe_choices if choice.unavailable is None]
        return dense + sum(layer.name not in choice.refused for choice in usable for layer in self.layers)


@dataclass
class Outcome:
    """results: by GEMM. numerics: what the checks found. more: entries that only some devices have."""

    results: dict[str, Measured] = field(default_factory=dict)
    numerics: list[dict[str, Any]] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)


def make_work(artifact: Artifact, kernels: Sequence[str] | None, device: str, tp: int) -> Work:
    """Errors: InputError (the artifact), UsageError (a kernel's name)."""
    decoder = Decoder(artifact)
    gemms = engine_gemms(artifact, decoder, tp)
    layers = expert_layers(artifact, decoder, tp) if device == "cuda" else []
    if layers:
        gemms = [gemm for gemm in gemms if not gemm.experts]
    known = [name for name in kernels if name not in MOE_KERNELS] if kernels is not None else None
    choices = choose(known, decoder, gemms, device)
    return Work(decoder, gemms, layers, choices, choose_moe(layers, device, kernels), device, tp)


def _counter(total: int, progress: Progress) -> Callable[[], None]:
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    return step


def on_cpu(work: Work, settings: Settings, progress: Progress) -> Outcome:
    """GEMM after GEMM, so that memory holds one of them."""
    batch, bench, series, outcome = settings["m"], Bench(wall()), work.series(), Outcome()
    budget, step = Budget(settings["budget_seconds"], series), _counter(series * len(batch), progress)
    for gemm in work.gemms:
        taken = [choice.kernel for choice in work.choices if choice.takes(gemm)]
        weight = own_weight(work.decoder, gemm, "cpu", work.tp)
        prepared = GemmBench(gemm.name, weight, baseline(), taken, bench, settings["cache_bytes"])
        outcome.results[gemm.name] = measure(prepared, batch, budget, step)
        outcome.numerics += prepared.numerics()
    return outcome


def on_cuda(work: Work, settings: Settings, progress: Progress) -> Outcome:
    """The GEMMs, then what a served model does beside them; the engine's selector is asked meanwhile."""
    questions = _asks(work)
    asking = start(None, make_request(work.decoder.artifact.config(), questions))
    try:
        outcome = _gemms_on_cuda(work, settings, progress)
        outcome.more["around"] = _around(work)
        outcome.more["engine"] = _engine(work, asking.wait(), questions)
    finally:
        asking.stop()
    return outcome


def _gemms_on_cuda(work: Work, settings: Settings, progress: Progress) -> Outcome:
    batch, bench, outcome = settings["m"], gpu_bench(), Outcome(more={"symbols": []})
    budget = Budget(settings["budget_seconds"], len(work.gemms) + len(work.layers))
    step = _counter(work.series() * len(batch), progress)
    for gemm in work.gemms:
        try:
            prepared = _prepared(work, gemm, bench)
        except torch.OutOfMemoryError as error:
            names = [choice.kernel.name for choice in work.choices if choice.takes(gemm)]
            outcome.results[gemm.name] = unprepared(names, batch, failure(error), budget, step)
            continue
        outcome.results[gemm.name] = measure_cuda(prepared, batch, budget, step)
        outcome.numerics += prepared.numerics()
        last = work.last_of(gemm)  # the profiler slows what comes after it
        outcome.more["symbols"] += [entry for m in SEEN_AT for entry in prepared.symbols(m, last)] if last else []
        del prepared  # or the next one would need room beside it
    for layer in work.layers:
        measured, numerics = measure_experts(work.decoder, layer, work.moe_choices, batch, bench, budget, step)
        outcome.results[layer.name] = measured
        outcome.numerics += numerics
        outcome.more["symbols"] += measured.symbols
    return outcome


def _prepared(work: Work, gemm: Gemm, bench: Bench) -> CudaGemm:
    own = own_weight(work.decoder, gemm, "cuda", work.tp)
    taken = [Taken(choice.kernel, choice.weight(own)) for choice in work.choices if choice.takes(gemm)]
    return CudaGemm(gemm.name, Taken(baseline(), own), taken, bench)


def _asks(work: Work) -> list[Ask]:
    """Of grouped experts both GEMMs, as the selector knows them."""
    return asks(work.decoder, work.gemms, work.tp) + expert_asks(work.decoder, work.layers)


def _engine(work: Work, reply: dict[str, Any], asked: list[Ask]) -> dict[str, Any]:
    """The selector's answers; of repacked weights, the kernels that the engine would run for them."""
    block = engine_block(reply, asked, work.layers, work.taken())
    cures = {choice.cure for choice in work.choices if choice.cure}
    group = work.decoder.treatments[0].scheme.group_size
    repacked = [cure_kernels(block, cure, gemm.n, gemm.k, group) for cure in cures for gemm in work.gemms]
    return block | {"repacked": sorted(set().union(*repacked))}


def _around(work: Work) -> dict[str, Any]:
    """What the rest of a step costs; where the GPU or the architecture is not known, why it was not measured."""
    device = torch.cuda.get_device_name()
    gpu = of_device(device, torch.cuda.get_device_properties(0).total_memory)
    if gpu is None:
        return {"not_measured": f"{device} is not in the table of GPUs"}
    try:
        return around(served(work.decoder.artifact.config()), vllm_limits(gpu))
    except (InputError, RuntimeError) as error:
        return {"not_measured": " ".join(str(error).split())[:200]}


MEASURE = {"cpu": on_cpu, "cuda": on_cuda}
