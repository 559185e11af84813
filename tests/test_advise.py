"""`quantpub advise`: which recipe pays for a model on a GPU, what does not fit, and where the times come from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO_MODEL, ROOT, run_cli

from quantpub.advising import NEAR, advise, candidates, ranked
from quantpub.candidates import Case, Choice
from quantpub.derived import ESTIMATED, OTHER, SAME
from quantpub.errors import InputError, UsageError
from quantpub.gpus import GPUS
from quantpub.kernel_tables import expected
from quantpub.recipe_files import recipe_files
from quantpub.served import served
from quantpub.serving_costs import Rest
from quantpub.stored import KL_28M, stored
from quantpub.targets import VERSIONS
from quantpub.workloads import WORKLOADS

QWEN3_8B: dict[str, Any] = {
    "model_type": "qwen3", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 12288, "vocab_size": 151936, "num_hidden_layers": 36, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_30B_A3B = QWEN3_8B | {
    "model_type": "qwen3_moe", "hidden_size": 2048, "num_key_value_heads": 4, "num_hidden_layers": 48,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
}  # fmt: skip


def asked(gpu: str = "H200", workload: str = "serving", memory: str | None = None, **more: Any) -> dict[str, Any]:
    return advise(more.get("config", QWEN3_8B), "a model", gpu, workload, memory, more.get("engine", "vllm"))


def by_recipe(advice: Mapping[str, Any], which: str = "choices") -> dict[str, dict[str, Any]]:
    return {each["recipe"]: each for each in advice[which]}


def test_every_recipe_and_bf16_is_either_a_choice_or_refused_with_a_reason() -> None:
    for gpu in ("H200", "A100-40", "L4", "B200", "RTX-5090"):
        advice = asked(gpu, "interactive")
        choices, refused = by_recipe(advice), by_recipe(advice, "refused")
        assert choices.keys() | refused.keys() == {"bf16", *recipe_files()} and not choices.keys() & refused.keys()
        assert all(each["reason"] for each in refused.values())


def test_kernels_are_those_that_the_tables_expect_of_the_newest_engine() -> None:
    choices = by_recipe(asked())
    for recipe, layout, scheme in (
        ("w4a16", "ct-pack", "W4A16"),
        ("int8-dynamic", "ct-int", "W8A8"),
        ("fp8-block", "hf-fp8", "FP8_BLOCK"),
        ("nvfp4a16", "ct-nvfp4", "NVFP4A16"),
    ):
        assert choices[recipe]["kernel"] == expected("vllm", VERSIONS["vllm"][-1], layout, scheme, "sm90").kernel
        assert (choices[recipe]["layout"], choices[recipe]["scheme"]) == (layout, scheme)


def test_measured_kernels_give_the_speedup_that_was_measured() -> None:
    """A layer of Qwen3-8B took 115.38 µs in bf16 at M = 1 and 86.24 on Machete; the embedding and the head stay."""
    advice = asked(workload="128:128@1")
    machete = by_recipe(advice)["w4a16"]
    assert machete["confidence"] == SAME
    linears = float(re.search(r"([\d.]+)x as fast", machete["reason"])[1])  # type: ignore[index]
    assert linears == pytest.approx(115.38 / 86.24, rel=0.1)
    assert 1 < machete["speedup"] < linears


def test_weights_are_counted_with_their_scales_and_rules_with_theirs() -> None:
    choices, model = by_recipe(asked()), served(QWEN3_8B)
    assert choices["w4a16"]["weights_gb"] == pytest.approx(model.bytes(4 + 16 / 128) / 1e9, abs=2e-3)
    assert choices["bf16"]["weights_gb"] == pytest.approx(model.bytes() / 1e9, abs=1e-3)
    down = next(linear for linear in model.linears if linear.name.endswith("down_proj"))
    more = down.weights * (8 + 16 / down.k - 4.125) / 8 / 1e9
    mixed = choices["w4a16-fp8-down"]
    assert mixed["weights_gb"] == pytest.approx(choices["w4a16"]["weights_gb"] + more, abs=2e-3)
    assert mixed["kernel"] == "Machete, CUTLASS FP8" and mixed["scheme"] == "W4A16, FP8_DYNAMIC"


def test_the_first_is_the_least_lossy_of_the_fastest() -> None:
    for gpu, workload in (("H200", "serving"), ("L4", "interactive"), ("B200", "prefill-heavy")):
        advice = asked(gpu, workload)
        top = max(choice["tokens_per_s"] for choice in advice["choices"])
        near = [choice for choice in advice["choices"] if choice["tokens_per_s"] >= (1 - NEAR) * top]
        known = [choice["kl_28m"] for choice in near if choice["kl_28m"] is not None]  # of FP8 caches it is not
        assert advice["choices"][0]["kl_28m"] == min(known)
        assert advice["choices"][0]["recipe"] in advice["reason"]


def test_a_little_more_speed_for_more_loss_is_said() -> None:
    """Wherever the first is not the fastest, and that is no less sure of its time: on some GPU it is so."""
    for gpu in ("H200", "H100", "L4", "A100-80", "RTX-4090"):
        for workload in ("interactive", "decode-heavy"):
            advice = asked(gpu, workload)
            first, fastest = advice["choices"][0], max(advice["choices"], key=lambda choice: choice["tokens_per_s"])
            if fastest["recipe"] == first["recipe"] or fastest["confidence"] != first["confidence"]:
                continue
            assert fastest["kl_28m"] > first["kl_28m"]
            assert f"{fastest['recipe']} is " in advice["reason"] and "loses more: KL" in advice["reason"]
            return
    pytest.fail("nowhere is the first a little slower than another")


def test_an_estimate_has_to_beat_what_was_measured_by_more_than_its_error() -> None:
    advice = asked("H200", "interactive")
    first, fastest = advice["choices"][0], max(advice["choices"], key=lambda choice: choice["tokens_per_s"])
    assert first["confidence"] == SAME and first["recipe"].startswith("fp8-dynamic")
    assert fastest["confidence"] == ESTIMATED and fastest["speedup"] < (1 + fastest["error"]) * first["speedup"]
    off = f"{100 * fastest['error']:.0f} % in the middle"
    assert f"{fastest['recipe']} might be faster, but that is an estimate, off by {off}" in advice["reason"]


@pytest.fixture(scope="module")
def on_h200() -> dict[str, Choice]:
    """Of Qwen3-8B in `interactive`."""
    found, _ = candidates(Case(served(QWEN3_8B), GPUS["H200"], GPUS["H200"].memory, WORKLOADS["interactive"], "vllm"))
    return {choice.recipe: choice for choice in found}


@pytest.mark.parametrize(
    ("error", "first"), [(0.0, "nvfp4a16"), (0.01, "fp8-dynamic"), (0.5, "fp8-dynamic"), (None, "fp8-dynamic")]
)
def test_an_estimate_comes_first_when_it_is_faster_by_more(
    error: float | None, first: str, on_h200: dict[str, Choice]
) -> None:
    """1.34x against 1.29x: 4 % faster, which has to be more than the error and than what a prediction can tell."""
    estimate, known = replace(on_h200["nvfp4a16"], error=error), on_h200["fp8-dynamic"]
    assert ranked([estimate, known])[0].recipe == first


def test_estimates_alone_are_ranked_as_they_are(on_h200: dict[str, Choice]) -> None:
    one, two = on_h200["nvfp4a16"], on_h200["w8a16"]
    assert ranked([two, replace(one, error=9.0)])[0].recipe == "nvfp4a16"


def test_where_only_an_estimate_beats_bf16_that_is_said() -> None:
    advice = asked("H200", "serving", config=QWEN3_30B_A3B)
    assert advice["choices"][0]["recipe"] == "bf16"
    assert advice["reason"].startswith("bf16 is best of what was measured; ") and "might be faster" in advice["reason"]


def test_no_kl_where_the_kernel_quantizes_what_the_recipe_does_not() -> None:
    """mxfp4's KL is that of 16-bit activations, which FlashInfer's kernel on Blackwell rounds to 4 bits."""
    here, there = asked("H200", "prefill-heavy"), asked("B200", "prefill-heavy")
    assert by_recipe(here)["mxfp4"]["kl_28m"] == KL_28M["mxfp4"]
    assert by_recipe(there)["mxfp4"]["kl_28m"] is None and "W4A4" in by_recipe(there)["mxfp4"]["kernel"]
    assert any(note.startswith("no KL for mxfp4: FlashInfer MXFP4 W4A4") for note in there["notes"])
    assert not any("no KL" in note for note in here["notes"])
    assert there["choices"][0]["recipe"] != "mxfp4" or "was not measured; estimated" in there["reason"]


def test_where_nothing_pays_bf16_is_first_and_the_reason_says_why() -> None:
    """Of a model of 2M weights the host sets the pace."""
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    advice = asked("H200", "serving", config=config)
    assert advice["choices"][0]["recipe"] == "bf16" and advice["choices"][0]["speedup"] == 1
    assert advice["reason"].startswith("bf16 is best") and "linears take" in advice["reason"]


@pytest.mark.slow
def test_less_memory_never_adds_a_choice_and_never_makes_one_faster() -> None:
    before = asked(workload="128:512@128")
    for memory in ("40GB", "22GB", "20GB", "12GB", "4GB"):
        after = asked(workload="128:512@128", memory=memory)
        old, new = by_recipe(before), by_recipe(after)
        assert new.keys() <= old.keys()
        for recipe, choice in new.items():
            assert choice["kv_tokens"] < old[recipe]["kv_tokens"]
            assert choice["tokens_per_s"] <= 1.01 * old[recipe]["tokens_per_s"]
        before = after
    assert not before["choices"] and before["reason"].startswith("nothing fits")


def test_what_does_not_fit_is_refused_with_its_bytes() -> None:
    advice = asked(memory="19GB")
    assert advice["bf16"] == {"tokens_per_s": None, "weights_gb": 16.381, "kv_tokens": 0, "fits": False}
    reason = by_recipe(advice, "refused")["bf16"]["reason"]
    assert "16.4 GB of weights" in reason and reason.endswith("17.5 GB of 19 GB are there")
    numbers = [float(n) for n in re.findall(r"([\d.]+) GB", reason)]
    assert sum(numbers[:3]) == pytest.approx(numbers[3], abs=0.1) and numbers[3] > numbers[4]
    assert advice["choices"] and all(choice["speedup"] is None for choice in advice["choices"])
    assert "bf16 is no choice" in advice["reason"]


@pytest.mark.slow
def test_a_cache_for_fewer_requests_at_once_is_said_and_no_refusal() -> None:
    advice = asked(workload="decode-heavy", memory="80GB")
    bf16, w4a16 = by_recipe(advice)["bf16"], by_recipe(advice)["w4a16"]
    assert not bf16["fits"] and not w4a16["fits"] and bf16["at_once"] < w4a16["at_once"] < 256
    assert f"{w4a16['at_once']} of 256 requests" in w4a16["reason"]
    assert asked(workload="decode-heavy")["bf16"]["fits"]


def test_fp8_without_fp8_units_is_weight_only_and_says_so() -> None:
    for recipe in ("fp8-dynamic", "fp8-block"):
        here, there = (by_recipe(asked(gpu))[recipe] for gpu in ("A100-80", "H100"))
        assert "A16" in here["kernel"] and "weight-only there" in here["reason"]
        assert "A16" not in there["kernel"] and "weight-only" not in there["reason"]
        assert here["speedup"] < there["speedup"]


def test_int8_is_refused_where_no_kernel_was_compiled_for_it() -> None:
    assert "Blackwell" in by_recipe(asked("B200"), "refused")["int8-dynamic"]["reason"]


def test_an_engine_that_decompresses_gains_nothing() -> None:
    refused = by_recipe(asked(engine="transformers"), "refused")
    assert "it is bf16" in refused["w4a16"]["reason"] and "slower than bf16" in refused["llm-int8"]["reason"]
    assert "no layout for SGLang" in by_recipe(asked(engine="sglang"), "refused")["int4-hqq-tile"]["reason"]


def test_where_nothing_was_measured_everything_is_an_estimate() -> None:
    advice = asked("L40S")
    assert {choice["confidence"] for choice in advice["choices"]} == {ESTIMATED}
    assert all(choice["error"] is None for choice in advice["choices"])
    assert any("nothing was measured on this GPU" in note for note in advice["notes"])


def test_other_shapes_on_a_measured_gpu_are_called_so() -> None:
    wider = by_recipe(asked(config=QWEN3_8B | {"intermediate_size": 9728}))
    assert wider["w4a16"]["confidence"] == OTHER and wider["bf16"]["confidence"] == OTHER


def test_what_was_measured_beside_the_linears_holds_for_models_alike_only(monkeypatch: pytest.MonkeyPatch) -> None:
    dimensions = {"heads": 32, "kv_heads": 8, "head_dim": 128, "window": None, "hidden": 4096, "vocab": 151936}
    rest = {"decode": [[1, 128, 9.0]], "head": [[1, 300.0]], "elementwise": [[1, 9.0]], "sustained": 0.8}
    one = replace(stored()["H200"], rest=rest, model=dimensions)
    monkeypatch.setattr("quantpub.candidates.stored", lambda: {"H200": one})

    def found(**other: int) -> Rest:
        return Case(served(QWEN3_8B | other), GPUS["H200"], GPUS["H200"].memory, WORKLOADS["serving"], "vllm").rest

    assert found() == Rest(
        decode={(1, 128): 9.0}, head={1: 300.0}, sustained=0.8
    )  # nothing says for which elementwise holds
    assert found(vocab_size=32000) == Rest(decode={(1, 128): 9.0}, sustained=0.8)
    assert found(num_key_value_heads=4) == Rest(head={1: 300.0}, sustained=0.8)


def test_experts_are_advised_too() -> None:
    advice = asked(config=QWEN3_30B_A3B)
    choice = by_recipe(advice)["w4a16"]
    assert choice["kernel"] == "Machete, Humming MoE" and choice["confidence"] == ESTIMATED
    assert "experts" in by_recipe(advice, "refused")["int4-hqq-tile"]["reason"]


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"gpu": "H2000"}, "H200"),
        ({"workload": "decode"}, "decode-heavy"),
        ({"memory": "much"}, "80GB"),
        ({"memory": "0GB"}, "80GB"),
        ({"memory": "200GB"}, "141 GB of one H200"),
        ({"engine": "vlm"}, "vllm"),
    ],
)
def test_wrong_names_are_usage_errors(wrong: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        asked(**wrong)


def test_an_unknown_architecture_is_not_guessed() -> None:
    with pytest.raises(InputError, match="mamba"):
        asked(config={"model_type": "mamba"})


def test_kl_is_that_of_the_quality_table() -> None:
    """The last row of a recipe counts: that of its present parameters."""
    table: dict[str, float] = {}
    for line in (ROOT / "docs" / "quality.md").read_text().splitlines():
        if match := re.match(r"\| \*\*quantpub `([\w-]+)`\*\*[^|]*\| ([\d.]+) ±", line):
            table[match[1]] = float(match[2])
    assert table == KL_28M
    assert KL_28M.keys() <= recipe_files().keys()


def test_the_command_shows_the_advice_and_prints_one_object() -> None:
    done = run_cli("advise", str(DEMO_MODEL), "--gpu", "h200", "-w", "decode-heavy", "--memory", "80GB")
    assert done.code == 0, done.err
    assert done.out.startswith("advice: ") and "w4a16-hqq" in done.out and "not llm-int8: " in done.out
    found = run_cli("advise", str(DEMO_MODEL), "--gpu", "h200", "--json").json()
    assert found["ok"] and found["gpu"] == "H200" and found["workload"] == "serving" and found["choices"]
    quiet = run_cli("advise", str(DEMO_MODEL), "--gpu", "h200", "--format", "quiet")
    assert quiet.out.strip() == found["choices"][0]["recipe"]


@pytest.mark.parametrize(
    "arguments", [("--gpu", "H2000"), ("--gpu", "H200", "-w", "x"), ("--gpu", "L4", "--memory", "x")]
)
def test_wrong_use_of_the_command_is_one_line(arguments: tuple[str, ...]) -> None:
    done = run_cli("advise", str(DEMO_MODEL), *arguments)
    assert done.code == 2 and done.err.startswith("error: ") and done.err.strip().count("\n") == 0


def test_nothing_fits_and_what_does_not_all_fit_are_shown() -> None:
    done = run_cli("advise", str(DEMO_MODEL), "--gpu", "h200", "--memory", "1GB")
    assert done.code == 0 and done.out.startswith("advice: nothing fits")
    assert run_cli("advise", str(DEMO_MODEL), "--gpu", "h200", "--memory", "1GB", "--format", "quiet").out == "none\n"


def test_a_recipe_of_ones_own_takes_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    text = (ROOT / "recipes" / "w4a16.yaml").read_text()
    (folder / "mine.yaml").write_text(text.replace("ignore: [lm_head]", "ignore: [lm_head, 're:.*down_proj']"))
    (folder / "broken.yaml").write_text("description: no scheme\n")
    monkeypatch.chdir(tmp_path)
    advice = asked()
    mine, whole = by_recipe(advice)["mine"], by_recipe(advice)["w4a16"]
    assert mine["kl_28m"] is None and mine["weights_gb"] > whole["weights_gb"] and "bf16" in mine["kernel"]
    assert "scheme" in by_recipe(advice, "refused")["broken"]["reason"]
