"""Evaluation against independent computations: compressed-tensors' own loader, plain hooks, arithmetic by hand."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO_MODEL, DEMO_TEXT, make_artifact, spawn_cli
from safetensors.torch import load_file, save_file

from quantpub.activations import fp8_per_token
from quantpub.artifact import Artifact
from quantpub.decode import Decoder
from quantpub.errors import InputError
from quantpub.evaluate import check_gate, evaluate, read_documents
from quantpub.forward import ArtifactModel, quiet_transformers
from quantpub.qtensor import dequantize

WINDOWS, WINDOW = 4, 128


def run(artifact: Path, baseline: Path = DEMO_MODEL, data: Path = DEMO_TEXT, **options: Any) -> dict[str, Any]:
    return evaluate(Artifact.open(artifact), str(baseline), data, **{"windows": WINDOWS, "window": WINDOW, **options})


@pytest.fixture(scope="module")
def w4a16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(DEMO_MODEL, "w4a16", tmp_path_factory.mktemp("eval") / "w4a16")


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(DEMO_MODEL, "fp8-dynamic", tmp_path_factory.mktemp("eval") / "fp8")


@pytest.fixture(scope="module")
def moe_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE with large weights, so that its predictions are far from uniform; the demo's tokenizer."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("moe") / "moe"
    with quiet_transformers():
        Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, folder)
    return folder


def windows_of(baseline: Path) -> torch.Tensor:
    """The protocol's tokens, written out: token 0 before each document, cut into windows."""
    from transformers import AutoTokenizer

    tokenizer, ids = AutoTokenizer.from_pretrained(baseline), []
    for line in DEMO_TEXT.read_text().splitlines():
        ids += [0, *tokenizer(json.loads(line)["text"])["input_ids"]]
    return torch.tensor(ids[: WINDOWS * WINDOW]).view(WINDOWS, WINDOW)


def kl_by_window(base_BTV: torch.Tensor, out_BTV: torch.Tensor) -> torch.Tensor:
    base, out = base_BTV.double().log_softmax(-1), out_BTV.double().log_softmax(-1)
    return torch.nn.functional.kl_div(out, base, reduction="none", log_target=True).sum(-1).mean(-1)


def load_plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_compressed(folder: Path) -> Any:
    """The artifact as transformers and compressed-tensors open it, decompressed: none of quantpub's code."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    with quiet_transformers():
        config = CompressedTensorsConfig(run_compressed=False)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config).eval()


def decoded_model(artifact: Path, baseline: Path, out: Path) -> Path:
    """A plain float32 checkpoint that holds exactly the weights that the artifact stands for."""
    shutil.copytree(baseline, out)
    tensors = {name: tensor.float() for name, tensor in load_file(baseline / "model.safetensors").items()}
    decoder = Decoder(Artifact.open(artifact))
    for module, _ in decoder.modules():
        tensors[f"{module}.weight"] = dequantize(decoder.qtensor(module))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@torch.inference_mode()
def logits(model: Any, x_BT: torch.Tensor) -> torch.Tensor:
    value: torch.Tensor = model(x_BT).logits
    return value


@pytest.fixture(params=["dense", "moe"])
def w4a16_pair(request: pytest.FixtureRequest, w4a16: Path, moe_model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """(a W4A16 artifact, its base model)"""
    if request.param == "dense":
        return w4a16, DEMO_MODEL
    return make_artifact(moe_model, "w4a16", tmp_path / "moe-w4a16"), moe_model


@pytest.mark.slow
def test_figures_are_those_of_transformers_and_compressed_tensors(w4a16_pair: tuple[Path, Path]) -> None:
    artifact, baseline = w4a16_pair
    evidence = run(artifact, baseline)
    x_BT = windows_of(baseline)
    base, out = logits(load_plain(baseline), x_BT), logits(load_compressed(artifact), x_BT)
    kl = kl_by_window(base, out)
    nll = torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), x_BT[:, 1:].flatten())
    assert kl.mean() > 0.01, "the test must see a difference"
    # compressed-tensors rounds the decompressed weights to bf16, quantpub does not: a token may go to another expert
    assert evidence["kl"]["mean"] == pytest.approx(kl.mean().item(), rel=0.01)
    assert evidence["kl"]["stderr"] == pytest.approx(kl.std().item() / math.sqrt(WINDOWS), rel=0.1)
    assert evidence["perplexity"]["artifact"]["mean"] == pytest.approx(nll.exp().item(), rel=2e-3)
    same = (base.argmax(-1) == out.argmax(-1)).float()
    assert evidence["top1"]["mean"] == pytest.approx(same.mean().item(), abs=0.01)
    assert evidence["data"]["tokens"] == x_BT.numel()


def test_a_baseline_of_the_decoded_weights_is_at_no_distance(w4a16_pair: tuple[Path, Path], tmp_path: Path) -> None:
    artifact, baseline = w4a16_pair
    evidence = run(artifact, decoded_model(artifact, baseline, tmp_path / "decoded"))
    assert abs(evidence["kl"]["mean"]) < 1e-7
    assert evidence["top1"]["mean"] == 1
    assert evidence["perplexity"]["ratio"]["mean"] == pytest.approx(1, abs=1e-6)


def test_one_wrong_scale_is_seen(w4a16: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(w4a16, tmp_path / "damaged"))
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight_scale"] *= 1.5
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    assert run(damaged)["kl"]["mean"] > 1.1 * run(w4a16)["kl"]["mean"]


def test_fp8_rounding_by_hand() -> None:
    # row 0: scale 1; E4M3 has 3 bits of mantissa, so steps of 32 from 256 on, of 1/8 from 1 on; ties go to even
    # row 1: scale 2; the halved values 1.0625 and 17 lie half way: to 1 and 16
    # row 2: zeros have the least scale and stay zeros; row 3: so small that the least scale makes its codes subnormal
    least = 1 / (448 * 512)
    x_MK = torch.tensor(
        [
            [448.0, 270.0, 300.0, 1.05, -1.2],
            [896.0, 2.125, 34.0, 0.0, -896.0],
            [0.0] * 5,
            [least * 2**-6, least * 2**-9 * 1.4, 0.0, 0.0, -least * 2**-9 * 0.4],
        ]
    )
    due_MK = torch.tensor(
        [
            [448.0, 256.0, 288.0, 1.0, -1.25],
            [896.0, 2.0, 32.0, 0.0, -896.0],
            [0.0] * 5,
            [least * 2**-6, least * 2**-9, 0.0, 0.0, 0.0],
        ]
    )
    torch.testing.assert_close(fp8_per_token(x_MK), due_MK, rtol=1e-6, atol=0)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """FP8 per token a second time, from the format's definition: a grid of 2^(e-3), subnormal below 2^-6."""
    scale = (x.abs().amax(-1, keepdim=True) / 448).clamp(min=1 / (448 * 512))
    y = x / scale
    exponent = y.abs().clamp(min=2.0**-6).log2().floor()
    step = (exponent - 3).exp2()
    return ((y / step).round() * step).clamp(-448, 448) * scale


def round_linears(model: Any) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]), *inputs[1:]))


def round_experts(model: Any) -> None:
    """Each expert of each token in turn, written out."""

    def forward(self: Any, x_MK: torch.Tensor, index_MC: torch.Tensor, weight_MC: torch.Tensor) -> torch.Tensor:
        out_MK = torch.zeros_like(x_MK)
        for m, c in ((m, c) for m in range(len(x_MK)) for c in range(index_MC.shape[1])):
            expert = int(index_MC[m, c])
            gate, up = (self.gate_up_proj[expert] @ rounded(x_MK[m : m + 1])[0]).chunk(2)
            hidden = torch.nn.functional.silu(gate) * up
            out_MK[m] += weight_MC[m, c] * (self.down_proj[expert] @ rounded(hidden[None])[0])
        return out_MK

    for module in model.modules():
        if type(module).__name__.endswith("MoeExperts"):
            module.forward = forward.__get__(module)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_fp8_activations_are_rounded_where_the_scheme_says(
    kind: str, fp8: Path, moe_model: Path, tmp_path: Path
) -> None:
    baseline = DEMO_MODEL if kind == "dense" else moe_model
    artifact = fp8 if kind == "dense" else make_artifact(moe_model, "fp8-dynamic", tmp_path / "artifact")
    plain = load_plain(decoded_model(artifact, baseline, tmp_path / "decoded"))
    with quiet_transformers(), torch.inference_mode():
        model = ArtifactModel(Decoder(Artifact.open(artifact)))
        x_BT = windows_of(baseline)[:1]
        weights_only = logits(plain, x_BT)
        round_linears(plain)
        round_experts(plain)
        due, got = logits(plain, x_BT), model.forward(x_BT)
    assert model.not_emulated() == []
    moved = kl_by_window(weights_only, due).mean()
    assert moved > 1e-4, "the test must see the activations"
    # a value on the edge between two codes may fall to either side, and a token then to another expert
    assert kl_by_window(due, got).mean() < 0.02 * moved


def test_activations_that_cannot_be_rounded_are_reported(
    moe_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One up_proj left in bf16 is fused with a quantized gate_proj: they share one input. Our own plans refuse that."""
    monkeypatch.setattr("quantpub.plan.mixed", lambda shards, family: {})
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(
        "description: mixed\nscheme: FP8_DYNAMIC\nalgorithm: {name: fp8}\nengines: {vllm: ct-float}\n"
        'ignore: [lm_head, "re:.*layers.1.mlp.experts.3.up_proj", model.layers.0.self_attn.q_proj]\n'
    )
    evidence = run(make_artifact(moe_model, str(recipe), tmp_path / "mixed"), moe_model)
    assert evidence["activations"]["not_emulated"] == ["model.layers.1.mlp.experts.gate_up_proj"]
    assert [act["num"] for act in evidence["activations"]["quantized"]] == ["fp8_e4m3"]
    assert evidence["verdict"]["gate"] == "no gate" and check_gate(evidence) is None


def test_only_activations_of_treatments_in_use_are_claimed(tmp_path: Path) -> None:
    """A rule takes every linear: of the recipe's own FP8 nothing is left to round."""
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        "description: x\nscheme: FP8_DYNAMIC\nalgorithm: {name: fp8}\nignore: [lm_head]\nengines: {vllm: ct-float}\n"
        "rules: [{match: 're:.*', scheme: W4A16, algorithm: {name: rtn}}]\n"
    )
    artifact = make_artifact(DEMO_MODEL, str(recipe), tmp_path / "a")
    assert len(Decoder(Artifact.open(artifact)).treatments) == 2
    assert run(artifact, windows=1)["activations"] == {"quantized": [], "not_emulated": []}


def test_the_evidence_is_sealed_says_what_made_it_and_names_no_path(fp8: Path, tmp_path: Path) -> None:
    folder, seen = Path(shutil.copytree(fp8, tmp_path / "a")), list[tuple[int, int]]()
    evidence = run(folder, batch=3, progress=lambda n, total: seen.append((n, total)))
    artifact = Artifact.open(folder)
    assert artifact.read_json("eval.json") == evidence and artifact.damage() == []
    assert artifact.run()["stages"]["eval"] == {"kl": evidence["kl"]["mean"], "gate": "passed"}
    made = evidence["made_by"]
    assert made["settings"]["windows"] == WINDOWS and set(made["versions"]) >= {"quantpub", "torch", "transformers"}
    assert str(tmp_path) not in json.dumps(evidence) and str(DEMO_TEXT.parent) not in json.dumps(evidence)
    assert evidence["baseline"]["is_source"] is True
    assert seen == [(3, WINDOWS), (4, WINDOWS)]
    assert run(folder, batch=1)["kl"] == pytest.approx(evidence["kl"], abs=2e-7)


def test_the_gate_of_the_recipe(fp8: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fp8, tmp_path / "a"))
    assert run(folder)["verdict"]["gate"] == "passed"
    recipe = folder / ".quantpub" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("max_kl: 0.02", "max_kl: 0.0001"))
    evidence = run(folder)
    assert evidence["verdict"]["gate"] == "failed"
    assert "exceeds the recipe's 0.0001" in str(check_gate(evidence))


def test_the_gate_does_not_pass_on_another_baseline(w4a16: Path, tmp_path: Path) -> None:
    """The KL is nil, but it is not the KL to the model the artifact was made from."""
    evidence = run(w4a16, decoded_model(w4a16, DEMO_MODEL, tmp_path / "decoded"))
    assert evidence["baseline"]["is_source"] is False
    assert "not the checkpoint" in str(check_gate(evidence))


def test_fewer_windows_than_asked_for_are_counted(w4a16: Path, tmp_path: Path) -> None:
    data = tmp_path / "short.txt"
    data.write_text("def f(x):\n    return x + 1\n" * 40)
    evidence = run(w4a16, data=data, windows=500, window=64)
    assert evidence["made_by"]["settings"]["windows"] == evidence["data"]["tokens"] // 64 < 500
    assert evidence["data"]["documents"] == 1


BAD_TEXTS: list[tuple[str, bytes, str]] = [
    ("empty.jsonl", b"", "empty"),
    ("blank.txt", b" \n\n", "empty"),
    ("half.jsonl", b'{"text": "a"}\n{"text": ', "half.jsonl:2: not valid JSON"),
    ("other.jsonl", b'{"text": "a"}\n\n{"content": "b"}\n', 'other.jsonl:3: the line has no "text"'),
    ("list.jsonl", b'["a"]\n', "list.jsonl:1"),
    ("number.jsonl", b'{"text": 7}\n', "number.jsonl:1"),
    ("latin.txt", "café".encode("latin-1"), "not UTF-8 (byte 3)"),
    ("table.csv", b"a,b\n", ".csv"),
]


@pytest.mark.parametrize(("name", "content", "said"), BAD_TEXTS, ids=[name for name, *_ in BAD_TEXTS])
def test_bad_text_is_one_clear_line(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_documents(path)
    assert said in str(caught.value) and "\n" not in str(caught.value) and caught.value.next


def test_a_missing_or_too_short_text(w4a16: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        run(w4a16, data=tmp_path / "none.txt")
    (tmp_path / "short.txt").write_text("x = 1")
    with pytest.raises(InputError, match=r"the text has \d tokens, one window needs 128"):
        run(w4a16, data=tmp_path / "short.txt")


@pytest.mark.parametrize("key", ["vocab_size", "num_hidden_layers"])
def test_a_baseline_of_another_shape_is_refused(key: str, w4a16: Path, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {key: config[key] + 1}))
    with pytest.raises(InputError, match=f"the baseline has {key} {config[key] + 1}, the artifact {config[key]}"):
        run(w4a16, model)


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight_scale"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def break_scale(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight_scale"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGES = [(drop_tensor, "up_proj.weight_scale is missing"), (break_scale, "not finite")]


@pytest.mark.parametrize(("damage", "said"), DAMAGES)
def test_a_damaged_artifact_has_no_figures(damage: Callable[[Path], None], said: str, artifact: Path) -> None:
    damage(artifact)
    with pytest.raises(InputError, match=said):
        run(artifact)
    assert not (artifact / ".quantpub" / "eval.json").exists()


def test_a_baseline_that_lacks_a_weight_is_not_filled_with_random_numbers(w4a16: Path, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"missing in the model.*layers\.1\.mlp\.up_proj"):
        run(w4a16, model)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_what_transformers_imports_says_nothing(fp8: Path, tmp_path: Path) -> None:
    """torchao, where it is installed, talks while it is imported: not into our stderr."""
    folder = Path(shutil.copytree(fp8, tmp_path / "a"))
    ran = spawn_cli("eval", folder, "--baseline", DEMO_MODEL, "--data", DEMO_TEXT, "--windows", 1, "--format", "quiet")
    assert ran.code in (0, 3) and "torchao" not in ran.err and "_pytree" not in ran.err
