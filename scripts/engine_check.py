"""Load checkpoints in a real vLLM, one process each, and measure perplexity through the engine's own kernels.

usage: engine_check.py OUT.json TOKENS.json NAME=FOLDER[,DISABLED_KERNEL] ...
TOKENS.json holds windows of token ids. The first checkpoint is the base: top-1 agreement is with it. Written: perplexity,
agreement, the kernel lines of the engine's log, versions. Runs on a GPU host that has vLLM on its path; no quantpub needed.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from provenance import made_by, write

WORKERS = 3  # engines at a time

KERNEL = re.compile(
    r"(Using \w+Kernel for [\w-]+|Selected \w+ for \w+|Using \w+ (?:Fp8 )?MoE backend|Using '?\w+'? \w+ MoE backend[^\n]*)"
)


def inside(folder: str, tokens: Path) -> None:
    """In the engine's process: print one JSON line with the log-probability of every token and the engine's favourite."""
    from vllm import LLM, SamplingParams

    windows = json.loads(tokens.read_text())
    llm = LLM(
        folder,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=1024,
        gpu_memory_utilization=0.2,
        dtype="bfloat16",
        enable_prefix_caching=False,
    )
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False)
    rows = []
    for ids, answer in zip(windows, llm.generate([{"prompt_token_ids": ids} for ids in windows], params), strict=True):
        for token, choices in zip(ids[1:], answer.prompt_logprobs[1:], strict=True):
            best = min(choices, key=lambda t: choices[t].rank)
            rows.append((choices[token].logprob, best))
    print("RESULT " + json.dumps(rows), flush=True)


def measure(folder: str, tokens: Path, disabled: str) -> dict[str, Any]:
    env = os.environ | {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_DISABLED_KERNELS": disabled}
    done = subprocess.run(
        [sys.executable, __file__, "--inside", folder, tokens],
        env=env,
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )
    log = done.stdout + done.stderr
    result = re.search(r"^RESULT (.*)$", log, re.M)
    if not result:
        return {"failed": log[-1500:]}
    rows = json.loads(result[1])
    mean = -sum(row[0] for row in rows) / len(rows)
    return {
        "perplexity": math.exp(mean),
        "tokens": len(rows),
        "best": [row[1] for row in rows],
        "kernels": sorted(set(KERNEL.findall(log))),
        "disabled": disabled or None,
    }


def named(spec: str, tokens: Path, out: Path) -> tuple[str, dict[str, Any]]:
    """(name, findings), also added to OUT.jsonl at once: a run that is cut short loses nothing."""
    name, _, rest = spec.partition("=")
    folder, _, disabled = rest.partition(",")
    found = measure(str(Path(folder).resolve()), tokens, disabled)
    print(name, {k: v for k, v in found.items() if k != "best"}, flush=True)
    with out.with_suffix(".jsonl").open("a") as f:
        f.write(json.dumps({"name": name} | {k: v for k, v in found.items() if k != "best"}) + "\n")
    return name, found


def main() -> None:
    out, tokens = Path(sys.argv[1]), Path(sys.argv[2]).resolve()
    with ThreadPoolExecutor(WORKERS) as pool:
        found = dict(pool.map(lambda spec: named(spec, tokens, out), sys.argv[3:]))
    for spec in sys.argv[3:]:  # what failed has another try alone: engines disturb each other's memory profiling
        if "failed" in found[spec.partition("=")[0]]:
            found |= [named(spec, tokens, out)]
    base = next(iter(found.values())).get("best")
    for value in found.values():
        best = value.pop("best", None)
        if base and best:
            value["top1_agreement"] = sum(a == b for a, b in zip(base, best, strict=True)) / len(base)
    packages = ("vllm", "torch", "transformers", "compressed-tensors")
    write(str(out), made_by("scripts/engine_check.py", packages), checkpoints=found)


if __name__ == "__main__":
    if sys.argv[1] == "--inside":
        inside(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
