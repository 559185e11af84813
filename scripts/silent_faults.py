"""What a real engine does with checkpoints that are wrong in a known way, beside what `verify` and its canary say of them.

usage: silent_faults.py OUT.json WORK {dense|moe} BASE QUANTIZED=FOLDER ...

BASE is a trained model in one shard; the FOLDERs are made from it, by the names that FAULTS gives them. Each fault is planted
in a copy below WORK. Run with the engine's own Python; it works offline. CANARY_ENGINE is the engine (vllm), CANARY_MEMORY
the part of the GPU's memory, CANARY_CACHE the bytes of vLLM's KV cache, CANARY_AT_ONCE how many run side by side (4).

silent: the engine loaded it and answered, without an error. caught: by a rule of `verify`, which needs no engine; and by the
canary. Exit code 1 where neither saw a fault, or a sound checkpoint was stopped.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from provenance import made_by, write
from safetensors.torch import load_file

sys.path += [str(Path(__file__).resolve().parents[1] / "tests")]
import plants
from plants import Edit, Tensors, changed, config, dropped, each, quantization, renamed, weights

from quantpub.decode import Decoder
from quantpub.engines.canary import Run, Settings, report, run
from quantpub.engines.canary_tokens import Tokens, canary_tokens
from quantpub.errors import QuantpubError
from quantpub.opened import Opened, open_quantized
from quantpub.verify.engine import expected
from quantpub.verify.run import verify

PACKAGES = ("vllm", "torch", "transformers", "compressed-tensors", "triton")
DOWN, EXPERT = plants.DOWN, "model.layers.0.mlp.experts.0.gate_proj"
ONE_LAYER, SCALE = "down_proj.weight_scale", ".weight_scale"


@dataclass(frozen=True)
class Fault:
    """row: of quantpub/failures.py, None: of none, 0: of what is sound. of: the checkpoint's name on the command line."""

    row: int | None
    of: str
    edit: Edit


def bf16_experts(base: Path, stack: bool) -> Edit:
    """The experts as they were before quantization, one parameter a layer or each its own."""

    def change(t: Tensors) -> None:
        for name in [name for name in t if ".experts." in name]:
            del t[name]
        own = {name: w for name, w in load_file(base / plants.SHARD).items() if ".experts." in name}
        t.update(stacked(own) if stack else own)

    return weights(change)


def stacked(own: Tensors) -> Tensors:
    """[E, 2N, K] and [E, N, K] a layer, as transformers holds them."""
    found: Tensors = {}
    for layer in sorted({name.partition(".experts.")[0] for name in own}):
        count = len({name.split(".experts.")[1].split(".")[0] for name in own if name.startswith(f"{layer}.")})
        w = {
            m: torch.stack([own[f"{layer}.experts.{i}.{m}_proj.weight"] for i in range(count)])
            for m in ("gate", "up", "down")
        }
        found[f"{layer}.experts.gate_up_proj"] = torch.cat([w["gate"], w["up"]], 1)
        found[f"{layer}.experts.down_proj"] = w["down"]
    return found


def dense() -> dict[str, Fault]:
    cache = quantization(lambda q: q.update(kv_cache_scheme=plants.CACHE))
    unended = quantization(lambda q: q["ignore"].append("re:.*v_proj"))
    return {
        "v_proj with a global scale of its own": Fault(6, "nvfp4a16", plants.own_global("weight_global_scale", 0.5)),
        "one down_proj with scales of other groups": Fault(
            8, "nvfp4a16", changed(f"{DOWN}{SCALE}", plants.meaningless)
        ),
        "every linear with scales of other groups": Fault(8, "nvfp4a16", each(SCALE, plants.meaningless)),
        "every tensor in a second shard": Fault(9, "w4a16", plants.written_twice),
        "the scales of down_proj missing": Fault(12, "w4a16", dropped(ONE_LAYER)),
        "the scales of FP8 down_proj missing": Fault(12, "fp8-dynamic", dropped(ONE_LAYER)),
        "the scales of down_proj renamed": Fault(12, "w4a16", renamed(ONE_LAYER, "down_proj.scale")),
        "an ignore pattern without an end": Fault(16, "w4a16", unended),
        "FP8 keys and values declared, no scales": Fault(17, "fp8-dynamic", cache),
        "a scale that is not a number": Fault(5, "w4a16", changed(f"{DOWN}{SCALE}", plants.NAN)),
        "scales of zero in one linear": Fault(5, "w4a16", changed(f"{DOWN}{SCALE}", torch.zeros_like)),
        "nibbles swapped in one linear": Fault(None, "w4a16", changed(f"{DOWN}.weight_packed", plants.swapped_nibbles)),
        "one norm lost": Fault(None, "w4a16", dropped("layers.0.post_attention_layernorm")),
        "the quantization_config lost": Fault(None, "w4a16", config(lambda c: c.pop("quantization_config"))),
    }


def moe(base: Path) -> dict[str, Fault]:
    return {
        "experts in one bf16 parameter": Fault(4, "w4a16", bf16_experts(base, True)),
        "an expert's scales of zero": Fault(5, "w4a16", changed(f"{EXPERT}{SCALE}", torch.zeros_like)),
        "experts under another name": Fault(11, "w4a16", renamed(".experts.", ".expert.")),
        "no experts": Fault(26, "w4a16", dropped(".experts.")),
        "one expert missing in every layer": Fault(26, "w4a16", dropped(".experts.2.")),
        "one linear of one expert missing": Fault(26, "w4a16", dropped("layers.0.mlp.experts.2.up_proj")),
        "experts in bf16, which the config says are int4": Fault(27, "w4a16", bf16_experts(base, False)),
        "FP8 experts in bf16, which the config says are FP8": Fault(27, "fp8-dynamic", bf16_experts(base, False)),
        "two experts exchanged in one layer": Fault(None, "w4a16", weights(plants.exchange_experts)),
        "the scales of one FP8 expert missing": Fault(
            12, "fp8-dynamic", dropped("layers.0.mlp.experts.2.down_proj.weight_scale")
        ),
    }


@dataclass(frozen=True)
class Bench:
    """Where a fault is tried: the engine with its settings, the base, and the base's own run."""

    engine: str
    settings: Settings
    tokens: Tokens
    base: Path
    before: Run
    work: Path

    def judge(self, name: str, row: int | None, folder: Path) -> dict[str, Any]:
        opened, failing = open_quantized(str(folder)), rules(folder, self.base)
        with tempfile.TemporaryDirectory(dir=self.work) as out:
            found = run(self.engine, folder, self.tokens, Path(out, "run"), None, self.settings)
            told = report(self.engine, found, self.before, self.tokens, expected(opened, _decoder(opened)))
        shown = {
            key: told.get(key)
            for key in ("verdict", "reason", "kl", "max_kl", "top1_agreement", "missing", "generated")
        }
        silent = bool(told["loaded"]) and "error" not in told
        result = {"name": name, "row": row, "rules": failing, "silent": silent, "canary": shown}
        print(
            name,
            "| rules:",
            ", ".join(failing) or "none",
            "| silent" if silent else "| error",
            told["reason"][:160],
            flush=True,
        )
        return result


def rules(folder: Path, base: Path) -> dict[str, str]:
    """Those of `verify` that fail; `opened`: it is not even taken for a quantized checkpoint."""
    try:
        found = verify(open_quantized(str(folder)), str(base))
    except QuantpubError as error:
        return {"opened": str(error).replace(f"{folder}/", "")}
    return {check["id"]: check["detail"] for check in found["checks"] if check["status"] == "failed"}


def _decoder(opened: Opened) -> Decoder | None:
    try:
        return opened.decoder
    except QuantpubError:  # it is broken on purpose
        return None


def planted(name: str, fault: Fault, sound: dict[str, Path], work: Path) -> Path:
    folder = work / name.replace(" ", "-").replace(",", "")
    shutil.copytree(sound[fault.of], folder)
    fault.edit(folder)
    return folder


def stranger(folder: Path, work: Path) -> Path:
    """Without our records: it is judged as anybody's."""
    copy = Path(shutil.copytree(folder, work / f"sound-{folder.name}"))
    shutil.rmtree(copy / ".quantpub", ignore_errors=True)
    return copy


def wrong(results: Sequence[dict[str, Any]]) -> list[str]:
    """Sound ones that were stopped, and faults that nothing saw."""
    stopped = [r["name"] for r in results if r["row"] == 0 and (r["rules"] or r["canary"]["verdict"] == "failed")]
    return stopped + [
        r["name"] for r in results if r["row"] != 0 and not r["rules"] and r["canary"]["verdict"] != "failed"
    ]


def main() -> int:
    out, work, kind, base = (
        Path(sys.argv[1]).resolve(),
        Path(sys.argv[2]).resolve(),
        sys.argv[3],
        Path(sys.argv[4]).resolve(),
    )
    work.mkdir(parents=True)
    named = (spec.partition("=") for spec in sys.argv[5:])
    sound = {name: stranger(Path(folder).resolve(), work) for name, _, folder in named}
    engine, options = os.environ.get("CANARY_ENGINE", "vllm"), dict[str, Any]()
    if memory := os.environ.get("CANARY_MEMORY"):
        options["memory"] = float(memory)
    if cache := os.environ.get("CANARY_CACHE"):
        options["engine"] = {"kv_cache_memory_bytes": int(cache)}
    settings, tokens = Settings(timeout=300, options=options), canary_tokens(base, base)
    bench = Bench(engine, settings, tokens, base, run(engine, base, tokens, work / "base", None, settings), work)
    faults = dense() if kind == "dense" else moe(base)
    tasks: list[tuple[str, int | None, Path]] = [(f"sound {name}", 0, folder) for name, folder in sound.items()]
    tasks += [(name, fault.row, planted(name, fault, sound, work)) for name, fault in faults.items()]
    with ThreadPoolExecutor(int(os.environ.get("CANARY_AT_ONCE", "4"))) as pool:
        results = list(pool.map(lambda task: bench.judge(*task), tasks))
    shown = {"engine": engine, "windows": len(tokens.windows), "window": len(tokens.windows[0]), "ids": tokens.source}
    write(
        str(out),
        made_by("scripts/silent_faults.py", PACKAGES),
        settings=shown,
        model=kind,
        results=results,
        wrong=wrong(results),
    )
    return int(bool(wrong(results)))


if __name__ == "__main__":
    sys.exit(main())
