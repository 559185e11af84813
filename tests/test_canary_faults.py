"""What an engine tells without an error: scales that it left unused, modules that it did not quantize, limits, what to do."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO_MODEL
from inside import inside
from safetensors.torch import save_file

from quantpub.artifact import Artifact
from quantpub.engines import canary as stage
from quantpub.engines.canary import Run, canary, report
from quantpub.engines.canary_faults import LOOSE, MAX_KL, Expected, ignored_scales
from quantpub.engines.canary_tokens import Tokens
from quantpub.engines.probing import top
from quantpub.errors import UnavailableError, UsageError
from quantpub.opened import open_quantized
from quantpub.targets import TARGETS
from quantpub.verify.engine import expected, in_engine, kinds, refused
from quantpub.verify.run import remedy

PEERS = Path(__file__).parent / "golden" / "checkpoints"
IDS = Tokens(((1, 2, 3, 0),), (1, 2), "text")
ROWS = torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 3)


@pytest.mark.parametrize(
    ("unused", "ignored"),
    [
        (["a.weight_scale", "a.input_scale"], ["a.weight_scale"]),
        (["a.weight_scale_2", "a.weight_global_scale"], ["a.weight_scale_2", "a.weight_global_scale"]),
        (["a.weight_scale_inv", "a.weight_zero_point"], ["a.weight_scale_inv", "a.weight_zero_point"]),
        (["a.qzeros", "a.scales", "a.SCB"], ["a.qzeros", "a.scales", "a.SCB"]),
        (["e.gate_up_proj_scale", "e.w13_proj_scale"], ["e.gate_up_proj_scale", "e.w13_proj_scale"]),
        (["a.input_scale", "a.k_scale", "a.v_scale", "a.input_global_scale"], []),
        (["mtp.weight_packed", "mtp.weight_scale"], []),
        (["mtp.weight", "mtp.weight_scale", "a.weight_scale"], ["a.weight_scale"]),
    ],
)
def test_scales_of_weights_that_were_used_are_told_from_others(unused: list[str], ignored: list[str]) -> None:
    assert ignored_scales(unused) == ignored


def reply(**more: Any) -> dict[str, Any]:
    return {"loaded": True, "finite": True, "generated": {"tokens": [*range(9)], "text": None}, **more}


def whole(folder: Path, rows_TV: torch.Tensor = ROWS) -> Path:
    folder.mkdir()
    save_file({"logprobs_TV": rows_TV.log()}, folder / "window-0.safetensors")
    return folder


def told(folder: Path, quantized: bool | None = True, **more: Any) -> dict[str, Any]:
    """The report of a run whose logits are the base's."""
    found = Run(reply(**more), whole(folder / "found"))
    return report("vllm", found, Run(reply(), whole(folder / "base")), IDS, Expected(quantized=quantized))


PLAIN = {"kernels": {"q": "UnquantizedLinearMethod", "e": "UnquantizedFusedMoEMethod"}}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (PLAIN, "none of its modules is quantized"),
        ({"kernels": {}, "quantizer": None}, "took no notice of its quantization"),
        (
            {"unexpected": ["a.weight_scale"]},
            "1 scales of weights were not used, though the weights were: a.weight_scale",
        ),
    ],
)
def test_a_checkpoint_that_is_loaded_as_if_it_were_not_quantized_fails(
    more: dict[str, Any], words: str, tmp_path: Path
) -> None:
    found = told(tmp_path, **more)
    assert found["verdict"] == "failed" and words in found["reason"] and "serve it with another engine" in found["next"]


@pytest.mark.parametrize(
    ("more", "quantized"),
    [
        (PLAIN, False),
        (PLAIN, None),
        ({"kernels": {"q": "MarlinLinearKernel", "head": "UnquantizedLinearMethod"}}, True),
        ({"kernels": {}, "quantizer": "fp8, dequantized"}, True),  # as it was loaded
        ({"kernels": {}}, True),  # out of reach
    ],
)
def test_kernels_that_are_due_or_not_told_are_no_fault(
    more: dict[str, Any], quantized: bool | None, tmp_path: Path
) -> None:
    assert told(tmp_path, quantized, **more)["verdict"] == "passed"


def likely(folder: Path, own: list[float]) -> Path:
    """A run of which only two most likely tokens are known, and how likely the text's own were."""
    folder.mkdir()
    save_file(top([[(math.log(0.6), 7), (math.log(0.3), 8)]] * len(own), own), folder / "window-0.safetensors")
    return folder


@pytest.mark.parametrize(
    ("own", "ids", "verdict"),
    [(-3.2, "text", "failed"), (-2.4, "text", "passed"), (-3.2, "random ids", "passed"), (-9e2, "text", "failed")],
)
def test_where_only_the_most_likely_tokens_are_known_the_texts_own_must_stay_likely(
    own: float, ids: str, verdict: str, tmp_path: Path
) -> None:
    base, found = likely(tmp_path / "base", [-2.0] * 3), likely(tmp_path / "found", [own] * 3)
    seen = report("vllm", Run(reply(), found), Run(reply(), base), Tokens(IDS.windows, IDS.prompt, ids))
    assert seen["kl"]["mean"] == pytest.approx(0, abs=1e-6) and seen["verdict"] == verdict
    assert verdict == "passed" or "the text's own tokens are less likely by" in seen["reason"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"loaded": False, "error": "ValueError: x", "kind": "error"}, "read the engine's last line"),
        ({"loaded": False, "error": "signal 11", "kind": "crash"}, "load it in the engine alone"),
        ({"missing": ["a.weight"]}, "names that the engine looks for"),
        ({"finite": False}, "bfloat16"),
        ({"generated": {"tokens": [4] * 9, "text": None}}, "compare with --engine transformers"),
    ],
)
def test_each_kind_of_fault_says_what_to_do(more: dict[str, Any], words: str, tmp_path: Path) -> None:
    found = told(tmp_path, **more)
    assert found["verdict"] == "failed" and words in found["next"]
    assert remedy({"checks": [], "engine": found}) == found["next"]


def test_a_kl_that_is_too_high_says_what_to_do(tmp_path: Path) -> None:
    far = Run(reply(), whole(tmp_path / "found", torch.tensor([[0.97, 0.01, 0.01, 0.01]] * 3)))
    found = report("vllm", far, Run(reply(), whole(tmp_path / "base")), IDS)
    assert found["reason"].startswith("KL 2.86784") and "exceeds 0.5 nats" in found["reason"]
    assert "the engine computes with them otherwise" in found["next"]


def test_a_package_that_the_engine_lacks_is_not_the_checkpoints_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = {"loaded": False, "error": "ImportError: it requires gptqmodel", "kind": "install"}
    code = f"print({json.dumps(failed)!r})"
    monkeypatch.setattr(stage, "command", lambda python, module: [sys.executable, "-c", code])
    with pytest.raises(UnavailableError, match="requires gptqmodel") as error:
        stage.run("vllm", DEMO_MODEL, IDS, tmp_path / "out")
    assert "into the engine's environment" in str(error.value.next)


def test_an_engine_that_is_not_there_says_where_to_look() -> None:
    with pytest.raises(UsageError, match="lacks sglang") as error:
        stage.require("sglang", None)
    assert "--engine-python" in str(error.value.next) and "pip install sglang" in str(error.value.next)


# ---- what is expected of a checkpoint


def test_what_the_tables_know_is_said_and_not_tried() -> None:
    opened = open_quantized(str(PEERS / "modelopt-fp8-dense"))
    found = in_engine(opened, None, "transformers", "/nowhere/python")  # nothing is started
    assert (found["verdict"], found["loaded"], found["ran"]) == ("failed", False, False)
    assert found["reason"].startswith("modelopt-fp8 is not loaded there, and was not tried: transformers does not know")
    assert "vllm" in found["next"] and kinds(opened.decoder) == {("modelopt-fp8", "FP8", False, False)}
    assert refused("vllm", {("modelopt-fp8", "FP8", False, False)}) is None
    assert refused("transformers", {("a layout that nobody has read of", "W4A16", False, False)}) is None
    experts = refused("transformers", {("ct-nvfp4", "NVFP4A16", True, False)})
    assert experts is not None and "ct-nvfp4 of experts" in experts["reason"] and set(TARGETS) >= {"transformers"}


def test_the_limit_is_by_the_evaluation_then_by_the_gate_then_absolute(artifact: Path) -> None:
    ours = Artifact.open(artifact)
    assert expected(ours, None).max_kl == 0.2
    ours.write_evidence("eval.json", {"kl": {"mean": 0.3}})
    assert expected(ours, None).max_kl == 0.65
    ours.write_evidence("eval.json", {"kl": {"mean": 0.001}})
    limit = expected(ours, None)
    assert limit.max_kl == 0.052 and limit.basis == "2 times the 0.00100 of its evaluation and 0.05"
    ours.write_evidence("eval.json", {"kl": {"mean": 0.001}, "weights_sha256": "of others"})
    assert expected(ours, None).max_kl == 0.2
    peer = open_quantized(str(PEERS / "llmcompressor-w4a16-dense"))
    assert expected(peer, peer.decoder) == Expected(MAX_KL, quantized=True)
    assert expected(peer, None).max_kl == LOOSE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("modelopt-fp8-dense", "failed"),
        ("modelopt-fp8-per-channel-dense", "failed"),
        ("llmcompressor-fp8-dynamic-dense", "passed"),
        ("torchao-fp8-weight-dense", "passed"),
    ],
)
def test_scales_that_transformers_leaves_unused_are_found(name: str, verdict: str) -> None:
    """It loads ModelOpt's FP8 as if codes were weights. The random model's KL alone would not tell."""
    ids = torch.randint(30, (2, 16), generator=torch.Generator().manual_seed(0)).tolist()
    tokens = Tokens(tuple(map(tuple, ids)), tuple(ids[0][:8]), "random ids")
    with inside():
        found = canary("transformers", PEERS / name, PEERS / "base-dense", tokens, expected=Expected(quantized=True))
    assert found["verdict"] == verdict, found["reason"]
    if verdict == "failed":
        assert found["reason"].startswith("7 scales of weights were not used, though the weights were: model.layers.0")
        assert "took no notice of its quantization" in found["reason"] and found["unexpected"]["scale_count"] == 7
