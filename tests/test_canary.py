"""The canary in a real engine, transformers on the CPU: sound layouts pass, planted faults fail, what cannot run is said."""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO_MODEL, ROOT, make_artifact
from inside import Answers, inside
from safetensors.torch import load_file, save_file

from quantpub.engines import canary as stage
from quantpub.engines import probing
from quantpub.engines.canary import Settings, canary, require
from quantpub.engines.canary_tokens import Tokens, canary_tokens
from quantpub.errors import UnavailableError, UsageError

Tensors = dict[str, torch.Tensor]
RUN = stage.run  # in a process
few = functools.cache(lambda: canary_tokens(DEMO_MODEL, window=64))
IDS = Tokens(((1, 2, 3),), (1, 2), "text")


# ---- processes


@pytest.mark.parametrize("python", ["/bin/true", "/bin/false", "/nowhere/python", "/bin/cat"])
def test_what_is_no_python_is_a_usage_error(python: str) -> None:
    with pytest.raises(UsageError) as error:
        require("vllm", python)
    assert error.value.where == f"--engine-python {python}"


def test_a_python_without_the_engine_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="lacks sglang"):
        require("sglang", sys.executable)
    with pytest.raises(UsageError, match="no engine 'tgi'"):
        require("tgi", None)


def spoken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, timeout: float = 20) -> dict[str, Any]:
    """What a process of these lines comes to as a probe's reply."""
    monkeypatch.setattr(stage, "command", lambda python, module: [sys.executable, "-c", code])
    return RUN("vllm", DEMO_MODEL, IDS, tmp_path / "out", None, Settings(timeout=timeout)).reply


def test_rubbish_is_no_reply(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = "import sys; print('{}'); print('[1'); print('/a/b/c went wrong', file=sys.stderr); sys.exit(3)"
    told = spoken(monkeypatch, tmp_path, code)
    assert told == {"loaded": False, "error": "the engine ended with 3 and no answer: c went wrong", "kind": "crash"}


def test_a_reply_is_found_among_other_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = "print('INFO'); print('{\"loaded\": true, \"finite\": true}'); print('bye')"
    assert spoken(monkeypatch, tmp_path, code) == {"loaded": True, "finite": True}


def test_a_crash_is_the_checkpoints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = spoken(monkeypatch, tmp_path, "import os; os.kill(os.getpid(), 11)")
    assert told["error"] == "the engine was ended by signal 11 and no answer"


def test_too_long_is_unavailable_and_nothing_is_left_running(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    child = tmp_path / "pid"
    code = (
        "import pathlib, subprocess, time\n"
        f"child = subprocess.Popen(['sleep', '60']); pathlib.Path({str(child)!r}).write_text(str(child.pid)); time.sleep(60)"
    )
    with pytest.raises(UnavailableError, match=r"no answer within 0\.6 s"):
        spoken(monkeypatch, tmp_path, code, timeout=0.6)
    assert ended(Path(f"/proc/{child.read_text()}/stat")), "it would sleep for a minute"


def ended(stat: Path) -> bool:
    """A signal that kills takes a moment on a busy machine; only the process itself is waited for, not what it started."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            if stat.read_text().split()[2] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def test_killed_and_out_of_memory_are_unavailable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="ended by signal 9"):
        spoken(monkeypatch, tmp_path / "a", "import os; os.kill(os.getpid(), 9)")
    failed = json.dumps({"loaded": False, **probing.failure(RuntimeError("CUDA out of memory. Tried to allocate"))})
    with pytest.raises(UnavailableError, match="too little memory"):
        spoken(monkeypatch, tmp_path / "b", f"print({failed!r})")


def test_errors_are_one_line_without_paths() -> None:
    said = probing.failure(ValueError("no such\n file: '/home/me/models/base/config.json', see https://x.org/a/b"))
    assert said == {"error": "ValueError: no such file: 'config.json', see https://x.org/a/b", "kind": "error"}
    assert probing.failure(ImportError("pip install x"))["kind"] == "install"


# ---- transformers itself


@pytest.fixture(autouse=True)
def answers() -> Iterator[Answers]:
    with inside() as ran:
        yield ran


@pytest.fixture(scope="module")
def masters(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Recipe → an artifact of the demo model. Read only."""

    @functools.cache
    def made(recipe: str) -> Path:
        return make_artifact(DEMO_MODEL, recipe, tmp_path_factory.mktemp("masters") / recipe, LAYOUTS[recipe][0])

    return made


def judged(folder: Path, base: Path = DEMO_MODEL, **more: Any) -> dict[str, Any]:
    return canary("transformers", folder, base, few(), settings=Settings(generate=12), **more)


@functools.cache
def base_logits(base: Path) -> torch.Tensor:
    from quantpub.forward import load_baseline

    logits_BTV: torch.Tensor = load_baseline(base)(torch.tensor(few().windows), use_cache=False).logits
    return logits_BTV


def evaluated(artifact: Path, base: Path = DEMO_MODEL) -> tuple[float, float]:
    """(mean, standard error) of the KL of stage `eval` on the canary's own ids, from the artifact's bytes in float32."""
    from quantpub import evaluate
    from quantpub.artifact import Artifact
    from quantpub.decode import Decoder
    from quantpub.forward import ArtifactModel

    x_BT = torch.tensor(few().windows)
    with torch.inference_mode():
        found_BTV = ArtifactModel(Decoder(Artifact.open(artifact))).forward(x_BT)
        base_BTV = base_logits(base)
        rows = [evaluate.compare(*window) for window in zip(x_BT, base_BTV, found_BTV, strict=True)]
    kl = evaluate.figures(rows)["kl"]
    return kl["mean"], kl["stderr"]


LAYOUTS = {
    "w4a16-rtn": ("ct-pack", "Linear of pack-quantized"),
    "fp8-dynamic": ("ct-float", "Linear of float-quantized"),
    "int8-dynamic": ("ct-int", "Linear of int-quantized"),
    "nvfp4a16": ("ct-nvfp4", "Linear of nvfp4-pack-quantized"),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", LAYOUTS)
def test_compressed_tensors_layouts_load_and_agree_with_stage_eval(masters: Callable[[str], Path], recipe: str) -> None:
    artifact, kernel = masters(recipe), LAYOUTS[recipe][1]
    told = judged(artifact)
    mean, stderr = evaluated(artifact)
    assert told["verdict"] == "passed" and told["missing"]["count"] == told["unexpected"]["count"] == 0
    assert told["kl"]["mean"] == pytest.approx(mean, abs=stderr + 1e-3)  # two bf16 runs are 6e-4 apart
    assert told["kl"]["tokens"] == 4 * 64 and told["kl"]["over"] == "the whole vocabulary"
    assert set(told["kernels"].values()) == {kernel} and len(told["kernels"]) == 28
    assert told["generated"]["text"] and len(told["generated"]["base"]["tokens"]) == 12
    json.dumps(told, allow_nan=False)


def zeroed(tensors: Tensors) -> None:
    for name in tensors:
        if name.endswith("weight_scale"):
            tensors[name].zero_()


def swapped(tensors: Tensors) -> None:
    names = sorted((n for n in tensors if n.endswith("weight_global_scale")), key=lambda n: float(tensors[n]))
    low, high = names[0], names[-1]
    assert tensors[low] < tensors[high]
    tensors[low], tensors[high] = tensors[high].clone(), tensors[low].clone()


def renamed(tensors: Tensors) -> None:
    name = "model.layers.0.mlp.down_proj.weight_packed"
    tensors[name.replace("down", "d")] = tensors.pop(name)


def damaged(tensors: Tensors) -> None:
    tensors["model.layers.0.mlp.down_proj.weight_scale"].fill_(math.nan)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "fault", "reason"),
    [
        ("w4a16-rtn", zeroed, r"KL \d+.* exceeds 0.5 .*one token again and again"),
        ("nvfp4a16", swapped, r"KL 2.* exceeds 0.5"),
        ("w4a16-rtn", renamed, r"1 tensors are missing .*layers.0.mlp.down_proj.weight_packed; KL"),
        ("w4a16-rtn", damaged, "its logits are not finite"),
    ],
    ids=["scales zeroed", "global scales swapped", "a name broken", "a scale not a number"],
)
def test_planted_faults_are_caught(
    masters: Callable[[str], Path], tmp_path: Path, recipe: str, fault: Callable[[Tensors], None], reason: str
) -> None:
    artifact = Path(shutil.copytree(masters(recipe), tmp_path / "artifact"))
    tensors = load_file(artifact / "model.safetensors")
    fault(tensors)
    save_file(tensors, artifact / "model.safetensors", metadata={"format": "pt"})
    told = judged(artifact)
    assert told["verdict"] == "failed" and re.search(reason, told["reason"]), told["reason"]


def save_moe(folder: Path) -> Path:
    """A random Qwen3-MoE with large weights, so that its predictions are far from uniform; the demo's tokenizer."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    names = ("hidden_size", "intermediate_size", "moe_intermediate_size")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}
    config = Qwen3MoeConfig(vocab_size=8192, initializer_range=0.15, **dict.fromkeys(names, 128), **heads, **experts)
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, folder)
    return folder


@pytest.mark.slow
def test_experts_of_other_names_are_left_at_random_and_that_is_a_failure(tmp_path: Path) -> None:
    base = save_moe(tmp_path / "moe")
    artifact = make_artifact(base, "w4a16-rtn", tmp_path / "artifact")
    sound = judged(artifact, base)
    assert sound["verdict"] == "passed" and sound["missing"]["count"] == 0
    assert sound["kl"]["mean"] == pytest.approx(evaluated(artifact, base)[0], rel=0.02)
    tensors = {
        name.replace(".experts.", ".expert."): t for name, t in load_file(artifact / "model.safetensors").items()
    }
    save_file(tensors, artifact / "model.safetensors", metadata={"format": "pt"})
    told = judged(artifact, base)
    assert told["verdict"] == "failed" and told["missing"]["count"] == 4
    assert told["reason"].startswith(
        "4 tensors are missing and were left as initialized: model.layers.0.mlp.experts.down_proj"
    )
    assert told["unexpected"]["count"] == 2 * 4 * 3 * 3
    assert told["warnings"][-1].startswith("Qwen3MoeForCausalLM LOAD REPORT from: artifact ")


@pytest.mark.slow
def test_the_whole_way_in_a_process_of_its_own(
    masters: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its base in this one; packages that transformers would import for nothing are hidden from it: 2 s."""
    artifact, here = masters("w4a16-rtn"), stage.run
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules |= dict.fromkeys(('hqq', 'torchao'))")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(
        stage, "run", lambda engine, folder, *more: (RUN if folder == artifact else here)(engine, folder, *more)
    )
    told = judged(artifact, python=sys.executable)
    assert told["verdict"] == "passed" and told["ids"] == "text" and 0.1 < told["kl"]["mean"] < 0.3
    assert told["device"] == "cpu" and len(told["generated"]["tokens"]) == 12
    assert not any(str(ROOT) in line or "/" in line for line in told["warnings"])


@pytest.mark.slow
def test_a_folder_that_is_no_checkpoint_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 100, "model_type": "no-such-model"}))
    told = canary("transformers", tmp_path)
    assert not told["loaded"] and told["verdict"] == "failed" and "no-such-model" in told["reason"]
    assert told["ids"].startswith("random") and "\n" not in told["error"]
