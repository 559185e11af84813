"""Times the int4 kernels that an engine could pick against bf16, by M: what a plan and a card say of them was measured here.

usage: python scripts/kernel_table.py OUT.json        (a CUDA host; with vLLM on the path Machete and Marlin too)

Shapes: the linears of one layer of Qwen3-8B as engines merge them. Every kernel's call is captured in a CUDA graph that
walks through copies of the weight, more than twice the L2 cache in all; kernels take turns, so that drift hits all alike.
A cell is the median over rounds of one call's microseconds, summed over the shapes, with the smallest and the largest.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable

import torch
from provenance import made_by, write

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}
BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
GROUP, ROUNDS = 128, 15
CACHE = 128 << 20  # bytes that a walk through the copies must touch
Call = Callable[[torch.Tensor], torch.Tensor]


def weight_bf16(n: int, k: int) -> Call:
    w_NK = torch.randn(n, k, device="cuda").mul_(0.02).bfloat16()
    return lambda x_MK: torch.nn.functional.linear(x_MK, w_NK)


def weight_tinygemm(n: int, k: int) -> Call:
    halves = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(halves, 8)
    pairs = torch.randn(k // GROUP, n, 2, device="cuda").mul_(0.01).bfloat16()
    return lambda x_MK: torch.ops.aten._weight_int4pack_mm(x_MK, packed, GROUP, pairs)


def weight_machete(n: int, k: int) -> Call:
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    words = torch.randint(-(2**31), 2**31 - 1, (n, k // 8), device="cuda", dtype=torch.int32).t()
    kind, dtype = scalar_types.uint4b8, torch.bfloat16
    b = ops.machete_prepack_B(words, a_type=dtype, b_type=kind, group_scales_type=dtype)
    s_GN = torch.randn(k // GROUP, n, device="cuda").mul_(0.01).bfloat16()
    return lambda x_MK: ops.machete_mm(a=x_MK, b_q=b, b_type=kind, b_group_scales=s_GN, b_group_size=GROUP)


def weight_marlin(n: int, k: int) -> Call:
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils as utils
    from vllm.scalar_type import scalar_types

    device, empty = torch.device("cuda"), torch.empty(0, dtype=torch.int32, device="cuda")
    words = torch.randint(-(2**31), 2**31 - 1, (k // 8, n), device="cuda", dtype=torch.int32)
    b = ops.gptq_marlin_repack(words, empty, k, n, 4)
    s_GN = utils.marlin_permute_scales(torch.randn(k // GROUP, n, device="cuda").mul_(0.01).bfloat16(), k, n, GROUP)
    space = utils.marlin_make_workspace_new(device)
    return lambda x_MK: utils.apply_gptq_marlin_linear(
        x_MK, b, s_GN, empty, empty, empty, space, scalar_types.uint4b8, n, k, is_k_full=True
    )


KERNELS = {"bf16": weight_bf16, "tinygemm": weight_tinygemm, "machete": weight_machete, "marlin": weight_marlin}
BITS = {"bf16": 16}


def capture(kernel: str, n: int, k: int, calls: list[Call], x_MK: torch.Tensor) -> torch.cuda.CUDAGraph:
    for call in calls:
        call(x_MK)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call(x_MK)
    return graph


def seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def shape_times(names: list[str], n: int, k: int) -> dict[tuple[str, int], list[float]]:
    """(kernel, M) → microseconds of one call, a figure a round."""
    calls = {}
    for name in names:
        copies = max(2, -(-CACHE // (n * k * BITS.get(name, 4) // 8)))
        calls[name] = [KERNELS[name](n, k) for _ in range(copies)]
    times: dict[tuple[str, int], list[float]] = {}
    for m in BATCH:
        x_MK = torch.randn(m, k, device="cuda").bfloat16()
        graphs = {name: capture(name, n, k, calls[name], x_MK) for name in names}
        for _ in range(ROUNDS):
            for name, graph in graphs.items():
                times.setdefault((name, m), []).append(1e6 * seconds(graph) / len(calls[name]))
    return times


def available() -> dict[str, str | None]:
    """kernel → why it cannot run here, or None."""
    found: dict[str, str | None] = {}
    for name, make in KERNELS.items():
        try:
            make(256, 1024)(torch.randn(4, 1024, device="cuda").bfloat16())
            found[name] = None
        except Exception as error:  # a missing package or a refused shape alike
            found[name] = f"{type(error).__name__}: {error!s:.200}"
    return found


def summed(times: list[dict[tuple[str, int], list[float]]], name: str, m: int) -> list[float]:
    return [sum(round_) for round_ in zip(*(shape[name, m] for shape in times), strict=True)]


def main(out: str) -> None:
    torch.manual_seed(0)
    found = available()
    names = [name for name, reason in found.items() if reason is None]
    times = [shape_times(names, n, k) for n, k in SHAPES.values()]
    rows = []
    for m in BATCH:
        row: dict[str, object] = {"m": m}
        base = summed(times, "bf16", m)
        for name in names:
            own = summed(times, name, m)
            row |= {
                f"{name}_us": round(statistics.median(own), 2),
                f"{name}_range_us": [round(min(own), 2), round(max(own), 2)],
            }
            if name != "bf16":
                row[f"{name}_speedup"] = round(statistics.median(b / o for b, o in zip(base, own, strict=True)), 4)
        rows.append(row)
        print(json.dumps(row))
    reasons = {name: reason for name, reason in found.items() if reason}
    settings = {"cuda": torch.version.cuda, "seed": 0, "rounds": ROUNDS, "group_size": GROUP, "shapes_NK": SHAPES}
    made = made_by("scripts/kernel_table.py", ("torch", "vllm"), **settings)
    write(out, made, unavailable=reasons, rows=rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
