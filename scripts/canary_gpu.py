"""Run checkpoints through a real engine beside their base model: loading, kernels, text, KL of the logits.

usage: canary_gpu.py OUT.json BASE NAME=FOLDER ...

Run with the engine's own Python and PYTHONPATH naming this repository; it works offline. The base runs once, every
checkpoint in a process of its own after it. OUT.jsonl keeps each finding at once; a checkpoint that fails has the end of its
log on stderr. In the environment: CANARY_ENGINE, the engine (vllm); CANARY_MEMORY, the part of the GPU's memory that it may
take; CANARY_CACHE, the bytes of vLLM's KV cache, with which several can run at once; CANARY_OWN=1 adds the KL of our own
evaluation on the same tokens.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from provenance import made_by, write

from quantpub.engines.canary import Run, Settings, report, require, run
from quantpub.engines.canary_tokens import Tokens, canary_tokens
from quantpub.errors import QuantpubError

PACKAGES = ("vllm", "sglang", "torch", "transformers", "compressed-tensors", "flashinfer-python", "triton")
LOG = 6000  # characters of a log that are shown


def short(found: dict[str, Any]) -> dict[str, Any]:
    """Evidence is read by people: kernels as counts, with one module of each."""
    kernels = found.pop("kernels", {})
    first = {kernel: name for name, kernel in reversed(kernels.items())}
    counts = {kernel: {"modules": count, "first": first[kernel]} for kernel, count in Counter(kernels.values()).items()}
    return {**found, "kernels": counts}


def show_log(folder: Path) -> None:
    log = folder / "log"
    if log.is_file():
        print(f"--- log of {folder.name}\n{log.read_text(errors='replace')[-LOG:]}", file=sys.stderr, flush=True)


def attempt(engine: str, folder: Path, tokens: Tokens, out: Path, settings: Settings) -> Run:
    """A run, also where it was killed or found no memory: the others go on."""
    try:
        found = run(engine, folder, tokens, out, None, settings)
    except QuantpubError as error:
        found = Run({"loaded": False, "error": str(error), "kind": error.code}, out)
    except Exception as error:
        traceback.print_exc()
        found = Run({"loaded": False, "error": f"{type(error).__name__}: {error}", "kind": "bug"}, out)
    if found.error:
        show_log(out)
    return found


def keep(out: Path, name: str, found: dict[str, Any]) -> None:
    """A run that is cut short loses nothing."""
    with out.with_suffix(".jsonl").open("a") as file:
        file.write(json.dumps({"name": name, **found}) + "\n")
    told = {key: found.get(key) for key in ("verdict", "reason", "kl", "top1_agreement", "kernel_rows", "seconds")}
    print(name, json.dumps(told), flush=True)


def compare_with_own(base: Path, named: dict[str, Path], tokens: Tokens, found: dict[str, Any]) -> None:
    """The same tokens through our own float32 model of each checkpoint: what its bytes compute without any engine."""
    import torch

    from quantpub import evaluate
    from quantpub.forward import ArtifactModel, load_baseline, quiet_transformers
    from quantpub.opened import open_quantized

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x_BT = torch.tensor(tokens.windows, device=device)
    with quiet_transformers(), torch.inference_mode():
        base_BTV = load_baseline(base, device)(x_BT, use_cache=False).logits
        for name, folder in named.items():
            try:
                found_BTV = ArtifactModel(open_quantized(str(folder)).decoder, device).forward(x_BT)
                rows = [evaluate.compare(*window) for window in zip(x_BT, base_BTV, found_BTV, strict=True)]
                found[name]["own_kl"] = evaluate.figures(rows)["kl"]
            except Exception as error:
                traceback.print_exc()
                found[name]["own_kl"] = {"error": f"{type(error).__name__}: {error}"}
            print(name, "own", json.dumps(found[name]["own_kl"]), flush=True)


def main() -> None:
    out, base = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    named = [(name, Path(folder).resolve()) for name, _, folder in (spec.partition("=") for spec in sys.argv[3:])]
    engine, memory = os.environ.get("CANARY_ENGINE", "vllm"), os.environ.get("CANARY_MEMORY")
    options: dict[str, Any] = {"memory": float(memory)} if memory else {}
    if cache := os.environ.get("CANARY_CACHE"):
        options["engine"] = {"kv_cache_memory_bytes": int(cache)}
    settings = Settings(timeout=540, options=options)
    require(engine, None)
    tokens, found = canary_tokens(base, base), {}
    with tempfile.TemporaryDirectory(prefix="quantpub-canary-") as temporary:
        before = attempt(engine, base, tokens, Path(temporary, "base"), settings)
        found["base"] = short(report(engine, before, None, tokens))
        keep(out, "base", found["base"])
        for name, folder in named:
            started, place = time.monotonic(), Path(temporary, name)
            one = report(engine, attempt(engine, folder, tokens, place, settings), before, tokens)
            found[name] = short(one) | {"wall_seconds": round(time.monotonic() - started, 1)}
            keep(out, name, found[name])
            for window in place.glob("*.safetensors"):
                window.unlink()  # a window of a large vocabulary is 150 MB
    if os.environ.get("CANARY_OWN"):
        compare_with_own(base, dict(named), tokens, found)
    shown = {"engine": engine, "windows": len(tokens.windows), "window": len(tokens.windows[0]), "ids": tokens.source}
    write(str(out), made_by("scripts/canary_gpu.py", PACKAGES), settings=shown, checkpoints=found)


if __name__ == "__main__":
    main()
