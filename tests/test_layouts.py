"""Laws 1 and 2 for every (algorithm, layout, scheme, shape): lossless or rejected, and equal to an independent packer."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpub.layouts import LAYOUTS
from quantpub.layouts.base import Layout
from quantpub.layouts.ct_pack import pack_words, unpack_words
from quantpub.qtensor import CODE_DTYPES, QTensor, dequantize, same
from quantpub.registry import load
from quantpub.scheme import PRESETS, WHOLE, Scheme, preset
from quantpub.shards import DTYPES

ALL = [(name, scheme) for name in LAYOUTS for scheme in PRESETS]
dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


def random_q(scheme: Scheme, n: int, k: int, dtype: torch.dtype, seed: int) -> QTensor:
    """Any codes at all, and any scales, negative ones too."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    if scheme.weight.num == "int4":
        codes = raw % 16 - 8
    else:
        codes = torch.where((raw & 0x7F) == 0x7F, 0, raw).view(CODE_DTYPES[scheme.weight.num])  # 0x7F is NaN
    scale = torch.randn(scheme.weight.scale_shape(n, k), generator=generator).to(dtype)
    return QTensor(scheme, codes, scale)


@pytest.mark.parametrize(("layout_name", "scheme_name"), ALL)
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 300),
    group=st.sampled_from([WHOLE, 8, 16, 32, 64, 128]),
    dtype=dtypes,
    seed=st.integers(0, 2**31),
)
def test_lossless_or_rejected(
    layout_name: str, scheme_name: str, n: int, k: int, group: int, dtype: torch.dtype, seed: int
) -> None:
    layout: Layout = load(LAYOUTS, "layout", layout_name)
    scheme = preset(scheme_name, group)
    reason = layout.reject(scheme, n, k)
    if reason is not None:
        assert str(k) in reason or scheme.name in reason
        return
    q = random_q(scheme, n, k, dtype, seed)
    tensors = layout.pack(q)
    assert same(layout.unpack(tensors, scheme), q)
    spec = layout.spec(scheme, n, k, next(name for name, d in DTYPES.items() if d == dtype))
    assert {s: (DTYPES[d], shape) for s, (d, shape) in spec.items()} == {
        s: (t.dtype, tuple(t.shape)) for s, t in tensors.items()
    }


@pytest.mark.parametrize(("layout_name", "scheme_name"), ALL)
def test_the_sweep_exercises_both_answers(layout_name: str, scheme_name: str) -> None:
    """A layout holds its own scheme at ordinary shapes, and no other."""
    layout: Layout = load(LAYOUTS, "layout", layout_name)
    owns = {"ct-pack": "W4A16", "ct-float": "FP8_DYNAMIC"}[layout_name] == scheme_name
    assert (layout.reject(preset(scheme_name), 256, 512) is None) == owns


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 20), words=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_words_equal_the_reference_packer(n: int, words: int, seed: int) -> None:
    codes = torch.randint(-8, 8, (n, words * 8), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    reference = pack_to_int32(codes, 4)
    assert torch.equal(pack_words(codes), reference)
    assert torch.equal(unpack_words(reference), codes)
    assert torch.equal(unpack_words(reference), unpack_from_int32(reference, 4, torch.Size(codes.shape)))


def test_words_by_hand() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).view(1, 16)
    assert [hex(word & 0xFFFFFFFF) for word in pack_words(codes)[0].tolist()] == ["0x76543210", "0xfedcba98"]


def test_shape_tensor_is_n_then_k() -> None:
    layout: Layout = load(LAYOUTS, "layout", "ct-pack")
    packed = layout.pack(random_q(preset("W4A16"), 64, 128, torch.bfloat16, 0))
    assert packed["weight_shape"].tolist() == [64, 128]
    assert packed["weight_shape"].dtype == torch.int64


def test_dequantize_by_hand() -> None:
    """Two rows, two groups of two: codes times their group's scale, a negative one included."""
    scheme = preset("W4A16", 2)
    codes = torch.tensor([[-8, 7, 1, 0], [2, -3, 4, 5]], dtype=torch.int8)
    scale = torch.tensor([[0.5, -2.0], [1.0, 0.25]], dtype=torch.bfloat16)
    expected = torch.tensor([[-4.0, 3.5, -2.0, 0.0], [2.0, -3.0, 1.0, 1.25]])
    assert torch.equal(dequantize(QTensor(scheme, codes, scale)), expected)


def test_dequantize_fp8_by_hand() -> None:
    scheme = preset("FP8_DYNAMIC")
    codes = torch.tensor([[448.0, -0.015625], [1.5, 2.0]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.5], [2.0]], dtype=torch.bfloat16)
    assert torch.equal(dequantize(QTensor(scheme, codes, scale)), torch.tensor([[224.0, -0.0078125], [3.0, 4.0]]))


@pytest.mark.parametrize(
    ("n", "k", "group", "reason"),
    [
        (64, 100, 128, "multiple of 8"),
        (64, 136, 128, "group size 128"),
        (64, 128, 128, None),
        (3, 8, WHOLE, None),
    ],
)
def test_pack_rejects_with_a_reason(n: int, k: int, group: int, reason: str | None) -> None:
    layout: Layout = load(LAYOUTS, "layout", "ct-pack")
    found = layout.reject(preset("W4A16", group), n, k)
    assert found is None if reason is None else reason in str(found)
