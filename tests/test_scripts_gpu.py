"""The scripts that measure throughput on a GPU host: what of them needs no GPU, and the whole of serve_bench on a stand-in.

The stand-in is a module `vllm` of a few lines with the attributes that serve_inside.py uses, and an `nvidia-smi`.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROOT, run_cli

SCRIPTS = ROOT / "scripts"
ENGINE = """
import time
from types import SimpleNamespace as N

class SamplingParams:
    def __init__(self, **given): self.max_tokens = given["max_tokens"]; assert given["ignore_eos"]

class LLM:
    def __init__(self, folder, **given):
        if folder.endswith("broken"):
            raise RuntimeError("no kernel takes this weight")
        print("INFO 11-20 [x.py:1] Using MacheteLinearKernel for CompressedTensorsWNA16")
        print("Capturing graphs: 50%|#### 8.00it/s]", end="")
        print("INFO 11-20 [y.py:2] GPU KV cache size: 705,312 tokens")
        core = N(get_output=self._output, shutdown=lambda: None)
        scheduler = N(max_num_batched_tokens=16384, max_num_seqs=1024)
        self.llm_engine = N(engine_core=core, vllm_config=N(scheduler_config=scheduler))

    def _output(self):
        time.sleep(0.0002)
        return N(timestamp=time.monotonic(), outputs=[None] * self.requests)

    def generate(self, prompts, params, use_tqdm):
        assert all(isinstance(prompt["prompt_token_ids"][0], int) for prompt in prompts)
        self.requests = len(prompts)
        for _ in range(params.max_tokens):
            self.llm_engine.engine_core.get_output()
        return [N(outputs=[N(token_ids=[0] * params.max_tokens)]) for _ in prompts]
"""


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    """Imports one of the scripts; they find each other beside themselves."""

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    path, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(SCRIPTS))
    yield load
    sys.path[:] = path
    for name in set(sys.modules) - known:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__ or "").parent == SCRIPTS:
            del sys.modules[name]


@pytest.fixture(scope="module")
def model(script: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny configuration, in shards small enough that there are several."""
    out: Path = tmp_path_factory.mktemp("random") / "tiny"
    made = script("random_model")
    total = made.make(out, made.CONFIGS["tiny"], "cpu", limit=1_000_000)
    assert total == sum(2 * math.prod(shape) for shape in made.shapes(made.CONFIGS["tiny"]).values())
    return out


def test_random_model_opens_in_transformers(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert len(list(model.glob("*.safetensors"))) > 1
    found, info = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True, dtype=torch.bfloat16)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert found.config.rope_parameters["rope_theta"] == 1e6
    weight = found.model.layers[1].mlp.down_proj.weight.float()
    assert weight.std().item() == pytest.approx(0.02, rel=0.02) and abs(weight.mean().item()) < 1e-3
    assert not torch.equal(weight, found.model.layers[0].mlp.down_proj.weight.float())
    assert found(torch.arange(8)[None]).logits.isfinite().all()


def test_random_8b_has_the_shapes_of_qwen3_8b(script: Any) -> None:
    made = script("random_model")
    tensors = made.shapes(made.CONFIGS["qwen3-8b"])
    parameters = sum(math.prod(shape) for shape in tensors.values())
    assert (len(tensors), parameters) == (399, 8_190_735_360)  # of Qwen/Qwen3-8B's own index
    parts = made.shards(tensors, made.SHARD)
    assert [name for part in parts for name in part] == list(tensors) and len(parts) == 4


def test_random_moe_has_a_layer_of_qwen3_30b_a3b(script: Any) -> None:
    made = script("random_model")
    a_layer = sum(math.prod(shape) for _, shape in made.layer(made.CONFIGS["qwen3-30b-a3b-2-layers"]))
    whole = 48 * a_layer + 2 * 151936 * 2048 + 2048
    assert whole == 30_532_122_624  # of Qwen/Qwen3-30B-A3B


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (SCRIPTS / "shapes").glob("*.yaml")))
def test_recipes_for_shapes_quantize_a_random_model(model: Path, tmp_path: Path, recipe: str) -> None:
    shapes = SCRIPTS / "shapes" / f"{recipe}.yaml"
    made = run_cli("quantize", model, "-r", shapes, "--engine", "vllm", "-o", tmp_path / recipe, "--json")
    assert made.code == 0, made.err
    whole = run_cli("plan", model, "-r", recipe, "--engine", "vllm", "--json").json()["plans"][0]
    assert made.json()["output_bytes"] == whole["output_bytes"]  # the recipe proper: only the algorithm differs
    run = json.loads((tmp_path / recipe / ".quantpub" / "run.json").read_text())
    assert run["scheme"]["name"] == whole["scheme"] and run["layout"] == whole["layout"]


@pytest.mark.slow
def test_shapes_artifacts_quantizes_side_by_side(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, SCRIPTS / "shapes_artifacts.py", model, tmp_path, "w4a16-rtn", "nothing", "--jobs", "2"]
    done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, check=False, cwd=tmp_path)
    lines = {each["recipe"]: each for each in map(json.loads, done.stdout.splitlines()[:2])}
    assert done.returncode == 1 and lines["w4a16-rtn"]["code"] == 0, done.stderr
    assert "unknown recipe" in lines["nothing"]["failed"]
    run = json.loads((tmp_path / "w4a16-rtn" / ".quantpub" / "run.json").read_text())
    assert run["recipe"] == "shapes-w4a16-rtn" and run["layout"] == "ct-pack"


def test_runs_are_those_of_the_workloads(script: Any) -> None:
    runs = script("serve_bench").planned(["interactive", "serving", "1024:64@16"])
    assert [(run.name, run.written) for run in runs] == [
        *((f"interactive@{n}", f"128:128@{n}") for n in (1, 2, 4, 8)),
        ("serving", "512:128@100"),
        ("1024:64@16", "1024:64@16"),
    ]


def test_checkpoints_are_named_with_their_gpu(script: Any) -> None:
    parse = script("serve_bench").Checkpoint.parse
    assert (parse("a=/x/y").gpu, parse("a=/x/y@3").gpu) == (0, 3)
    assert parse("a=/x@2/y@3").folder == Path("/x@2/y") and parse("a=/x@b").folder == Path("/x@b")
    with pytest.raises(SystemExit, match="NAME=FOLDER"):
        parse("/x/y")


def test_budget_is_shared_and_the_small_get_all(script: Any) -> None:
    cap = script("serve_inside").cap
    assert cap([1, 2, 3], 6) == math.inf
    assert cap([1, 10, 10], 11) == 5
    assert cap([2, 2, 100], 10) == 6
    assert cap([5, 5], -1) < 0


def test_scaling_keeps_the_character_of_a_workload(script: Any) -> None:
    inside = script("serve_inside")
    costs = inside.Costs(prompt=1e-3, step=0.01, full_step=0.01, cached=0.0)
    long, wide = inside.Run("decode", 128, 2048, 256), inside.Run("prefill", 2048, 128, 256)
    assert costs.seconds(long) == pytest.approx(256 * 128 * 1e-3 + 2048 * 0.01)
    assert inside.scaled(long, costs, 100) == long
    less = inside.scaled(long, costs, 45)
    assert (less.requests, less.output) == (256, 1152) and costs.seconds(less) <= 45  # 9/16
    fewer = inside.scaled(wide, costs, 200)
    assert (fewer.output, fewer.requests) == (128, 96) and costs.seconds(fewer) <= 200  # 6/16
    assert inside.scaled(wide, costs, -1).requests == 16
    assert inside.scaled(inside.Run("one", 128, 128, 1), costs, 0).requests == 1


def test_steps_are_told_by_batch(script: Any) -> None:
    steps = [(10.5, 2), (10.6, 4), (10.7, 4), (10.9, 4)]
    told = script("serve_inside").told(steps, begun=10.0)
    assert (told["steps"], told["first_s"]) == (4, 0.5)
    assert told["opening"] == [[2, 500.0], [4, 100.0], [4, 100.0], [4, 200.0]]
    assert told["by_batch"][0] == {"requests": 4, "steps": 3, "median_ms": 100.0}
    assert script("serve_inside").told([], 0.0) == {}


def test_log_lines_give_kernels_and_facts(script: Any) -> None:
    log = script("engine_log")
    assert log.kernels_in("(EngineCore pid=7) INFO [a.py:9] Using MarlinNvFp4LinearKernel for NVFP4 GEMM") == [
        "Using MarlinNvFp4LinearKernel for NVFP4"
    ]
    assert log.kernels_in("INFO Selected CutlassFP8ScaledMMLinearKernel for CompressedTensorsW8A8Fp8")
    assert log.kernels_in("INFO Using 'MARLIN' NvFp4 MoE backend out of potential") == [
        "Using 'MARLIN' NvFp4 MoE backend"
    ]
    assert log.facts_in("INFO GPU KV cache size: 705,312 tokens") == {"kv_cache_tokens": 705312}
    assert log.facts_in("Model loading took 15.27 GiB and 4.250000 seconds") == {"model_gib": 15.27, "load_s": 4.25}
    assert log.facts_in("Graph capturing finished in 9 secs, took -0.66 GiB") == {"capture_s": 9, "graphs_gib": -0.66}


def run_of(**changed: Any) -> dict[str, Any]:
    shape = {"prompt": 512, "output": 128, "requests": 100, "ran": "512:128@100", "asked": "512:128@100"}
    return {"workload": "serving", **shape, "repeat": 0, "seconds": 2.0, **changed}


def test_repeats_are_summarised(script: Any) -> None:
    runs = [run_of(seconds=2.0, steps=5), run_of(seconds=2.5, steps=6), run_of(seconds=4.0, steps=7)]
    (found,) = script("serve_bench").summarised(runs)
    assert (found["median_s"], found["spread"], found["steps"]) == (2.5, 0.8, 6)
    assert (found["output_tokens_per_s"], found["total_tokens_per_s"]) == (5120.0, 25600.0)
    assert (
        not found["scaled"] and script("serve_bench").summarised([run_of(ran="512:128@50", requests=50)])[0]["scaled"]
    )


def test_cores_are_cut_without_overlap(script: Any) -> None:
    cores = script("serve_bench").cores_of([0])
    assert cores[0] == sorted(os.sched_getaffinity(0))
    several = script("serve_bench").cores_of(list(range(2)))
    assert len(cores[0]) == 1 or not set(several[0]) & set(several[1])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """serve_bench.py as it is called, on two checkpoints: one works, one fails in its constructor."""
    place = tmp_path_factory.mktemp("bench")
    (place / "site").mkdir()
    (place / "site" / "vllm.py").write_text(ENGINE)
    smi = place / "nvidia-smi"
    smi.write_text('#!/bin/sh\ncase "$*" in *memory.used*) echo 0;; *) echo "NVIDIA H200, 580.1";; esac\n')
    smi.chmod(0o755)
    for name in ("good", "broken"):
        (place / name).mkdir()
        config = {"vocab_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 256}
        (place / name / "config.json").write_text(json.dumps(config))
    command = [sys.executable, SCRIPTS / "serve_bench.py", "out/bench.json", "good=good", "broken=broken"]
    options = ["--workloads", "interactive,64:8@4", "--cache", place / "cache", "--limit-seconds", "20"]
    env = os.environ | {"PYTHONPATH": "site", "PATH": f"{place}:{os.environ['PATH']}"}
    done = subprocess.run([*command, *options], env=env, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return place / "out"


def test_bench_measures_a_checkpoint(bench: Path) -> None:
    found = json.loads((bench / "bench.json").read_text())
    good = found["checkpoints"]["good"]
    assert found["made_by"]["gpu"] == "NVIDIA H200" and found["made_by"]["settings"]["limit"] == 20
    assert good["kernels"] == ["Using MacheteLinearKernel for CompressedTensorsWNA16"]
    assert good["log"]["kv_cache_tokens"] == 705312 and good["engine"]["max_num_batched_tokens"] == 16384
    runs = {run["workload"]: run for run in good["workloads"]}
    assert list(runs) == [*(f"interactive@{n}" for n in (1, 2, 4, 8)), "64:8@4"]
    assert len(runs["interactive@4"]["seconds"]) == 3 and runs["interactive@4"]["by_batch"][0]["requests"] == 4
    assert runs["64:8@4"]["steps"] == 8 and not runs["64:8@4"]["scaled"] and "failed" not in good
    assert "MacheteLinearKernel" in (bench / "good.log").read_text()


def test_bench_says_why_a_checkpoint_failed(bench: Path) -> None:
    broken = json.loads((bench / "bench.json").read_text())["checkpoints"]["broken"]
    assert "no kernel takes this weight" in broken["failed"] and broken["workloads"] == []
    assert "no kernel takes this weight" in (bench / "broken.log").read_text()


def test_bench_writes_every_run_at_once(bench: Path) -> None:
    lines = [json.loads(line) for line in (bench / "bench.jsonl").read_text().splitlines()]
    runs = [line["run"] for line in lines if "run" in line]
    assert len(runs) == 4 * 3 + 2 and {run["repeat"] for run in runs} == {0, 1, 2}
    first = [run["workload"] for run in runs[:5]]
    assert first == [*(f"interactive@{n}" for n in (1, 2, 4, 8)), "64:8@4"]  # each once before any twice


def measured(script: Any) -> dict[str, Any]:
    def runs(*seconds: float) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = script("serve_bench").summarised([run_of(seconds=each) for each in seconds])
        return found

    shown = {"bf16": runs(4.0, 4.4), "fp8": runs(2.0), "odd": runs(3.0), "alone": runs(3.0)}
    return {"made_by": {}, "checkpoints": {name: {"workloads": found} for name, found in shown.items()}}


def test_side_by_side_joins_what_was_run(script: Any) -> None:
    side = script("side_by_side")
    asked = []

    def predict(evidence: Any, config: Any, ran: str) -> dict[str, Any]:
        asked.append((evidence["name"], ran))
        return {"seconds": evidence["seconds"], "baseline_seconds": evidence["base"], "shares": {"attention": 0.2}}

    known = {
        "fp8": ({"name": "fp8", "seconds": 2.5, "base": 4.0}, {}),
        "odd": ({"name": "odd", "base": 5.0}, {}),  # its prediction fails
    }
    rows = {row["checkpoint"]: row for row in side.joined(measured(script), known, "bf16", predict)}
    assert ("fp8", "512:128@100") in asked
    fp8 = rows["fp8"]
    assert (fp8["error"], fp8["measured_speedup"], fp8["predicted_speedup"]) == (-0.2, 2.1, 1.6)
    assert fp8["predicted_tokens_per_s"] == pytest.approx(64000 / 2.5) and fp8["prediction"]["shares"]
    assert "KeyError" in rows["odd"]["missing"] and rows["alone"]["missing"] == "no profile"
    assert side.summary(list(rows.values()))["within_15_percent"] == 0


def test_side_by_side_takes_the_base_from_the_profiles(script: Any) -> None:
    side = script("side_by_side")
    known = {name: ({"base": base}, {}) for name, base in (("a", 3.9), ("b", 4.0), ("c", 6.0))}
    rows = side.joined(measured(script), known, "bf16", lambda e, c, r: {"seconds": 1, "baseline_seconds": e["base"]})
    base = rows[0]
    assert (base["checkpoint"], base["predicted_s"], base["error"], base["predicted_speedup"]) == ("bf16", 4.0, 0.05, 1)
    text = side.markdown(rows).splitlines()
    assert text[2] == "| bf16 | serving | 512:128@100 | 15,238 | 9.5% | 16,000 | +5.0% | 1.00× | 1.00× |"
    assert text[4] == "| odd | serving | 512:128@100 | 21,333 | one run | no profile | – | 1.40× | – |"


def test_side_by_side_finds_profiles_in_artifacts_and_beside(script: Any, tmp_path: Path) -> None:
    (tmp_path / "a" / ".quantpub").mkdir(parents=True)
    (tmp_path / "a" / ".quantpub" / "profile.json").write_text('{"name": "a"}')
    (tmp_path / "a" / "config.json").write_text('{"model_type": "qwen3"}')
    (tmp_path / "b.json").write_text('{"name": "b"}')
    (tmp_path / "shape.json").write_text('{"model_type": "llama"}')
    found = script("side_by_side").profiles(tmp_path, ["a", "b", "c"], tmp_path / "shape.json")
    assert found == {"a": ({"name": "a"}, {"model_type": "qwen3"}), "b": ({"name": "b"}, {"model_type": "llama"})}
