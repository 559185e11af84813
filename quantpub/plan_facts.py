"""A plan's figures: counts, exact bytes, memory, tensor parallelism, kernels and notes; what `quantpub plan` shows."""

from __future__ import annotations

import math
import os
from collections import Counter
from typing import Any

from quantpub import advice
from quantpub.actions import QUANTIZE
from quantpub.checkpoint import INDEX
from quantpub.plan import Plan
from quantpub.plan_engines import engines_of, merged_weights
from quantpub.recipe import ignores
from quantpub.shards import tensor_bytes
from quantpub.tp_cut import tp_table


def unmatched(plan: Plan) -> list[str]:
    """Entries of the recipe's `ignore` that name nothing here; a tied head is no tensor, so `lm_head` may."""
    modules = [action.module for action in plan.actions]
    entries = [entry for entry in plan.recipe.ignore if entry != "lm_head"]
    used = {action.treatment for action in plan.actions}
    idle = [rule.match for place, rule in enumerate(plan.recipe.rules, 1) if place not in used]
    return [entry for entry in entries if not any(ignores((entry,), module) for module in modules)] + idle


def tensor_parallel(plan: Plan) -> dict[int, str | None]:
    """Size → the first reason why an engine cannot load it so, or None."""
    modules = {}
    for action in plan.actions:
        if action.kind == QUANTIZE:
            assert action.treatment is not None
            treatment, (n, k) = plan.treatments[action.treatment], action.part.info.shape
            modules[action.module] = (treatment.scheme, treatment.layout, n, k)
    table = tp_table(modules, plan.family, plan.checkpoint.config)
    return {size: next(iter(reasons), None) for size, reasons in table.items()}


def summary(plan: Plan) -> dict[str, Any]:
    """The plan's figures: counts, exact bytes, bits per weight, estimated peak memory, tensor parallelism, rejections."""
    quantized = [action for action in plan.actions if action.kind == QUANTIZE]
    weights = sum(math.prod(action.part.info.shape) for action in quantized)
    packed = sum(tensor_bytes(*spec) for action in quantized for spec in action.outputs.values())
    parameters = sum(math.prod(action.part.info.shape) for action in plan.actions)
    output = sum(plan.shard_bytes(shard) for shard in plan.shards)
    merged, refusals = merged_weights(plan), engines_of(plan)
    engines = [engine for engine, reason in refusals.items() if reason is None]
    used = [plan.treatments[place] for place in sorted({a.treatment for a in quantized if a.treatment is not None})]
    return {
        "model": plan.checkpoint.source.identity(),
        "recipe": plan.recipe.name,
        "scheme": plan.scheme.name,
        "layout": plan.layout.name,
        "schemes": list(dict.fromkeys(treatment.scheme.name for treatment in used)),
        "engines": {engine: reason or "ok" for engine, reason in refusals.items()},
        "calibrates": sorted(plan.calibrates),
        "shards": len(plan.shards),
        "tensors": len(plan.actions),
        "quantized": len(quantized),
        "copied": dict(sorted(Counter(a.role for a in plan.actions if a.kind != QUANTIZE).items())),
        "parameters": parameters,
        "quantized_parameters": weights,
        "source_bytes": sum(plan.checkpoint.source.files[shard] for shard in plan.shards),
        "output_bytes": output,
        "bits_per_quantized_weight": round(8 * packed / weights, 4) if weights else None,
        "bits_per_weight": round(8 * output / parameters, 4) if parameters else None,
        "peak_memory_bytes": peak_memory(plan),
        "tensor_parallel": {str(size): reason or "ok" for size, reason in tensor_parallel(plan).items()},
        "rejected": plan.rejections,
        "ignore_unmatched": unmatched(plan),
        "companions": list(plan.checkpoint.companions),
        "left_behind": [name for name in plan.checkpoint.left_behind if name != INDEX],
        "kernels": advice.kernels(merged, engines),
        "notes": advice.notes(advice.case(merged, [treatment.algorithm for treatment in used], engines)),
    }


WORKERS = min(8, len(os.sched_getaffinity(0)))  # tensors worked on at a time
INTERPRETER = 330 << 20  # Python with torch, safetensors headers and the threads' buffers, measured
QUEUES = 3 * (32 << 20)  # what may wait between reading, computing and writing


def peak_memory(plan: Plan) -> int:
    """Estimated peak of the whole process: the interpreter, the queues, and the tensors in work.

    Each tensor in work stands there as read, as codes (1 byte a weight) and packed; one more is being read.
    """
    largest = max((action.part.info.nbytes for action in plan.actions if action.kind == QUANTIZE), default=0)
    return INTERPRETER + QUEUES + 2 * (WORKERS + 1) * largest
