"""The canary's whole way through a package `vllm` of a few lines, and the script for a GPU host on it.

The stand-in has the names and calls of vLLM 0.25.1 that the probe uses, as they were read. It shows that a request gets there,
that rows of logits are put in order and that findings come back; what vLLM itself computes, it cannot show. The probe answers
in this process; in one of its own another probe does in `test_canary`.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from inside import inside

from quantpub.engines.canary import Settings, canary
from quantpub.engines.probe_vllm import ENVIRONMENT

STUB = {
    "__init__.py": """
        __version__ = "0.25.1"
        import json, logging, math, torch
        from types import SimpleNamespace as N
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
        from vllm.model_executor.kernels.machete import MacheteLinearKernel
        print("INFO a line on stdout, as engines log")
        log = logging.getLogger("vllm")
        log.propagate, log.level = False, logging.INFO

        class SamplingParams:
            def __init__(self, temperature, max_tokens, detokenize, prompt_logprobs=None):
                self.count, self.prompt, self.text = max_tokens, prompt_logprobs, detokenize

        class Method:
            __module__ = "vllm.model_executor.layers.linear"

        class Model(torch.nn.Module):
            def __init__(self, config):
                super().__init__()
                self.head = torch.nn.Linear(16, config["vocab_size"], bias=False)
                self.embed = torch.nn.Embedding(config["vocab_size"], 16)
                self.head.quant_method = Method()
                self.head.quant_method.kernel = MacheteLinearKernel()
            def load_weights(self, weights):
                generator = torch.Generator().manual_seed(0)
                for name, parameter in self.named_parameters():
                    parameter.data = torch.randn(parameter.shape, generator=generator)
                    parameter.data *= weights.get("scale", 1.0) if name == "head.weight" else 1.0
                return {name for name, _ in self.named_parameters() if name not in weights.get("lost", [])}
            def compute_logits(self, hidden):
                return self.head(hidden)

        class LLM:
            def __init__(self, model, *, skip_tokenizer_init, enforce_eager, max_model_len, **kwargs):
                assert set(kwargs) <= {"seed"} and skip_tokenizer_init and enforce_eager
                config = json.load(open(model + "/config.json"))
                if "raises" in config:
                    raise ValueError(config["raises"])
                log.info("Using MacheteLinearKernel for CompressedTensorsWNA16")
                log.warning("Your GPU is old, see %s/config.json", model)
                log.warning("Your GPU is old, see %s/config.json", model)
                self.model, self.hides = Model(config), config.get("hides", False)
                DefaultModelLoader().load_weights(self.model, config)
                self.llm_engine = N(model_config=N(dtype=torch.bfloat16))
            def apply_model(self, function):
                if self.hides:
                    raise RuntimeError("in another process")
                return [function(self.model)]
            @torch.no_grad()
            def generate(self, prompts, params, use_tqdm):
                (ids,) = [prompt["prompt_token_ids"] for prompt in prompts]
                hidden, tokens = self.model.embed(torch.tensor(ids)), []
                while len(tokens) < params.count:
                    logits = self.model.compute_logits(hidden[-1:])
                    tokens.append(int(logits.argmax()))
                    logits.zero_()
                    if params.count > 1:
                        hidden = self.model.embed(torch.tensor(tokens))
                given = None
                if params.prompt:
                    rows = self.model.compute_logits(hidden[:-1]).log_softmax(-1)
                    given = [None]
                    for row, own in zip(rows, ids[1:]):
                        rank = row.argsort(descending=True).tolist()
                        shown = dict.fromkeys([own, *rank[:params.prompt]])
                        given.append({t: N(logprob=float(row[t]), rank=rank.index(t) + 1) for t in shown})
                return [N(outputs=[N(token_ids=tokens, text="")], prompt_logprobs=given)]
    """,
    "platforms.py": """
        class current_platform:
            device_name = "cuda"
            get_device_name = staticmethod(lambda: "NVIDIA H200")
    """,
    "engine/arg_utils.py": """
        from dataclasses import dataclass
        @dataclass
        class EngineArgs:
            model: str
            seed: int = 0
    """,
    "model_executor/kernels/machete.py": """
        class MacheteLinearKernel: pass
    """,
    "model_executor/model_loader/default_loader.py": """
        class DefaultModelLoader:
            def load_weights(self, model, config):
                model.load_weights(config)
    """,
}


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to make checkpoints in, beside a package `vllm` that this Python finds, and every one started from here."""
    for name, text in STUB.items():
        path = tmp_path / "packages" / "vllm" / name
        for folder in (path.parent, *path.parent.parents):
            if folder.is_relative_to(tmp_path / "packages" / "vllm"):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "__init__.py").touch()
        path.write_text(textwrap.dedent(text))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.syspath_prepend(tmp_path / "packages")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)  # and back to what it was
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]


def checkpoint(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 48, "max_position_embeddings": 34, **config}))
    return folder


def compared(folder: Path, base: Path | None = None) -> dict[str, Any]:
    with inside():
        return canary("vllm", folder, base, python=sys.executable, settings=Settings(options={"device": "cpu"}))


def test_the_whole_way_in_a_stand_in(stub: Path) -> None:
    base, same = checkpoint(stub / "base"), checkpoint(stub / "same")
    told = compared(same, base)
    assert told["verdict"] == "passed" and told["kl"]["mean"] == 0 and told["kl"]["tokens"] == 4 * 31
    assert told["kl"]["over"] == "the whole vocabulary" and told["missing"] == {"count": 0, "names": []}
    assert (told["version"], told["device"], told["dtype"]) == ("0.25.1", "NVIDIA H200", "bfloat16")
    assert told["kernels"] == {"head": "MacheteLinearKernel"} and told["kernel_rows"] == {"Machete": 1}
    assert told["kernel_lines"] == ["Using MacheteLinearKernel for CompressedTensorsWNA16"]
    assert told["warnings"] == ["Your GPU is old, see config.json"]
    assert told["generated"]["tokens"] == told["generated"]["base"]["tokens"] != []


def test_faults_in_a_stand_in(stub: Path) -> None:
    base = checkpoint(stub / "base")
    wrong = compared(checkpoint(stub / "wrong", scale=0.1, lost=["head.weight"]), base)
    assert wrong["verdict"] == "failed" and "head.weight; KL" in wrong["reason"]
    refused = compared(checkpoint(stub / "refused", raises="no kernel takes (/a/b/c)"))
    assert not refused["loaded"] and refused["error"] == "ValueError: no kernel takes (c)"


def test_where_the_model_is_out_of_reach_the_most_likely_tokens_are_compared(stub: Path) -> None:
    base, found = checkpoint(stub / "base", hides=True), checkpoint(stub / "found", hides=True, scale=0.9)
    told = compared(found, base)
    assert told["kl"]["over"] == "the most likely tokens, a lower bound" and 0 < told["kl"]["mean"] < 1
    assert told["top1_agreement"] == 1 and told["kernels"] == {} and told["missing"]["count"] == 0
    assert any("no whole rows of logits" in line for line in told["warnings"])


def test_the_script_for_a_gpu_host_runs_every_checkpoint_beside_one_base(
    stub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (stub / "bin").mkdir()
    (stub / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA H200, 570.1'\n")
    (stub / "bin" / "nvidia-smi").chmod(0o755)
    base, same, bad = (
        checkpoint(stub / name, **more) for name, more in (("b", {}), ("s", {}), ("x", {"raises": "no"}))
    )
    monkeypatch.setenv("PATH", f"{stub / 'bin'}:{os.environ['PATH']}")
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = str(ROOT / "scripts" / "canary_gpu.py")
    monkeypatch.setattr(sys, "argv", [script, str(stub / "out.json"), str(base), f"same={same}", f"bad={bad}"])
    with inside() as ran:
        runpy.run_path(script, run_name="__main__")
    assert ran == [base, same, bad]
    found = json.loads((stub / "out.json").read_text())
    verdicts = {name: one["verdict"] for name, one in found["checkpoints"].items()}
    assert verdicts == {"base": "not compared", "same": "passed", "bad": "failed"}
    assert found["checkpoints"]["same"]["kernels"] == {"MacheteLinearKernel": {"modules": 1, "first": "head"}}
    assert found["made_by"]["gpu"] == "NVIDIA H200" and "--- log of bad\nValueError: no" in capsys.readouterr().err
    assert len((stub / "out.jsonl").read_text().splitlines()) == 3 and str(stub) not in (stub / "out.json").read_text()
