"""What vLLM's log says of an engine: kernels, memory, and the phases of its start. Lines are those of vLLM 0.25.1.

Sources: model_executor/kernels/linear, v1/core/kv_cache_utils.py, v1/worker/gpu/model_runner.py, compilation/monitor.py.
"""

from __future__ import annotations

import re

KERNELS = (
    re.compile(r"Using \w+Kernel for [\w-]+"),
    re.compile(r"Selected \w+ for \w+"),
    re.compile(r"Using (?:'?\w+'? )+MoE backend"),
    re.compile(r"Using \w+ attention backend"),
    re.compile(r"Using FlashAttention version \d+"),
    re.compile(r"Using V2 Model Runner"),
)
FACTS = {
    "weights_s": re.compile(r"Loading weights took ([\d.]+) seconds"),
    "model_gib": re.compile(r"Model loading took ([\d.]+) GiB"),
    "load_s": re.compile(r"Model loading took [\d.]+ GiB(?: memory)? and ([\d.]+) seconds"),
    "dynamo_s": re.compile(r"Dynamo bytecode transform time: ([\d.]+) s"),
    "compile_s": re.compile(r"torch\.compile took ([\d.]+) s in total"),
    "profiling_s": re.compile(r"Initial profiling/warmup run took ([\d.]+) s"),
    "kv_cache_gib": re.compile(r"Available KV cache memory: ([\d.]+) GiB"),
    "kv_cache_tokens": re.compile(r"GPU KV cache size: ([\d,]+) tokens"),
    "capture_s": re.compile(r"Graph capturing finished in (\d+) secs"),
    "graphs_gib": re.compile(r"Graph capturing finished in \d+ secs, took (-?[\d.]+) GiB"),
    "engine_s": re.compile(r"init engine \(profile, create kv cache, warmup model\) took ([\d.]+) s"),
}


def kernels_in(line: str) -> list[str]:
    return [found[0] for pattern in KERNELS if (found := pattern.search(line))]


def facts_in(line: str) -> dict[str, float]:
    return {name: float(m[1].replace(",", "")) for name, pattern in FACTS.items() if (m := pattern.search(line))}
