"""Quantizes one model by several recipes side by side, for timing: the shapes count, quality does not.

usage: python scripts/shapes_artifacts.py MODEL OUT_DIR [RECIPE ...] [--jobs N] [--gpus 0,1] [--device cuda]

A RECIPE is one of scripts/shapes/*.yaml (all of them by default; plain rounding, nothing searched), or any other recipe.
Each becomes OUT_DIR/RECIPE, made by `quantpub quantize` itself, in a process of its own, N at a time, GPUs in turn. Hashing
and copying on one core bound a process, not the GPU: several at once cost hardly more time than one. fsync is switched
off, since the artifacts are thrown away with the host: waiting for its disk would be most of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {path.stem: path for path in sorted((ROOT / "scripts" / "shapes").glob("*.yaml"))}
# What a process runs: the command line, durable no longer.
WITHOUT_FSYNC = "import os; os.fsync = lambda fd: None; from quantpub.cli import main; main()"
CORES_A_JOB = 2  # one reads and hashes, one computes and writes in turn


def command(model: Path, recipe: str, out: Path, device: str) -> list[str]:
    name = Path(recipe).stem
    arguments = ["quantize", model, "-r", SHAPES.get(recipe, recipe), "--engine", "vllm", "-o", out / name]
    return [sys.executable, "-c", WITHOUT_FSYNC, *map(str, arguments), "--device", device, "--json"]


def environment(gpu: str, threads: int) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    chosen = {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
    return os.environ | chosen | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}


def artifact(command: list[str], env: dict[str, str], name: str) -> dict[str, Any]:
    begun = time.monotonic()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    found: dict[str, Any] = {"recipe": name, "seconds": round(time.monotonic() - begun, 1), "code": done.returncode}
    if done.returncode:
        found["failed"] = (done.stderr + done.stdout)[-800:]
    else:
        found["gb"] = round(json.loads(done.stdout)["output_bytes"] / 1e9, 2)
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("recipes", nargs="*", default=list(SHAPES))
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=max(1, cores // CORES_A_JOB), help="processes at a time")
    parser.add_argument("--gpus", default="", help="their numbers, taken in turn; empty: as the environment has them")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    given = parser.parse_args()
    recipes = given.recipes or list(SHAPES)
    jobs, gpus, begun = min(given.jobs, len(recipes)), given.gpus.split(","), time.monotonic()
    given.out.mkdir(parents=True, exist_ok=True)

    def one(turn: int) -> dict[str, Any]:
        recipe, env = recipes[turn], environment(gpus[turn % len(gpus)], max(1, cores // jobs))
        return artifact(command(given.model.resolve(), recipe, given.out.resolve(), given.device), env, recipe)

    with ThreadPoolExecutor(jobs) as pool:
        found = list(pool.map(one, range(len(recipes))))
    free = shutil.disk_usage(given.out).free / 1e9
    print(f"{len(recipes)} artifacts, {jobs} at a time: {time.monotonic() - begun:.1f} s; {free:.1f} GB free")
    sys.exit(any(each["code"] for each in found))


if __name__ == "__main__":
    main()
