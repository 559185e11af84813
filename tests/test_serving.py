"""What the engine would run beside what was measured: its answers by GEMM, the tables where it is silent, repacked weights.

Also which kernels a profile takes and for which GEMMs, the progress of it, and what one of several GPUs holds of a weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantpub.cures import CURES, cures
from quantpub.engines.choice import Ask, Choice
from quantpub.errors import GateError, InputError
from quantpub.experts import ExpertLayer
from quantpub.families import FAMILIES, Family
from quantpub.gemms import Gemm
from quantpub.hardware import GENERATIONS, TILES
from quantpub.kernels import KERNELS, choices, moe_vllm, serving, work
from quantpub.kernels.base import Kernel, Weight
from quantpub.kernels.dense import BF16
from quantpub.kernels.measure import Measured
from quantpub.kernels.measure_moe import MoeChoice
from quantpub.kernels.moe import MOE_KERNELS
from quantpub.kernels.moe_torch import LOOP
from quantpub.kernels.serving import by_row, cure_kernels, engine_block
from quantpub.kernels.work import Work
from quantpub.merged import share
from quantpub.qtensor import QTensor
from quantpub.scheme import Scheme, preset

W4, TILE, FP8 = preset("W4A16"), preset("W4A16_FLOAT_ZERO"), preset("FP8_DYNAMIC")
(TILE_CURE,) = cures("torchao-tile", "W4A16_FLOAT_ZERO")


def ask(name: str, n: int = 4096, k: int = 4096, scheme: Scheme = W4, layout: str = "ct-pack", experts: int = 0) -> Ask:
    return Ask(name, n, k, scheme, layout, experts, 4 if experts else 0)


def answer(name: str, kernel: str | None, error: str | None = None) -> dict[str, Any]:
    return Choice(name, kernel, "Class", "asked vllm 0.25.1", {}, error).as_json()


def reply(*answers: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    return {"engine": "vllm", "version": "0.25.1", "generation": "sm90", "choices": list(answers)} | facts


LEAVES = tuple(f"model.layers.0.mlp.experts.0.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj"))


def layer(name: str = "mlp.experts") -> ExpertLayer:
    return ExpertLayer(name, 8, 4, 256, 512, W4, "ct-pack", (LEAVES,))


# names


def test_every_row_is_a_kernel_of_ours_and_several_may_share_one() -> None:
    """Two by scheme; two by the engine's version, see below."""
    dense, sparse = by_row(False), by_row(True)
    assert dense["Machete"] == ["machete"] and dense["CUTLASS FP8"] == ["cutlass-fp8", "cutlass-fp8-static"]
    assert sparse["Triton INT8 MoE"] == ["vllm-triton-moe-int8", "vllm-triton-moe-int8-a16"]
    for rows, known in ((dense, KERNELS), (sparse, MOE_KERNELS)):
        assert "" not in rows and all(set(names) <= set(known) for names in rows.values())
    assert not any("bf16" in names for names in dense.values())


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((7, 5), "sm75"), ((7, 0), ""), ((8, 0), "sm80"), ((8, 6), "sm80"), ((8, 9), "sm89"), ((9, 0), "sm90"),
        ((10, 0), "sm100"), ((10, 3), "sm100"), ((11, 0), ""), ((12, 0), "sm120"),
    ],
)  # fmt: skip
def test_the_generation_of_a_gpu(capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert serving.generation() == name and (not name or name in GENERATIONS)


# the engine's answers


def test_the_answer_is_the_kernel_that_was_measured() -> None:
    """Of two kernels with one row, the one that takes the artifact's scheme."""
    asked = [ask("a", scheme=FP8), ask("b", scheme=preset("FP8"))]
    taken = {"a": ["dequantized", "cutlass-fp8"], "b": ["cutlass-fp8-static", "torch-fp8-tensor"]}
    said = reply(answer("a", "CUTLASS FP8"), answer("b", "CUTLASS FP8"), environment={"X": "1"})
    block = engine_block(said, asked, [], taken)
    assert block["runs"] == {"a": "cutlass-fp8", "b": "cutlass-fp8-static"} and block["unknown"] == {}
    assert block["choices"] == said["choices"] and block["environment"] == {"X": "1"}
    assert (block["engine"], block["version"], block["generation"]) == ("vllm", "0.25.1", "sm90")


@pytest.mark.parametrize(
    ("said", "taken", "reason"),
    [
        (answer("a", "Machete"), ["marlin"], "would run Machete for a, which is not among the kernels timed here"),
        (answer("a", "Machete"), [], "would run Machete for a, which is not among the kernels timed here"),
        (answer("a", "Machete 2"), ["machete"], "would run Machete 2 for a"),
        (answer("a", None), ["machete"], "no kernel is known for a: asked vllm 0.25.1"),
        (answer("a", None, "it refuses"), ["machete"], "no kernel is known for a: it refuses"),
    ],
)
def test_what_was_not_measured_is_unknown_with_the_reason(
    said: dict[str, Any], taken: Sequence[str], reason: str
) -> None:
    block = engine_block(reply(said), [ask("a")], [], {"a": taken})
    assert block["runs"] == {} and list(block["unknown"]) == ["a"] and reason in block["unknown"]["a"]


def test_a_gemm_that_nobody_measured_is_unknown() -> None:
    assert list(engine_block(reply(answer("a", "Machete")), [ask("a")], [], {})["unknown"]) == ["a"]


def test_both_gemms_of_grouped_experts_are_one_entry() -> None:
    names = ["self_attn.o_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    asked = [ask(names[0]), *(ask(name, experts=8) for name in names[1:])]
    said = reply(answer(names[0], "Marlin"), *(answer(name, "Marlin MoE") for name in names[1:]))
    taken = {"self_attn.o_proj": ["marlin"], "mlp.experts": ["vllm-triton-moe-int8-a16", "vllm-marlin-moe"]}
    block = engine_block(said, asked, [layer()], taken)
    assert block["runs"] == {"self_attn.o_proj": "marlin", "mlp.experts": "vllm-marlin-moe"}
    assert block["unknown"] == {}


KINDS = [replace(layer(f"mlp.experts 8×512×{hidden} {scheme.name}"), hidden=hidden, scheme=scheme, layout=layout)
         for hidden, scheme, layout in ((256, W4, "ct-pack"), (128, W4, "ct-pack"), (256, FP8, "ct-float"))]  # fmt: skip


def test_every_kind_of_experts_has_an_answer_of_its_own() -> None:
    """Two shapes, and one of them in two schemes."""
    decoded: Any = Decoded(W4, "ct-pack")
    asked = serving.expert_asks(decoded, KINDS)
    assert [(one.n, one.k, one.scheme.name) for one in asked] == [
        (1024, 256, "W4A16"), (256, 512, "W4A16"), (1024, 128, "W4A16"), (128, 512, "W4A16"),
        (1024, 256, "FP8_DYNAMIC"), (256, 512, "FP8_DYNAMIC"),
    ]  # fmt: skip
    rows = {"W4A16": "Marlin MoE", "FP8_DYNAMIC": "CUTLASS FP8 MoE"}
    said = reply(*(answer(one.gemm, rows[one.scheme.name]) for one in asked))
    taken = {kind.name: ["vllm-triton-moe-fp8", "vllm-cutlass-moe-fp8", "vllm-marlin-moe"] for kind in KINDS}
    block = engine_block(said, asked, KINDS, taken)
    due = ["vllm-marlin-moe", "vllm-marlin-moe", "vllm-cutlass-moe-fp8"]
    assert block["runs"] == dict(zip([kind.name for kind in KINDS], due, strict=True)) and block["unknown"] == {}
    del taken[KINDS[1].name]
    assert list(engine_block(said, asked, KINDS, taken)["unknown"]) == [KINDS[1].name]


def test_both_gemms_of_experts_are_asked_for_by_the_engines_names() -> None:
    decoded: Any = Decoded(W4, "ct-pack")
    both = serving.expert_asks(decoded, [layer()])
    assert both == [
        Ask("mlp.experts.gate_up_proj", 1024, 256, W4, "ct-pack", 8, 4, 1, 2),
        Ask("mlp.experts.down_proj", 256, 512, W4, "ct-pack", 8, 4, 1, 1),
    ]
    decoded.family_ = FAMILIES["mixtral"]
    leaves = tuple(f"model.layers.0.block_sparse_moe.experts.0.{leaf}" for leaf in ("w1", "w3", "w2"))
    mixtral = replace(layer("block_sparse_moe.experts"), members=(leaves,), tp=2)
    names = ["block_sparse_moe.experts.w13", "block_sparse_moe.experts.w2"]
    assert [(one.gemm, one.tp) for one in serving.expert_asks(decoded, [mixtral])] == [(name, 2) for name in names]
    decoded.family_ = FAMILIES["qwen3_moe"]
    for one in [*both, *serving.expert_asks(decoded, KINDS[1:2])]:
        assert one.expert_sides == (one.k if one.members == 2 else one.n, 512)


INT8 = ["vllm-triton-moe-int8", "vllm-triton-moe-int8-a16"]


@pytest.mark.parametrize("installed", [None, *INT8])
@pytest.mark.parametrize(
    ("version", "due"),
    [
        ("0.25.1", INT8[1]), ("0.25.1+cu129", INT8[1]), ("0.32.9", INT8[1]), ("0.33.0", INT8[0]), ("0.33", INT8[0]),
        ("1.0.0rc1", INT8[0]), ("", None), ("main", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("order", [INT8, INT8[::-1]])
def test_of_int8_experts_the_kernel_is_that_of_the_engines_version(
    version: str, due: str | None, installed: str | None, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM rounds their activations from 0.33 on; one that is installed says itself what it does."""

    def engine_int8() -> str:
        if installed is None:
            raise ImportError("no vLLM")
        return installed

    monkeypatch.setattr(moe_vllm, "engine_int8", engine_int8)
    it = replace(layer(), scheme=preset("W8A8"), layout="ct-int")
    asked = serving.expert_asks(Decoded(W4, "ct-pack"), [it])  # type: ignore[arg-type]
    said = reply(*(answer(one.gemm, "Triton INT8 MoE") for one in asked), version=version)
    due = installed or due
    block = engine_block(said, asked, [it], {"mlp.experts": order})
    assert block["runs"] == ({"mlp.experts": due} if due else {})
    if due is None:
        assert "on int8 or bf16 activations by its version, which is not known" in block["unknown"]["mlp.experts"]
    other = [name for name in INT8 if name != due]
    assert engine_block(said, asked, [it], {"mlp.experts": other[:1]})["runs"] == {}


def test_experts_are_answered_for_by_kernels_for_experts_only() -> None:
    """A dense kernel's name says nothing of experts, nor an expert's of a linear whose name begins alike."""
    block = engine_block(
        reply(answer("mlp.experts.down_proj", "Marlin"), answer("mlp.experts_gate", "Marlin MoE")),
        [ask("mlp.experts.down_proj", experts=8), ask("mlp.experts_gate")],
        [layer()],
        {"mlp.experts": ["marlin", "vllm-marlin-moe"], "mlp.experts_gate": ["marlin", "vllm-marlin-moe"]},
    )
    assert block["runs"] == {} and set(block["unknown"]) == {"mlp.experts", "mlp.experts_gate"}


def test_an_engine_that_cannot_be_asked_is_answered_for_by_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both versions that were read: they agree on FP8, and not on int4."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    asked = [ask("a", scheme=FP8, layout="ct-float")]
    block = engine_block({"error": "vLLM is not installed"}, asked, [], {"a": ["cutlass-fp8"]})
    (choice,) = block["choices"]
    assert block["runs"] == {"a": "cutlass-fp8"} and choice["source"].startswith("table")
    assert (block["engine"], block["version"], block["generation"]) == ("vllm", "", "sm90")
    assert block["error"] == "vLLM is not installed"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (11, 0))
    block = engine_block({"error": "vLLM is not installed"}, asked, [], {"a": ["cutlass-fp8"]})
    assert block["runs"] == {} and "vLLM is not installed" in block["unknown"]["a"] and block["generation"] == ""


def test_the_engines_own_word_on_the_generation_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> tuple[int, int]:
        raise AssertionError("the reply says it")

    monkeypatch.setattr(torch.cuda, "get_device_capability", never)
    block = engine_block({"error": "no", "generation": "sm89"}, [ask("a", scheme=FP8, layout="ct-float")], [], {})
    assert block["generation"] == "sm89" and block["choices"][0]["kernel"]


# repacked weights


def block(version: str = "0.25.1", generation: str = "sm90") -> dict[str, Any]:
    return {"engine": "vllm", "version": version, "generation": generation}


def test_a_repacked_weight_runs_on_what_the_tables_name() -> None:
    assert cure_kernels(block(), TILE_CURE, 4096, 4096, 128) == {"machete"}
    assert cure_kernels(block(generation="sm80"), TILE_CURE, 4096, 4096, 128) == {"marlin"}
    assert cure_kernels(block(generation=""), TILE_CURE, 4096, 4096, 128) == set()


def test_a_shape_that_the_first_kernel_does_not_take_runs_on_the_next() -> None:
    """Machete wants N in 128s; Marlin takes 64."""
    assert any(64 % n for n, _ in TILES["Machete"].sides)
    assert cure_kernels(block(), TILE_CURE, 4096 + 64, 4096, 128) == {"marlin"}
    assert cure_kernels(block("0.33.0"), TILE_CURE, 4096 + 64, 4096, 128) == set()  # Humming, which is not ours
    assert cure_kernels(block(), TILE_CURE, 8, 8, 128) == set()


def test_cures_name_layouts_and_schemes_that_exist() -> None:
    assert cures("ct-pack", "W4A16") == () == cures("torchao-tile", "W4A16")
    for found in CURES.values():
        for cure in found:
            assert choices._layout(cure.layout).name == cure.layout and preset(cure.scheme).name == cure.scheme
            assert set(cure.as_json()) == {"layout", "scheme", "format", "lossless", "note"}
            assert cure.lossless == (cure.note == "")


def test_whole_zeros_are_the_nearest_that_four_bits_hold() -> None:
    """-zero/scale: -1.2, 100, -100, and a group whose scale is 0."""
    scale, zero = torch.tensor([[1.0, 0.1, 0.1, 0.0]]), torch.tensor([[1.25, -10.0, 10.0, 3.0]])
    q = QTensor(
        preset("W4A16_FLOAT_ZERO", 32), torch.zeros(1, 128, dtype=torch.int8), scale.bfloat16(), zero.bfloat16()
    )
    cured = TILE_CURE.convert(q)
    assert cured.zero is not None and cured.zero.tolist() == [[-1, 7, -8, 0]] and cured.zero.dtype == torch.int8


# which kernels a profile takes


class Decoded:
    """Of an artifact no more than is asked: one treatment for all modules, or another for those of a rule."""

    def __init__(self, scheme: Scheme, layout: str, ruled: Sequence[str] = (), config: Mapping[str, Any] | None = None):
        self.own = SimpleNamespace(scheme=scheme, layout=SimpleNamespace(name=layout))
        self.treatments, self.ruled = [self.own], ruled
        self.shapes: list[tuple[str, tuple[int, int]]] = []
        self.artifact = SimpleNamespace(config=lambda: config or {})
        self.family_ = FAMILIES["qwen3_moe"]
        self.zeros: dict[str, float] = {}  # module → the zero of its weights

    def family(self) -> Family:
        return self.family_

    def place(self, module: str) -> int:
        return int(module in self.ruled)

    def treated(self, module: str) -> Any:
        other = SimpleNamespace(scheme=FP8, layout=SimpleNamespace(name="ct-float"))
        return other if module in self.ruled else self.own

    def qtensor(self, module: str) -> QTensor:
        return tile_weight(self.zeros.get(module, 1.5)).q

    def modules(self) -> list[tuple[str, tuple[int, int]]]:
        return self.shapes


def gemm_of(name: str, n: int = 128, k: int = 256, experts: int = 0) -> Gemm:
    return Gemm(name, n, k, 2, (f"model.layers.0.{name}",), experts)


A, B = gemm_of("a"), gemm_of("b", 64)


def choice_of(kernel: Kernel, decoded: Decoded, gemms: Sequence[Gemm] = (A, B), device: str = "cpu") -> choices.Choice:
    return choices._choice(kernel, decoded, gemms, device)  # type: ignore[arg-type]


def kernel_of(**facts: Any) -> Kernel:
    return replace(BF16, name="it", devices=("cpu",), unavailable=lambda: None, **facts)


def narrow(scheme: Scheme, n: int, k: int) -> str | None:
    return f"too narrow: {n}" if n < 128 else None


def test_a_kernel_takes_what_it_does_not_refuse() -> None:
    every, some = (choice_of(kernel_of(reject=r), Decoded(W4, "ct-pack")) for r in (lambda *_: None, narrow))
    assert every.refused == {} and every.takes(A) and every.takes(B)
    assert some.refused == {"b": "too narrow: 64"} and some.unavailable is None
    assert some.takes(A) and not some.takes(B) and some.cure is None


def test_what_refuses_every_gemm_is_unavailable_with_the_first_reason() -> None:
    found = choice_of(kernel_of(reject=narrow), Decoded(W4, "ct-pack"), [B, gemm_of("c", 32)])
    assert found.unavailable == "too narrow: 64" and not found.takes(B)
    assert choice_of(kernel_of(), Decoded(W4, "ct-pack"), []).unavailable == "the artifact has no quantized linear"


def test_the_machine_is_asked_last_and_the_device_first() -> None:
    here = replace(kernel_of(), unavailable=lambda: "no such op")
    found = choice_of(here, Decoded(W4, "ct-pack"))
    assert found.unavailable == "no such op" and not found.takes(A)
    away = choice_of(replace(here, devices=("cuda", "xpu")), Decoded(W4, "ct-pack"))
    assert away.unavailable == "it runs on cuda and xpu; this was measured on cpu" and away.refused == {}


def test_a_kernel_of_the_cures_layout_is_taken_on_the_repacked_weight() -> None:
    reader = kernel_of(reads=("ct-pack",), reject=lambda s, n, k: None if s.name == "W4A16_ASYM" else "another scheme")
    found = choice_of(reader, Decoded(TILE, "torchao-tile"))
    assert found.cure == TILE_CURE and found.unavailable is None and found.takes(B)
    assert found.as_json()["repacked"] == TILE_CURE.as_json() and found.as_json()["unavailable"] is None
    assert "repacked" not in choice_of(kernel_of(), Decoded(TILE, "torchao-tile")).as_json()
    other = choice_of(replace(reader, reads=("gptq",)), Decoded(TILE, "torchao-tile"))
    assert other.cure is None and other.unavailable == "it reads gptq, not torchao-tile"


def test_a_cure_is_for_the_recipes_own_treatment_alone() -> None:
    reader = kernel_of(reads=("ct-pack",), reject=narrow)
    found = choice_of(reader, Decoded(TILE, "torchao-tile", ruled=["model.layers.0.a"]), [A, B, gemm_of("c")])
    assert found.cure == TILE_CURE and found.takes(gemm_of("c"))
    assert found.refused == {"a": "a rule of the recipe gives it another layout", "b": "too narrow: 64"}


def test_a_gemm_whose_weight_would_lose_more_than_the_cure_says_is_refused() -> None:
    """Weights from 6 to 13.5 in steps of 0.5: their whole zero would be −20. Every member of a merged GEMM counts."""
    reader, decoded = kernel_of(reads=("ct-pack",)), Decoded(TILE, "torchao-tile")
    merged = replace(A, members=("model.layers.0.q", "model.layers.0.k"))
    decoded.zeros = {"model.layers.0.k": 10.0}
    found = choice_of(reader, decoded, [merged, B])
    assert found.cure == TILE_CURE and found.takes(B) and not found.takes(merged) and list(found.refused) == ["a"]
    assert "repacked as pack-quantized, no code stands for the zeros of 256 of 256 groups" in found.refused["a"]
    alone = choice_of(reader, decoded, [merged])
    assert alone.unavailable == found.refused["a"] and not alone.takes(merged)
    assert choice_of(reader, Decoded(TILE, "torchao-tile"), [merged, B]).refused == {}


def test_a_cure_that_takes_nothing_leaves_the_first_reason() -> None:
    reader = kernel_of(reads=("ct-pack",), reject=narrow)
    found = choice_of(reader, Decoded(TILE, "torchao-tile"), [B])
    assert found.cure is None and found.unavailable == "it reads ct-pack, not torchao-tile"
    found = choice_of(replace(reader, unavailable=lambda: "no op"), Decoded(TILE, "torchao-tile"))
    assert found.cure is None and found.unavailable == "it reads ct-pack, not torchao-tile"


def tile_weight(of: float = 1.5) -> Weight:
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(128, 16)
    scale, zero = torch.full((128, 2), 0.5).bfloat16(), torch.full((128, 2), of).bfloat16()
    return Weight(QTensor(TILE, codes, scale, zero), {}, "torchao-tile")


def test_the_weight_is_repacked_only_for_a_cure() -> None:
    own = tile_weight()
    assert choices.Choice(BF16, None, {}).weight(own) is own
    cured = choices.Choice(BF16, None, {}, TILE_CURE).weight(own)
    assert cured.layout == "ct-pack" and cured.q.scheme.name == "W4A16_ASYM" and "weight_packed" in cured.packed
    assert cured.q.zero is not None and set(cured.q.zero.flatten().tolist()) == {-3}


def test_those_that_are_asked_for_each_once_and_never_the_baseline() -> None:
    decoded: Any = Decoded(W4, "ct-pack")
    named = choices.choose(["marlin", "bf16", "marlin", "torch-int4"], decoded, [A], "cpu")
    assert [choice.kernel.name for choice in named] == ["marlin", "torch-int4"]
    assert {choice.kernel.name for choice in choices.choose(None, decoded, [A], "cpu")} == set(KERNELS) - {"bf16"}
    assert choices.choose([], decoded, [A], "cpu") == []


# the work


def work_of(decoded: Decoded, taken: Sequence[choices.Choice], layers: Sequence[ExpertLayer] = ()) -> Work:
    grouped = [MoeChoice(replace(LOOP, name=name), why, refused) for name, why, refused in (
        ("one", None, {}), ("two", None, {"mlp.experts": "no"}), ("three", "not here", {}))]  # fmt: skip
    return Work(decoded, [A, B], [*layers], [*taken], grouped if layers else [], "cuda", 1)  # type: ignore[arg-type]


def taken_by() -> list[choices.Choice]:
    return [
        choices.Choice(replace(BF16, name="all"), None, {}),
        choices.Choice(replace(BF16, name="wide"), None, {"b": "too narrow"}),
        choices.Choice(replace(BF16, name="cured"), None, {}, TILE_CURE),
        choices.Choice(replace(BF16, name="none"), "not here", {}),
    ]


def test_what_was_measured_on_the_artifacts_own_layout() -> None:
    it = work_of(Decoded(W4, "ct-pack"), taken_by(), [layer(), layer("other.experts")])
    assert it.taken() == {"a": ["all", "wide"], "b": ["all"], "mlp.experts": ["one"], "other.experts": ["one", "two"]}
    assert it.series() == (2 + 1 + 2 + 0) + (1 + 2 + 0)
    assert [choice.kernel.name for choice in it.asked()] == ["all", "wide", "cured", "none", "one", "two", "three"]


def test_entries_say_shape_and_scheme_of_linears_and_experts() -> None:
    it = work_of(Decoded(W4, "ct-pack", ruled=["model.layers.0.b"]), [], [layer()])
    one, two, grouped = it.entries()
    assert one == {"name": "a", "n": 128, "k": 256, "count": 2, "scheme": "W4A16", "group": 128, "layout": "ct-pack"}
    assert (two["scheme"], two["group"], two["layout"]) == ("FP8_DYNAMIC", FP8.group_size, "ct-float")
    assert (grouped["name"], grouped["n"], grouped["k"], grouped["scheme"]) == ("mlp.experts", 1024, 256, "W4A16")
    assert (grouped["experts"], grouped["top_k"], grouped["intermediate"]) == (8, 4, 512)


def test_the_bits_of_all_weights_and_what_most_are_multiplied_in() -> None:
    decoded = Decoded(W4, "ct-pack", ruled=["x"])
    decoded.shapes = [("x", (256, 256)), ("y", (128, 256)), ("z", (128, 128))]
    it = work_of(decoded, [])
    int4, fp8 = 4 + 16 / 128, 8 + 16 / 256
    bits = (256 * 256 * fp8 + (128 * 256 + 128 * 128) * int4) / (256 * 256 + 128 * 256 + 128 * 128)
    assert it.facts() == {"bits": round(bits, 4), "computes_in": "fp8"}
    decoded.shapes.append(("w", (1024, 1024)))
    assert it.facts()["computes_in"] == "bf16"
    decoded.shapes = []
    assert it.facts() == {}


def test_the_selector_is_asked_for_every_gemm_and_for_both_of_experts() -> None:
    decoded = Decoded(W4, "ct-pack", config={"num_experts_per_tok": 4})
    asked = work._asks(work_of(decoded, [], [layer()]))
    assert [(one.gemm, one.experts, one.top_k) for one in asked] == [
        ("a", 0, 0), ("b", 0, 0), ("mlp.experts.gate_up_proj", 8, 4), ("mlp.experts.down_proj", 8, 4),
    ]  # fmt: skip
    assert asked[1] == Ask("b", 64, 256, W4, "ct-pack", tp=1, members=1)
    assert [one.gemm for one in work._asks(work_of(decoded, []))] == ["a", "b"]
    merged = replace(A, members=("q", "k", "v"))
    assert serving.asks(decoded, [merged], 2)[0] == Ask("a", 128, 256, W4, "ct-pack", tp=2, members=3)  # type: ignore[arg-type]


def test_the_kernels_of_repacked_weights_stand_in_the_engines_block() -> None:
    decoded, said = Decoded(TILE, "torchao-tile"), reply(answer("a", "tinygemm"), answer("b", "tinygemm"))
    asked = [ask("a", scheme=TILE), ask("b", scheme=TILE)]
    own = choices.Choice(replace(BF16, name="tinygemm"), None, {})
    assert work._engine(work_of(decoded, [own]), said, asked)["repacked"] == []
    found = work._engine(work_of(decoded, [own, *taken_by()]), said, asked)
    assert found["repacked"] == ["machete", "marlin"]  # N = 128, and N = 64
    assert found["runs"] == {"a": "tinygemm", "b": "tinygemm"}


def test_progress_counts_to_the_end() -> None:
    said = list[tuple[int, int]]()
    step = work._counter(2, lambda done, total: said.append((done, total)))
    step()
    step()
    assert said == [(1, 2), (2, 2)]


def test_kernels_for_experts_are_no_kernels_of_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[Any]()
    decoded: Any = Decoded(W4, "ct-pack")

    def chosen(*given: Any) -> list[Any]:
        asked.append(given)
        return []

    monkeypatch.setattr(work, "Decoder", lambda artifact: decoded)
    monkeypatch.setattr(work, "engine_gemms", lambda *_: [A, gemm_of("mlp.experts.down_proj", experts=8)])
    monkeypatch.setattr(work, "expert_layers", lambda *_: [layer()])
    monkeypatch.setattr(work, "choose", lambda names, decoder, gemms, device: chosen(names, list(gemms)))
    monkeypatch.setattr(work, "choose_moe", lambda layers, device, names: chosen(names, layers))
    names = ["marlin", "vllm-marlin-moe"]
    it = work.make_work(None, names, "cuda", 2)  # type: ignore[arg-type]
    assert asked == [(["marlin"], [A]), (names, [layer()])] and it.gemms == [A] and it.tp == 2
    asked.clear()
    on_cpu = work.make_work(None, None, "cpu", 1)  # type: ignore[arg-type]
    assert asked == [(None, on_cpu.gemms), (None, [])] and len(on_cpu.gemms) == 2 and on_cpu.layers == []


def test_every_gemm_is_measured_and_the_profiler_comes_after_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cured` is given the repacked weight; a GEMM that a kernel refuses is not prepared for it."""
    seen, budgets, progress = list[Any](), list[Any](), list[tuple[int, int]]()

    class Prepared:
        def __init__(self, name: str, baseline: Any, taken: Sequence[Any], bench: Any) -> None:
            self.name = name
            seen.append((name, baseline.kernel.name, [(one.kernel.name, one.weight) for one in taken], bench))

        def numerics(self) -> list[dict[str, Any]]:
            return [{"gemm": self.name}]

        def symbols(self, m: int, only: set[str]) -> list[Any]:
            seen.append((m, sorted(only)))
            return [(self.name, m)]

    def measured(it: Prepared, batch: Sequence[int], budget: Any, step: Any) -> Any:
        budgets.append(budget)
        step()
        return it.name, batch

    def experts(*given: Any) -> Any:
        seen.append((given[1].name, len(given[2])))
        return Measured(symbols=["of experts"]), [{"gemm": "experts"}]  # type: ignore[list-item]

    monkeypatch.setattr(choices.Choice, "weight", lambda self, own: (own, self.cure is not None))
    for name, stand_in in {
        "CudaGemm": Prepared, "measure_cuda": measured, "measure_experts": experts, "gpu_bench": lambda: "bench",
        "own_weight": lambda decoder, gemm, device, tp: f"{gemm.name} on {device}",
    }.items():  # fmt: skip
        monkeypatch.setattr(work, name, stand_in)
    it = work_of(Decoded(W4, "ct-pack"), taken_by(), [layer()])
    settings = {"m": [1, 4, 16], "budget_seconds": 40.0}
    found = work._gemms_on_cuda(it, settings, lambda done, total: progress.append((done, total)))
    a = [(name, ("a on cuda", name == "cured")) for name in ("all", "wide", "cured")]
    b = [(name, ("b on cuda", name == "cured")) for name in ("all", "cured")]
    wide, rest = ["wide"], ["all", "bf16", "cured"]  # the profiler looks at a kernel where it is met last
    last = [("b", "bf16", b, "bench"), (1, rest), (256, rest)]
    assert seen == [("a", "bf16", a, "bench"), (1, wide), (256, wide), *last, ("mlp.experts", 3)]
    results: Any = found.results
    assert {name: results[name] for name in "ab"} == {"a": ("a", [1, 4, 16]), "b": ("b", [1, 4, 16])}
    assert found.numerics == [{"gemm": "a"}, {"gemm": "b"}, {"gemm": "experts"}]
    assert found.more == {"symbols": [("a", 1), ("a", 256), ("b", 1), ("b", 256), "of experts"]}
    assert (budgets[0].seconds, budgets[0].series) == (40.0, 3) and budgets[0] is budgets[1]
    assert progress == [(1, 6 * 3), (2, 6 * 3)]


def test_a_gemm_that_finds_no_memory_is_listed_with_all_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weight, a repacked copy or the baseline: the others are measured, and a wrong kernel is still an error."""

    def own_weight(decoder: Any, gemm: Gemm, device: str, tp: int) -> str:
        if gemm.name == "b":
            raise torch.OutOfMemoryError("CUDA out of memory\nand advice")
        return gemm.name

    def gemm(name: str, *_: Any) -> Any:
        if wrong:
            raise GateError("kernel all computes a wrong")
        return SimpleNamespace(name=name, numerics=lambda: [name], symbols=lambda m, only: [m])

    wrong, progress, budgets = False, list[int](), list[int]()
    monkeypatch.setattr(choices.Choice, "weight", lambda self, own: own)
    for name, stand_in in {
        "CudaGemm": gemm, "own_weight": own_weight, "gpu_bench": lambda: None,
        "measure_cuda": lambda it, batch, budget, step: budgets.append(budget.series) or it.name,
    }.items():  # fmt: skip
        monkeypatch.setattr(work, name, stand_in)
    it = replace(work_of(Decoded(W4, "ct-pack"), taken_by()), gemms=[B, A])
    settings = {"m": [1, 4], "budget_seconds": 40.0}
    found = work._gemms_on_cuda(it, settings, lambda done, total: progress.append(done))
    reason = "the op failed: CUDA out of memory"
    assert found.results["b"].missing == [(name, m, reason) for name in ("all", "cured") for m in (1, 4)]
    assert found.results["a"] == "a" and found.numerics == ["a"] and found.more == {"symbols": [1, 256]}
    assert progress == [1, 2, 3, 4] and budgets == [1]
    wrong = True
    with pytest.raises(GateError):
        work._gemms_on_cuda(it, settings, lambda done, total: None)


class Asking:
    def __init__(self, said: dict[str, Any]) -> None:
        self.said, self.stopped = said, 0

    def wait(self) -> dict[str, Any]:
        return self.said

    def stop(self) -> None:
        self.stopped += 1


@pytest.mark.parametrize("fails", [False, True])
def test_the_selector_is_asked_meanwhile_and_always_ended(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asking = Asking(reply(answer("a", "Machete"), answer("b", "Machete")))
    requests = list[Any]()

    def started(python: str | None, request: Any) -> Asking:
        requests.append((python, request))
        return asking

    monkeypatch.setattr(work, "start", started)

    def measured(*_: Any) -> work.Outcome:
        assert len(requests) == 1
        if fails:
            raise InputError("the artifact")
        return work.Outcome()

    monkeypatch.setattr(work, "_gemms_on_cuda", measured)
    monkeypatch.setattr(work, "_around", lambda it: {"rest": {}})
    it = work_of(Decoded(W4, "ct-pack", config={"model_type": "llama"}), taken_by())
    if fails:
        with pytest.raises(InputError):
            work.on_cuda(it, {}, lambda done, total: None)
    else:
        found = work.on_cuda(it, {}, lambda done, total: None).more
        assert found["around"] == {"rest": {}} and set(found["engine"]["unknown"]) == {"a", "b"}
    ((python, request),) = requests
    assert python is None and request["config"] == {"model_type": "llama"}
    assert [one["gemm"] for one in request["asks"]] == ["a", "b"] and asking.stopped == 1


@pytest.mark.parametrize("error", [InputError("no such layers"), RuntimeError("out of\n memory " + "x" * 400)])
def test_what_could_not_be_measured_beside_says_why(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> dict[str, Any]:
        raise error

    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    it = work_of(Decoded(W4, "ct-pack", config=config | {"vocab_size": 9, "num_hidden_layers": 1}), [])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=141 * 10**9))
    monkeypatch.setattr(work, "around", lambda model, limits: {"said": (model.hidden, limits.batched)})
    assert work._around(it) == {"said": (64, 16384)}
    monkeypatch.setattr(work, "around", fail)
    said = work._around(it)["not_measured"]
    assert said.startswith(("no such layers", "out of memory x")) and len(said) <= 200
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA T4")
    assert work._around(it) == {"not_measured": "NVIDIA T4 is not in the table of GPUs"}


# what one of several GPUs holds


def test_a_cut_of_blocks_takes_their_scales_along() -> None:
    """FP8 in blocks of 128 × 128, 256 by 384."""
    codes = torch.arange(256 * 384).remainder(100).reshape(256, 384).float().to(torch.float8_e4m3fn)
    q = QTensor(preset("FP8_BLOCK"), codes, torch.arange(6.0).reshape(2, 3))
    rows, columns = share(q, "out", 2), share(q, "in", 3)
    assert torch.equal(rows.codes_NK.float(), codes[:128].float()) and rows.scale.tolist() == [[0, 1, 2]]
    assert torch.equal(columns.codes_NK.float(), codes[:, :128].float()) and columns.scale.tolist() == [[0], [3]]
    assert share(q, None, 2) is q and share(q, "in", 1) is q
    with pytest.raises(InputError, match="192 in_features on each of 2 GPUs are no whole blocks of 128"):
        share(q, "in", 2, "o_proj")
    with pytest.raises(InputError, match="cannot be shared by 5 GPUs"):
        share(q, "out", 5, "o_proj")


def test_a_scale_of_whole_rows_stays_where_columns_are_cut() -> None:
    codes = torch.ones(8, 64).to(torch.float8_e4m3fn)
    q = QTensor(FP8, codes, torch.arange(8.0).reshape(8, 1))
    assert share(q, "in", 2).scale.tolist() == q.scale.tolist() and share(q, "in", 2).shape == (8, 32)
    assert share(q, "out", 4).scale.tolist() == [[0], [1]] and share(q, "out", 4).codes_NK.is_contiguous()


def test_zeros_are_cut_like_scales() -> None:
    q = tile_weight().q
    cut = share(q, "in", 2)
    assert cut.zero is not None and cut.zero.shape == cut.scale.shape == (128, 1) and cut.shape == (128, 128)
