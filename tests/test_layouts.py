"""Laws 1 and 2 for every (layout, scheme, shape, dtype): what a code means by hand; lossless or rejected with a reason."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpub.layouts import KERNEL_LAYOUTS, LAYOUTS
from quantpub.layouts.base import Layout
from quantpub.qtensor import CODE_DTYPES, SCALE_DTYPES, QTensor, dequantize, same, scale_dtype
from quantpub.registry import load
from quantpub.scheme import PRESETS, WHOLE, Scheme, preset
from quantpub.shards import NAMES

EVERY = {**LAYOUTS, **KERNEL_LAYOUTS}
ALL = [(name, scheme) for name in EVERY for scheme in PRESETS]
SOURCES = [torch.bfloat16, torch.float16, torch.float32]
ORDINARY = (256, 1024)  # a shape that every layout holds, if it holds the scheme
SIDES = [1, 3, 8, 12, 16, 40, 64, 100, 128, 192, 256]


def layout_of(name: str) -> Layout:
    layout: Layout = load(EVERY, "layout", name)
    return layout


def random_codes(num: str, n: int, k: int, g: torch.Generator) -> torch.Tensor:
    """Every code of a number format but FP8's NaN; minus zero is one of them."""
    raw = torch.randint(-128, 128, (n, k), generator=g, dtype=torch.int8)
    match num:
        case "int4":
            return raw % 16 - 8
        case "int8":
            return raw
        case "fp4_e2m1":
            return (raw % 16).to(torch.uint8)
        case "fp8_e4m3":
            return torch.where((raw & 0x7F) == 0x7F, 0, raw).view(CODE_DTYPES[num])
    raise AssertionError(num)


def random_scale(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    """Any scale that the scheme can store: of either sign in the model's dtype, positive in the others."""
    match scheme.weight.scale_dtype:
        case "model":
            return torch.randn(shape, generator=g).to(dtype)
        case "float32":
            return torch.rand(shape, generator=g) + 2.0**-20
        case "absmax127":
            return (torch.rand(shape, generator=g) * 8 + 2.0**-20) * torch.tensor(1 / 127, dtype=torch.float32)
        case "fp8_e4m3":
            return torch.randint(1, 127, shape, generator=g).to(torch.uint8).view(torch.float8_e4m3fn)
        case "e8m0":
            return torch.randint(0, 255, shape, generator=g).to(torch.uint8).view(SCALE_DTYPES["e8m0"])
    raise AssertionError(scheme)


def random_q(scheme: Scheme, n: int, k: int, dtype: torch.dtype, seed: int) -> QTensor:
    """A random canonical tensor of `scheme` for a weight [n, k] that came in `dtype`."""
    g = torch.Generator().manual_seed(seed)
    weight, act, grid = scheme.weight, scheme.act, scheme.weight.scale_shape(n, k)
    zero = global_scale = input_scale = None
    if weight.zero_domain == "int":
        zero = random_codes(weight.num, *grid, g)
    elif weight.zero_domain == "float":
        zero = torch.randn(grid, generator=g).to(scale_dtype(scheme, dtype))
    if weight.global_scale:
        global_scale = 2.0 ** torch.randint(-30, 8, (), generator=g)
    if act is not None and (act.global_scale or not act.dynamic):
        input_scale = 1 / (1 / (torch.rand((), generator=g) + 2.0**-10))  # a reciprocal has a reciprocal
    codes_NK, scale = random_codes(weight.num, n, k, g), random_scale(scheme, grid, dtype, g)
    return QTensor(scheme, codes_NK, scale, zero, global_scale, input_scale)


def check(layout: Layout, q: QTensor, dtype: torch.dtype) -> None:
    """Packing loses nothing, makes what `spec` foretells, and can be written as it is."""
    tensors = layout.pack(q)
    spec = layout.spec(q.scheme, *q.shape, NAMES[dtype])
    assert {s: (NAMES[t.dtype], tuple(t.shape)) for s, t in tensors.items()} == spec
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert same(layout.unpack(tensors, q.scheme, q.shape), q)


def holders(scheme_name: str) -> list[str]:
    """Layouts that hold a scheme at an ordinary shape in bf16."""
    return [name for name in EVERY if layout_of(name).reject(preset(scheme_name), *ORDINARY, "BF16") is None]


@pytest.mark.parametrize(("layout_name", "scheme_name"), ALL)
@settings(max_examples=20, deadline=None)
@given(
    n=st.sampled_from(SIDES),
    k=st.sampled_from([*SIDES, 7, 60, 96, 384]),
    group=st.sampled_from([None, WHOLE, 8, 16, 32, 64, 128]),
    dtype=st.sampled_from(SOURCES),
    seed=st.integers(0, 2**31),
)
def test_lossless_or_rejected(
    layout_name: str, scheme_name: str, n: int, k: int, group: int | None, dtype: torch.dtype, seed: int
) -> None:
    layout, scheme = layout_of(layout_name), preset(scheme_name, group)
    reason = layout.reject(scheme, n, k, NAMES[dtype])
    if reason is not None:
        block = "whole rows" if scheme.group_size == WHOLE else str(scheme.group_size)
        named = (scheme.name, str(n), str(k), block, NAMES[dtype])
        assert any(word in reason for word in named), reason
        return
    check(layout, random_q(scheme, n, k, dtype, seed), dtype)


@pytest.mark.parametrize("dtype", SOURCES, ids=str)
@pytest.mark.parametrize("layout_name", EVERY)
def test_a_layout_holds_its_schemes_at_an_ordinary_shape(layout_name: str, dtype: torch.dtype) -> None:
    layout = layout_of(layout_name)
    held = [s for s in PRESETS.values() if layout.reject(s, *ORDINARY, NAMES[dtype]) is None]
    assert held or dtype != torch.bfloat16, "a layout that holds nothing"
    for scheme in held:
        check(layout, random_q(scheme, *ORDINARY, dtype, 0), dtype)


@pytest.mark.parametrize("scheme_name", PRESETS)
def test_every_scheme_has_a_layout_that_an_engine_loads(scheme_name: str) -> None:
    assert set(holders(scheme_name)) & set(LAYOUTS)


@pytest.mark.parametrize("layout_name", EVERY)
def test_a_layout_says_its_name_and_its_kind(layout_name: str) -> None:
    layout = layout_of(layout_name)
    assert layout.name == layout_name
    assert layout.kind == ("checkpoint" if layout_name in LAYOUTS else "kernel")


@pytest.mark.parametrize("scheme_name", PRESETS)
def test_a_shard_at_the_tensor_parallel_multiples_is_writable(scheme_name: str) -> None:
    """A shard is a weight of its own to the engine: the smallest odd multiples of `tp_multiple` are held like any other."""
    for name in holders(scheme_name):
        layout, scheme = layout_of(name), preset(scheme_name)
        multiple = layout.tp_multiple(scheme)
        if multiple is None:
            continue  # no engine cuts this one
        rows, columns = multiple
        assert rows >= 1 and columns >= 1
        assert layout.reject(scheme, 3 * rows, 3 * columns, "BF16") is None, (name, rows, columns)
        check(layout, random_q(scheme, 3 * rows, 3 * columns, torch.bfloat16, 0), torch.bfloat16)


@pytest.mark.parametrize("scheme_name", PRESETS)
def test_the_configuration_is_json_and_names_what_is_ignored(scheme_name: str) -> None:
    for name in set(holders(scheme_name)) & set(LAYOUTS):
        layout = layout_of(name)
        config = layout.config(preset(scheme_name), ["lm_head", "model.router"])
        assert json.loads(json.dumps(config)) == config
        assert config["quant_method"] == layout.method
        if layout.group is not None:
            assert json.loads(json.dumps(layout.group(preset(scheme_name))))["weights"]


def test_dequantize_by_hand() -> None:
    """Two rows, two groups of two: codes times their group's scale, a negative one included."""
    scheme = preset("W4A16", 2)
    codes = torch.tensor([[-8, 7, 1, 0], [2, -3, 4, 5]], dtype=torch.int8)
    scale = torch.tensor([[0.5, -2.0], [1.0, 0.25]], dtype=torch.bfloat16)
    expected = torch.tensor([[-4.0, 3.5, -2.0, 0.0], [2.0, -3.0, 1.0, 1.25]])
    assert torch.equal(dequantize(QTensor(scheme, codes, scale)), expected)


def test_dequantize_an_integer_zero_by_hand() -> None:
    """The zero is in codes, and comes off before the scale."""
    codes = torch.tensor([[-8, 7, 1, 0]], dtype=torch.int8)
    scale, zero = torch.tensor([[0.5, 2.0]]), torch.tensor([[-3, 7]], dtype=torch.int8)
    q = QTensor(preset("W4A16_ASYM", 2), codes, scale, zero)
    assert torch.equal(dequantize(q), torch.tensor([[-2.5, 5.0, -12.0, -14.0]]))


def test_dequantize_a_float_zero_by_hand() -> None:
    """The zero is in weights, and is added after the scale."""
    codes = torch.tensor([[-8, 7, 1, 0]], dtype=torch.int8)
    scale, zero = torch.tensor([[0.5, 2.0]]), torch.tensor([[-3.25, 0.125]])
    q = QTensor(preset("W4A16_FLOAT_ZERO", 2), codes, scale, zero)
    assert torch.equal(dequantize(q), torch.tensor([[-7.25, 0.25, 2.125, 0.125]]))


def test_dequantize_fp8_by_hand() -> None:
    scheme = preset("FP8_DYNAMIC")
    codes = torch.tensor([[448.0, -0.015625], [1.5, 2.0]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.5], [2.0]], dtype=torch.bfloat16)
    assert torch.equal(dequantize(QTensor(scheme, codes, scale)), torch.tensor([[224.0, -0.0078125], [3.0, 4.0]]))


def test_dequantize_blocks_by_hand() -> None:
    """Scale [i, j] belongs to rows 128·i … and columns 128·j …; the blocks at the edges are parts of one."""
    codes = torch.ones(130, 200).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    w_NK = dequantize(QTensor(preset("FP8_BLOCK"), codes, scale))
    assert w_NK[127, 127] == 1 and w_NK[127, 128] == 2 and w_NK[128, 127] == 3 and w_NK[129, 199] == 4


def test_dequantize_nvfp4_by_hand() -> None:
    """All sixteen codes, a block scale of 1.5 and a global scale of 1/8."""
    codes = torch.arange(16, dtype=torch.uint8).view(1, 16)
    scale = torch.tensor([[1.5]]).to(torch.float8_e4m3fn)
    w_NK = dequantize(QTensor(preset("NVFP4A16"), codes, scale, global_scale=torch.tensor(0.125)))
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) * 0.1875
    assert torch.equal(w_NK, torch.cat([magnitudes, -magnitudes])[None])
    assert torch.signbit(w_NK[0, 8]), "code 8 is minus zero"


def test_dequantize_mxfp4_by_hand() -> None:
    """Byte 127 stands for 1, 128 for 2, 120 for 1/128."""
    codes = torch.tensor([[7, 15] + [2] * 30 + [7, 9] + [0] * 30], dtype=torch.uint8)
    scale = torch.tensor([[128, 120]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    w_NK = dequantize(QTensor(preset("MXFP4A16"), codes, scale))
    assert w_NK[0, [0, 1, 2, 32, 33, 34]].tolist() == [12.0, -12.0, 2.0, 0.046875, -0.00390625, 0.0]
