"""Golden bytes that only CUDA operators can make: tinygemm's tiles, Marlin's repack, Machete's prepack, vLLM's GPTQ and AWQ.

usage: python scripts/goldens/int4_cuda.py OUT_DIR

Writes torchao_cuda, marlin_cuda, machete_cuda, gptq_cuda and awq_cuda .safetensors, with versions, device and calls in
their metadata. Needs a GPU of compute capability 9.0 (Machete), PyTorch, and vLLM on the path; nothing of quantpub. A
part that fails says so and leaves its file without it; the exit status counts the parts that failed.

Codes, scales and zeros are functions of their position (`hashed`), so that a test can make them again without this host.
Names in the files: `<case>.<tensor>`. N out_features, K in_features, G groups. Of a weight that a kernel made of the
identity, the first rows are kept.
"""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
MASK = 0xFFFFFFFF
KEPT = 16  # rows of a kernel's weight


def hashed(rows: int, columns: int, seed: int) -> torch.Tensor:
    """int64 [rows, columns], 32 mixed bits of seed and position, the same with every version and device of torch."""
    x = (torch.arange(rows * columns, dtype=torch.int64) + 1000003 * (seed + 1)) & MASK
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = ((x ^ (x >> shift)) * factor) & MASK
    return ((x ^ (x >> 15)) & MASK).view(rows, columns)


def codes(n: int, k: int, bits: int, seed: int = 0) -> torch.Tensor:
    """Unsigned codes 0 … 2^bits − 1, int64 [N, K]."""
    return hashed(n, k, seed) >> 7 & (1 << bits) - 1


def scales(g: int, n: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """[G, N]: five-bit mantissas around 1/64, half of them negative; exact in fp16 and bf16."""
    x = hashed(g, n, seed)
    return ((32 + (x & 31)).double() / 2048 * (1 - 2 * (x >> 9 & 1))).to(dtype)


def float_zeros(g: int, n: int, dtype: torch.dtype, seed: int = 2) -> torch.Tensor:
    return (((hashed(g, n, seed) & 63) - 32).double() / 512).to(dtype)


def int32(words: torch.Tensor) -> torch.Tensor:
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def packed_rows(x_RC: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned codes [R, C] → int32 [R·bits/32, C], the first row in the lowest bits: GPTQ's qweight of [K, N] codes."""
    per = 32 // bits
    return int32(sum(x_RC[i::per] << bits * i for i in range(per)))


def packed_columns(x_RC: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Unsigned codes [R, C] → int32 [R, C·bits/32]; order: which column each field of a word holds."""
    per = 32 // bits
    fields = order or tuple(range(per))
    return int32(sum(x_RC[:, column::per] << bits * i for i, column in enumerate(fields)))


def without(arguments: dict[str, object], function: Callable[..., object]) -> dict[str, object]:
    """The arguments that this version of `function` takes: newer vLLMs have no act order."""
    return {name: value for name, value in arguments.items() if name in inspect.signature(function).parameters}


def torchao(out: Tensors) -> None:
    for n, k in ((8, 128), (16, 1024), (24, 2048)):
        c = codes(n, k, 4)
        halves = (c[:, ::2] << 4 | c[:, 1::2]).to(torch.uint8).cuda()
        out[f"n{n}_k{k}.packed"] = torch.ops.aten._convert_weight_to_int4pack(halves, 8)
    for n, k, g in ((16, 256, 32), (8, 512, 128)):
        c = codes(n, k, 4)
        packed = torch.ops.aten._convert_weight_to_int4pack((c[:, ::2] << 4 | c[:, 1::2]).to(torch.uint8).cuda(), 8)
        pairs = torch.stack([scales(k // g, n, torch.bfloat16), float_zeros(k // g, n, torch.bfloat16)], -1).cuda()
        eye = torch.eye(k, dtype=torch.bfloat16, device="cuda")
        y_KN = torch.ops.aten._weight_int4pack_mm(eye, packed, g, pairs.contiguous())
        out[f"eye_n{n}_k{k}_g{g}.packed"], out[f"eye_n{n}_k{k}_g{g}.weight"] = packed, y_KN.t()[:KEPT]


def marlin_repack(out: Tensors) -> None:
    from vllm import _custom_ops as ops

    for bits, n, k in ((4, 64, 128), (4, 128, 64), (4, 192, 128), (8, 64, 128)):
        qweight = packed_rows(codes(n, k, bits).t(), bits).contiguous().cuda()
        extra = without({"perm": torch.empty(0, dtype=torch.int32, device="cuda")}, ops.gptq_marlin_repack)
        out[f"b{bits}_n{n}_k{k}.qweight"] = ops.gptq_marlin_repack(qweight, size_k=k, size_n=n, num_bits=bits, **extra)


def marlin_helpers(out: Tensors) -> None:
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_permute_scales, marlin_zero_points

    for n, k, g in ((64, 128, 32), (128, 256, 128), (192, 128, 64), (64, 128, -1), (128, 64, -1)):
        groups = 1 if g == -1 else k // g
        s = scales(groups, n, torch.bfloat16).cuda()
        out[f"n{n}_k{k}_g{g}.scales"] = marlin_permute_scales(s, size_k=k, size_n=n, group_size=g)
        zeros = codes(groups, n, 4, 3).to(torch.int32).cuda()
        out[f"n{n}_k{k}_g{g}.qzeros"] = marlin_zero_points(zeros, size_k=groups, size_n=n, num_bits=4)


def marlin_product(out: Tensors) -> None:
    """What marlin_gemm makes of the identity: the weight as the kernel sees it, with scales of both signs."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils as utils
    from vllm.scalar_type import scalar_types

    device, empty = torch.device("cuda"), torch.empty(0, dtype=torch.int32, device="cuda")
    cases = (("uint4b8", 4, 32), ("uint4", 4, 32), ("uint8b128", 8, -1), ("uint4b8", 4, -1))
    for kind, bits, g in cases:
        n, k = 64, 128
        groups = 1 if g == -1 else k // g
        qweight = packed_rows(codes(n, k, bits).t(), bits).contiguous().cuda()
        repacked = ops.gptq_marlin_repack(
            qweight, size_k=k, size_n=n, num_bits=bits, **without({"perm": empty}, ops.gptq_marlin_repack)
        )
        s = utils.marlin_permute_scales(scales(groups, n, torch.bfloat16).cuda(), size_k=k, size_n=n, group_size=g)
        zeros = utils.marlin_zero_points(codes(groups, n, 4, 3).to(torch.int32).cuda(), groups, n, 4)
        order = without({"g_idx": empty, "perm": empty, "is_k_full": True}, ops.marlin_gemm)
        y_KN = ops.marlin_gemm(
            a=torch.eye(k, dtype=torch.bfloat16, device=device),
            c=None,
            b_q_weight=repacked,
            b_bias=None,
            b_scales=s,
            a_scales=None,
            global_scale=None,
            b_zeros=zeros if kind == "uint4" else empty,
            workspace=utils.marlin_make_workspace_new(device),
            b_q_type=getattr(scalar_types, kind),
            size_m=k,
            size_n=n,
            size_k=k,
            use_atomic_add=False,
            use_fp32_reduce=True,
            is_zp_float=False,
            **order,
        )
        out[f"eye_{kind}_n{n}_k{k}_g{g}.weight"] = y_KN.t()[:KEPT]


def flat(x: torch.Tensor) -> torch.Tensor:
    """The words in the order of memory, whatever the strides."""
    return torch.as_strided(x, (x.numel(),), (1,), x.storage_offset()).clone()


def machete_prepack(c: torch.Tensor, bits: int, kind: str) -> torch.Tensor:
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    b_q = packed_rows(c.t(), bits).cuda().t().contiguous().t()
    return ops.machete_prepack_B(b_q, torch.bfloat16, getattr(scalar_types, kind), torch.bfloat16)


def machete_repack(out: Tensors) -> None:
    cases = ((4, "uint4b8", 128, 64), (4, "uint4b8", 256, 128), (8, "uint8b128", 128, 128))
    for bits, kind, n, k in cases:
        prepacked = machete_prepack(codes(n, k, bits), bits, kind)
        print(f"machete {kind} N={n} K={k}: shape {tuple(prepacked.shape)}, strides {prepacked.stride()}")
        out[f"{kind}_n{n}_k{k}.prepacked"] = flat(prepacked)


def machete_product(out: Tensors) -> None:
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    for kind, bits, g in (("uint4b8", 4, 64), ("uint4", 4, 64), ("uint8b128", 8, -1)):
        n, k = 128, 64
        groups = 1 if g == -1 else k // g
        s = scales(groups, n, torch.bfloat16).cuda()
        zeros = -1.0 * s * codes(groups, n, 4, 3).to(torch.bfloat16).cuda() if kind == "uint4" else None
        y_KN = ops.machete_mm(
            a=torch.eye(k, dtype=torch.bfloat16, device="cuda"),
            b_q=machete_prepack(codes(n, k, bits), bits, kind),
            b_type=getattr(scalar_types, kind),
            b_group_zeros=zeros,
            b_group_scales=s,
            b_group_size=g,
        )
        out[f"eye_{kind}_n{n}_k{k}_g{g}.weight"] = y_KN.t()[:KEPT]


def gptq(out: Tensors) -> None:
    """vLLM's GPTQ kernel on the identity; v1 zeros, so 7 for the middle of 4 bits."""
    from vllm import _custom_ops as ops

    n, k, g = 64, 128, 32
    for exllama in (False, True):
        qweight = packed_rows(codes(n, k, 4).t(), 4).contiguous().cuda()
        zeros = torch.full((k // g, n // 8), 0x77777777, dtype=torch.int32, device="cuda")
        g_idx = (torch.arange(k, dtype=torch.int32) // g).cuda()
        if exllama:
            g_idx = torch.empty(0, dtype=torch.int32, device="cuda")
            order = {"q_perm": torch.empty(0, dtype=torch.int32, device="cuda")}
            ops.gptq_shuffle(qweight, bit=4, **without(order, ops.gptq_shuffle))
        y_KN = ops.gptq_gemm(
            torch.eye(k, dtype=torch.float16, device="cuda"),
            qweight,
            zeros,
            scales(k // g, n, torch.float16).cuda(),
            use_exllama=exllama,
            use_v2_format=False,
            bit=4,
            **without({"b_g_idx": g_idx}, ops.gptq_gemm),
        )
        out[f"eye_{'exllama' if exllama else 'plain'}_n{n}_k{k}_g{g}.weight"] = y_KN.t()[:KEPT]


def awq(out: Tensors) -> None:
    from vllm import _custom_ops as ops

    n, k, g = 64, 128, 32
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    qweight = packed_columns(codes(n, k, 4).t(), 4, order).contiguous().cuda()
    qzeros = packed_columns(codes(k // g, n, 4, 3), 4, order).contiguous().cuda()
    w_KN = ops.awq_dequantize(qweight, scales(k // g, n, torch.float16).cuda(), qzeros, 0, 0, 0)
    out[f"n{n}_k{k}_g{g}.weight"] = w_KN.t()[:KEPT]


FILES: dict[str, tuple[Callable[[Tensors], None], ...]] = {
    "torchao_cuda": (torchao,),
    "marlin_cuda": (marlin_repack, marlin_helpers, marlin_product),
    "machete_cuda": (machete_repack, machete_product),
    "gptq_cuda": (gptq,),
    "awq_cuda": (awq,),
}


def provenance(parts: tuple[Callable[[Tensors], None], ...]) -> dict[str, str]:
    found = {"made by": "scripts/goldens/int4_cuda.py", "calls": ", ".join(part.__name__ for part in parts)}
    for package in ("torch", "vllm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found | {"device": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda), "seed": "hashed()"}


def main(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name, parts in FILES.items():
        out: Tensors = {}
        for part in parts:
            try:
                part(out)
                torch.cuda.synchronize()
            except Exception:
                failed += 1
                print(f"FAILED {name}: {part.__name__}")
                traceback.print_exc()
        if out:
            tensors = {key: value.detach().cpu().contiguous() for key, value in out.items()}
            save_file(tensors, folder / f"{name}.safetensors", provenance(parts))
            print(f"{name}: {len(tensors)} tensors, {(folder / f'{name}.safetensors').stat().st_size} bytes")
    return failed


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/goldens/int4_cuda.py OUT_DIR")
    sys.exit(main(Path(sys.argv[1])))
