"""Experts that stay in high precision beside quantized attention: engines find them so in every layout, or it is said."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO_MODEL, make_artifact, run_cli
from inside import inside
from repacks import MAKERS, again

from quantpub.artifact import Artifact
from quantpub.decode import Decoder
from quantpub.engines.canary import Settings, canary
from quantpub.engines.canary_tokens import canary_tokens
from quantpub.opened import open_quantized
from quantpub.targets import TARGETS, unloadable
from quantpub.treatments import unquantized
from quantpub.verify.engine import kinds, refused
from quantpub.verify.run import verify

EXPERTS = "model.layers.0.mlp.experts"
SCHEMES = {
    "ct-pack": "W4A16", "ct-int": "W8A8", "ct-float": "FP8_DYNAMIC", "ct-nvfp4": "NVFP4A16", "ct-mxfp4": "MXFP4A16",
    "hf-fp8": "FP8_BLOCK", "modelopt-fp8-channel": "FP8_DYNAMIC", "modelopt-fp8-block": "FP8_BLOCK",
    "modelopt-nvfp4": "NVFP4A16", "gptq": "W4A16", "gptq-v2": "W4A16", "awq": "W4A16_ASYM",
    "torchao-tile": "W4A16_FLOAT_ZERO", "torchao-nvfp4": "NVFP4A16", "bnb-int8": "LLM_INT8",
}  # fmt: skip


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE of sides that every layout takes, with large weights; the demo's tokenizer."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("moe") / "moe"
    torch.manual_seed(0)
    sides = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 256)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}
    config = Qwen3MoeConfig(vocab_size=8192, initializer_range=0.1, **sides, **heads, **experts)
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, folder)
    return folder


def recipe(folder: Path, layout: str, engines: tuple[str, ...] = tuple(TARGETS)) -> Path:
    """Attention alone is quantized."""
    scheme, path = SCHEMES[layout], folder / f"{layout}.yaml"
    held = ", ".join(f"{name}: {layout}" for name in engines if unloadable(name, layout, scheme) is None)
    path.write_text(
        f"description: d\nscheme: {scheme}\nalgorithm: {MAKERS[scheme]}\nengines: {{{held}}}\n"
        'ignore: [lm_head, "re:.*mlp\\\\.experts\\\\..*"]\n'
    )
    return path


def made(moe: Path, layout: str, folder: Path) -> Path:
    return make_artifact(moe, str(recipe(folder, layout)), folder / "artifact", layout)


def stated(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", SCHEMES)
def test_engines_find_them_unquantized(layout: str, moe: Path, tmp_path: Path) -> None:
    """`verify` looks every name up as each engine does that loads such a checkpoint."""
    artifact = made(moe, layout, tmp_path)
    evidence = verify(open_quantized(str(artifact)), str(moe))
    assert evidence["verdict"] == "passed", [check for check in evidence["checks"] if check["status"] == "failed"]
    named = Artifact.open(artifact).run()["engines"]
    found = kinds(Decoder(Artifact.open(artifact)))
    assert found == {(layout, SCHEMES[layout], False, True)}
    assert named and all(refused(engine, found) is None for engine in named)


def test_the_names_that_vllm_asks_for(moe: Path, tmp_path: Path) -> None:
    """Of a layer's experts it asks once. GPTQ: a pattern from the start of the name; AWQ: an entry anywhere in it."""
    for layout in ("gptq", "awq"):
        (tmp_path / layout).mkdir()
    patterns = stated(made(moe, "gptq", tmp_path / "gptq"))["dynamic"]
    assert any(re.match(pattern.removeprefix("-:"), EXPERTS) for pattern in patterns)
    assert not any(re.match(pattern.removeprefix("-:"), "model.layers.0.self_attn.qkv_proj") for pattern in patterns)
    assert any(entry in EXPERTS for entry in stated(made(moe, "awq", tmp_path / "awq"))["modules_to_not_convert"])


def test_the_experts_of_a_layer_have_one_more_name() -> None:
    from quantpub.families import FAMILIES, LINEAR

    each = [(f"model.layers.3.mlp.experts.{i}.{leaf}", LINEAR) for i in (0, 1) for leaf in ("up_proj", "down_proj")]
    shared = [("model.layers.3.mlp.shared_experts.up_proj", LINEAR)]
    assert "model.layers.3.mlp.experts" in unquantized(each, FAMILIES["qwen3_moe"])
    assert unquantized(shared, FAMILIES["qwen3_moe"]) == ("lm_head", shared[0][0])


def test_repacked_they_stay_as_they_are(moe: Path, tmp_path: Path) -> None:
    artifact = made(moe, "ct-pack", tmp_path)
    assert again(artifact, "gptq", tmp_path / "gptq")["modules"] == 8
    assert any(re.match(pattern.removeprefix("-:"), EXPERTS) for pattern in stated(tmp_path / "gptq")["dynamic"])
    assert verify(open_quantized(str(tmp_path / "gptq")), str(moe))["verdict"] == "passed"


REFUSED = {
    ("vllm", "bnb-int8"): "where the model has experts, quantized or not",  # seen: NotImplementedError on an H200
    ("sglang", "bnb-int8"): "have none",
    ("sglang", "gptq"): "takes the experts of every such checkpoint for quantized",
    ("sglang", "gptq-v2"): "takes the experts of every such checkpoint for quantized",
    ("transformers", "ct-pack"): "not quantized and the rest is packed",
    ("transformers", "ct-int"): "not quantized and the rest is packed",
    ("transformers", "ct-nvfp4"): "not quantized and the rest is packed",
    ("transformers", "ct-mxfp4"): "not quantized and the rest is packed",
}


@pytest.mark.parametrize(("engine", "layout"), REFUSED)
def test_who_cannot_load_them_says_so_before_anything_is_written(
    engine: str, layout: str, moe: Path, tmp_path: Path
) -> None:
    assert unloadable(engine, layout, SCHEMES[layout]) is None
    words, path = REFUSED[engine, layout], recipe(tmp_path, layout, (engine,))
    ran = run_cli("quantize", moe, "-r", path, "-o", tmp_path / "out")
    assert ran.code == 3 and ran.err.count("\n") == 1 and words in ran.err and not (tmp_path / "out").exists()


def test_verify_says_which_engine_it_did_not_ask(moe: Path, tmp_path: Path) -> None:
    evidence = verify(open_quantized(str(made(moe, "gptq", tmp_path))), str(moe))
    (names,) = [check for check in evidence["checks"] if check["id"] == "names"]
    assert (
        names["status"] == "passed"
        and "; experts not as SGLang has them: SGLang's GPTQ loader takes" in names["detail"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ct-float", "hf-fp8", "torchao-nvfp4"])
def test_transformers_computes_with_them(layout: str, moe: Path, tmp_path: Path) -> None:
    """hf-fp8 is dequantized as it is loaded where there is no GPU, and then has no quantizer left."""
    artifact = made(moe, layout, tmp_path)
    with inside():
        told = canary(
            "transformers", artifact, moe, canary_tokens(DEMO_MODEL, window=64), settings=Settings(generate=4)
        )
    assert told["verdict"] == "passed", told["reason"]
    assert told["missing"]["count"] == told["unexpected"]["count"] == 0 and 0 < told["kl"]["mean"] < 0.2
    assert told["quantizer"] == "fp8, dequantized" if layout == "hf-fp8" else "HfQuantizer" in told["quantizer"]


def test_of_everything_else_that_engine_is_asked_all_the_same(moe: Path, tmp_path: Path) -> None:
    """A linear that SGLang alone would take for unquantized is seen, though it loads no such experts."""
    artifact = made(moe, "gptq", tmp_path)
    shutil.rmtree(artifact / ".quantpub")
    for name in ("config.json", "quantize_config.json"):
        value = json.loads((artifact / name).read_text())
        value.get("quantization_config", value)["dynamic"][r"-:.*o_proj"] = {}
        (artifact / name).write_text(json.dumps(value))
    evidence = verify(open_quantized(str(artifact)), str(moe))
    (names,) = [check for check in evidence["checks"] if check["id"] == "names"]
    assert names["status"] == "failed" and "SGLang" in names["detail"] and "o_proj" in names["detail"]
