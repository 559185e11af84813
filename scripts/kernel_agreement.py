"""Multiplies with the kernels themselves and compares with `dequantize`: does each kernel see the weight we mean?

usage: python scripts/kernel_agreement.py OUT.json ARTIFACT ...        (a CUDA host with vLLM on the path, or any CPU)

For every merged GEMM of an artifact, one of each shape, experts one by one, the artifact's own bytes go to every kernel of
`quantpub.kernels` that reads them; torch's own 8-bit kernels are given what the bytes mean. Two products: the identity, which
returns the kernel's weight itself, and random activations. Reported: the part of the weights that equals dequantize(q)
rounded to bf16 bit for bit, the largest difference in units of the last bf16 place of the row's largest weight, and the
relative error of the random product (8-bit activations have an error of their own). A kernel that should take such a weight
and cannot is listed with the reason.

Evidence of before the kernels were the package's own says torch-scaled-mm for torch-fp8, and fp4-marlin for mxfp4-marlin.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from provenance import made_by, write

from quantpub.artifact import Artifact
from quantpub.decode import Decoder
from quantpub.gemms import engine_gemms
from quantpub.kernels import BASELINE, KERNELS
from quantpub.kernels.base import Kernel, Operands, Weight
from quantpub.kernels.check import limit
from quantpub.kernels.choices import own_weight
from quantpub.qtensor import QTensor, dequantize
from quantpub.registry import load
from quantpub.scheme import NUMBERS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DENSE = (BASELINE, "dequantized")  # they multiply by dequantize(q), and so agree
ROOMY = 1024  # a side that every kernel's tiles divide
M = 64


def suited(weight: Weight) -> Iterator[Kernel]:
    """Those for such weights on this device, whether or not the shape fits them."""
    for name in KERNELS:
        kernel = load(KERNELS, "kernel", name)
        runs_here = name not in DENSE and DEVICE in kernel.devices
        if runs_here and kernel.refuses(weight.q.scheme, weight.layout, ROOMY, ROOMY) is None:
            yield kernel


def rows(folder: str) -> Iterator[dict[str, Any]]:
    decoder = Decoder(Artifact.open(Path(folder)))
    for gemm in engine_gemms(decoder.artifact, decoder):
        weight = own_weight(decoder, gemm, DEVICE, 1)
        q = weight.q
        row = {"artifact": Path(folder).name, "scheme": q.scheme.name, "layout": weight.layout}
        row |= {"gemm": gemm.name, "n": gemm.n, "k": gemm.k}
        row |= {"negative_scales": int((q.scale.float() < 0).sum()), "scales": q.scale.numel()}
        for kernel in suited(weight):
            yield row | {"kernel": kernel.name} | agreement(kernel, weight)


def agreement(kernel: Kernel, weight: Weight) -> dict[str, Any]:
    if reason := kernel.refuses(weight.q.scheme, weight.layout, *weight.q.shape) or kernel.unavailable():
        return {"failed": reason}
    try:
        return compared(kernel, weight.q, kernel.prepare(weight))
    except Exception as error:  # said in the evidence, not hidden
        return {"failed": f"{type(error).__name__}: {error!s:.300}"}


def unit(kernel: Kernel, q: QTensor) -> float:
    """The identity's 1, of a size that makes the kernel's own scale of a token exactly 1, so that only the weight is seen.

    Not for groups: there 448 · code · scale lies on ties of bf16, which the last bit of a float32 product decides. Calibrated
    activations are as large as their scale allows.
    """
    if kernel.split is None or q.scheme.act is None:
        return 1.0
    if (high := limit(q)) is not None:
        return float(high)
    return NUMBERS[kernel.split.num].high if q.scheme.act.granularity == "token" else 1.0


def met(kernel: Kernel, x_KK: torch.Tensor, operands: Operands) -> float:
    """What the kernel multiplies by in place of the identity's ones: them, but as a calibrated scale rounds them."""
    if kernel.split is None or kernel.split.calibrated is None:
        return float(x_KK[0, 0])
    return float(kernel.split.dequantize(kernel.split.activations(x_KK, operands))[0, 0])


def compared(kernel: Kernel, q: QTensor, operands: Operands) -> dict[str, Any]:
    w_NK, k = dequantize(q), q.shape[1]
    x_KK = torch.eye(k, dtype=torch.bfloat16, device=DEVICE).mul_(unit(kernel, q))
    seen_NK, due_NK = kernel.run(x_KK, operands).t(), (w_NK * met(kernel, x_KK, operands)).bfloat16()
    off_NK = (seen_NK.float() - due_NK.float()).abs()
    last = torch.exp2(torch.floor(torch.log2(due_NK.float().abs().amax(1, keepdim=True).clamp_min(1e-30))) - 7)
    x_MK = torch.randn(M, k, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    if (high := limit(q)) is not None:
        x_MK *= high / x_MK.abs().amax()
    x_MK = x_MK.bfloat16()
    y_MN, expected_MN = kernel.run(x_MK, operands).float(), x_MK.float() @ w_NK.t()
    return {
        "equal_bits": round(float((seen_NK == due_NK).float().mean()), 6),
        "largest_difference_bf16_ulp": round(float((off_NK / last).max()), 4),
        "product_relative_error": round(float((y_MN - expected_MN).norm() / expected_MN.norm()), 6),
    }


def made() -> dict[str, object]:
    command, settings = "scripts/kernel_agreement.py", {"seed": 0, "m": M}
    if DEVICE == "cuda":
        return made_by(command, ("torch", "vllm"), cuda=torch.version.cuda, **settings)
    return {"command": command, "versions": {"torch": torch.__version__}, "device": DEVICE, **settings}


def main(out: str, *folders: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    found = [row for folder in folders for row in rows(folder)]
    for row in found:
        print(json.dumps(row))
    write(out, made(), rows=found)


if __name__ == "__main__":
    main(*sys.argv[1:])
