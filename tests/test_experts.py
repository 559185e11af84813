"""Experts of small MoE checkpoints as engines stack them, kernels for them by hand, and planted faults."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_artifact
from safetensors.torch import save_file

from quantpub.artifact import Artifact
from quantpub.decode import Decoder
from quantpub.errors import GateError, InputError
from quantpub.experts import ExpertLayer, ExpertWeights, assemble, expert_layers, load
from quantpub.kernels.base import Operands
from quantpub.kernels.moe import MOE_BASELINES, MOE_KERNELS, baseline
from quantpub.kernels.moe_base import MoeKernel, dense
from quantpub.kernels.moe_check import (
    MoeProbe,
    check_moe,
    make_probes,
    moe_error,
    reference,
    route,
    tolerance,
    touched,
    traffic,
)
from quantpub.kernels.moe_torch import GROUPED, LOOP
from quantpub.kernels.moe_vllm import CUTLASS_FP8, TRITON_BF16, TRITON_FP8, TRITON_INT8
from quantpub.kernels.moe_vllm_marlin import MARLIN, MARLIN_FP4
from quantpub.qtensor import QTensor, dequantize
from quantpub.registry import load as load_entry
from quantpub.scheme import PRESETS, Scheme, WeightFormat, preset

E, T, K, W = 6, 2, 128, 256  # experts, of a token, hidden, width of an expert
QWEN = ("qwen3_moe", "mlp.experts", ("gate_proj", "up_proj", "down_proj"))
MIXTRAL = ("mixtral", "block_sparse_moe.experts", ("w1", "w3", "w2"))
missing = GROUPED.unavailable()


def save(folder: Path, family: tuple[str, str, tuple[str, ...]] = QWEN, layers: int = 2, odd: bool = False) -> Path:
    """Layers of random experts and nothing else; odd: another intermediate size in the last."""
    model, at, (gate, up, down) = family
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(layers):
        inner = 2 * W if odd and layer == layers - 1 else W
        for e in range(E):
            for name, shape in ((gate, (inner, K)), (up, (inner, K)), (down, (K, inner))):
                w_NK = torch.randn(shape, generator=generator) * shape[1] ** -0.5
                tensors[f"model.layers.{layer}.{at}.{e}.{name}.weight"] = w_NK.bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": model, "num_experts_per_tok": T}))
    return folder


def decoded(folder: Path, recipe: str = "w4a16-rtn", layout: str | None = None) -> Decoder:
    return Decoder(Artifact.open(make_artifact(folder, recipe, folder.parent / f"{folder.name}-{recipe}", layout)))


def plain(i: int = 32, k: int = 16, experts: int = 4, top_k: int = 2) -> ExpertWeights:
    """Experts of integer codes by one scale of ½, so that bf16 holds every weight."""
    scheme = Scheme("W8", WeightFormat("int8", (-1, -1)))
    generator = torch.Generator().manual_seed(3)

    def q(n: int, columns: int) -> tuple[QTensor, dict[str, torch.Tensor]]:
        codes = torch.randint(-8, 8, (n, columns), generator=generator, dtype=torch.int8)
        return QTensor(scheme, codes, torch.tensor([[0.5 / columns**0.5]])), {"weight": codes}

    layer = ExpertLayer("mlp.experts", experts, top_k, k, i, scheme, "none", ())
    return assemble(layer, [[q(i, k), q(i, k), q(k, i)] for _ in range(experts)])


def altered(run: Callable[..., torch.Tensor], **how: object) -> MoeKernel:
    return replace(LOOP, name="planted", run=run, **how)


@pytest.mark.parametrize("family", [QWEN, MIXTRAL], ids=lambda family: family[0])
def test_layers_of_one_shape_are_one_entry_and_gate_comes_before_up(
    family: tuple[str, str, tuple[str, ...]], tmp_path: Path
) -> None:
    decoder = decoded(save(tmp_path / "m", family))
    (layer,) = expert_layers(decoder.artifact, decoder)
    assert layer.as_json() == {
        "name": family[1], "experts": E, "top_k": T, "hidden": K, "intermediate": W, "count": 2
    }  # fmt: skip
    assert (layer.scheme, layer.layout) == (preset("W4A16"), "ct-pack")
    assert layer.members[4] == tuple(f"model.layers.0.{family[1]}.4.{leaf}" for leaf in family[2])


def test_a_layer_of_another_shape_is_an_entry_of_its_own(tmp_path: Path) -> None:
    decoder = decoded(save(tmp_path / "m", layers=3, odd=True))
    layers = expert_layers(decoder.artifact, decoder)
    assert [(layer.intermediate, layer.count) for layer in layers] == [(W, 2), (2 * W, 1)]
    assert [layer.name for layer in layers] == [f"mlp.experts 6×{i}×128 W4A16" for i in (256, 512)]
    assert layers[1].members[0][0] == "model.layers.2.mlp.experts.0.gate_proj"


def test_weights_are_the_artifacts_own_bytes_stacked(tmp_path: Path) -> None:
    decoder = decoded(save(tmp_path / "m"))
    (layer,) = expert_layers(decoder.artifact, decoder)
    weights = load(decoder, layer)
    gate, up, down = (decoder.packed(member) for member in layer.members[3])
    assert torch.equal(weights.packed13["weight_packed"][3, 0], gate["weight_packed"])
    assert torch.equal(weights.packed13["weight_scale"][3, 1], up["weight_scale"])
    assert torch.equal(weights.packed2["weight_packed"][3], down["weight_packed"])
    w13, w2 = dense(weights)
    assert w13.shape == (E, 2 * W, K) and w2.shape == (E, K, W)
    for e, (gate_name, up_name, down_name) in enumerate(layer.members):
        both = torch.cat([dequantize(decoder.qtensor(gate_name)), dequantize(decoder.qtensor(up_name))])
        assert torch.equal(w13[e], both.bfloat16())
        assert torch.equal(w2[e], dequantize(decoder.qtensor(down_name)).bfloat16())


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [("fp8-dynamic", None), ("int8-dynamic", None), ("nvfp4a16", "ct-nvfp4"), ("nvfp4a16", "modelopt-nvfp4")],
)
def test_other_formats_stack_too(recipe: str, layout: str | None, tmp_path: Path) -> None:
    decoder = decoded(save(tmp_path / "m", layers=1), recipe, layout)
    (layer,) = expert_layers(decoder.artifact, decoder)
    weights = load(decoder, layer)
    packed = decoder.packed(layer.members[5][1])
    for suffix, tensor in packed.items():
        stacked = weights.packed13[suffix]
        assert stacked.dtype == tensor.dtype and stacked.shape == (E, 2, *tensor.shape)
        assert stacked[5, 1].tolist() == tensor.tolist()
    for kernel in (LOOP, GROUPED) if missing is None else (LOOP,):
        check_moe(kernel, "experts", kernel.prepare(weights), make_probes(weights), 61)


def test_a_gpu_of_two_has_half_of_every_expert(tmp_path: Path) -> None:
    decoder = decoded(save(tmp_path / "m"))
    (layer,) = expert_layers(decoder.artifact, decoder, tp=2)
    assert (layer.intermediate, layer.tp, layer.as_json()["tp"]) == (W // 2, 2, 2)
    w13, w2 = dense(load(decoder, layer))
    gate, up, down = (dequantize(decoder.qtensor(member)).bfloat16() for member in layer.members[1])
    assert torch.equal(w13[1], torch.cat([gate[: W // 2], up[: W // 2]])) and torch.equal(w2[1], down[:, : W // 2])
    with pytest.raises(InputError, match="cannot be shared by 3"):
        expert_layers(decoder.artifact, decoder, tp=3)


@pytest.mark.parametrize("gone", ["1.up_proj", "2"])
def test_experts_that_are_not_alike_are_an_error(gone: str, tmp_path: Path) -> None:
    """No plan of today makes them: a line of it is taken away."""
    decoder = decoded(save(tmp_path / "m", layers=1))
    for name in [name for name in decoder._modules if f".experts.{gone}" in name]:
        del decoder._modules[name]
    with pytest.raises(InputError, match="not all of one shape"):
        expert_layers(decoder.artifact, decoder)


def test_experts_of_unknown_linears_are_an_error(tmp_path: Path) -> None:
    decoder = decoded(save(tmp_path / "m", layers=1))
    for name in [name for name in decoder._modules if name.endswith("up_proj")]:
        del decoder._modules[name]
    with pytest.raises(InputError, match="holds down_proj, gate_proj, which are no gate, up and down of qwen-moe"):
        expert_layers(decoder.artifact, decoder)


def test_a_config_without_top_k_is_an_error(tmp_path: Path) -> None:
    decoder = decoded(save(tmp_path / "m", layers=1))
    config = decoder.artifact.path / "config.json"
    config.write_text(
        json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "num_experts_per_tok"})
    )
    with pytest.raises(InputError, match="lacks num_experts_per_tok"):
        expert_layers(decoder.artifact, decoder)


def test_a_dense_model_has_no_experts(artifact: Path) -> None:
    decoder = Decoder(Artifact.open(artifact))
    assert expert_layers(decoder.artifact, decoder) == []


def test_two_tokens_and_two_experts_by_hand() -> None:
    """Identity gates and ups: h = silu(x)·x, then expert 0 adds it once and expert 1 takes it twice."""
    one = torch.eye(8)
    operands = (torch.stack([torch.cat([one, one])] * 2).bfloat16(), torch.stack([one, 2 * one]).bfloat16())
    x = torch.zeros(2, 8)
    x[0, 0], x[1, 3] = 2.0, -1.0
    weights, ids = torch.tensor([[0.75, 0.25], [1.0, 0.0]]), torch.tensor([[1, 0], [0, 1]], dtype=torch.int32)
    y = LOOP.run(x.bfloat16(), weights, ids, operands).float()
    silu = [v / (1 + math.exp(-v)) for v in (2.0, -1.0)]
    due = torch.zeros(2, 8)
    due[0, 0], due[1, 3] = 2.0 * silu[0] * (0.75 * 2 + 0.25), -1.0 * silu[1]
    assert torch.allclose(y, due, rtol=2**-6, atol=0)


def test_the_reference_is_what_a_loop_over_tokens_gives_in_float64() -> None:
    weights = plain()
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    shares, ids = route(torch.randn(5, 4, generator=torch.Generator().manual_seed(2)), 2)
    due = torch.zeros(5, 16, dtype=torch.float64)
    for token in range(5):
        for share_, e in zip(shares[token], ids[token].tolist(), strict=True):
            g, u, d = (dequantize(part[e]).double() for part in (weights.gate, weights.up, weights.down))
            gate = g @ x[token].double()
            due[token] += share_.double() * (d @ (gate * torch.sigmoid(gate) * (u @ x[token].double())))
    assert torch.allclose(reference(weights, x, shares, ids)[0].double(), due, rtol=1e-4, atol=1e-6)


def test_routing_is_of_distinct_experts_and_sums_to_one() -> None:
    shares, ids = route(torch.tensor([[0.0, math.log(3.0), -9.0, math.log(1.0 + 1e-6)]]), 2)
    assert ids.tolist() == [[1, 3]] and ids.dtype == torch.int32
    assert torch.allclose(shares, torch.tensor([[0.75, 0.25]]), atol=1e-5)


def test_probes_meet_every_expert_and_leave_some_out() -> None:
    routed, skewed, each = make_probes(plain(experts=8, top_k=3))
    assert [probe.routing for probe in (routed, skewed, each)] == ["routed", "skewed", "each"]
    assert set(routed.ids_PT.flatten().tolist()) == set(range(8))
    assert set(skewed.ids_PT.flatten().tolist()) == set(range(6)) and (skewed.ids_PT[:, 0] == 4).float().mean() > 0.9
    assert each.ids_PT[:, 0].tolist() == [p % 8 for p in range(61)] and each.weights_PT.sum(0).tolist() == [61, 0, 0]
    assert len(make_probes(plain(experts=100))[2].ids_PT) == 100
    for probe in (routed, skewed, each):
        assert all(len(set(row)) == 3 for row in probe.ids_PT.tolist())


def test_every_batch_that_is_timed_is_routed_anew() -> None:
    layer = plain(experts=8, top_k=2).layer
    batches = traffic(layer, 3, 5, torch.device("cpu"))
    assert len({tuple(ids.flatten().tolist()) for _, _, ids in batches}) == 5
    assert all(x.shape == (3, 16) and x.dtype == torch.bfloat16 and w.shape == (3, 2) for x, w, _ in batches)
    operands = (torch.zeros(100, dtype=torch.int32), torch.zeros(400, dtype=torch.uint8))
    assert [touched(layer, operands, m) for m in (1, 2, 10**6)] == [200, 350, 800]


KERNELS = [LOOP, pytest.param(GROUPED, marks=pytest.mark.skipif(missing is not None, reason=str(missing)))]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("m", [1, 2, 7, 61, 200])
def test_kernels_compute_what_the_experts_mean(kernel: MoeKernel, m: int) -> None:
    weights = plain()
    assert 0 < check_moe(kernel, "experts", kernel.prepare(weights), make_probes(weights), m) < 0.8


@pytest.mark.parametrize("top_k", [1, 4])
def test_one_expert_of_a_token_and_all(top_k: int) -> None:
    weights = plain(top_k=top_k)
    check_moe(LOOP, "experts", LOOP.prepare(weights), make_probes(weights), 61)


def gate_and_up_swapped(operands: Operands) -> Operands:
    return operands[0].roll(operands[0].shape[1] // 2, 1), operands[1]


def two_experts_swapped(operands: Operands) -> Operands:
    order = torch.tensor([0, 1, 3, 2])
    return operands[0][order], operands[1][order]


def down_of_the_next(operands: Operands) -> Operands:
    return operands[0], operands[1].roll(1, 0)


def one_expert_a_tenth_off(operands: Operands) -> Operands:
    w2 = operands[1].clone()
    w2[2] *= 1.1
    return operands[0], w2


def one_row_of_one_expert(operands: Operands) -> Operands:
    w2 = operands[1].clone()
    w2[1, 5] *= 1.25
    return operands[0], w2


@pytest.mark.parametrize(
    "fault",
    [gate_and_up_swapped, two_experts_swapped, down_of_the_next, one_expert_a_tenth_off, one_row_of_one_expert],
    ids=lambda fault: fault.__name__,
)
def test_wrong_weights_are_found(fault: Callable[[Operands], Operands]) -> None:
    weights = plain()
    with pytest.raises(GateError, match="computes experts wrong"):
        check_moe(LOOP, "experts", fault(LOOP.prepare(weights)), make_probes(weights), 61)


Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Operands], torch.Tensor]
FAULTS: dict[str, Run] = {
    "weights of the other slot": lambda x, w, ids, o: LOOP.run(x, w.flip(-1), ids, o),
    "all weights alike": lambda x, w, ids, o: LOOP.run(x, torch.full_like(w, 0.5), ids, o),
    "not renormalised": lambda x, w, ids, o: LOOP.run(x, w * 0.9, ids, o),
    "no weights": lambda x, w, ids, o: LOOP.run(x, torch.ones_like(w), ids, o),
    "ids of the token before": lambda x, w, ids, o: LOOP.run(x, w, ids.roll(1, 0), o),
    "the last expert left out": lambda x, w, ids, o: LOOP.run(x, w.mul(ids != 3), ids, o),
    "not a number": lambda x, w, ids, o: LOOP.run(x, w, ids, o) * torch.nan,
    "transposed": lambda x, w, ids, o: LOOP.run(x, w, ids, o)[:, :8],
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_kernel_is_found(name: str) -> None:
    weights = plain()
    with pytest.raises(GateError, match="computes experts wrong"):
        check_moe(altered(FAULTS[name]), "experts", LOOP.prepare(weights), make_probes(weights), 61)


@pytest.mark.parametrize("stale", ["answer", "routing", "activations"])
def test_a_kernel_that_keeps_something_of_its_first_call_is_found(stale: str) -> None:
    kept: dict[int, tuple[torch.Tensor, ...]] = {}

    def run(x: torch.Tensor, w: torch.Tensor, ids: torch.Tensor, operands: Operands) -> torch.Tensor:
        old_x, old_ids = kept.setdefault(len(x), (x, ids, w))[:2]
        old_w = kept[len(x)][2]
        given = {"answer": (old_x, old_w, old_ids), "routing": (x, w, old_ids), "activations": (old_x, w, ids)}[stale]
        return LOOP.run(*given, operands)

    weights = plain()
    with pytest.raises(GateError):
        check_moe(altered(run), "experts", LOOP.prepare(weights), make_probes(weights)[:1], 61)


def rounded(x: torch.Tensor, num: str) -> torch.Tensor:
    """Activations quantized and back, one scale a row."""
    amax = x.float().abs().amax(-1, keepdim=True)
    if num == "int8":
        return (x.float() / (amax / 127)).round() * (amax / 127)
    return (x.float() / (amax / 448)).to(torch.float8_e4m3fn).float() * (amax / 448)


@pytest.mark.parametrize("num", ["int8", "fp8_e4m3"])
def test_the_tolerance_fits_kernels_that_quantize_their_activations(num: str) -> None:
    """Written out for every token; its error lies within the tolerance of its formats, and outside that of bf16."""
    weights = plain(i=256, k=128)

    def run(x: torch.Tensor, w: torch.Tensor, ids: torch.Tensor, operands: Operands) -> torch.Tensor:
        w13, w2 = (part.float() for part in operands)
        both = torch.einsum("mk,mtnk->mtn", rounded(x, num), w13[ids.long()])
        h = torch.nn.functional.silu(both[..., :256]) * both[..., 256:]
        return torch.einsum("mti,mtki,mt->mk", rounded(h, num), w2[ids.long()], w).bfloat16()

    probes = make_probes(weights)
    used = check_moe(altered(run, acts=(num, num)), "experts", LOOP.prepare(weights), probes, 61)
    assert 0.2 < used < 0.9
    with pytest.raises(GateError):
        check_moe(altered(run), "experts", LOOP.prepare(weights), probes, 61)


def test_the_tolerance_by_hand() -> None:
    """bf16 and two experts: w13 2·(1 + 1.034²), silu·up 2, w2 2, one addition, all in squares of 2⁻⁸."""
    probe = make_probes(plain())[0]
    assert tolerance(LOOP, probe) == pytest.approx(2**-8 * math.sqrt(2 * (1 + 1.034**2) + 2 + 2 + 1))
    eight = replace(LOOP, acts=("int8", "fp8_e4m3"))
    still: MoeProbe = replace(probe, peaks=(2.54, 99.0))
    assert tolerance(eight, still) == pytest.approx(
        math.sqrt((1 + 1.034**2) * (0.01**2 + 2 * 2**-16) + 2**-8 + 5 * 2**-16), rel=1e-6
    )


def test_one_expert_among_many_is_seen() -> None:
    """One of 64 is a tenth off: the whole is not, its own tokens are."""
    expected, y = torch.ones(64, 32), torch.ones(64, 32)
    y[7] *= 1.1
    ids = torch.arange(64)[:, None]
    assert moe_error(y, expected, torch.ones(64, 1), ids) == pytest.approx(0.1, rel=1e-4)
    assert float((y - expected).norm() / expected.norm()) < 0.013


def test_the_registry_and_the_kernels_agree() -> None:
    for name in MOE_KERNELS:
        assert load_entry(MOE_KERNELS, "MoE kernel", name).name == name
    assert {name for names in MOE_BASELINES.values() for name in names} <= set(MOE_KERNELS)
    assert baseline("cpu") == (LOOP, "")


def layer_of(scheme: str, layout: str, hidden: int = 2048, inner: int = 768) -> ExpertLayer:
    return ExpertLayer("mlp.experts", 128, 8, hidden, inner, PRESETS[scheme], layout, ())


TAKES = {
    ("W4A16", "ct-pack"): {MARLIN},
    ("W4A16_ASYM", "ct-pack"): {MARLIN},
    ("W8A16", "ct-pack"): {MARLIN},
    ("W4A16", "gptq"): set(),
    ("FP8_DYNAMIC", "ct-float"): {TRITON_FP8, CUTLASS_FP8},
    ("FP8", "ct-float"): set(),
    ("FP8_BLOCK", "ct-float"): set(),
    ("W8A8", "ct-int"): {TRITON_INT8},
    ("NVFP4A16", "ct-nvfp4"): {MARLIN_FP4},
    ("NVFP4A16", "modelopt-nvfp4"): {MARLIN_FP4},
    ("MXFP4A16", "ct-mxfp4"): set(),
}


@pytest.mark.parametrize("case", TAKES, ids="-".join)
def test_kernels_refuse_what_they_do_not_read(case: tuple[str, str]) -> None:
    kernels = {TRITON_FP8, CUTLASS_FP8, TRITON_INT8, MARLIN, MARLIN_FP4}
    assert {kernel for kernel in kernels if kernel.refuses(layer_of(*case)) is None} == TAKES[case]
    assert TRITON_BF16.refuses(layer_of(*case)) is None


def test_sizes_that_a_kernel_cannot_take_are_refused() -> None:
    assert "hidden size 192" in str(MARLIN.refuses(layer_of("W4A16", "ct-pack", hidden=192)))
    assert MARLIN_FP4.refuses(layer_of("NVFP4A16", "ct-nvfp4", hidden=192)) is None
    assert "intermediate size 96" in str(MARLIN.refuses(layer_of("W4A16", "ct-pack", inner=96)))
    assert "intermediate size 72" in str(CUTLASS_FP8.refuses(layer_of("FP8_DYNAMIC", "ct-float", inner=72)))
    assert "hidden size 12" in str(GROUPED.refuses(layer_of("W4A16", "ct-pack", hidden=12)))
