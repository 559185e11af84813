"""Kernels for a layer's experts: does each compute what the weights mean, and how long does it take against bf16?

usage: python scripts/moe_agreement.py OUT.json [--synthetic] ARTIFACT ...     (a CUDA host; with vLLM on the path its kernels)

The first layer of every kind of an artifact; with --synthetic also one of Qwen3-30B-A3B's shape and a narrow one, random
weights quantized here. Every kernel is checked (quantpub.kernels.moe_check), then timed: calls captured in a CUDA graph,
each on a batch routed anew, over as many copies of the weights as exceed twice the L2 cache; kernels take turns. A cell is
the median over rounds of one call's microseconds. Listed too: the device kernels that a call was seen to start.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from provenance import made_by, write

from quantpub.algorithms import ALGORITHMS
from quantpub.artifact import Artifact
from quantpub.decode import Decoder
from quantpub.experts import ExpertLayer, ExpertWeights, assemble, expert_layers, load
from quantpub.kernels.base import Operands
from quantpub.kernels.check import relative_error
from quantpub.kernels.moe import MOE_KERNELS, baseline
from quantpub.kernels.moe_base import MoeKernel
from quantpub.kernels.moe_check import check_moe, make_probes, touched, traffic
from quantpub.layouts import LAYOUTS
from quantpub.qtensor import QTensor
from quantpub.registry import load as load_entry
from quantpub.scheme import preset
from quantpub.stats import Stats

BATCH = (1, 8, 64, 512, 4096)
ROUNDS, LEAST_CALLS, MOST_CALLS = 15, 4, 64
SAME = 2.0**-6  # a captured call and a plain one may add in another order
CUDA = torch.device("cuda", 0)
SHAPES = {"Qwen3-30B-A3B": (128, 8, 2048, 768), "narrow": (8, 2, 256, 128)}
MADE = {
    "W4A16": ("rtn", "ct-pack"),
    "W4A16_ASYM": ("rtn", "ct-pack"),
    "W8A16": ("rtn", "ct-pack"),
    "FP8_DYNAMIC": ("fp8", "ct-float"),
    "W8A8": ("rtn", "ct-int"),
    "NVFP4A16": ("nvfp4", "ct-nvfp4"),
}


def synthetic(name: str, scheme_name: str) -> ExpertWeights:
    """Random experts of one of SHAPES, quantized by the plain algorithm of the scheme."""
    (experts, top_k, k, i), (how, where) = SHAPES[name], MADE[scheme_name]
    scheme, algorithm = preset(scheme_name), load_entry(ALGORITHMS, "algorithm", how)
    layout = load_entry(LAYOUTS, "layout", where)
    generator = torch.Generator(CUDA).manual_seed(0)

    def quantized(w_NK: torch.Tensor, amax: float) -> tuple[QTensor, dict[str, torch.Tensor]]:
        q = algorithm.quantize(w_NK, Stats(group_amax=amax), scheme, algorithm.params())
        return q, layout.pack(q)

    def expert() -> list[tuple[QTensor, dict[str, torch.Tensor]]]:
        shapes = ((i, k), (i, k), (k, i))
        w = [torch.randn(shape, device=CUDA, generator=generator).mul_(shape[1] ** -0.5).bfloat16() for shape in shapes]
        both = max(float(part.abs().max()) for part in w[:2])
        return [quantized(w[0], both), quantized(w[1], both), quantized(w[2], float(w[2].abs().max()))]

    layer = ExpertLayer(f"{name}.experts", experts, top_k, k, i, scheme, where, ())
    return assemble(layer, [expert() for _ in range(experts)])


def layers(arguments: list[str]) -> Iterator[tuple[str, ExpertWeights]]:
    if "--synthetic" in arguments:
        for name in SHAPES:
            for scheme in MADE:
                yield "synthetic", synthetic(name, scheme)
    for folder in (argument for argument in arguments if argument != "--synthetic"):
        decoder = Decoder(Artifact.open(Path(folder)))
        for layer in expert_layers(decoder.artifact, decoder):
            yield Path(folder).name, load(decoder, layer, "cuda")


@dataclass
class Timed:
    """Calls in a graph. x_MK, result: of the last of them."""

    graph: torch.cuda.CUDAGraph
    calls: int
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    operands: Operands
    result: torch.Tensor


def captured(kernel: MoeKernel, layer: ExpertLayer, operands: Operands, m: int) -> Timed:
    cache = 2 * torch.cuda.get_device_properties(CUDA).L2_cache_size
    nbytes = sum(tensor.nbytes for tensor in operands)
    copies = [operands] + [tuple(t.clone() for t in operands) for _ in range(min(MOST_CALLS, -(-cache // nbytes)) - 1)]
    calls = min(MOST_CALLS, max(LEAST_CALLS, len(copies), -(-cache // max(1, touched(layer, operands, m)))))
    batches = traffic(layer, m, calls, CUDA)
    for place in (0, calls - 1):
        kernel.run(*batches[place], copies[place % len(copies)])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for place in range(calls):
            result = kernel.run(*batches[place], copies[place % len(copies)])
    return Timed(graph, calls, batches[-1], copies[(calls - 1) % len(copies)], result)


def follows(kernel: MoeKernel, timed: Timed) -> bool:
    """Whether a replay computes what lies in its inputs then, and not what lay there when it was captured."""
    x_MK, weights_MT, ids_MT = timed.batch
    x_MK.copy_(-x_MK.flip(-1))
    timed.graph.replay()
    torch.cuda.synchronize()
    return relative_error(timed.result, kernel.run(x_MK, weights_MT, ids_MT, timed.operands).float()) < SAME


def microseconds(graphs: dict[str, Timed]) -> dict[str, float]:
    """The median of one call of each, over rounds in which they take turns."""
    flush = torch.empty(2 * torch.cuda.get_device_properties(CUDA).L2_cache_size, dtype=torch.uint8, device=CUDA)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    took: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(ROUNDS + 1):
        for name in sorted(graphs, reverse=bool(turn % 2)):
            flush.zero_()
            start.record()
            graphs[name].graph.replay()
            end.record()
            end.synchronize()
            took[name].append(1e3 * start.elapsed_time(end) / graphs[name].calls)
    return {name: round(statistics.median(times[1:]), 2) for name, times in took.items()}


def started(kernel: MoeKernel, layer: ExpertLayer, operands: Operands) -> list[str]:
    """The device kernels of one call at M = 64, as the profiler names them."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    (batch,) = traffic(layer, 64, 1, CUDA)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        kernel.run(*batch, operands)
        torch.cuda.synchronize()
    return [f"{event.name:.90}" for event in seen.events() if event.device_type == DeviceType.CUDA]


def checked(kernel: MoeKernel, weights: ExpertWeights, row: dict[str, Any]) -> Operands | None:
    """Its operands, if it runs here and is right; else `row` says why not."""
    reason = kernel.unavailable() or kernel.refuses(weights.layer)
    if "cuda" not in kernel.devices or reason:
        row["refused"] = reason or "not for CUDA"
        return None
    try:
        operands, probes = kernel.prepare(weights), make_probes(weights)
        row["used_of_tolerance"] = {
            probe.routing: {
                str(m): round(check_moe(kernel, row["layer"]["name"], operands, [probe], m), 4) for m in sizes
            }
            for probe in probes
            for sizes in ((1, 17, 512, None),)
        }
    except Exception as error:  # said in the evidence, not hidden
        row["failed"] = f"{type(error).__name__}: {error!s:.400}"
        return None
    try:
        row["kernels"] = started(kernel, weights.layer, operands)
    except RuntimeError as error:
        row["kernels"] = f"not profiled: {error!s:.200}"
    return operands


def rows(artifact: str, weights: ExpertWeights) -> list[dict[str, Any]]:
    layer = weights.layer
    head = {"artifact": artifact, "scheme": layer.scheme.name, "layout": layer.layout, "layer": layer.as_json()}
    kernels = {name: load_entry(MOE_KERNELS, "MoE kernel", name) for name in MOE_KERNELS}
    found = {name: {**head, "kernel": name} for name in kernels}
    ready = {
        name: operands for name, k in kernels.items() if (operands := checked(k, weights, found[name])) is not None
    }
    base, why = baseline("cuda")
    for m in BATCH:
        graphs = {}
        for name, operands in ready.items():
            try:
                graphs[name] = captured(kernels[name], layer, operands, m)
            except Exception as error:
                found[name].setdefault("not_timed", {})[m] = f"{type(error).__name__}: {error!s:.300}"
        took = microseconds(graphs)
        for name, timed in graphs.items():
            cell = {"us": took[name], "calls": timed.calls, "follows_inputs": follows(kernels[name], timed)}
            if base is not None and base.name in took:
                cell["speedup"] = round(took[base.name] / took[name], 3)
            found[name].setdefault("times", {})[m] = cell
        del graphs
        torch.cuda.empty_cache()
    return [row | {"baseline": base.name if base else None, "baseline_not": why} for row in found.values()]


def engine_choice() -> str:
    from quantpub.kernels.moe_vllm import engine_int8

    try:
        return engine_int8()
    except Exception as error:
        return f"{type(error).__name__}: {error!s:.200}"


def main(out: str, *arguments: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    found: list[dict[str, Any]] = []
    made = made_by(
        "scripts/moe_agreement.py", ("torch", "vllm", "triton"), cuda=torch.version.cuda, seed=0, rounds=ROUNDS
    )
    for artifact, weights in layers(list(arguments)):
        found += rows(artifact, weights)
        for row in found[-len(MOE_KERNELS) :]:
            print(json.dumps({key: value for key, value in row.items() if key != "kernels"}), flush=True)
        write(
            out, made | {"engine_int8": engine_choice()}, rows=found
        )  # what is there survives a run that is cut short


if __name__ == "__main__":
    main(*sys.argv[1:])
