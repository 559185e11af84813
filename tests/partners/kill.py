"""Kill a quantizing process, finish it in another, compare the trees. Prints one JSON object.

usage: kill.py MODEL RECIPE WORK points            at every passage of every write point, by injection
       kill.py MODEL RECIPE WORK random COUNT      COUNT times at a random moment, from outside

Each victim is forked from this process, which has imported torch but never used its threads (OMP_NUM_THREADS=1): a real
process that dies by a real SIGKILL, without paying for the imports every time.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from quantpub import files
from quantpub.checkpoint import open_checkpoint
from quantpub.plan import make_plan
from quantpub.quantize import quantize
from quantpub.recipe import load_recipe

MODEL, RECIPE, WORK = sys.argv[1], sys.argv[2], Path(sys.argv[3])


def run(out: Path) -> None:
    recipe = load_recipe(RECIPE)
    quantize([make_plan(open_checkpoint(MODEL), recipe, recipe.layouts([], [])[0])], out)


def child(out: Path, crash_at: str | None = None, counts: Path | None = None) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ["QUANTPUB_CRASH_AT"] = crash_at or "nowhere:0"
        files._passages.clear()
        run(out)
        if counts:
            counts.write_text(json.dumps(files._passages))
        code = 0
    finally:
        os._exit(code)


def died(pid: int) -> bool:
    status = os.waitpid(pid, 0)[1]
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"the run failed by itself: {status}")
    return os.WIFSIGNALED(status)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def finish(out: Path, expected: dict[str, bytes], when: str) -> None:
    if (out / "config.json").exists() and any(
        not (out / name).exists() for name in expected if name.endswith(".safetensors")
    ):
        raise SystemExit(f"{when}: config.json stood before the weights did")
    if died(child(out)):
        raise SystemExit(f"{when}: the second run died")
    found = tree(out)
    if found != expected:
        differing = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise SystemExit(f"{when}: differs in {differing}")
    shutil.rmtree(out)


def main() -> None:
    reference, counts = WORK / "reference", WORK / "counts.json"
    started = time.monotonic()
    assert not died(child(reference, counts=counts))
    duration = time.monotonic() - started
    expected, killed = tree(reference), Counter()
    if sys.argv[4] == "points":
        for point, passages in json.loads(counts.read_text()).items():
            for n in range(1, passages + 1):
                if not died(child(WORK / "out", f"{point}:{n}")):
                    raise SystemExit(f"{point}:{n} was not reached")
                killed[point] += 1
                finish(WORK / "out", expected, f"{point}:{n}")
    else:
        rng = random.Random(0)
        while killed["random"] < int(sys.argv[5]):
            pid, moment = child(WORK / "out"), rng.uniform(0, duration)
            time.sleep(moment)
            os.kill(pid, signal.SIGKILL)
            if died(pid):
                killed["random"] += 1
            finish(WORK / "out", expected, f"after {moment:.3f} s")
    print(json.dumps({"killed": dict(killed), "files": len(expected), "duration": round(duration, 3)}))


if __name__ == "__main__":
    main()
