"""The card says what the evidence says: figures are traced back to it, and an edited one is caught."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO_MODEL, ROOT, make_artifact, tree

from quantpub.artifact import Artifact
from quantpub.card import card, check, gpu, render
from quantpub.card.facts import facts
from quantpub.errors import InputError, UsageError

DEVICE = {"cpu": "Example CPU", "cores": 2, "threads": 2, "cpu_capability": "AVX2", "gpu": None}
HUB = {"kind": "hub", "repo": "acme/base-2m", "commit": "0123456789abcdef0123456789abcdef01234567", "gated": False}
NUMBER = re.compile(r"(?<![\w.,/*-])\d[\d,]*(?:\.\d+)?(?![\w/*])(?!\.\d)")


def made_by(stage: str, **settings: Any) -> dict[str, Any]:
    versions = {"quantpub": "9.8.7", "python": "3.77.1", "torch": "2.66.0"}
    return {"stage": stage, "settings": settings, "versions": versions, "device": DEVICE}


def evaluation() -> dict[str, Any]:
    return {
        "made_by": made_by(
            "eval", windows=64, window=512, batch=4, dtype="float32", baseline="model", data="text.jsonl"
        ),
        "baseline": {"kind": "local", "name": "model", "is_source": True},
        "data": {"file": "text.jsonl", "sha256": "ab" * 32, "documents": 7, "tokens": 32768},
        "activations": {"quantized": [], "not_emulated": []},
        "perplexity": {
            "base": {"mean": 12.3456789, "stderr": 1.2345678},
            "artifact": {"mean": 13.5792468, "stderr": 1.3579246},
            "ratio": {"mean": 1.0999189, "stderr": 0.0123987},
        },
        "kl": {"unit": "nats per token", "mean": 0.0765432, "stderr": 0.0034567},
        "top1": {"mean": 0.8765432, "stderr": 0.0045678},
        "verdict": {"gate": "failed", "reason": "KL 0.07654 exceeds the recipe's 0.05 nats per token", "max_kl": 0.05},
    }


def profile(device_class: str = "cpu") -> dict[str, Any]:
    rows = [
        {
            "gemm": "mlp.down_proj",
            "kernel": kernel,
            "m": m,
            "median_us": 100.04 / s,
            "ci95_us": [91.37 / s, 110.92 / s],
            "baseline_us": 100.04,
            "speedup": s,
        }
        for kernel, m, s in (("torch-int4", 1, 2.347), ("torch-int4", 64, 0.871), ("other", 1, 1.119))
    ]
    return {
        "made_by": made_by("profile", m=[1, 64]),
        "device_class": device_class,
        "label": "CPU: says nothing of the serving engine's kernels" if device_class == "cpu" else "",
        "baseline": {"name": "bf16"},
        "gemms": [{"name": "mlp.down_proj", "n": 128, "k": 384, "count": 4}],
        "kernels": [
            {"name": "torch-int4", "layout": "ct-pack", "unavailable": None},
            {"name": "marlin", "layout": "marlin", "unavailable": "it needs a GPU"},
        ],
        "rows": rows,
        "totals": [{"kernel": row["kernel"], "m": row["m"], "speedup": row["speedup"]} for row in rows],
        "verdict": {"gate": "not proven", "reason": "only a CPU was timed"},
    }


def verification() -> dict[str, Any]:
    ratios = [19.12, 19.57, 20.31, 21.98]
    return {
        "made_by": made_by("verify"),
        "checks": [
            {"id": "index", "status": "passed", "detail": "66 tensors | 1 shard"},
            {"id": "engine", "status": "skipped", "detail": "no engine here"},
        ],
        "tensors": {"compared": 28, "sqnr_db": {"min": 19.12, "median": 19.94, "worst": "model.layers.3.mlp.up_proj"}},
        "per_tensor": [{"module": f"m{i}", "sqnr_db": value} for i, value in enumerate(ratios)],
        "verdict": "incomplete",
    }


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(DEMO_MODEL, "w4a16", tmp_path_factory.mktemp("card") / "w4a16")


@pytest.fixture(scope="module")
def measured(master: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`master` with every kind of evidence and its plots."""
    artifact = Artifact.open(Path(shutil.copytree(master, tmp_path_factory.mktemp("card") / "measured")))
    for name, value in {"eval": evaluation(), "profile": profile(), "verify": verification()}.items():
        artifact.write_evidence(f"{name}.json", value)
    card(artifact)
    return artifact.path


@pytest.fixture
def bare(master: Path, tmp_path: Path) -> Artifact:
    """An artifact that was only quantized."""
    return Artifact.open(Path(shutil.copytree(master, tmp_path / "bare")))


@pytest.fixture
def full(measured: Path, tmp_path: Path) -> Artifact:
    """An artifact with every kind of evidence, of made-up and telling figures."""
    return Artifact.open(Path(shutil.copytree(measured, tmp_path / "full")))


def readme(artifact: Artifact) -> str:
    return (artifact.path / "README.md").read_text()


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def front_matter(artifact: Artifact) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    data: dict[str, Any] = ModelCard.load(artifact.path / "README.md").data.to_dict()
    return data


def set_source(artifact: Artifact, source: dict[str, Any]) -> None:
    artifact.write(".quantpub/run.json", json.dumps(artifact.run() | {"source": source}).encode())


def numbers_in(value: Any) -> Iterator[float]:
    """Every number in an evidence file, those inside its texts too."""
    if isinstance(value, dict):
        for entry in (*value.keys(), *value.values()):
            yield from numbers_in(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from numbers_in(entry)
    elif isinstance(value, str):
        yield from (float(token) for token in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?!\w|\.\d)", value))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def traceable(token: str, figures: set[float]) -> bool:
    """Whether the token is a figure of the evidence, rounded, in per cent, or in thousands, millions of bytes."""
    digits = len(token.partition(".")[2])
    value = float(token.replace(",", ""))
    scaled = (figure * scale for figure in figures for scale in (1, 100, 1e-3, 1e-6, 1e-9))
    return any(round(figure, digits) == value for figure in scaled)


def test_every_number_is_traced_to_the_evidence(full: Artifact) -> None:
    card(full, "acme/tiny-2m-W4A16")
    files = ("run", "eval", "profile", "verify")
    figures = {number for name in files for number in numbers_in(full.read_json(f"{name}.json"))}
    plan = [json.loads(line) for line in (full.meta / "plan.jsonl").read_text().splitlines()]
    sizes = {line["as"]: float(line["shape"][0] * (line["shape"] + [1])[1]) for line in plan}
    kinds: dict[str, list[float]] = {}
    for name, size in sizes.items():
        kinds.setdefault(re.sub(r"\d+", "*", name), []).append(size)
    figures |= {sum(kind) for kind in kinds.values()} | {float(len(kind)) for kind in kinds.values()}
    made = full.run()["stages"]["quantize"]
    figures |= {made["output_bytes"] / made["source_bytes"]} | set(numbers_in([full.config(), plan[0]["shape"]]))
    text = re.sub(r"```.*?```", "", readme(full), flags=re.DOTALL)
    prose = "\n".join(line for line in text.splitlines() if "compressed_tensors.py" not in line and "5.17" not in line)
    found = NUMBER.findall(prose)
    assert len(found) > 100
    assert [token for token in found if not traceable(token, figures)] == []


def test_the_trace_would_see_an_invented_number() -> None:
    assert traceable("1.10", {1.0999}) and traceable("87.65", {0.87654}) and traceable("2,345", {2345.0})
    assert not traceable("1.11", {1.0999}) and not traceable("1.1001", {1.0999})


def test_the_template_holds_no_number() -> None:
    template = (ROOT / "model_cards" / "card.md.j2").read_text()
    assert re.findall(r"(?<![\w.])\d+(?![\w])", re.sub(r"\{#.*?#\}", "", template)) == []


def test_an_edited_number_is_caught_with_its_line(full: Artifact) -> None:
    card(full)
    assert check(full) == []
    path, text = full.path / "README.md", readme(full)
    assert "0.07654" in text
    path.write_text(text.replace("0.07654 ± 0.00346", "0.00654 ± 0.00346"))
    line = text[: text.index("0.07654 ± 0.00346")].count("\n") + 1
    (reason,) = check(full)
    assert reason.startswith(f"line {line}: the card says ") and "0.00654" in reason and "0.07654" in reason


EDITS: dict[str, Callable[[str], str]] = {
    "a line added": lambda text: text.replace("## Speed\n", "## Speed\n\nTwice as fast on every GPU.\n"),
    "a line removed": lambda text: text.replace(
        "- No speed on a GPU is claimed: the kernels were timed on a CPU.\n", ""
    ),
    "line ends": lambda text: text.replace("\n", "\r\n"),
    "a licence": lambda text: text.replace("pipeline_tag:", "license: apache-2.0\npipeline_tag:"),
    "no front matter": lambda text: text.split("---\n", 2)[2],
    "broken front matter": lambda text: text.replace("tags:\n", "tags: [\n"),
    "a local path": lambda text: text + "\nSee /home/me/model.\n",
}


@pytest.mark.parametrize("name", EDITS)
def test_every_edit_is_caught(name: str, full: Artifact) -> None:
    card(full)
    text = readme(full)
    edited = EDITS[name](text)
    assert edited != text
    (full.path / "README.md").write_bytes(edited.encode())
    assert check(full)


def test_front_matter_edits_and_paths_are_named(full: Artifact) -> None:
    card(full)
    text = readme(full)
    (full.path / "README.md").write_text(EDITS["a licence"](text))
    assert "front matter: license is 'apache-2.0', the evidence gives None" in check(full)
    (full.path / "README.md").write_text(EDITS["a local path"](text))
    assert any(reason.endswith("it names a local path") for reason in check(full))
    (full.path / "README.md").unlink()
    assert check(full) == ["there is no README.md"]


def test_newer_evidence_makes_the_card_and_its_plots_stale(full: Artifact) -> None:
    card(full)
    changed = verification()
    changed["per_tensor"][0]["sqnr_db"] = 12.34
    full.write_evidence("verify.json", changed)
    assert check(full) == [
        f".quantpub/plots/sqnr.{form} does not show the evidence's figures" for form in ("png", "svg")
    ]
    full.write_evidence("eval.json", evaluation() | {"weights_sha256": "0" * 64})
    assert "eval.json was measured on other weights" in check(full)


def test_without_an_evaluation_there_is_no_figure_of_quality(full: Artifact, bare: Artifact) -> None:
    for artifact in (full, bare):
        (artifact.meta / "eval.json").unlink(missing_ok=True)
        report = card(artifact, "acme/tiny")
        text = readme(artifact)
        assert "eval" in report["not_measured"]
        assert not re.search(r"KL|erplexity|nats", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        assert "Not measured." in section(text, "Quality")
        assert "quantpub eval acme/tiny --baseline pycode-tiny-2m" in section(text, "Quality")
        assert "Quality was not measured." in section(text, "Limitations")
        assert check(artifact) == []


def test_a_bare_artifact_says_what_was_not_measured_and_how_to(bare: Artifact) -> None:
    report = card(bare)
    assert report["not_measured"] == ["verify", "profile", "eval"] and report["plots"] == []
    text = readme(bare)
    for title, command in (("Quality", "eval"), ("Speed", "profile"), ("Verification", "verify")):
        assert "Not measured." in section(text, title) and f"quantpub {command} " in section(text, title)
        assert not NUMBER.findall(section(text, title))


def test_evidence_that_says_not_what_made_it_is_no_evidence(full: Artifact) -> None:
    evidence = evaluation()
    del evidence["made_by"]
    full.write_evidence("eval.json", evidence)
    with pytest.raises(InputError, match="does not say what made it"):
        card(full)
    full.write_evidence("eval.json", evaluation() | {"data": {}})
    with pytest.raises(InputError, match="lacks a figure"):
        card(full)


def test_a_licence_is_never_invented(full: Artifact) -> None:
    card(full)
    assert not {"license", "license_name", "license_link", "base_model"} & set(front_matter(full))
    assert "states no licence" in section(readme(full), "License")
    set_source(full, HUB)
    card(full)
    assert "license" not in front_matter(full) and front_matter(full)["base_model"] == HUB["repo"]
    assert "states no licence" in section(readme(full), "License")


def test_a_licence_is_copied_as_it_stands(full: Artifact) -> None:
    terms = {"license": "other", "license_name": "acme-terms", "license_link": "https://acme.example/terms"}
    set_source(full, HUB | terms | {"language": ["en", "no"], "gated": True})
    full.write("LICENSE", b"terms\n")
    card(full, "acme/base-2m-W4A16")
    found, text = front_matter(full), section(readme(full), "License")
    assert found == {
        "base_model": "acme/base-2m",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **terms,
        "language": ["en", "no"],
        "tags": ["quantized", "w4a16", "int4", "compressed-tensors", "vllm", "sglang"],
    }
    order = re.findall(r"^(\w+):", readme(full).split("---")[1], re.MULTILINE)
    assert order[:4] == ["base_model", "base_model_relation", "library_name", "pipeline_tag"]
    assert all(term in text for term in (*terms.values(), "`LICENSE`", "on request"))
    assert f"commit `{HUB['commit']}`" in readme(full) and f"--revision {HUB['commit']}" in readme(full)
    assert check(full) == []


def test_the_components_add_up_to_the_model(full: Artifact) -> None:
    card(full)
    rows = [
        line.strip("| ").split(" | ")
        for line in section(readme(full), "What is quantized").splitlines()
        if line.startswith("| `")
    ]
    parameters = [int(row[3].replace(",", "")) for row in rows]
    made = full.run()["stages"]["quantize"]
    assert sum(parameters) == made["parameters"]
    assert sum(int(row[1]) for row in rows) == made["tensors"]
    quantized = [row for row in rows if row[4] == "int4, one scale per 128 columns"]
    assert sum(int(row[3].replace(",", "")) for row in quantized) == made["quantized_parameters"]
    assert {row[5] for row in quantized} == {"not quantized"}, "activations are not int4 because weights are"
    assert {row[4] for row in rows if row not in quantized} == {"BF16"}


def test_activations_are_described_from_the_scheme(tmp_path: Path) -> None:
    artifact = Artifact.open(make_artifact(DEMO_MODEL, "fp8-dynamic", tmp_path / "fp8"))
    card(artifact)
    assert "| FP8 (E4M3), one scale per row | FP8 (E4M3), one scale per token, at run time |" in section(
        readme(artifact), "What is quantized"
    )
    assert front_matter(artifact)["tags"][1:3] == ["fp8-dynamic", "fp8"]


def test_a_config_that_contradicts_the_plan_has_no_card(full: Artifact) -> None:
    config = full.config()
    config["quantization_config"]["ignore"].append("model.layers.0.self_attn.q_proj")
    full.write("config.json", json.dumps(config).encode())
    with pytest.raises(InputError, match="quantization_config and the plan disagree on ignore"):
        card(full)


def test_cpu_timings_are_labelled_and_claim_nothing(full: Artifact) -> None:
    card(full)
    speed = section(readme(full), "Speed")
    assert "**CPU: says nothing of the serving engine's kernels.**" in speed
    assert "Gate of the recipe: **not proven**" in speed and "`marlin`: it needs a GPU" in speed
    assert "| 1 | 2.35× | 1.12× |" in speed and "| 64 | 0.87× | – |" in speed
    assert "No speed on a GPU is claimed" in section(readme(full), "Limitations")
    evidence = profile()
    del evidence["label"]
    full.write_evidence("profile.json", evidence)
    card(full)
    assert "**Timed on a CPU: it says nothing" in section(readme(full), "Speed")


def test_gpu_timings_name_the_gpu_and_its_driver(full: Artifact) -> None:
    evidence = profile("cuda")
    gpu = {"name": "Example H200", "capability": [9, 0], "cuda": "13.1", "driver": "580.1"}
    evidence["made_by"]["device"] = DEVICE | {"gpu": gpu}
    evidence["verdict"] = {"gate": "passed", "reason": "faster than bf16 at each M of the workload"}
    full.write_evidence("profile.json", evidence)
    card(full)
    speed = section(readme(full), "Speed")
    assert "Example H200, driver 580.1, CUDA 13.1" in speed and "CPU" not in speed
    assert "No speed on a GPU is claimed" not in readme(full)


H200 = ROOT / "docs" / "evidence" / "h200-qwen3-8b"


def on_h200(artifact: Artifact, name: str, **changes: Any) -> tuple[dict[str, Any], str]:
    """(a profile made on a GPU, the section on speed of a card that holds it). No plots are drawn."""
    evidence = json.loads((H200 / f"{name}.json").read_text()) | changes
    artifact.write_evidence("profile.json", evidence)
    text = render(facts(artifact, None))
    artifact.write("README.md", text.encode())
    return evidence, section(text, "Speed")


def test_a_gpus_profile_is_on_the_card(full: Artifact) -> None:
    evidence, speed = on_h200(full, "w4a16-rtn")
    assert "NVIDIA H200, driver 580.159.04, CUDA 13.0" in speed and "torch 2.11.0, vllm 0.25.1;" in speed
    assert "(vLLM 0.25.1 on sm90, with `VLLM_USE_DEEP_GEMM=0`)" in speed
    (answer,) = [row[1:] for row in cells(speed) if row[0].startswith("mlp.down_proj, mlp.gate_up_proj")]
    why = "CUTLASS W4A8: CUTLASS W4A8 only supports FP8 (e4m3) activations"
    assert answer == ["Machete (`MacheteLinearKernel`)", "`machete`", "asked vllm 0.25.1", why]
    assert cells(speed, "M")[0] == ["M", "machete (the engine's)", "marlin"]
    sums = {(t["kernel"], t["m"]): t["speedup"] for t in evidence["totals"]}
    for m in evidence["made_by"]["settings"]["m"]:
        assert [str(m), f"{sums['machete', m]:.2f}×", f"{sums['marlin', m]:.2f}×"] in cells(speed, str(m))
    assert {row[1] for row in cells(speed, "mlp.down_proj") if len(row) == 7} == {"machete"}
    assert "all GEMMs together pay up to M = 64. One by one: mlp.down_proj up to M = 128;" in speed
    assert "mlp.gate_up_proj up to M = 151;" in speed
    assert "self_attn.qkv_proj up to M = 8; self_attn.o_proj not even at the smallest M." in speed
    assert "takes 13.9 GB more, and leaves the KV cache 719,762 tokens in place of 813,970" in speed.replace(
        "It t", "t"
    )
    assert "reach, by GEMM, 13 % to 35 % at M = 1 (bf16 55 % to 90 %)" in speed
    assert "plots/speedup.png" in speed and "plots/layers.png" in speed and "CPU" not in speed
    text = section(readme(full), "Limitations")
    assert "this model was not served" in text and "timed on the NVIDIA H200" in text
    assert cells(readme(full), "Speed gate")[0][1].startswith("passed: 0.94x in serving on machete")


@pytest.mark.slow
def test_every_number_of_a_gpus_profile_is_traced_to_it(full: Artifact) -> None:
    for name in ("w4a16-rtn", "int8-dynamic", "int4-hqq-tile"):
        evidence, speed = on_h200(full, name)
        figures = set(numbers_in(evidence))
        found = NUMBER.findall(re.sub(r"`[^`]*`|\d+:\d+@[\d,]+", "", speed))
        assert len(found) > 400 and [token for token in found if not traceable(token, figures)] == []


def test_workloads_are_told_as_forecasts(full: Artifact) -> None:
    evidence, speed = on_h200(full, "fp8-dynamic")
    assert "Forecast for serving on one NVIDIA H200, made of measured kernels." in speed
    for name, found in evidence["workloads"].items():
        (row,) = cells(speed, f"{name}, {found['written']}")
        m = max(found["by_m"], key=lambda line: line[3])[0]
        speedups = [f"{found[key]:.2f}×" for key in ("linear_speedup", "speedup")]
        rates = [f"{found[key]:,.0f}" for key in ("baseline_tokens_per_s", "tokens_per_s")]
        assert row[1:] == [str(m), *speedups, f"{100 * found['shares']['attention']:.0f} %", *rates]
    assert "attention (vllm_flash_attn 3)" in speed and "Estimated:" not in speed
    less = evidence["workloads"] | {"serving": evidence["workloads"]["serving"] | {"estimated": ["head"]}}
    assert "Estimated: head." in on_h200(full, "fp8-dynamic", workloads=less)[1]
    assert cells(speed, "GEMM", "Kernel")[0][-1] == "Quantizing activations alone"


def test_a_failed_gate_says_what_to_do_and_what_was_repacked(full: Artifact) -> None:
    evidence, speed = on_h200(full, "int4-hqq-tile")
    assert "Gate of the recipe: **failed**. 0.07x in serving on tinygemm" in speed
    assert "\nRepack it as pack-quantized (ct-pack)" in speed
    assert cells(speed, "M")[0] == ["M", "tinygemm (the engine's)", "machete (repacked)", "marlin (repacked)"]
    assert "- marlin and machete: the same codes repacked as pack-quantized (layout `ct-pack`" in speed
    assert evidence["verdict"]["cure"]["note"] in speed
    assert "read: vLLM chooses nothing for torchao's own tensor" in speed


def test_a_gpus_profile_without_a_verdict_has_no_forecast(full: Artifact) -> None:
    """An engine that could not be asked, and kernels that none of the measured ones stands for."""
    found = json.loads((H200 / "fp8-block.json").read_text())
    choices = [
        choice | {"kernel": None, "class_name": None, "source": "table, not established", "error": "not installed"}
        for choice in found["engine"]["choices"]
    ]
    engine: dict[str, Any] = {
        "engine": "vllm",
        "version": "",
        "generation": "sm90",
        "error": "not installed",
        "choices": choices,
    }
    engine |= {"runs": {}, "unknown": {"mlp.down_proj": "no kernel is known"}, "repacked": []}
    verdict = {"gate": "not proven", "reason": "no kernel is known"}
    lacking: dict[str, Any] = {
        "workloads": {},
        "crossover": {},
        "roofline": [],
        "around": {"not_measured": "an odd GPU"},
    }
    _, speed = on_h200(full, "fp8-block", engine=engine, verdict=verdict, **lacking)
    assert "(vLLM on sm90; it could not be asked: not installed)" in speed and "Forecast" not in speed
    assert "table, not established; not installed" in speed and "(the engine's)" not in speed
    assert cells(speed, "M")[0] == ["M", "cutlass-fp8-block", "triton-fp8-block"]


def test_what_only_some_formats_have_is_said(full: Artifact) -> None:
    """FP4 activations, experts, several GPUs."""
    backend = {"tokens_an_expert": 3.2, "favours": "latency"}
    share = {"16": 0.21, "1": 0.34, "8192": 0.05}
    evidence, speed = on_h200(full, "fp8-dynamic", fp4={"quantize_share": share, "moe_backend": {"serving": backend}})
    assert "takes 34 % at M = 1 and 5 % at M = 8192 of the kernels' time." in speed
    assert "serving meets 3.2 tokens an expert, which favours a backend for latency." in speed
    evidence["made_by"]["settings"]["tensor_parallel"] = 4
    on_h200(full, "fp8-dynamic", made_by=evidence["made_by"])
    assert "those of one of 4 GPUs" in section(readme(full), "Limitations")


def test_a_crossover_does_not_hide_what_is_slower_below_it(full: Artifact) -> None:
    _, speed = on_h200(full, "fp8-block")
    assert "all GEMMs together pay up to M = 4, and again from M = 192." in speed


def test_several_kernels_of_the_engine_are_summed(full: Artifact) -> None:
    """No kernel of a mixed artifact takes every GEMM, so none has totals."""
    found = json.loads((H200 / "w4a16-rtn.json").read_text())
    runs = found["engine"]["runs"] | {"mlp.down_proj": "marlin"}
    ran = [row for row in found["rows"] if runs[row["gemm"]] == row["kernel"]]
    count = {gemm["name"]: gemm["count"] for gemm in found["gemms"]}
    base, own = (
        sum(count[row["gemm"]] * row[side] for row in ran if row["m"] == 16) for side in ("baseline_us", "median_us")
    )
    _, speed = on_h200(full, "w4a16-rtn", rows=ran, totals=[], engine=found["engine"] | {"runs": runs})
    assert cells(speed, "M")[0] == ["M", "as the engine runs them"]
    assert cells(speed, "16")[0] == ["16", f"{base / own:.2f}×"]


@pytest.mark.slow
def test_plots_know_their_device_and_their_kernels(full: Artifact) -> None:
    evidence, _ = on_h200(full, "int4-hqq-tile")
    card(full)
    assert check(full) == []
    drawn = (full.meta / "plots" / "layers.svg").read_text()
    assert "on the NVIDIA H200" in drawn and "machete (repacked)" in drawn and "dequantized" not in drawn
    assert len(re.findall(r">tinygemm \(the engine", drawn)) == 1, "one legend for all panels"
    evidence["made_by"]["device"]["gpu"]["name"] = "NVIDIA H100"
    full.write_evidence("profile.json", evidence)
    stale = [reason for reason in check(full) if "does not show" in reason]
    assert [f".quantpub/plots/{name}.{form}" for name in ("speedup", "layers") for form in ("png", "svg")] == [
        reason.split(" ")[0] for reason in stale
    ]


def test_no_line_of_a_plot_is_cut_off() -> None:
    from quantpub.plots import draw_layers, layers, spread

    for name in ("int4-hqq-tile", "fp8-dynamic"):
        evidence = json.loads((H200 / f"{name}.json").read_text())
        figure = draw_layers(layers(evidence), evidence)
        for axes in figure.axes:
            low, high = axes.get_ylim()
            assert all(low < value < high for line in axes.lines for value in line.get_ydata())
        colours = {(line.get_label(), line.get_color()) for axes in figure.axes for line in axes.lines}
        assert len(colours) == len({label for label, _ in colours})
    sizes = [1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256]
    assert spread(sizes, 14) == [size for size in sizes if size not in (96, 192)]
    assert spread(sizes, 7) == [1, 4, 16, 64, 256] and spread([3, 24, 100], 14) == [3, 24, 100]
    assert spread([7], 14) == [7]


def test_kernels_that_were_not_run_are_told_by_reason(full: Artifact) -> None:
    evidence = profile()
    evidence["kernels"] += [{"name": "machete", "layout": "machete", "unavailable": "it needs a GPU"}]
    full.write_evidence("profile.json", evidence)
    card(full)
    assert "\nNot run:\n\n- `marlin`, `machete`: it needs a GPU\n" in section(readme(full), "Speed")


def test_limitations_follow_from_the_evidence(full: Artifact) -> None:
    evidence = evaluation()
    evidence["baseline"] = {"kind": "local", "name": "cousin", "is_source": False}
    evidence["activations"] = {
        "quantized": [{"num": "fp8_e4m3", "granularity": "token", "dynamic": True}],
        "not_emulated": ["experts"],
    }
    full.write_evidence("eval.json", evidence)
    card(full)
    text = section(readme(full), "Limitations")
    assert "`cousin`, not the checkpoint this was made from" in text
    assert "leave the quantization of activations out for experts" in text
    assert "Verification is incomplete" in text and "The speed gate of the recipe is not proven" in text
    assert "That SGLang loads it rests on reading its source, not on a run." in text


def test_the_same_evidence_gives_the_same_bytes_from_any_folder(full: Artifact, tmp_path: Path) -> None:
    shutil.rmtree(full.meta / "plots")  # drawn anew, twice
    card(full, "acme/tiny")
    first = tree(full.path)
    shutil.rmtree(full.meta / "plots")
    assert {f".quantpub/plots/{name}.{form}" for name in ("speedup", "sqnr") for form in ("png", "svg")} <= set(first)
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        card(full)  # the Hub id is remembered
        assert check(full) == []
    finally:
        os.chdir(before)
    assert tree(full.path) == first
    assert full.damage() == []
    everything = readme(full) + "".join(first[name].decode() for name in first if name.endswith(".svg"))
    assert str(tmp_path) not in everything and not re.search(r"20\d\d-\d\d", everything)


def test_tables_are_whole(full: Artifact) -> None:
    """A bar or a line end in a detail must not break a row."""
    card(full)
    width = None
    for line in readme(full).splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else None
        assert width is None or cells is None or cells == width, line
        width = cells
    assert r"66 tensors \| 1 shard" in readme(full)


MIXED = "w4a16-fp8-down"


def cells(text: str, *start: str) -> list[list[str]]:
    """The rows of the tables that begin with these cells."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [row for row in rows if row[: len(start)] == list(start)]


@pytest.fixture(scope="module")
def mixed_card(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    artifact = Artifact.open(make_artifact(DEMO_MODEL, MIXED, tmp_path_factory.mktemp("card") / "mixed"))
    card(artifact, "acme/mixed")
    return artifact


def test_a_card_of_several_schemes_describes_each(mixed_card: Artifact) -> None:
    text = readme(mixed_card)
    assert "quantized to W4A16 and FP8_DYNAMIC: " in text
    assert cells(text, "Schemes") == [["Schemes", "W4A16 and FP8_DYNAMIC"]]
    assert cells(text, "Weights of W4A16 layers")[0][1] == "int4, one scale per 128 columns"
    assert cells(text, "Activations of W4A16 layers")[0][1] == "not quantized"
    assert cells(text, "Weights of FP8_DYNAMIC layers")[0][1] == "FP8 (E4M3), one scale per row"
    assert cells(text, "Activations of FP8_DYNAMIC layers")[0][1] == "FP8 (E4M3), one scale per token, at run time"
    assert not cells(text, "Weights of quantized layers") and not cells(text, "Activations there")
    assert cells(text, "Format")[0][1].endswith("(quantpub layouts `ct-pack` and `ct-float`)")
    assert front_matter(mixed_card)["tags"] == [
        "quantized", "w4a16", "fp8-dynamic", "int4", "fp8", "compressed-tensors", "vllm", "sglang",
    ]  # fmt: skip
    assert check(mixed_card) == []


def test_a_card_of_several_schemes_has_kernels_for_each(mixed_card: Artifact) -> None:
    text = section(readme(mixed_card), "Use")
    assert "| Engine | For | Version | GPU | Kernel | Known by |" in text
    assert ["vLLM", "W4A16", "0.25.1", "sm90", "Machete", "seen"] in cells(text, "vLLM")
    assert ["vLLM", "FP8_DYNAMIC", "0.25.1", "sm90", "CUTLASS FP8", "seen"] in cells(text, "vLLM")
    assert [row[1] for row in cells(text, "SGLang") if len(row) == 4] == ["W4A16", "FP8_DYNAMIC"]


def own_recipe(folder: Path, text: str) -> str:
    path = folder / "own.yaml"
    path.write_text(f"description: a recipe of a test\nignore: [lm_head]\n{text}\n")
    return str(path)


def test_a_treatment_that_no_weight_had_is_not_described(tmp_path: Path) -> None:
    """A rule for every linear: of the recipe's own int4 nothing is in the file."""
    every = "rules: [{match: 're:.*', scheme: FP8_DYNAMIC, algorithm: {name: fp8}}]"
    recipe = own_recipe(tmp_path, f"scheme: W4A16\nalgorithm: {{name: rtn}}\n{every}\nengines: {{vllm: ct-pack}}")
    artifact = Artifact.open(make_artifact(DEMO_MODEL, recipe, tmp_path / "a"))
    card(artifact)
    text = readme(artifact)
    assert "quantized to FP8_DYNAMIC: " in text and cells(text, "Scheme") == [["Scheme", "FP8_DYNAMIC"]]
    assert front_matter(artifact)["tags"][1:3] == ["fp8-dynamic", "fp8"]
    kernels = [row[-2] for row in cells(section(text, "Use"), "vLLM", "0.25.1", "sm90")]
    assert kernels == ["CUTLASS FP8"]
    assert not re.search(r"W4A16|int4|Machete", text.split("```yaml")[0].split("# ", 1)[1])


def test_two_group_sizes_of_one_scheme_are_told_apart(tmp_path: Path) -> None:
    rule = "rules: [{match: 're:.*down_proj', scheme: W4A16, group_size: 64}]"
    recipe = own_recipe(tmp_path, f"scheme: W4A16\nalgorithm: {{name: rtn}}\n{rule}\nengines: {{vllm: ct-pack}}")
    artifact = Artifact.open(make_artifact(DEMO_MODEL, recipe, tmp_path / "a"))
    card(artifact)
    assert "quantized to W4A16 in groups of 128 and W4A16 in groups of 64: " in readme(artifact)


def save_moe(folder: Path) -> Path:
    """A layer of Qwen3-MoE, random, with attention."""
    import torch
    from safetensors.torch import save_file

    at = "model.layers.0."
    names = [f"self_attn.{p}_proj" for p in "qkvo"]
    names += [f"mlp.experts.{e}.{p}_proj" for e in range(2) for p in ("gate", "up", "down")]
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{at}{name}.weight": torch.randn(128, 128, generator=generator).bfloat16() for name in names}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "num_experts_per_tok": 2}))
    return folder


def test_experts_have_kernels_of_their_own_on_the_card(tmp_path: Path) -> None:
    artifact = Artifact.open(make_artifact(save_moe(tmp_path / "m"), "w4a16", tmp_path / "a", "ct-pack"))
    card(artifact)
    text = section(readme(artifact), "Use")
    assert ["vLLM", "W4A16", "0.25.1", "sm90", "Machete", "seen"] in cells(text, "vLLM")
    assert ["vLLM", "W4A16, experts", "0.25.1", "sm90", "Marlin MoE", "seen"] in cells(text, "vLLM")
    assert front_matter(artifact)["tags"] == ["quantized", "w4a16", "int4", "compressed-tensors", "vllm", "sglang"]


def test_an_engine_that_refuses_experts_is_not_on_the_card(tmp_path: Path) -> None:
    artifact = Artifact.open(make_artifact(save_moe(tmp_path / "m"), "int8-dynamic", tmp_path / "a"))
    card(artifact)
    assert artifact.run()["engines"] == ["vllm"]
    assert "vllm serve" in readme(artifact) and "sglang" not in readme(artifact).split("```yaml")[0]


def test_an_engine_that_would_merge_within_a_block_is_not_on_the_card(tmp_path: Path) -> None:
    """The demo's k_proj has 64 rows, half a block of FP8, and v_proj follows it in the merged weight."""
    artifact = Artifact.open(make_artifact(DEMO_MODEL, "fp8-block", tmp_path / "a"))
    card(artifact)
    assert artifact.run()["engines"] == ["transformers"]
    assert "vllm serve" not in readme(artifact) and "AutoModelForCausalLM" in readme(artifact)


def test_a_layout_that_the_recipe_gives_no_engine_is_offered_to_those_that_load_it(tmp_path: Path) -> None:
    artifact = Artifact.open(make_artifact(DEMO_MODEL, "w4a16", tmp_path / "a", "gptq"))
    card(artifact, "me/x")
    assert artifact.run()["engines"] == ["vllm", "sglang", "transformers"]
    assert "vllm serve me/x" in readme(artifact) and cells(section(readme(artifact), "Use"), "SGLang")


def test_a_card_without_an_engine_says_so(bare: Artifact) -> None:
    bare.write(".quantpub/run.json", json.dumps(bare.run() | {"engines": []}).encode())
    card(bare)
    assert "No engine is known to load it." in section(readme(bare), "Use")
    assert "| Engine |" not in readme(bare)


def test_what_was_seen_is_said_of_the_scheme_that_was(tmp_path: Path) -> None:
    """vLLM loaded torchao-tile here with a floating-point zero; without one it did not."""
    words = {}
    for recipe in ("int4-hqq-tile", "w4a16"):
        artifact = Artifact.open(make_artifact(DEMO_MODEL, recipe, tmp_path / recipe, "torchao-tile"))
        card(artifact)
        words[recipe] = cells(section(readme(artifact), "Use"), "vLLM")[0][2], section(readme(artifact), "Limitations")
    assert words["int4-hqq-tile"][0].startswith("seen: 0.25.1 on an H200 (docs/evidence/")
    assert words["w4a16"][0].startswith("read: ") and "That vLLM and transformers load it rests on" in words["w4a16"][1]
    assert "rests on reading" not in words["int4-hqq-tile"][1]


def test_a_failed_verification_names_no_path(bare: Artifact) -> None:
    from quantpub.verify.run import verify

    (bare.path / "model.safetensors").write_bytes(b"short")
    (bare.path / "tokenizer.json").unlink()
    evidence = verify(bare, str(DEMO_MODEL))
    failed = [check["detail"] for check in evidence["checks"] if check["status"] == "failed"]
    text = (bare.meta / "verify.json").read_text()
    assert failed and str(bare.path) not in text and "/tmp" not in text and str(ROOT) not in text
    assert any(detail.startswith("model.safetensors: ") for detail in failed), failed
    card(bare)
    assert not [reason for reason in check(bare) if "local path" in reason]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("[Errno 2] No such file or directory: '{a}/.quantpub/plan.jsonl'", "'.quantpub/plan.jsonl'"),
        ("{a}/model.safetensors: the file is cut off", "model.safetensors: the file is cut off"),
        ("/elsewhere/on/a/disk/x.json is missing", "x.json is missing"),
        ("{s}/model.safetensors became shorter", "model.safetensors became shorter"),
        ("128 / 2 columns, a/b and ./c", "128 / 2 columns, a/b and ./c"),
    ],
)
def test_paths_in_a_finding_become_names(text: str, left: str, bare: Artifact) -> None:
    from quantpub.checkpoint import open_checkpoint
    from quantpub.verify.base import Subject
    from quantpub.verify.run import _nameless

    subject = Subject(bare, open_checkpoint(str(DEMO_MODEL)))
    assert _nameless(text.format(a=bare.path, s=DEMO_MODEL), subject).endswith(left)


def test_a_repo_id_must_be_one(bare: Artifact) -> None:
    with pytest.raises(UsageError, match="not a Hub id"):
        card(bare, "tiny")


@pytest.mark.parametrize(
    ("recipe", "layout", "words"),
    [
        ("int4-hqq-tile", "torchao-tile", ("far slower beyond", "0.04× at 4096", "not for experts")),
        ("nvfp4a16", "ct-nvfp4", ("Before Blackwell", "no FP4 arithmetic")),
        ("int8-dynamic", "ct-int", ("Not for Blackwell",)),
    ],
)
def test_what_the_plan_notes_stands_among_the_limitations(
    recipe: str, layout: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    artifact = Artifact.open(make_artifact(DEMO_MODEL, recipe, tmp_path / "a", layout))
    card(artifact)
    text = section(readme(artifact), "Limitations")
    assert all(word in text for word in words), text


def test_experts_of_several_kinds_are_named_with_the_kernel_that_was_timed_for_them() -> None:
    """Both GEMMs of a kind have one kernel, under the layer's name and what is made of it."""
    engine = {
        "runs": {"mlp.experts 8×64×128 W4A16": "vllm-marlin-moe"},
        "choices": [
            {"gemm": f"mlp.experts.{leaf} 8×64×128 {scheme}", "kernel": "Marlin MoE", "source": "asked"}
            for leaf, scheme in (("gate_up_proj", "W4A16"), ("down_proj", "W4A16"), ("down_proj", "W8A16"))
        ],
    }
    assert [answer[2] for answer in gpu.choices(engine)] == ["`vllm-marlin-moe`", "not timed"]
