"""docs/profile.md against profiles: every key of them is documented there, and every documented key is in one of them.

The profiles are the committed ones of a GPU, two made anew on this CPU, and, for what neither can show (experts, FP4, an
engine that could not be asked), the blocks that the code itself builds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import DEMO_MODEL, ROOT, make_artifact

from quantpub.around import around
from quantpub.artifact import Artifact
from quantpub.costs import fp4
from quantpub.engines.choice import Ask
from quantpub.experts import ExpertLayer
from quantpub.forecast import Forecast
from quantpub.gemms import Gemm
from quantpub.gpus import GPUS
from quantpub.kernels import work
from quantpub.kernels.measure_moe import choose_moe
from quantpub.kernels.serving import engine_block
from quantpub.profile import profile
from quantpub.schedule import vllm_limits
from quantpub.scheme import preset
from quantpub.served import served
from quantpub.timing import MINIMUM, Bench
from quantpub.verdict import judged

PAGE = ROOT / "docs" / "profile.md"
H200 = ROOT / "docs" / "evidence" / "h200-qwen3-8b"
GPU_FILES = ("w4a16-rtn", "fp8-dynamic", "int8-dynamic", "int4-hqq-tile", "nvfp4a16", "fp8-block", "later/w4a16-rtn")
ROW = re.compile(r"^\| `(?P<field>[^`]+)` \|(?P<unit>[^|]*)\| (?P<on>both|GPU) \|")
UNITS = {"_us": "µs", "_bytes": "bytes", "seconds": "s", "speedup": "ratio", "per_s": "tokens/s", ".m": "tokens"}
Key = tuple[str, ...]


@dataclass(frozen=True)
class Field:
    unit: str
    on: str


@cache
def documented() -> dict[Key, Field]:
    found = [match for line in PAGE.read_text().splitlines() if (match := ROW.match(line))]
    assert len({match["field"] for match in found}) == len(found), "a field is documented twice"
    return {tuple(match["field"].split(".")): Field(match["unit"].strip(), match["on"]) for match in found}


def keys(value: Any, at: Key = ()) -> Iterator[Key]:
    """Every path to a figure or text; lists of objects are marked with [], other lists are figures."""
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from keys(entry, (*at, name))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for entry in value:
            yield from keys(entry, (*at[:-1], f"{at[-1]}[]"))
    elif value != [] or at[-1] in ("repacked", "estimated"):
        yield at


def field_of(key: Key) -> Key | None:
    """The field that documents it: by its own name before a <placeholder>."""
    fits = [
        field
        for field in documented()
        if len(field) == len(key) and all(a == b or a.startswith("<") for a, b in zip(field, key, strict=True))
    ]
    return min(fits, key=lambda field: sum(part.startswith("<") for part in field), default=None)


def fields_in(evidence: Any) -> set[Key]:
    found = {key: field_of(key) for key in set(keys(evidence))}
    assert not [".".join(key) for key, field in found.items() if field is None], "not documented"
    return {field for field in found.values() if field is not None}


def committed(name: str) -> dict[str, Any]:
    evidence: dict[str, Any] = json.loads((H200 / f"{name}.json").read_text())
    return evidence


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> set[Key]:
    """Two profiles of this machine, few rounds each, with a kernel that quantizes activations and a cell left out."""
    folder, found, threads = tmp_path_factory.mktemp("schema"), set[Key](), torch.get_num_threads()
    torch.set_num_threads(1)  # nothing waits for a second core that others use
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantpub.timing.MAXIMUM", MINIMUM)
        patch.setattr("quantpub.kernels.work.Bench", lambda stopwatch: Bench(stopwatch, waited=lambda: 0))
        for recipe, seconds in (("w4a16-rtn", 60.0), ("fp8-dynamic", 60.0), ("fp8-dynamic", 1e-6)):
            artifact = folder / recipe
            opened = Artifact.open(artifact if artifact.exists() else make_artifact(DEMO_MODEL, recipe, artifact))
            found |= fields_in(profile(opened, m=[1, 16], budget_seconds=seconds, device="cpu"))
    torch.set_num_threads(threads)
    grouped = Gemm("mlp.experts.up_proj", 64, 128, 4, ("model.layers.0.mlp.experts.0.up_proj",), 8)
    return found | fields_in({"gemms": [grouped.as_json()]})


def of_experts() -> dict[str, Any]:
    """A GPU's entries for grouped experts."""
    layer = ExpertLayer("mlp.experts", 8, 2, 256, 128, preset("W4A16"), "ct-pack", (), tp=2)
    kernels = [choice.as_json() for choice in choose_moe([layer], "cuda", None)]
    assert kernels
    return {"gemms": [layer.as_json()], "kernels": kernels}


def unasked(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """An engine that could not be asked, on a GPU that no table has."""
    patch.setattr("quantpub.kernels.serving.generation", lambda: "sm75")
    patch.setattr("torch.cuda.get_device_name", lambda: "Example 9000")
    patch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=1 << 34))
    ask = Ask("mlp.down_proj", 64, 128, preset("FP8_DYNAMIC"), "ct-float")
    block = engine_block({"error": "vLLM is not installed"}, [ask], [], {"mlp.down_proj": []})
    assert block["unknown"] and not block["runs"]
    return {"engine": block, "around": work._around(None)}  # type: ignore[arg-type]


def without_vllm(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is measured beside the GEMMs where torch stands in; on this CPU all else fails."""
    model = served(json.loads((H200 / "config.json").read_text()))
    patch.setattr("quantpub.around.Stopwatch", lambda: None)
    patch.setattr("quantpub.around.decode_times", lambda us: {"decode": [[1, 128, 9.0]]})
    found = around(model, vllm_limits(GPUS["H200"]))
    assert found["failed"] and found["rest"]["stood_in"]
    return {"around": found}


def of_fp4() -> dict[str, Any]:
    """The block for FP4 activations, of a model with experts."""
    evidence = committed("fp8-dynamic")
    evidence["weights"] = {"bits": 4.5, "computes_in": "fp4"}
    for entry in evidence["gemms"]:
        entry |= {"scheme": "NVFP4", "group": 16}
    config = json.loads((H200 / "config.json").read_text())
    found = judged(evidence, config, type("Gate", (), {"workload": None, "min_speedup": None})(), None)
    assert "moe_backend" not in found["fp4"]
    sparse = {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    return found | fp4(Forecast(evidence, config | sparse), found["workloads"])


@pytest.fixture(scope="module")
def on_gpu() -> set[Key]:
    with pytest.MonkeyPatch.context() as patch:
        rare = [of_experts(), unasked(patch), without_vllm(patch), of_fp4()]
    return set().union(*(fields_in(one) for one in (*map(committed, GPU_FILES), *rare)))


@pytest.mark.slow
def test_what_both_devices_have_is_marked_so(on_cpu: set[Key], on_gpu: set[Key]) -> None:
    both = {field for field, about in documented().items() if about.on == "both"}
    names = {".".join(field) for field in both}
    assert {".".join(field) for field in on_cpu} == names
    # a GPU's evidence has a value for the GPU, and the committed profiles left nothing out
    lacking = {"made_by.device.gpu", *(name for name in names if name.startswith("not_measured[]"))}
    assert names - {".".join(field) for field in on_gpu} == lacking


@pytest.mark.slow
def test_no_documented_key_is_absent_from_all(on_cpu: set[Key], on_gpu: set[Key]) -> None:
    assert {".".join(field) for field in documented()} == {".".join(field) for field in on_cpu | on_gpu}


def test_an_undocumented_key_would_be_found() -> None:
    with pytest.raises(AssertionError, match=r"rows\[\]\.flavour"):
        fields_in({"rows": [{"gemm": "a", "flavour": 1}]})
    assert field_of(("crossover", "all")) == ("crossover", "all")
    assert field_of(("crossover", "mlp.down_proj")) == ("crossover", "<gemm>")


def test_units_follow_from_names() -> None:
    for field, about in documented().items():
        name = ".".join(field)
        unit = next((unit for end, unit in UNITS.items() if name.endswith(end)), None)
        assert unit is None or about.unit == unit, name


def test_the_errors_of_forecasts_are_those_of_the_evidence() -> None:
    found = json.loads((H200 / "predicted-and-served.json").read_text())
    text, summary = " ".join(PAGE.read_text().split()), found["summary"]
    assert f"{summary['runs']} runs, {summary['within_10_percent']} within 10 %" in text
    assert f"the largest error {100 * summary['largest_error']:.1f} %" in text
    assert f"the median {100 * summary['median_error']:.1f} %" in text
    lines = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines()]
    (head,) = [line for line in lines if line[0] == "checkpoint"]
    shown = {(line[0], column): cell for line in lines for column, cell in zip(head[1:], line[1:], strict=False)}
    for row in found["rows"]:
        assert shown[f"`{row['checkpoint']}`", row["workload"]] == f"{100 * row['error']:+.1f} %"


def test_evidence_of_a_gpu_names_no_local_path() -> None:
    for path in H200.glob("*.json"):
        assert not re.search(r"(?<![\w.])/(?:home|root|tmp|work|mnt)/", Path(path).read_text()), path.name
