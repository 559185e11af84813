"""What is handed to vLLM's ops, on stand-ins for them that compute what the ops are known to compute.

The stand-ins take the arguments of vLLM's functions by name, in both generations of signatures, and unpack what they are
given with the layouts `marlin` and `machete`, whose bytes are those of vLLM's own repacking. They show that prepared
weights, number types, sizes and groups arrive as they should, not that the ops themselves do.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_kernels_gpu_rejects import ASYM, W4, W8, integers, kernel, nvfp4, packed

from quantpub.activations import fp8_per_group, fp8_per_token, int8_per_token
from quantpub.kernels import fp4, vllm_common
from quantpub.kernels.base import Weight
from quantpub.kernels.check import PROBE_ROWS, check, check_split, make_probe
from quantpub.layouts import machete as machete_layout
from quantpub.layouts import marlin as marlin_layout
from quantpub.layouts.words import unpack_nibbles
from quantpub.qtensor import QTensor, dequantize
from quantpub.scheme import WHOLE, Scheme, preset

KINDS = {"uint4b8": (4, "int4", "none"), "uint4": (4, "int4", "int"), "uint8b128": (8, "int8", "none")}


def scheme_of(kind: str, groups: int, k: int) -> Scheme:
    base = {"uint4b8": W4, "uint4": ASYM, "uint8b128": W8}[kind]
    return preset(base.name, WHOLE if groups == 1 else k // groups)


def gptq_marlin_repack(b_q_weight: torch.Tensor, size_k: int, size_n: int, num_bits: int) -> torch.Tensor:
    assert b_q_weight.is_contiguous() and b_q_weight.shape == (size_k * num_bits // 32, size_n)
    codes = (vllm_common.fields(b_q_weight.t().contiguous(), num_bits) - (1 << (num_bits - 1))).to(torch.int8)
    return marlin_layout.pack(QTensor(W4 if num_bits == 4 else W8, codes, torch.ones(size_n, 1)))["qweight"]


def old_repack(b_q_weight: torch.Tensor, perm: torch.Tensor, size_k: int, size_n: int, num_bits: int) -> torch.Tensor:
    assert perm.numel() == 0 and perm.dtype == torch.int32
    return gptq_marlin_repack(b_q_weight, size_k, size_n, num_bits)


def apply_marlin(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zp: torch.Tensor | None,
    workspace: torch.Tensor,
    wtype: str,
    output_size_per_partition: int,
    input_size_per_partition: int,
) -> torch.Tensor:
    shape = (output_size_per_partition, input_size_per_partition)
    assert workspace.dtype == torch.int32 and not workspace.any()
    scheme = scheme_of(wtype, len(weight_scale), shape[1])
    tensors = {"qweight": weight, "scales": weight_scale}
    if weight_zp is not None:
        tensors["qzeros"] = weight_zp
    return input @ dequantize(marlin_layout.unpack(tensors, scheme, shape)).t().bfloat16()


def old_apply(*, g_idx: None, g_idx_sort_indices: None, is_k_full: bool, **rest: Any) -> torch.Tensor:
    assert is_k_full and g_idx is None and g_idx_sort_indices is None
    return apply_marlin(**rest)


def marlin_zero_points(zp: torch.Tensor, size_k: int, size_n: int, num_bits: int) -> torch.Tensor:
    assert zp.shape == (size_k, size_n) and zp.min() >= 0
    return marlin_layout.pack_zeros((zp - 8).to(torch.int8))


def permute_scales(s: torch.Tensor, size_k: int, size_n: int, group_size: int) -> torch.Tensor:
    assert s.shape == (1 if group_size == WHOLE else size_k // group_size, size_n)
    return marlin_layout.permute_scales(s)


def machete_prepack_B(
    b_q_weight: torch.Tensor, a_type: torch.dtype, b_type: str, group_scales_type: torch.dtype
) -> torch.Tensor:
    assert b_q_weight.stride(0) == 1 and a_type == group_scales_type == torch.bfloat16
    bits = KINDS[b_type][0]
    codes = (vllm_common.fields(b_q_weight.t(), bits) - (1 << (bits - 1))).to(torch.int8)
    plain = QTensor(W4 if bits == 4 else W8, codes, torch.ones(len(codes), 1))
    return machete_layout.pack(plain)["b_q"]


def machete_mm(
    a: torch.Tensor,
    b_q: torch.Tensor,
    b_type: str,
    b_group_scales: torch.Tensor,
    b_group_zeros: torch.Tensor | None,
    b_group_size: int,
) -> torch.Tensor:
    k, n = a.shape[1], b_group_scales.shape[1]
    groups = len(b_group_scales)
    assert b_group_size == (WHOLE if groups == 1 else k // groups) and (b_group_zeros is not None) == (
        b_type == "uint4"
    )
    plain = preset("W4A16" if KINDS[b_type][0] == 4 else "W8A16", WHOLE if groups == 1 else k // groups)
    codes = machete_layout.unpack({"b_q": b_q, "b_group_scales": b_group_scales}, plain, (n, k)).codes_NK.float()
    if b_group_zeros is None:
        return a @ (codes * b_group_scales.t().repeat_interleave(k // groups, 1).float()).t().bfloat16()
    wide = [t.t().repeat_interleave(k // groups, 1).float() for t in (b_group_scales, b_group_zeros)]
    return a @ ((codes + 8) * wide[0] + wide[1]).t().bfloat16()


def scaled(rounding: Callable[[torch.Tensor], torch.Tensor], high: float, dtype: torch.dtype) -> Any:
    """Codes and scales of activations, from the values that the rounding gives."""

    def quantize(x: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        scale = x.float().abs().amax(-1, keepdim=True) / high
        return (rounding(x.float()) / scale).round_(decimals=4).to(dtype), scale

    return quantize


def int8_quant(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    codes, scale = scaled(int8_per_token, 127, torch.float32)(x)
    return codes.round().to(torch.int8), scale, None


def fp8_quant(
    x: torch.Tensor, scale: torch.Tensor | None = None, use_per_token_if_dynamic: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    if scale is not None:
        return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale
    assert use_per_token_if_dynamic
    codes, scale = scaled(fp8_per_token, 448, torch.float8_e4m3fn)(x)
    return codes, scale


def group_quant(
    x: torch.Tensor, group_size: int, column_major_scales: bool = False, use_ue8m0: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    assert not use_ue8m0
    scale = x.float().unflatten(1, (-1, group_size)).abs().amax(-1) / 448
    codes = (fp8_per_group(x.float(), group_size) / scale.repeat_interleave(group_size, 1)).to(torch.float8_e4m3fn)
    return codes, scale.t().contiguous().t() if column_major_scales else scale


def spread(scale: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """numpy's rules, and those of blocks."""
    if scale.dim() < 2:
        return scale
    rows, columns = (shape[i] // scale.shape[i] for i in (0, 1))
    return scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def cutlass_scaled_mm(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    assert b.stride(0) == 1 and a.dtype == b.dtype and scale_a.dtype == scale_b.dtype == torch.float32
    if scale_b.shape == (b.shape[1], 1):
        scale_b = scale_b.t()
    wide_a, wide_b = spread(scale_a, tuple(a.shape)), spread(scale_b, tuple(b.shape))
    return ((a.float() * wide_a) @ (b.float() * wide_b)).to(out_dtype)


def triton_mm(
    A: torch.Tensor,
    B: torch.Tensor,
    As: torch.Tensor,
    Bs: torch.Tensor,
    block_size: list[int],
    output_dtype: torch.dtype,
) -> torch.Tensor:
    assert As.is_contiguous() and block_size == [128, 128]
    return cutlass_scaled_mm(A, B.t(), As, Bs.t(), output_dtype)


def prepare_fp4_layer_for_marlin(layer: Any) -> None:
    """Decoded here, so that whatever arrives is what the product is made of."""
    n, k = layer.output_size_per_partition, layer.input_size_per_partition
    assert layer.weight.shape == (n, k // 2) and layer.params_dtype == torch.bfloat16
    nv = hasattr(layer, "weight_global_scale")
    scale = layer.weight_scale.float() if nv else layer.weight_scale.view(torch.float8_e8m0fnu).float()
    layer.weight = torch.nn.Parameter(layer.weight.data.clone(), requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(scale.t().contiguous(), requires_grad=False)


def apply_fp4_marlin_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_global_scale: torch.Tensor | None,
    workspace: torch.Tensor,
    size_n: int,
    size_k: int,
) -> torch.Tensor:
    assert weight_scale.shape == (size_k // (16 if weight_global_scale is not None else 32), size_n)
    values = fp4.code_values(unpack_nibbles(weight), "fp4_e2m1")
    w = values * weight_scale.t().repeat_interleave(size_k // len(weight_scale), 1)
    return input @ (w if weight_global_scale is None else w * weight_global_scale).t().bfloat16()


def modules(new: bool) -> dict[str, Any]:
    utils = "model_executor.layers.quantization.utils."
    return {
        "_custom_ops": SimpleNamespace(
            gptq_marlin_repack=gptq_marlin_repack if new else old_repack,
            machete_prepack_B=machete_prepack_B,
            machete_mm=machete_mm,
            scaled_int8_quant=int8_quant,
            scaled_fp8_quant=fp8_quant,
            cutlass_scaled_mm=cutlass_scaled_mm,
        ),
        "scalar_type": SimpleNamespace(scalar_types=SimpleNamespace(**{name: name for name in KINDS})),
        utils + "marlin_utils": SimpleNamespace(
            marlin_permute_scales=permute_scales,
            marlin_make_workspace_new=lambda device: torch.zeros(132, dtype=torch.int32, device=device),
            marlin_zero_points=marlin_zero_points,
            apply_gptq_marlin_linear=apply_marlin if new else old_apply,
        ),
        utils + "marlin_utils_fp4": SimpleNamespace(
            prepare_fp4_layer_for_marlin=prepare_fp4_layer_for_marlin, apply_fp4_marlin_linear=apply_fp4_marlin_linear
        ),
        utils + "fp8_utils": SimpleNamespace(
            per_token_group_quant_fp8=group_quant, w8a8_triton_block_scaled_mm=triton_mm
        ),
    }


@pytest.fixture(params=[False, True], ids=["vllm up to 0.29", "vllm from 0.30"])
def stand_ins(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_common, "vllm", modules(request.param).__getitem__)


def sound(name: str, weight: Weight) -> None:
    """Checked as before a timing, on clones too: a timer rotates those."""
    found, probe = kernel(name), make_probe(weight.q)
    assert found.refuses(weight.q.scheme, weight.layout, *weight.q.shape) is None
    for operands in ((own := found.prepare(weight)), tuple(tensor.clone() for tensor in own)):
        check_split(found, "g", operands, probe, weight.q)
        for m in (1, PROBE_ROWS):
            check(found, "g", operands, probe, m)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", ["marlin", "machete"])
@pytest.mark.parametrize(
    ("layout", "scheme"),
    [
        ("ct-pack", W4),
        ("ct-pack", ASYM),
        ("ct-pack", W8),
        ("ct-pack", preset("W4A16", WHOLE)),
        ("gptq", W4),
        ("gptq", W8),
        ("awq", W4),
        ("awq", ASYM),
    ],
)
def test_integer_kernels_multiply_by_the_weight_that_the_file_holds(name: str, layout: str, scheme: Scheme) -> None:
    sound(name, packed(integers(scheme, 256, 256), layout))


def floats(name: str, n: int = 256, k: int = 256) -> QTensor:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(n, k, generator=generator).mul_(100).to(torch.float8_e4m3fn)
    scheme = preset(name)
    scale = 0.001 + 0.003 * torch.rand(scheme.weight.scale_shape(n, k), generator=generator)
    act = torch.tensor(0.01) if name == "FP8" else None
    return QTensor(scheme, codes, scale.bfloat16() if name == "FP8_DYNAMIC" else scale, input_scale=act)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("name", "layout", "scheme"),
    [
        ("cutlass-fp8", "ct-float", "FP8_DYNAMIC"),
        ("cutlass-fp8-static", "ct-float", "FP8"),
        ("cutlass-fp8-static", "modelopt-fp8", "FP8"),
        ("cutlass-fp8-block", "ct-float", "FP8_BLOCK"),
        ("cutlass-fp8-block", "hf-fp8", "FP8_BLOCK"),
        ("triton-fp8-block", "hf-fp8", "FP8_BLOCK"),
    ],
)
def test_fp8_kernels_multiply_by_the_weight_that_the_file_holds(name: str, layout: str, scheme: str) -> None:
    sound(name, packed(floats(scheme), layout))


@pytest.mark.usefixtures("stand_ins")
def test_int8_multiplies_by_the_weight_that_the_file_holds() -> None:
    sound("cutlass-int8", packed(integers(preset("W8A8")), "ct-int"))


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("layout", fp4.LAYOUTS)
@pytest.mark.parametrize("scheme", ["NVFP4", "NVFP4A16"])
def test_marlin_takes_global_scales_of_either_convention(layout: str, scheme: str) -> None:
    sound("fp4-marlin", packed(nvfp4(scheme, 128, 256), layout))


@pytest.mark.usefixtures("stand_ins")
def test_marlin_takes_mxfp4() -> None:
    codes = torch.randint(0, 16, (128, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scale = torch.randint(118, 126, (128, 8), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    sound("mxfp4-marlin", packed(QTensor(preset("MXFP4A16"), codes, scale), "ct-mxfp4"))
