"""Faults planted in the bytes of a checkpoint, and kernels that answer from earlier: each is stopped, by its name.

The faults are those of scripts/planted_faults.py, which plants them on a GPU with the serving engines' own kernels. Here a
reader decodes the faulty bytes with the layout's `unpack` and multiplies in bf16, and torch's CPU kernels are given what
the faulty bytes mean.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from test_kernels_gpu_rejects import ASYM, W4, W8, integers, nvfp4, packed
from test_kernels_vllm_calls import floats

from quantpub.errors import GateError
from quantpub.kernels import dense, torch_fp8, torch_int4, torch_int8
from quantpub.kernels.base import Kernel, Operands, Split, Weight
from quantpub.kernels.check import PROBE_ROWS, check, check_split, make_probe, tolerance
from quantpub.layouts import LAYOUTS
from quantpub.qtensor import QTensor, dequantize
from quantpub.registry import load
from quantpub.scheme import Scheme, preset

sys.path.insert(0, str(ROOT / "scripts"))
import planted_faults as planted

GEMM = "mlp.down_proj"


def read(weight: Weight) -> Operands:
    """What the bytes say, whatever the weight is said to mean."""
    unpack = load(LAYOUTS, "layout", weight.layout).unpack
    return (dequantize(unpack(weight.packed, weight.q.scheme, weight.q.shape)).to(torch.bfloat16),)


READER = replace(dense.BF16, name="reader", prepare=read)


def mxfp4() -> QTensor:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (128, 256), dtype=torch.uint8, generator=generator)
    exponents = torch.randint(118, 126, (128, 8), dtype=torch.uint8, generator=generator)
    return QTensor(preset("MXFP4A16"), codes, exponents.view(torch.float8_e8m0fnu))


def float_zero() -> QTensor:
    q = integers(W4)
    scheme = preset("W4A16_FLOAT_ZERO")
    return QTensor(scheme, q.codes_NK, q.scale, (torch.randn(q.scale.shape) * 0.01).bfloat16())


def w8(scheme: Scheme) -> QTensor:
    return integers(scheme, 64, 256)


WEIGHTS = {
    "ct-pack W4A16": packed(integers(W4), "ct-pack"),
    "ct-pack W4A16_ASYM": packed(integers(ASYM), "ct-pack"),
    "ct-pack W8A16": packed(w8(W8), "ct-pack"),
    "gptq W4A16": packed(integers(W4), "gptq"),
    "awq W4A16_ASYM": packed(integers(ASYM), "awq"),
    "torchao-tile": packed(float_zero(), "torchao-tile"),
    "ct-int W8A8": packed(w8(preset("W8A8")), "ct-int"),
    "ct-float FP8_DYNAMIC": packed(floats("FP8_DYNAMIC"), "ct-float"),
    "ct-float FP8": packed(floats("FP8"), "ct-float"),
    "hf-fp8 FP8_BLOCK": packed(floats("FP8_BLOCK"), "hf-fp8"),
    "ct-nvfp4 NVFP4A16": packed(nvfp4("NVFP4A16", 128, 256), "ct-nvfp4"),
    "modelopt-nvfp4 NVFP4": packed(nvfp4("NVFP4", 128, 256), "modelopt-nvfp4"),
    "ct-mxfp4 MXFP4A16": packed(mxfp4(), "ct-mxfp4"),
}
CPU = {
    "torch-int4": (torch_int4.KERNEL, "ct-pack W4A16"),
    "torch-int8-weight": (torch_int8.WEIGHT, "ct-pack W8A16"),
    "torch-int8": (torch_int8.KERNEL, "ct-int W8A8"),
    "torch-fp8-tensor": (torch_fp8.TENSOR, "ct-float FP8"),
}
INVERTIBLE = ("FP8_DYNAMIC", "FP8", "FP8_BLOCK", "NVFP4", "NVFP4A16")
ONE_SCALE = "FP8"


def cases() -> Iterator[tuple[str, str]]:
    for held, weight in WEIGHTS.items():
        scheme = weight.q.scheme.name
        yield held, "codes swapped"
        if scheme != ONE_SCALE:
            yield held, "scale off by one"
        if scheme in INVERTIBLE:
            yield held, "scale inverted"


def test_each_fault_applies_where_it_can() -> None:
    applied = [(h, name) for h, w in WEIGHTS.items() for name, fault in planted.FAULTS.items() if fault(w) is not None]
    assert applied == list(cases()) and len(applied) == 12 + 13 + 5


@pytest.mark.parametrize("held", WEIGHTS)
def test_sound_bytes_pass(held: str) -> None:
    weight = WEIGHTS[held]
    error, said = planted.judged(READER, GEMM, weight, weight.q)
    assert said is None and 0 < error < 2.0**-7


@pytest.mark.parametrize(("held", "fault"), cases())
def test_faulty_bytes_are_stopped_by_kernel_and_gemm(held: str, fault: str) -> None:
    weight = WEIGHTS[held]
    faulty = planted.FAULTS[fault](weight)
    assert faulty is not None
    given = replace(faulty, q=weight.q)  # the kernel has nothing but the bytes to go by
    error, said = planted.judged(READER, GEMM, given, weight.q)
    assert said is not None and str(said).startswith(f"reader on {GEMM}: kernel reader computes {GEMM} wrong at M = ")
    assert not error < 0.05


@pytest.mark.parametrize("name", CPU)
def test_torchs_kernels_on_what_faulty_bytes_mean(name: str) -> None:
    kernel, held = CPU[name]
    rows = list(planted.planted(kernel, GEMM, WEIGHTS[held]))
    assert rows[0]["fault"] == "none" and len(rows) >= 5
    assert all(row["right"] for row in rows), rows
    assert not rows[0]["stopped"] and all(row["stopped"] and name in row["said"] for row in rows[1:])


def test_swapped_nibbles_by_hand() -> None:
    """Of a row 0, 1, 2, … the faulty byte order makes 1, 0, 3, 2, …"""
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(8, 8)
    weight = packed(QTensor(preset("W4A16"), codes, torch.ones(8, 1).bfloat16()), "ct-pack")
    faulty = planted.swapped(weight)
    assert faulty is not None and faulty.q.codes_NK[0, :6].tolist() == [-7, -8, -5, -6, -3, -4]


def test_a_global_scale_of_the_other_convention_by_hand() -> None:
    faulty = planted.inverted(WEIGHTS["modelopt-nvfp4 NVFP4"])
    assert faulty is not None and faulty.packed["weight_scale_2"].item() == 2.0**12
    faulty = planted.inverted(WEIGHTS["ct-nvfp4 NVFP4A16"])
    assert faulty is not None and faulty.packed["weight_global_scale"].item() == 2.0**-12


# ---------------------------------------------------------------- kernels that answer from earlier


def stale_by_address(kernel: Kernel) -> Kernel:
    """Takes activations at an address that it has seen for the same activations."""
    seen: dict[int, torch.Tensor] = {}

    def run(x_MK: torch.Tensor, operands: Operands) -> torch.Tensor:
        if x_MK.data_ptr() not in seen:
            seen[x_MK.data_ptr()] = kernel.run(x_MK, operands)
        return seen[x_MK.data_ptr()]

    return replace(kernel, run=run)


@pytest.mark.parametrize("stale", [planted.stale_call, stale_by_address])
@pytest.mark.parametrize("m", [1, 7, PROBE_ROWS])
def test_an_answer_from_an_earlier_call_is_caught(stale: object, m: int) -> None:
    assert callable(stale)
    weight = WEIGHTS["ct-pack W4A16"]
    kernel = stale(torch_int4.KERNEL)
    with pytest.raises(GateError, match=r"torch-int4 computes g wrong at M = \d+: relative error (1\.9|2)"):
        check(kernel, "g", kernel.prepare(weight), make_probe(weight.q), m)


def test_an_earlier_answer_in_the_gemm_alone_is_caught() -> None:
    weight, own = WEIGHTS["ct-int W8A8"], torch_int8.KERNEL.split
    assert own is not None
    first: list[torch.Tensor] = []

    def gemm(activations: Operands, operands: Operands) -> torch.Tensor:
        first.append(own.gemm(activations, operands))
        return first[0]

    kernel = replace(torch_int8.KERNEL, split=replace(own, gemm=gemm))
    with pytest.raises(GateError):
        check_split(kernel, "g", kernel.prepare(weight), make_probe(weight.q), weight.q)


# ---------------------------------------------------------------- other tiles, from more tokens on

FEW = PROBE_ROWS  # up to here these kernels are right


def rounded_kernel(num: str) -> Kernel:
    """A product of rounded activations by a bf16 weight: FP8 a token, or FP4 in blocks of 16 under one scale of all."""
    from quantpub import e2m1
    from quantpub.qtensor import code_values

    def fp8(x_MK: torch.Tensor) -> Operands:
        scale = x_MK.float().abs().amax(-1, keepdim=True) / 448
        return ((x_MK.float() / scale).to(torch.float8_e4m3fn).float() * scale,)

    def fp4(x_MK: torch.Tensor) -> Operands:
        blocks = x_MK.float().unflatten(1, (-1, 16))
        scale = (blocks.abs().amax(-1, keepdim=True) / 6).to(torch.float8_e4m3fn).float()
        return ((code_values(e2m1.codes((blocks / scale).flatten(1)), num).view_as(blocks) * scale).flatten(1),)

    def gemm(activations: Operands, operands: Operands) -> torch.Tensor:
        return (activations[0] @ operands[0].float().t()).bfloat16()

    split = Split(num, fp4 if num == "fp4_e2m1" else fp8, lambda a: a[0], gemm)
    return replace(dense.BF16, name=num, run=lambda x, w: gemm(split.quantize(x), w), split=split)


def last_rows(y_MN: torch.Tensor, x_MK: torch.Tensor, w_NK: torch.Tensor) -> None:
    y_MN[-16:] = 0


def every_64th(y_MN: torch.Tensor, x_MK: torch.Tensor, w_NK: torch.Tensor) -> None:
    y_MN[::64] *= 1.3


def one_group(y_MN: torch.Tensor, x_MK: torch.Tensor, w_NK: torch.Tensor) -> None:
    y_MN[:, 7] += (0.3 * (x_MK[:, :64].float() @ w_NK[7, :64].float())).bfloat16()


def some_rows(y_MN: torch.Tensor, x_MK: torch.Tensor, w_NK: torch.Tensor) -> None:
    y_MN[100:700] = 0


@pytest.mark.slow
@pytest.mark.parametrize("fault", [None, last_rows, every_64th, one_group, some_rows])
@pytest.mark.parametrize("num", ["fp8_e4m3", "fp4_e2m1"])
def test_a_fault_of_more_tokens_is_caught(num: str, fault: Callable[..., None] | None) -> None:
    """At M = 8192; the loose tolerance of the rounded activations is 0.07 and 0.27."""
    sound = rounded_kernel(num)

    def run(x_MK: torch.Tensor, operands: Operands) -> torch.Tensor:
        y_MN = sound.run(x_MK, operands)
        if fault and len(x_MK) > FEW:
            fault(y_MN, x_MK, operands[0])
        return y_MN

    weight = packed(integers(W4, 128, 1024), "ct-pack")
    kernel = replace(sound, run=run)
    operands = kernel.prepare(weight)
    probe = check_split(kernel, GEMM, operands, make_probe(weight.q), weight.q)
    for m in (1, FEW):
        check(kernel, GEMM, operands, probe, m)
    if fault is None:
        assert check(kernel, GEMM, operands, probe, 8192) < 0.6 * tolerance(kernel)
        return
    with pytest.raises(GateError, match="wrong at M = 8192"):
        check(kernel, GEMM, operands, probe, 8192)


def test_an_earlier_weight_is_caught() -> None:
    first, second = (packed(integers(W4, seed=seed), "ct-pack") for seed in (1, 2))
    kernel = planted.stale_weight(torch_int4.KERNEL)
    check(kernel, "g", kernel.prepare(first), make_probe(first.q), PROBE_ROWS)
    with pytest.raises(GateError):
        check(kernel, "g", kernel.prepare(second), make_probe(second.q), PROBE_ROWS)


def test_other_activations_differ_much_at_every_m() -> None:
    probe = make_probe(integers(W4))
    for m in (1, 2, PROBE_ROWS, 100):
        x, other = probe.rows(m).float(), probe.others(m).float()
        assert x.shape == other.shape and (x - other).norm() == 2 * x.norm()


def test_machetes_zeros_have_a_tolerance_of_their_own() -> None:
    from quantpub.kernels.check import GEMM_TOLERANCE, tolerance
    from quantpub.kernels.vllm_machete import KERNEL as MACHETE
    from quantpub.kernels.vllm_marlin import KERNEL as MARLIN

    assert tolerance(MACHETE, ASYM) == tolerance(MACHETE) == 3 * GEMM_TOLERANCE
    assert tolerance(MACHETE, W4) == tolerance(MARLIN, ASYM) == GEMM_TOLERANCE


def test_what_machete_loses_on_zeros_passes_and_a_zero_one_off_does_not() -> None:
    """−scale·zero and scale·code rounded to bf16 before they are added; the second time with every zero one too high."""
    from quantpub.kernels.vllm_machete import KERNEL as MACHETE

    q = integers(ASYM, 256, 512)
    assert q.zero is not None

    def prepare(off: int) -> Operands:
        assert q.zero is not None
        product = (q.codes_NK.float() + 8).bfloat16() * q.scale.repeat_interleave(128, 1)
        added = -q.scale * (q.zero + 8 + off).bfloat16()
        return ((product + added.repeat_interleave(128, 1)),)

    probe = make_probe(q)
    kernel = replace(MACHETE, run=dense.run)
    assert check(kernel, "g", prepare(0), probe, PROBE_ROWS) > 0.003
    with pytest.raises(GateError):
        check(kernel, "g", prepare(1), probe, PROBE_ROWS)


# ---------------------------------------------------------------- what activations lose


@pytest.mark.parametrize("k", [64, 512, 8192])
def test_int8_and_fp4_activations_stay_under_their_roundoff(k: int) -> None:
    from quantpub import e2m1
    from quantpub.activations import int8_per_token
    from quantpub.kernels.check import ROUNDOFF
    from quantpub.qtensor import code_values

    x = torch.randn(PROBE_ROWS, k, generator=torch.Generator().manual_seed(k))
    lost = (int8_per_token(x) - x).norm() / x.norm()
    assert 0.2 * ROUNDOFF["int8"] < lost < 0.6 * ROUNDOFF["int8"]
    blocks = x.view(PROBE_ROWS, -1, 16)
    scale = (blocks.abs().amax(-1, keepdim=True) / 6).to(torch.float8_e4m3fn).float()
    rounded = code_values(e2m1.codes((blocks / scale).flatten(1)), "fp4_e2m1").view_as(blocks) * scale
    lost = (rounded - blocks).norm() / x.norm()
    assert 0.2 * ROUNDOFF["fp4_e2m1"] < lost < 0.6 * ROUNDOFF["fp4_e2m1"]
