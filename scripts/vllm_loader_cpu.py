"""Load checkpoints with vLLM's own model classes and loaders where there is no GPU, and compare every linear with ours.

usage: vllm_loader_cpu.py OUT.json NAME=FOLDER ...      (ours, in folders)

For layouts whose linears vLLM computes without kernels of its own (torchao's, bitsandbytes'): the model is built and filled by
vLLM's `get_model`, and each of its linears is given the identity, in bf16. What comes out is its weight as vLLM has loaded it:
the members of merged linears in their order, held against our `dequantize`. Attention is not run.

Run with a Python that has vLLM's packages and PYTHONPATH naming this repository and vLLM's wheel, unpacked; the version in its
METADATA must end in `+cpu`, by which vLLM chooses its platform. A folder that vLLM refuses is recorded with its message.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from provenance import installed, write

PACKAGES = ("vllm", "torch", "torchao", "bitsandbytes", "transformers")
MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


def loaded(folder: str) -> Any:
    """The model as vLLM's loader leaves it, on one rank."""
    import torch

    torch.accelerator.empty_cache = lambda: None  # vLLM calls it after loading, also where there is nothing to empty
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    args = EngineArgs(model=folder, dtype="bfloat16", max_model_len=256, enforce_eager=True, skip_tokenizer_init=True)
    config = args.create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{os.environ['RENDEZVOUS']}", 0, "gloo")
        initialize_model_parallel(1, 1)
        return get_model(vllm_config=config)


def compare(folder: str) -> dict[str, Any]:
    """Every linear of the engine against the weights that ours stands for."""
    import torch
    from vllm.model_executor.layers.linear import LinearBase

    from quantpub.artifact import Artifact
    from quantpub.decode import Decoder
    from quantpub.qtensor import dequantize

    decoder = Decoder(Artifact.open(Path(folder)))
    own = {module: dequantize(decoder.qtensor(module)).float() for module, _ in decoder.modules()}
    errors: dict[str, float] = {}
    methods: set[str] = set()
    for name, module in loaded(folder).named_modules():
        prefix, _, leaf = name.rpartition(".")
        members = [f"{prefix}.{each}" for each in MERGED.get(leaf, (leaf,))]
        if isinstance(module, LinearBase) and members[0] in own:
            w_NK = torch.cat([own.pop(member) for member in members])
            with torch.no_grad():
                found = module.quant_method.apply(module, torch.eye(w_NK.shape[1], dtype=torch.bfloat16), None)
            errors[name] = float((found.float().T - w_NK).norm() / w_NK.norm())
            methods.add(type(module.quant_method).__name__)
    worst = max(errors, key=errors.__getitem__)
    return {
        "loads": True,
        "layout": decoder.treatments[0].layout.name,
        "scheme": decoder.treatments[0].scheme.name,
        "linears": len(errors),
        "never_loaded": sorted(own),
        "methods": sorted(methods),
        "equal": sum(error == 0 for error in errors.values()),
        "worst_relative_error": errors[worst],
        "worst": worst,
    }


def one(folder: str, scratch: Path) -> dict[str, Any]:
    """In a process of its own: vLLM keeps one model parallel group a process."""
    scratch.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, __file__, "--one", folder],
        env={**os.environ, **ENV, "RENDEZVOUS": str(scratch)},
        capture_output=True,
        text=True,
        check=False,
    )
    scratch.unlink(missing_ok=True)
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    lines = [line.partition("]: ")[2] or line for line in done.stderr.splitlines() if "Error: " in line]
    return {"loads": False, "said": lines[-1] if lines else f"exit code {done.returncode}"}


def main(out: str, *given: str) -> None:
    pairs = [each.partition("=")[::2] for each in given]
    found = {name: one(folder, Path(f"{out}.rendezvous").absolute()) for name, folder in pairs}
    made: dict[str, object] = {
        "command": "vllm_loader_cpu",
        "versions": {p: installed(p) for p in PACKAGES},
        "device": "cpu",
    }
    write(out, made, checkpoints=found)


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        print(json.dumps(compare(sys.argv[2])))
    else:
        main(*sys.argv[1:])
