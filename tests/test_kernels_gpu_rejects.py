"""Kernels for GPUs on a machine without one: why each is unavailable, what it refuses, and how it reads a checkpoint."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantpub.kernels import KERNELS, fp4, torch_fp8, torch_int8, vllm_common, vllm_cutlass, vllm_fp4
from quantpub.kernels.base import Kernel, Weight
from quantpub.kernels.check import limit, make_probe
from quantpub.layouts import LAYOUTS
from quantpub.qtensor import QTensor
from quantpub.registry import load
from quantpub.scheme import WHOLE, Scheme, preset

VLLM = {
    "marlin",
    "machete",
    "cutlass-int8",
    "cutlass-fp8",
    "cutlass-fp8-static",
    "cutlass-fp8-block",
    "triton-fp8-block",
    "fp4-marlin",
    "mxfp4-marlin",
    "cutlass-fp4",
}
FLASHINFER = {"flashinfer-fp4", "flashinfer-fp4-linear", "flashinfer-fp4-cute-dsl"}


def kernel(name: str) -> Kernel:
    found: Kernel = load(KERNELS, "kernel", name)
    return found


def integers(scheme: Scheme, n: int = 128, k: int = 256, seed: int = 0) -> QTensor:
    generator, bits = torch.Generator().manual_seed(seed), scheme.weight.number.bits
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    codes = torch.randint(low, high, (n, k), generator=generator, dtype=torch.int8)
    groups = 1 if scheme.group_size == WHOLE else k // scheme.group_size
    scale = (0.002 + 0.01 * torch.rand(n, groups, generator=generator)).bfloat16()
    whole = scheme.weight.zero_domain == "int"
    zero = torch.randint(low, high, (n, groups), generator=generator, dtype=torch.int8) if whole else None
    return QTensor(scheme, codes, scale, zero)


def nvfp4(name: str = "NVFP4", n: int = 128, k: int = 64) -> QTensor:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    scale = (1 + 400 * torch.rand(n, k // 16, generator=generator)).to(torch.float8_e4m3fn)
    act = torch.tensor(2.0**-9) if preset(name).act else None
    return QTensor(preset(name), codes, scale, None, torch.tensor(2.0**-12), act)


def packed(q: QTensor, layout: str) -> Weight:
    return Weight(q, load(LAYOUTS, "layout", layout).pack(q), layout)


# ---------------------------------------------------------------- unavailable


@pytest.mark.parametrize("name", sorted(VLLM | FLASHINFER))
def test_a_missing_package_is_said_in_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    title = "FlashInfer" if name in FLASHINFER else "vLLM"
    assert kernel(name).unavailable() == f"{title} is not installed in this Python"
    assert kernel(name).package == title.lower() and kernel(name).devices == ("cuda",)


@pytest.mark.parametrize("name", sorted(VLLM | FLASHINFER | {"tinygemm"}))
def test_a_machine_without_a_gpu_is_said_in_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: package)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert kernel(name).unavailable() == "it needs a CUDA GPU, and PyTorch sees none here"


@pytest.mark.parametrize(
    ("name", "found", "reason"),
    [
        ("machete", (8, 0), "it needs compute capability 9.0, this is 8.0"),
        ("machete", (10, 0), "it has code for compute capabilities below 10.0, this is 10.0"),
        ("cutlass-int8", (12, 0), "it has code for compute capabilities below 10.0, this is 12.0"),
        ("cutlass-fp8", (8, 6), "it needs compute capability 8.9, this is 8.6"),
        ("cutlass-fp8-block", (8, 9), "it needs compute capability 9.0, this is 8.9"),
        ("cutlass-fp4", (9, 0), "it needs compute capability 10.0, this is 9.0"),
        ("flashinfer-fp4", (9, 0), "it needs compute capability 10.0, this is 9.0"),
        ("flashinfer-fp4-cute-dsl", (12, 0), "it has code for compute capabilities below 11.0, this is 12.0"),
        ("marlin", (7, 5), "it needs compute capability 8.0, this is 7.5"),
        ("tinygemm", (7, 5), "it needs compute capability 8.0, this is 7.5"),
    ],
)
def test_a_gpu_without_code_is_said(
    name: str, found: tuple[int, int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: package)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: found)
    assert kernel(name).unavailable() == reason


def test_a_package_that_does_not_import_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: str) -> None:
        raise ImportError("libcudart.so.13: cannot open\nshared object file")

    monkeypatch.setattr("importlib.util.find_spec", lambda package: package)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(vllm_common, "vllm", broken)
    assert kernel("marlin").unavailable() == "vLLM cannot be imported: ImportError: libcudart.so.13: cannot open"


# ---------------------------------------------------------------- refused

W4, ASYM, W8 = preset("W4A16"), preset("W4A16_ASYM"), preset("W8A16")


@pytest.mark.parametrize(
    ("name", "layout", "scheme", "n", "k"),
    [
        *[(name, layout, W4, 128, 256) for name in ("marlin", "machete") for layout in ("ct-pack", "gptq", "awq")],
        *[(name, "ct-pack", scheme, 128, 256) for name in ("marlin", "machete") for scheme in (ASYM, W8)],
        ("tinygemm", "torchao-tile", preset("W4A16_FLOAT_ZERO"), 64, 384),
        ("cutlass-int8", "ct-int", preset("W8A8"), 64, 48),
        ("cutlass-fp8", "ct-float", preset("FP8_DYNAMIC"), 64, 48),
        ("cutlass-fp8-static", "ct-float", preset("FP8"), 64, 48),
        ("cutlass-fp8-static", "modelopt-fp8", preset("FP8"), 64, 48),
        ("cutlass-fp8-block", "hf-fp8", preset("FP8_BLOCK"), 256, 128),
        ("triton-fp8-block", "ct-float", preset("FP8_BLOCK"), 256, 256),
        ("fp4-marlin", "ct-nvfp4", preset("NVFP4A16"), 128, 64),
        ("fp4-marlin", "modelopt-nvfp4", preset("NVFP4"), 128, 64),
        ("mxfp4-marlin", "ct-mxfp4", preset("MXFP4A16"), 128, 64),
        ("cutlass-fp4", "modelopt-nvfp4", preset("NVFP4"), 32, 32),
        ("flashinfer-fp4", "ct-nvfp4", preset("NVFP4"), 32, 32),
    ],
)
def test_a_weight_that_fits_is_taken(name: str, layout: str, scheme: Scheme, n: int, k: int) -> None:
    assert kernel(name).refuses(scheme, layout, n, k) is None


@pytest.mark.parametrize(
    ("name", "layout", "scheme", "n", "k", "word"),
    [
        ("marlin", "torchao-tile", W4, 128, 256, "it reads ct-pack or gptq or awq, not torchao-tile"),
        ("marlin", "ct-pack", preset("W8A8"), 128, 256, "not W8A8"),
        ("marlin", "ct-pack", W4, 96, 256, "Marlin wants N % 64 = 0"),
        ("marlin", "ct-pack", preset("W4A16", 256), 128, 256, "no code for groups of 256"),
        ("marlin", "ct-pack", replace(W8, weight=replace(W8.weight, zero_domain="int")), 128, 256, "not W8A16"),
        ("machete", "gptq", preset("W4A16", 32), 128, 256, "no code for groups of 32"),
        ("machete", "ct-pack", W4, 64, 256, "Machete wants N % 128 = 0"),
        ("tinygemm", "torchao-tile", ASYM, 64, 256, "not W4A16_ASYM"),
        ("tinygemm", "torchao-tile", preset("W4A16_FLOAT_ZERO", WHOLE), 64, 256, "not -1"),
        ("tinygemm", "torchao-tile", preset("W4A16_FLOAT_ZERO"), 60, 256, "60 is not a multiple of 8"),
        ("cutlass-int8", "ct-int", preset("W8A8"), 64, 40, "CUTLASS INT8 wants"),
        ("cutlass-int8", "ct-int", preset("FP8_DYNAMIC"), 64, 48, "not FP8_DYNAMIC"),
        ("cutlass-fp8", "ct-float", preset("FP8"), 64, 48, "dynamic scale a token, not FP8"),
        ("cutlass-fp8-static", "ct-float", preset("FP8_DYNAMIC"), 64, 48, "static scale a tensor, not FP8_DYNAMIC"),
        ("cutlass-fp8-block", "hf-fp8", preset("FP8_BLOCK"), 192, 128, "whole blocks"),
        ("triton-fp8-block", "ct-float", preset("FP8_DYNAMIC"), 128, 128, "scale a group, not FP8_DYNAMIC"),
        ("fp4-marlin", "ct-nvfp4", preset("MXFP4A16"), 128, 64, "not MXFP4A16"),
        ("mxfp4-marlin", "ct-mxfp4", preset("NVFP4A16"), 128, 64, "not NVFP4A16"),
        ("cutlass-fp4", "ct-nvfp4", preset("NVFP4A16"), 128, 64, "by NVFP4 activations"),
        ("cutlass-fp4", "ct-nvfp4", preset("NVFP4"), 48, 64, "wants N % 32 = 0"),
        ("flashinfer-fp4-linear", "ct-nvfp4", preset("NVFP4"), 128, 48, "K % 32 = 0"),
    ],
)
def test_a_weight_that_does_not_fit_is_refused_with_the_reason(
    name: str, layout: str, scheme: Scheme, n: int, k: int, word: str
) -> None:
    reason = kernel(name).refuses(scheme, layout, n, k)
    assert reason is not None and word in reason and "\n" not in reason


@pytest.mark.parametrize(
    ("found", "scheme", "n", "k", "word"),
    [
        (torch_int8.KERNEL, preset("LLM_INT8"), 64, 64, "not LLM_INT8"),
        (torch_int8.KERNEL, preset("W8A8"), 64, 60, "multiples of 8"),
        (torch_int8.WEIGHT, preset("W8A8"), 64, 64, "not W8A8"),
        (torch_int8.WEIGHT, W8, 64, 250, "read beyond the weight"),
        (torch_fp8.KERNEL, preset("FP8_DYNAMIC"), 64, 40, "multiples of 16"),
        (torch_fp8.TENSOR, preset("FP8_DYNAMIC"), 64, 64, "one scale of all"),
    ],
)
def test_torchs_own_refuse_with_the_reason(found: Kernel, scheme: Scheme, n: int, k: int, word: str) -> None:
    reason = found.reject(scheme, n, k)
    assert reason is not None and word in reason


# ---------------------------------------------------------------- how a checkpoint is read


@pytest.mark.parametrize(
    ("layout", "scheme"),
    [
        ("ct-pack", W4),
        ("ct-pack", ASYM),
        ("ct-pack", W8),
        ("gptq", W4),
        ("gptq", W8),
        ("awq", W4),
        ("awq", ASYM),
        ("gptq", preset("W4A16", WHOLE)),
    ],
)
def test_integer_layouts_come_down_to_one_form(layout: str, scheme: Scheme) -> None:
    q, bits = integers(scheme), scheme.weight.number.bits
    weight, middle = packed(q, layout), 1 << (bits - 1)
    words = vllm_common.words_KN(weight)
    assert words.shape == (256 * bits // 32, 128) and words.dtype == torch.int32
    assert torch.equal(vllm_common.fields(words.t(), bits) - middle, q.codes_NK.int())
    scale = vllm_common.scales_GN(weight)
    assert torch.equal(scale, q.scale.t()) and scale.is_contiguous()
    zero = vllm_common.zeros_GN(weight)
    if q.zero is not None:
        assert zero is not None and zero.is_contiguous() and torch.equal(zero - 8, q.zero.t().int())
    elif layout == "awq":
        assert zero is not None and (zero == 8).all()
    else:
        assert zero is None


def test_awq_and_plain_words_by_hand() -> None:
    word = torch.tensor([[0x75316420]], dtype=torch.int32)
    assert vllm_common.fields(word, 4, vllm_common.AWQ_ORDER).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert vllm_common.fields(word, 4).tolist() == [[0, 2, 4, 6, 1, 3, 5, 7]]
    assert (
        vllm_common.join(torch.tensor([[0, 1, 2, 3, 4, 5, 6, 15]], dtype=torch.int32), 4).item() == 0xF6543210 - 2**32
    )
    assert vllm_common.fields(torch.tensor([[-1]], dtype=torch.int32), 8).tolist() == [[255] * 4]


@pytest.mark.parametrize(("rows", "groups"), [(128, 4), (1, 3), (130, 9), (300, 8)])
def test_swizzled_scales_lie_where_the_hardware_looks(rows: int, groups: int) -> None:
    scale = torch.randint(0, 120, (rows, groups), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    tiles = fp4.swizzle(scale.view(torch.float8_e4m3fn))
    high, wide = -(-rows // 128), -(-groups // 4)
    assert tiles.shape == (128 * high, 4 * wide)
    flat = torch.zeros(high * wide * 512, dtype=torch.uint8)
    for r in range(rows):
        for g in range(groups):
            tile = (r // 128) * wide + g // 4
            flat[512 * tile + 16 * (r % 32) + 4 * (r % 128 // 32) + g % 4] = scale[r, g]
    assert torch.equal(tiles.view(torch.uint8).flatten(), flat)
    assert torch.equal(fp4.unswizzle(tiles, rows, groups).view(torch.uint8), scale)
    assert torch.equal(fp4.unswizzle(tiles.view(torch.int32), rows, groups).view(torch.uint8), scale)


@pytest.mark.parametrize("layout", fp4.LAYOUTS)
def test_both_conventions_of_global_scales_give_the_same_parts(layout: str) -> None:
    q = nvfp4()
    codes, tiles, alpha, divisor, act = fp4.operands(packed(q, layout))
    assert (alpha.item(), divisor.item(), act.item()) == (2.0**-21, 2.0**9, 2.0**-9)
    assert codes.shape == (128, 32) and torch.equal(
        fp4.unswizzle(tiles, 128, 4).view(torch.uint8), q.scale.view(torch.uint8)
    )
    assert fp4.parts(packed(nvfp4("NVFP4A16"), layout)).act is None


def test_merged_members_have_one_global_scale_each() -> None:
    """An engine that stacks q, k and v keeps three equal ones."""
    weight = packed(nvfp4(), "ct-nvfp4")
    stacked = {name: weight.packed[name].expand(3) for name in ("weight_global_scale", "input_global_scale")}
    found = fp4.parts(replace(weight, packed=weight.packed | stacked))
    assert found.weight.shape == () and found.weight.item() == 2.0**-12 and found.act is not None


def test_fp4_activations_are_read_back_by_hand() -> None:
    """Codes 2 (1.0) and 15 (−6.0) in each byte; scales 1 and 2; global scale ½."""
    codes = torch.full((2, 16), 0xF2, dtype=torch.uint8)
    tiles = fp4.swizzle(torch.tensor([[1.0, 2.0], [4.0, 8.0]]).to(torch.float8_e4m3fn))
    x = fp4.dequantize((codes, tiles, torch.tensor([0.5])))
    assert x.tolist() == [[0.5, -3.0] * 8 + [1.0, -6.0] * 8, [2.0, -12.0] * 8 + [4.0, -24.0] * 8]


def test_fp8_scales_of_rows_tensors_and_blocks() -> None:
    codes = torch.zeros(256, 128).to(torch.float8_e4m3fn)
    rows = QTensor(preset("FP8_DYNAMIC"), codes, torch.rand(256, 1).bfloat16())
    w, scale = vllm_cutlass.prepare(packed(rows, "ct-float"))
    assert w is codes and scale.dtype == torch.float32 and torch.equal(scale, rows.scale.float())
    whole = QTensor(preset("FP8"), codes, torch.tensor([[0.5]]), input_scale=torch.tensor(0.25))
    for layout in ("ct-float", "modelopt-fp8"):
        assert [t.tolist() for t in vllm_cutlass.prepare_static(packed(whole, layout))[1:]] == [[0.5], [0.25]]
    blocks = QTensor(preset("FP8_BLOCK"), codes, torch.rand(2, 1))
    assert torch.equal(vllm_cutlass.prepare_block(packed(blocks, "hf-fp8"))[1], blocks.scale)


def test_block_activations_are_read_back_by_hand() -> None:
    codes = torch.ones(2, 256).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).t().contiguous().t()  # column-major
    x = vllm_cutlass.dequantize_block((codes, scale))
    assert x[:, 0].tolist() == [1, 3] and x[:, 127].tolist() == [1, 3] and x[:, 128].tolist() == [2, 4]


# ---------------------------------------------------------------- activations with a calibrated scale


def test_a_probe_fills_the_range_of_a_calibrated_scale() -> None:
    q = nvfp4()
    assert limit(q) == 6 * 448 * 2.0**-9
    assert make_probe(q).x_PK.float().abs().max() == 6 * 448 * 2.0**-9
    assert limit(nvfp4("NVFP4A16")) is None and make_probe(nvfp4("NVFP4A16")).x_PK.float().std().round() == 1


@pytest.mark.parametrize("split", [torch_fp8.TENSOR.split, vllm_fp4.CUTLASS.split, vllm_cutlass.STATIC_KERNEL.split])
def test_static_kernels_take_the_scale_that_the_weight_brings(split: object) -> None:
    assert getattr(split, "calibrated", None) is not None


def test_static_activations_saturate_and_bring_their_scale() -> None:
    operands = (torch.zeros(0), torch.ones(1), torch.tensor([0.5]))
    codes, scale = torch_fp8.calibrated(torch.tensor([[448.0, -3.0]]).bfloat16(), operands)
    assert codes.float().tolist() == [[448.0, -6.0]] and scale.item() == 0.5
    codes, scale = torch_fp8.quantize_static(torch.tensor([[6.0, -0.375]]).bfloat16())
    assert codes.float().tolist() == [[448.0, -28.0]] and scale.item() == pytest.approx(6 / 448)


def test_int8_quantizes_each_token_by_its_largest_value() -> None:
    x_MK = torch.tensor([[127.0, -63.5, 2.5, 3.5], [0.0, 0.0, 0.0, 0.0], [1.0, -2.0, 0.5, 0.0]]).bfloat16()
    codes, scale = torch_int8.quantize(x_MK)
    assert codes.tolist() == [[127, -64, 2, 4], [0, 0, 0, 0], [64, -127, 32, 0]]  # halves to even
    assert scale[0].item() == 1.0 and scale[2].item() == pytest.approx(2 / 127)


def test_int8_product_by_hand() -> None:
    codes = torch.tensor([[1, 2, 3, 4] * 4, [-1, 0, 1, 0] * 4], dtype=torch.int8)
    weight = torch.tensor([[1] * 16, [2, -2] * 8], dtype=torch.int8)
    y = torch_int8.gemm((codes, torch.tensor([[0.5], [2.0]])), (weight, torch.tensor([[1.0, 0.25]])))
    assert y.dtype == torch.bfloat16 and y.tolist() == [[20.0, -2.0], [0.0, 0.0]]
