"""Measures real vLLM on checkpoints: tokens per second on quantpub's workloads, one engine after another on each GPU.

usage: python scripts/serve_bench.py OUT.json NAME=FOLDER[@GPU] ... [--workloads interactive,serving,prefill-heavy,…]
       python scripts/serve_bench.py --warm FOLDER

Engines on different GPUs run at once, each with cores of its own. A run is written to OUT.jsonl and printed the moment it
is done, and OUT.json is brought up to date; of an engine's log NAME.log keeps what names kernels, memory and the
phases of the start, and its end when it failed. `--warm` inspects the model's class and reads vLLM from disk once, so
that the first engine does not wait for it; it needs no GPU. Nothing is compared here: see side_by_side.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine_log import facts_in, kernels_in
from provenance import made_by, write
from serve_inside import ENGINE, Run

sys.path.append(str(Path(__file__).resolve().parents[1]))
from quantpub.workloads import WORKLOADS, parse

INSIDE = Path(__file__).resolve().with_name("serve_inside.py")
REPEATS = {"interactive": 3, "serving": 3, "prefill-heavy": 2, "decode-heavy": 2}
PACKAGES = ("vllm", "torch", "transformers", "compressed-tensors", "torchao", "triton")
ENVIRONMENT = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "NO_COLOR": "1",
}
SHOWN = 300  # characters of what is no run
LAST = 100  # lines of a failed engine's log
RESULT = "RESULT "


@dataclass(frozen=True)
class Checkpoint:
    name: str
    folder: Path
    gpu: int = 0

    @staticmethod
    def parse(spec: str) -> Checkpoint:
        name, equals, rest = spec.partition("=")
        folder, _, gpu = rest.rpartition("@") if re.search(r"@\d+$", rest) else (rest, "", "0")
        if not (name and equals and folder):
            raise SystemExit(f"{spec!r}: write NAME=FOLDER or NAME=FOLDER@GPU")
        return Checkpoint(name, Path(folder).resolve(), int(gpu))


def planned(texts: Iterable[str]) -> list[Run]:
    """Runs of workloads by name or written out, one for each concurrency: as many requests as are in flight."""
    found = []
    for text in texts:
        workload = parse(text)
        for each in workload.runs():
            name = each.name
            found.append(Run(name, each.prompt, each.output, each.concurrency[0], REPEATS.get(workload.name, 2)))
    return found


def summarised(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Repeats of one run together: median seconds, tokens per second from it, spread (longest − shortest) / median."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["workload"], run["ran"]), []).append(run)
    return [one_of(group) for group in groups.values()]


def one_of(repeats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first, seconds = repeats[0], [run["seconds"] for run in repeats]
    median = statistics.median(seconds)
    nearest = min(repeats, key=lambda run: abs(run["seconds"] - median))
    made = first["requests"] * first["output"]
    return {
        **{key: first[key] for key in ("workload", "asked", "ran", "prompt", "output", "requests")},
        "scaled": first["asked"] != first["ran"],
        "seconds": [round(value, 4) for value in seconds],
        "median_s": round(median, 4),
        "output_tokens_per_s": round(made / median, 1),
        "total_tokens_per_s": round((made + first["requests"] * first["prompt"]) / median, 1),
        "spread": round((max(seconds) - min(seconds)) / median, 4),
        **{key: nearest[key] for key in ("steps", "first_s", "opening", "by_batch") if key in nearest},
    }


class Book:
    """What was found so far, on disk after every finding."""

    def __init__(self, out: Path, made: dict[str, object]) -> None:
        self._out, self._made, self._lock = out, made, threading.Lock()
        self._runs: dict[str, list[dict[str, Any]]] = {}
        self._found: dict[str, dict[str, Any]] = {}

    def begin(self, checkpoint: Checkpoint) -> None:
        self._runs[checkpoint.name] = []
        self._found[checkpoint.name] = {"folder": checkpoint.folder.name, "gpu": checkpoint.gpu}

    def add(self, name: str, kind: str, value: Any) -> None:
        with self._lock:
            if kind == "run":
                self._runs[name].append(value)
            elif isinstance(value, dict):
                self._found[name].setdefault(kind, {}).update(value)
            else:
                self._found[name][kind] = value
            with self._out.with_suffix(".jsonl").open("a") as f:
                f.write(json.dumps({"name": name, kind: value}) + "\n")
            found = {n: each | {"workloads": summarised(self._runs[n])} for n, each in self._found.items()}
            write(str(self._out), self._made, checkpoints=found)
            if kind != "log":
                print(name, shown(kind, value), flush=True)


def shown(kind: str, value: Any) -> str:
    if kind != "run":
        return f"{kind} {json.dumps(value)[-SHOWN:]}"
    made = value["requests"] * value["output"]
    total = made + value["requests"] * value["prompt"]
    rate = f"{made / value['seconds']:,.1f} out/s, {total / value['seconds']:,.1f} total/s"
    return f"{value['workload']} {value['ran']}: {value['seconds']:.3f} s, {rate}"


def environment(checkpoint: Checkpoint, cache: Path) -> dict[str, str]:
    """A compile cache of its own for each checkpoint; what vLLM knows of model classes is shared."""
    own, shared = cache / checkpoint.name, cache / "modelinfos"
    shared.mkdir(parents=True, exist_ok=True)
    own.mkdir(exist_ok=True)
    if not (own / "modelinfos").exists():
        (own / "modelinfos").symlink_to(shared)
    return away() | {"CUDA_VISIBLE_DEVICES": str(checkpoint.gpu), "VLLM_CACHE_ROOT": str(own)}


def away() -> dict[str, str]:
    """For a process that runs in another folder, where `vllm` can be no one else's: paths to packages made absolute."""
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(str(Path(path).resolve()) for path in paths)}


def measure(checkpoint: Checkpoint, settings: dict[str, Any], given: argparse.Namespace, book: Book) -> None:
    """One engine from its start to its end; nothing that happens in it stops the others."""
    book.begin(checkpoint)
    wait_for_memory(checkpoint.gpu)
    engine = subprocess.Popen(
        [sys.executable, INSIDE, str(checkpoint.folder), json.dumps(settings)],
        env=environment(checkpoint, given.cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd="/",
        process_group=0,
    )
    late = threading.Timer(given.kill_after, end, (engine,))
    late.start()
    try:
        ended = follow(engine, checkpoint.name, given.logs / f"{checkpoint.name}.log", book)
    finally:
        late.cancel()
        end(engine)
    if ended is not None:
        book.add(checkpoint.name, "failed", ended)


def follow(engine: subprocess.Popen[str], name: str, log: Path, book: Book) -> str | None:
    """Read the log to its end. None when the engine said that it was done, else the last lines."""
    last: deque[str] = deque(maxlen=LAST)
    kernels: list[str] = []
    done = False
    assert engine.stdout is not None
    with log.open("w") as kept:
        for line in engine.stdout:
            if line.startswith(RESULT):
                for kind, value in json.loads(line.removeprefix(RESULT)).items():
                    book.add(name, kind, value)
                    done = done or kind == "end"
                if done:
                    break
                continue
            if "it/s]" not in line:
                last.append(line)
            fresh = [kernel for kernel in kernels_in(line) if kernel not in kernels]
            if fresh:
                kernels += fresh
                book.add(name, "kernels", list(kernels))
            if facts := facts_in(line):
                book.add(name, "log", facts)
            if fresh or facts:
                kept.write(line)
                kept.flush()
        if not done:
            kept.writelines(["\nthe last lines:\n", *last])
    return None if done else "".join(last)[-1500:]


def end(engine: subprocess.Popen[str]) -> None:
    """The engine and its core: a few seconds to go on their own, then the whole process group."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        engine.wait(timeout=5)
    try:
        os.killpg(engine.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    engine.wait()


def wait_for_memory(gpu: int, seconds: float = 20, free: int = 2000) -> None:
    """Until an engine before this one has given its memory back: less than `free` MiB in use."""
    query = ["nvidia-smi", "-i", str(gpu), "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    end_of_wait = time.monotonic() + seconds
    while time.monotonic() < end_of_wait:
        said = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        if not said.isdigit() or int(said) < free:
            return
        time.sleep(0.5)


def cores_of(gpus: Sequence[int]) -> dict[int, list[int]]:
    """Cores of their own for the engines of each GPU, so that one that compiles does not slow one that is timed."""
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // len(gpus)
    return {gpu: cores[i * each : (i + 1) * each] if each else cores for i, gpu in enumerate(gpus)}


def warm(folder: Path, cache: Path) -> None:
    code = (
        "import sys, time; begun = time.monotonic(); from vllm.engine.arg_utils import EngineArgs; import vllm.v1.engine.core; "
        "EngineArgs(model=sys.argv[1], skip_tokenizer_init=True).create_model_config(); "
        "print(f'warm: {time.monotonic() - begun:.1f} s')"
    )
    env = away() | {"VLLM_CACHE_ROOT": str(cache)}
    subprocess.run([sys.executable, "-c", code, str(folder.resolve())], env=env, cwd="/", check=False)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("checkpoints", nargs="*", metavar="NAME=FOLDER[@GPU]")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--limit-seconds", type=float, default=120, help="for the runs of one checkpoint")
    parser.add_argument("--kill-after", type=float, default=420, help="seconds for one checkpoint, its start included")
    parser.add_argument("--capture-max", type=int, help="capture CUDA graphs up to this batch only: a quicker start")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "serve-bench-cache")
    parser.add_argument("--logs", type=Path, help="folder for NAME.log; beside OUT.json by default")
    parser.add_argument("--warm", type=Path, metavar="FOLDER")
    given = parser.parse_args()
    if not given.warm and not (given.out and given.checkpoints):
        parser.error("name OUT.json and a checkpoint")
    return given


def main() -> None:
    given = arguments()
    given.cache = given.cache.resolve()
    if given.warm:
        return warm(given.warm, given.cache)
    given.out = given.out.resolve()
    given.logs = given.logs or given.out.parent
    for folder in (given.out.parent, given.logs):
        folder.mkdir(parents=True, exist_ok=True)
    checkpoints = [Checkpoint.parse(spec) for spec in given.checkpoints]
    runs = [asdict(run) for run in planned(given.workloads.split(","))]
    gpus = sorted({checkpoint.gpu for checkpoint in checkpoints})
    cores = cores_of(gpus)
    settings = {"runs": runs, "limit": given.limit_seconds, "capture_max": given.capture_max}
    made = made_by(
        "scripts/serve_bench.py", PACKAGES, settings=settings | {"engine": ENGINE, "cores_each": len(cores[gpus[0]])}
    )
    book = Book(given.out, made)

    def on(gpu: int) -> None:
        for checkpoint in (each for each in checkpoints if each.gpu == gpu):
            measure(checkpoint, settings | {"cores": cores[gpu]}, given, book)

    with ThreadPoolExecutor(len(gpus)) as pool:
        list(pool.map(on, gpus))


if __name__ == "__main__":
    main()
