"""Activations rounded as serving kernels round them: by hand, and against a second implementation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpub.activations import fp8_per_group, fp8_per_token, int8_per_token, rounding_of
from quantpub.scheme import PRESETS


def activations(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 3


def test_int8_by_hand() -> None:
    """Scales 2 and 0: halves round to even; a row of zeros stays zeros."""
    x = torch.tensor([[254.0, 3.0, 5.0, -7.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert int8_per_token(x).tolist() == [[254.0, 4.0, 4.0, -8.0, 0.0], [0.0] * 5]


def test_outlier_columns_stay_and_do_not_widen_the_scale() -> None:
    """Column 1 holds 6.5 ≥ 6 in one row: it is left alone in both; the scales are those of amax 1.27 and 2.54.

    In the third row its 5.08 is no outlier, and widens the scale, though the column stays as it is.
    """
    x = torch.tensor([[1.27, 6.5, 0.014], [2.54, 0.001, -0.027], [1.0, 5.08, 0.03]])
    expected = [[1.27, 6.5, 0.01], [2.54, 0.001, -0.02], [1.0, 5.08, 0.04]]
    torch.testing.assert_close(int8_per_token(x, 6.0), torch.tensor(expected), rtol=1e-5, atol=1e-7)
    assert int8_per_token(x)[1, 1] == 0, "without the threshold the row's own scale rounds it away"


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 4), columns=st.integers(1, 300), group=st.sampled_from([16, 128]), seed=st.integers(0, 999))
def test_groups_are_tokens_of_their_own(rows: int, columns: int, group: int, seed: int) -> None:
    x = activations(rows, columns, seed)
    parts = [fp8_per_token(part, 1e-10 / 448) for part in x.split(group, dim=-1)]
    assert torch.equal(fp8_per_group(x, group), torch.cat(parts, dim=-1))


def test_groups_equal_the_reference_implementation() -> None:
    """compressed-tensors' own fake quantization with dynamic groups of 128, whose scale is amax / 448."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    x = activations(8, 512, 5)
    scale = x.view(8, 4, 128).abs().amax(-1) / 448
    arguments = QuantizationArgs(
        num_bits=8, type="float", symmetric=True, strategy="group", group_size=128, dynamic=True
    )
    reference = fake_quantize(x, scale, torch.zeros_like(scale), arguments)
    torch.testing.assert_close(fp8_per_group(x, 128), reference, rtol=1e-6, atol=0)


def test_int8_equals_torch_fake_quantization() -> None:
    x = activations(16, 256, 6)
    for row, rounded in zip(x, int8_per_token(x), strict=True):
        reference = torch.fake_quantize_per_tensor_affine(row, float(row.abs().max() / 127), 0, -128, 127)
        torch.testing.assert_close(rounded, reference, rtol=1e-5, atol=1e-6)


def test_every_scheme_is_rounded_or_takes_a_calibrated_scale() -> None:
    for scheme in PRESETS.values():
        if scheme.act is None:
            continue
        rounding = rounding_of(scheme.act)
        assert (rounding is None) == (not scheme.act.dynamic or scheme.act.global_scale), scheme.name
        if rounding is not None:
            x = activations(4, 256, 1)
            error = (rounding(x) - x).abs()
            assert error.max() > 0 and (error.norm() / x.norm()) < 0.04


@pytest.mark.parametrize("name", ["W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "LLM_INT8"])
def test_leading_dimensions_are_kept(name: str) -> None:
    act = PRESETS[name].act
    assert act is not None
    rounding = rounding_of(act)
    assert rounding is not None
    x = activations(6, 256, 2).view(2, 3, 256)
    assert torch.equal(rounding(x), rounding(x.view(6, 256)).view(2, 3, 256))
