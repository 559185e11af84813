"""Figures of calibration where they could be wrong without a word: what enters the first layer, runs of several processes that
were killed, scales that experts share, rows that poor experts are shown."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import DEMO_MODEL, DEMO_TEXT, make_artifact
from safetensors.torch import load_file
from test_families import save_tiny

from quantpub.artifact import Artifact
from quantpub.calibrating import Asked, calibrate
from quantpub.checkpoint import open_checkpoint
from quantpub.decode import Decoder
from quantpub.families import FAMILIES
from quantpub.gemms import fuse
from quantpub.layer_store import LayerStore
from quantpub.observe import observe
from quantpub.observe.experts import ENOUGH, Experts, Router
from quantpub.observe.passing import Pass
from quantpub.observe.ranks import Ranks
from quantpub.observe.skeleton import Skeleton
from quantpub.observe.watch import Gathered, Watch
from quantpub.plan import make_plan
from quantpub.quantize import quantize
from quantpub.recipe import load_recipe
from quantpub.samples import Request
from quantpub.smoothing import smoothing_of

IDS = torch.arange(48).view(2, 24) % 60


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUANTPUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def ids(folder: Path) -> Path:
    """Samples of two lengths, as token ids."""
    path, rng = folder / "ids.jsonl", torch.Generator().manual_seed(5)
    rows = [torch.randint(3, 60, (n,), generator=rng).tolist() for n in (40, 64, 40)]
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


def test_what_the_model_does_to_embeddings_is_done(tmp_path: Path) -> None:
    """Granite multiplies them in the model's forward, by 12 in its releases and by 1 in a config of defaults."""
    from transformers import AutoModelForCausalLM

    assert "granite" in FAMILIES
    save_tiny("granite", tmp_path, embedding_multiplier=12.0)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval().get_decoder()
    entered: list[torch.Tensor] = []
    base.layers[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    with torch.inference_mode():
        base(input_ids=IDS, use_cache=False)
        (hidden,) = Skeleton(open_checkpoint(str(tmp_path)), tmp_path).embed([IDS])
    assert torch.equal(hidden, entered[0])


class Beside(Ranks):
    """One of two processes; the other one is `theirs`."""

    theirs: ClassVar[dict[str, Any]] = {}

    def agree(self, value: int) -> int:
        self.theirs.setdefault("asked", []).append(value)
        return min(value, self.theirs["answers"].pop(0))

    def share(self, value: Any) -> Any:
        return value


@pytest.mark.parametrize(("other", "first"), [([1, 1], 1), ([2, 0], 0), ([1, 0], 0), ([-1, 0], 0)])
def test_processes_that_were_killed_a_layer_apart_begin_anew_together(
    other: list[int], first: int, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that goes on at layer 1 beside one that begins at 0 would add up inputs of different layers."""
    going = Pass.__new__(Pass)
    monkeypatch.setattr(Beside, "theirs", {"answers": list(other)})
    store = LayerStore(cache)
    store.begin(0)
    for layer in range(2):
        store.add(layer, {"x": torch.zeros(1)}, {})
    going._store, going._ranks, going.experts, going._rows = store, Beside(0, 2), {}, []
    going.hidden, going.skeleton = _Saved(1), _Saved(1)  # type: ignore[assignment]
    assert going._begin() == first
    assert len(store.finished()) == first


class _Saved:
    """Hidden states on disk, of which the layer alone matters."""

    def __init__(self, layer: int) -> None:
        self.saved = lambda: layer
        self.resume = self.start = lambda: None
        self.embed = lambda rows: iter(())


def test_what_a_run_of_more_processes_left_is_cleared_away(cache: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    checkpoint, request = open_checkpoint(str(tmp_path / "model")), Request(str(ids(tmp_path)), 8, 64)
    folder = cache / "observed" / observe(checkpoint, request).key
    (folder / "record.json").unlink()
    (folder / "hidden-1of2-0").write_bytes(b"left")
    observe(checkpoint, request)
    assert not list(folder.glob("hidden-*"))


MIXED = """
description: int4 attention by GPTQ beside experts in static FP8
scheme: W4A16
algorithm: {name: gptq}
rules:
  - {match: 're:.*mlp\\.experts\\..*', scheme: FP8, algorithm: {name: fp8}}
ignore: [lm_head]
engines: {vllm: ct-pack}
"""


@pytest.mark.slow
def test_experts_beside_gptq_share_their_scale_of_inputs(cache: Path, tmp_path: Path) -> None:
    """Engines keep one for gate and up of all experts of a layer, and one for down, whoever found what it is made of."""
    wide = {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 64}
    save_tiny("qwen3_moe", tmp_path / "model", **wide)
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(MIXED)
    make_artifact(tmp_path / "model", str(recipe), tmp_path / "out", "ct-pack", ids(tmp_path))
    decoder = Decoder(Artifact.open(tmp_path / "out"))
    scales: dict[str, set[float]] = {}
    for module, _ in decoder.modules():
        if (scale := decoder.input_scale(module)) is not None:
            scales.setdefault(re.sub(r"experts\.\d+\.(gate|up)?", "", module), set()).add(float(scale))
    assert len(scales) == 8 and all(len(found) == 1 for found in scales.values())
    assert len(set.union(*scales.values())) > 4, "layers have scales of their own"


def test_rows_that_poor_experts_are_shown_come_from_all_samples(cache: Path, tmp_path: Path) -> None:
    """Not the first rows only, which are those of the shortest samples."""
    whole = Gathered(4, 1, torch.device("cpu"), hessian=False)
    whole.add(torch.arange(128.0)[:, None].expand(128, 4).contiguous(), 0)
    watch, shown = Watch({}, "", 1), list[torch.Tensor]()

    class Module(torch.nn.Module):
        def forward(self, x_MK: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            shown.append(x_MK)
            return x_MK

    module = Module()
    router = Router(Experts(module, "experts", ["experts.0.gate_proj"]), watch)
    some = Gathered(4, 1, torch.device("cpu"), hessian=False)
    some.add(torch.ones(ENOUGH - 8, 4), 0)
    watch.gathered |= {"experts": whole, "experts.0.gate_proj": some}
    router.finish()
    assert router.routed == [ENOUGH - 8]
    assert not module._forward_pre_hooks, "a layer that is run again, quantized, is not watched"
    assert shown[0][:, 0].tolist() == [8 + 16 * i for i in range(8)]


SMOOTHED = """
description: static FP8 after smoothing
scheme: FP8
algorithm: {name: fp8}
transform: {name: smoothquant, alpha: 0.5}
ignore: [lm_head]
engines: {vllm: ct-float}
"""


def test_scales_of_whole_tensors_are_those_of_what_smoothing_left(cache: Path, tmp_path: Path) -> None:
    """Of inputs and of weights alike, over all that an engine merges: before smoothing both are others."""
    recipe = tmp_path / "smoothed.yaml"
    recipe.write_text(SMOOTHED)
    plan = make_plan(open_checkpoint(str(DEMO_MODEL)), load_recipe(str(recipe)), "ct-float")
    found = calibrate([plan], Asked(str(DEMO_TEXT), 8, 64))
    quantize(found.plans, tmp_path / "out", statistics=found.statistics)
    artifact = Artifact.open(tmp_path / "out")
    decoder = Decoder(artifact)
    smoothing, statistics = smoothing_of(artifact, decoder), found.statistics
    assert smoothing is not None and statistics is not None
    source = load_file(DEMO_MODEL / "model.safetensors")
    for members in fuse(plan.shapes, plan.family).values():
        inputs = max(float(smoothing.observed(m, statistics.input(m)).amax_K.max()) for m in members)
        weights = max(float(smoothing.apply(f"{m}.weight", source[f"{m}.weight"]).abs().max()) for m in members)
        for member in members:
            q = decoder.qtensor(member)
            assert q.input_scale is not None
            assert float(q.input_scale) == pytest.approx(inputs / 448, rel=1e-6)
            assert float(q.scale) == pytest.approx(weights / 448, rel=1e-6)


def test_layers_that_are_whole_but_of_another_record_are_not_taken(tmp_path: Path) -> None:
    """A layer and its line in the journal exchanged together: each fits the other, and neither fits the record."""
    store = LayerStore(tmp_path)
    store.begin(0)
    for layer in range(2):
        store.add(layer, {"x": torch.tensor([float(layer)])}, {})
    record = store.end({"key": "k"})
    assert store.whole() == record
    other = LayerStore(tmp_path / "other")
    other.begin(0)
    other.add(0, {"x": torch.tensor([7.0])}, {})
    other.path(0).replace(store.path(0))
    lines = (tmp_path / "journal.jsonl").read_text().splitlines()[1:]
    mine = (tmp_path / "other" / "journal.jsonl").read_text().splitlines()
    (tmp_path / "journal.jsonl").write_text("\n".join([*mine, *lines]) + "\n")
    assert len(store.finished()) == 2 and store.whole() is None


@pytest.mark.slow
def test_evidence_of_statistics_and_of_solutions_stand_side_by_side(cache: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "both.yaml"
    recipe.write_text(
        "description: both\nscheme: W4A16\nalgorithm: {name: gptq}\nkv_cache: fp8\nignore: [lm_head]\n"
        "engines: {vllm: ct-pack}\n"
    )
    out = make_artifact(DEMO_MODEL, str(recipe), tmp_path / "out")
    evidence = json.loads((out / ".quantpub" / "calibration.json").read_text())
    assert evidence["made_by"]["stage"] == "observe" and evidence["solved"]["made_by"]["stage"] == "solve"
    assert evidence["key"] != evidence["solved"]["key"]
