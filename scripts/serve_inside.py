"""Inside one engine's process: start vLLM on a checkpoint, warm it up, and time workloads within a budget of seconds.

usage: serve_inside.py FOLDER SETTINGS      (called by serve_bench.py; one `RESULT {…}` line on stdout for each finding)

Every request of a run is sent at once, as token ids, greedy, to exactly its output length. What does not fit the budget is
scaled: fewer output tokens where the output is the longer part, else fewer requests; what was run is what is reported.
The engine's own clock says when each of its steps gave its tokens, so that a step's time is known beside the total.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ENGINE: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "dtype": "bfloat16",
    "max_model_len": 4352,
    "gpu_memory_utilization": 0.9,
    "enable_prefix_caching": False,
    "seed": 0,
}
BATCH = 256  # requests of the warm-up's decode steps
CACHE_READ = 3e12  # bytes of keys and values a second, for estimates only
SIXTEENTHS = range(15, 0, -1)  # parts of a workload that is scaled
OPENING = 12  # steps told one by one
Step = tuple[float, int]  # the engine's time, requests that got a token


@dataclass(frozen=True)
class Run:
    """requests: all sent at once. repeats: at most so many."""

    name: str
    prompt: int
    output: int
    requests: int
    repeats: int = 1

    @property
    def written(self) -> str:
        """As quantpub's workloads are written."""
        return f"{self.prompt}:{self.output}@{self.requests}"


@dataclass(frozen=True)
class Costs:
    """Seconds: of a prompt token, of a decode step of 1 and of BATCH requests, and of reading one cached token."""

    prompt: float
    step: float
    full_step: float
    cached: float

    def seconds(self, run: Run) -> float:
        """An estimate: a step grows with its batch in a straight line, and with what attention reads."""
        step = self.step + (run.requests - 1) / (BATCH - 1) * max(0.0, self.full_step - self.step)
        step += run.requests * (run.prompt + run.output / 2) * self.cached
        return run.requests * run.prompt * self.prompt + run.output * step


def cap(estimates: Iterable[float], budget: float) -> float:
    """The most that one may take when the smaller ones get all they need; infinite when everything fits."""
    waiting = sorted(estimates)
    for done, estimate in enumerate(waiting):
        share = budget / (len(waiting) - done)
        if estimate > share:
            return share
        budget -= estimate
    return math.inf


def scaled(run: Run, costs: Costs, most: float) -> Run:
    """The largest of its sixteenths that is estimated to fit; the smallest when none does."""
    if costs.seconds(run) <= most:
        return run
    parts = [part(run, sixteenths) for sixteenths in SIXTEENTHS]
    return next((each for each in parts if costs.seconds(each) <= most), parts[-1])


def part(run: Run, sixteenths: int) -> Run:
    if run.output > run.prompt:
        return replace(run, output=max(1, run.output * sixteenths // 16))
    return replace(run, requests=max(1, run.requests * sixteenths // 16))


def told(steps: Sequence[Step], begun: float) -> dict[str, Any]:
    """first_s: until the first tokens. opening: [requests, ms] of the first steps. by_batch: the commonest batch sizes."""
    if not steps:
        return {}
    times = [begun, *(at for at, _ in steps)]
    lengths = [(requests, 1000 * (b - a)) for (_, requests), a, b in zip(steps, times, times[1:], strict=False)]
    batches: dict[int, list[float]] = {}
    for requests, ms in lengths:
        batches.setdefault(requests, []).append(ms)
    common = sorted(batches.items(), key=lambda item: -len(item[1]))[:3]
    return {
        "steps": len(steps),
        "first_s": round(steps[0][0] - begun, 5),
        "opening": [[requests, round(ms, 3)] for requests, ms in lengths[:OPENING]],
        "by_batch": [
            {"requests": n, "steps": len(ms), "median_ms": round(statistics.median(ms), 4)} for n, ms in common
        ],
    }


class Engine:
    """A vLLM engine with a watch on its steps."""

    def __init__(self, folder: str, capture_max: int | None) -> None:
        from vllm import LLM

        graphs = {"compilation_config": {"max_cudagraph_capture_size": capture_max}} if capture_max else {}
        self.llm = LLM(folder, **ENGINE, **graphs)
        self.vocab: int = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
        self.steps: list[Step] = []
        core = self.llm.llm_engine.engine_core
        take = core.get_output

        def watched() -> Any:
            found = take()
            if found.outputs:
                self.steps.append((found.timestamp, len(found.outputs)))
            return found

        core.get_output = watched

    def run(self, run: Run, seed: int = 0) -> tuple[float, dict[str, Any]]:
        """Seconds from the first request sent to the last answer taken, and the steps in between."""
        from vllm import SamplingParams

        draw = random.Random(f"{seed} {run.written}")
        ids = range(min(100, self.vocab // 2), self.vocab)
        prompts = [{"prompt_token_ids": draw.choices(ids, k=run.prompt)} for _ in range(run.requests)]
        params = SamplingParams(max_tokens=run.output, temperature=0, ignore_eos=True, detokenize=False)
        self.steps.clear()
        begun = time.monotonic()
        answers = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.monotonic() - begun
        made = sum(len(answer.outputs[0].token_ids) for answer in answers)
        if made != run.requests * run.output:
            raise RuntimeError(f"{run}: {made} tokens came back")
        return seconds, told(self.steps, begun)

    def warm_up(self, kv_bytes: int) -> Costs:
        """A full prefill (twice, where that is quick), decode steps of one request and of BATCH; costs from them."""
        long, short, wide = Run("", 2048, 1, 8), Run("", 16, 32, 1), Run("", 16, 32, BATCH)
        prefill, _ = self.run(long)
        if prefill < 3:
            prefill, _ = self.run(long, seed=1)
        self.run(short)
        one, _ = self.run(short, seed=1)
        many, _ = self.run(wide)
        a_token = prefill / (long.prompt * long.requests)
        decode = many - wide.prompt * wide.requests * a_token
        return Costs(a_token, one / short.output, max(one, decode) / wide.output, kv_bytes / CACHE_READ)

    def facts(self) -> dict[str, Any]:
        """The settings that the engine really has; what this version calls otherwise is None."""
        config = self.llm.llm_engine.vllm_config
        names = {
            "max_num_batched_tokens": "scheduler_config.max_num_batched_tokens",
            "max_num_seqs": "scheduler_config.max_num_seqs",
            "async_scheduling": "scheduler_config.async_scheduling",
            "chunked_prefill": "scheduler_config.enable_chunked_prefill",
            "block_size": "cache_config.block_size",
            "gpu_blocks": "cache_config.num_gpu_blocks",
            "kv_cache_tokens": "cache_config.kv_cache_size_tokens",
            "cudagraph_mode": "compilation_config.cudagraph_mode",
            "cudagraph_sizes": "compilation_config.cudagraph_capture_sizes",
            "compile_mode": "compilation_config.mode",
            "custom_ops": "compilation_config.custom_ops",
            "passes": "compilation_config.pass_config",
            "quantization": "model_config.quantization",
            "v2_model_runner": "use_v2_model_runner",
        }
        return {name: plain(at(config, path)) for name, path in names.items()}

    def stop(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def at(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def plain(value: Any) -> Any:
    """As JSON can hold it."""
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value if type(value) in (int, float, bool, str, type(None)) else str(value)


def kv_bytes(config: dict[str, Any]) -> int:
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 4 * int(config["num_hidden_layers"]) * int(heads) * int(size)


def measure(engine: Engine, runs: Sequence[Run], costs: Costs, limit: float) -> None:
    """Every run once, scaled where need be; then repeats, round after round, of what still fits."""
    end = time.monotonic() + limit
    took: dict[Run, tuple[Run, float]] = {}
    for place, run in enumerate(runs):
        most = cap((costs.seconds(each) for each in runs[place:]), end - time.monotonic())
        took[run] = timed(engine, run, scaled(run, costs, most), 0)
    for repeat in range(1, max((run.repeats for run in runs), default=0)):
        for run, (ran, seconds) in took.items():
            if repeat < run.repeats and seconds <= end - time.monotonic():
                took[run] = timed(engine, run, ran, repeat)


def timed(engine: Engine, asked: Run, run: Run, repeat: int) -> tuple[Run, float]:
    seconds, steps = engine.run(run, seed=repeat)
    shape = {"ran": run.written, "prompt": run.prompt, "output": run.output, "requests": run.requests}
    say("run", {"workload": asked.name, "asked": asked.written, **shape, "repeat": repeat, "seconds": seconds} | steps)
    return run, seconds


def say(kind: str, value: dict[str, Any]) -> None:
    """On a line of its own: progress bars of the engine leave theirs open."""
    sys.stdout.write(f"\nRESULT {json.dumps({kind: value})}\n")
    sys.stdout.flush()


def main() -> None:
    folder, settings = sys.argv[1], json.loads(sys.argv[2])
    if settings.get("cores"):
        os.sched_setaffinity(0, settings["cores"])
    runs = [Run(**each) for each in settings["runs"]]
    begun = time.monotonic()
    engine = Engine(folder, settings.get("capture_max"))
    started = time.monotonic()
    say("engine", engine.facts() | {"start_s": round(started - begun, 2)})
    costs = engine.warm_up(kv_bytes(json.loads((Path(folder) / "config.json").read_text())))
    say("warm", asdict(costs) | {"warm_s": round(time.monotonic() - started, 2)})
    measure(engine, runs, costs, settings["limit"])
    say("end", {"total_s": round(time.monotonic() - begun, 2)})
    engine.stop()


if __name__ == "__main__":
    main()
