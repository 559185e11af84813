"""Golden results of half-quadratic quantization, made by hqq and torchao on the CPU.

usage: python -P scripts/goldens/hqq.py FOLDER        (hqq 0.2.8.post1, torchao 0.18)
writes FOLDER/hqq.safetensors; nothing of quantpub is used.

    w                bf16 [6, 256]: rows of normal, heavy-tailed and shifted weights of several sizes, groups of 128
    hqq.codes, .scale, .zero    what `optimize_weights_proximal_legacy` makes of it with its default parameters, begun as
                     hqq's Quantizer begins: w ≈ (codes − zero) · scale, codes 0…15, float32
    inert.codes, .zero          the same with beta 1e-9, under which the shrinkage is zero whatever the error
    x, shrunk.P.BETA    errors, and what `shrink_lp_op` leaves of them
    torchao.codes, .scale, .zero    `_choose_qparams_and_quantize_affine_hqq` in bf16: w ≈ (codes − 8) · scale + zero
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from hqq.core.optimize import optimize_weights_proximal_legacy, shrink_lp_op
from safetensors.torch import save_file
from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq

SEED, GROUP = 11, 128
PROVENANCE = {"made by": "scripts/goldens/hqq.py", "seed": str(SEED), "device": "cpu"} | {
    name: version(name) for name in ("hqq", "torchao", "torch")
}
SHRINKS = ((0.7, 1.0), (0.7, 10.0), (0.5, 3.0))
DEFAULTS = {"lp_norm": 0.7, "beta": 1e1, "kappa": 1.01, "iters": 20}


def weights() -> torch.Tensor:
    torch.manual_seed(SEED)
    normal, shifted = torch.randn(2, 256) * 0.02, torch.randn(2, 256) * 0.01 + 0.008
    tailed = torch.distributions.StudentT(4.0).sample((2, 256)) * 0.01
    return torch.cat([normal, tailed, shifted]).bfloat16()


def legacy(w: torch.Tensor, **changed: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    groups = w.float().view(-1, GROUP)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = 15 / (high - low)
    zero = torch.round(-low * scale)
    codes, scale, zero = optimize_weights_proximal_legacy(
        groups, scale, zero, [0, 15], axis=1, device="cpu", opt_params=DEFAULTS | changed
    )
    shape = (len(w), -1)
    return codes.to(torch.uint8).view(w.shape), (1 / scale).reshape(shape), zero.reshape(shape)


def main(folder: Path) -> None:
    w = weights()
    names = ("codes", "scale", "zero")
    found = dict(zip((f"hqq.{name}" for name in names), legacy(w), strict=True))
    inert_codes, _, inert_zero = legacy(w, beta=1e-9)
    made = _choose_qparams_and_quantize_affine_hqq(
        w, nbits=4, group_size=GROUP, axis=1, compute_dtype=torch.bfloat16, device="cpu"
    )
    codes, scale, zero = made[:3]
    other = {
        "torchao.codes": codes,
        "torchao.scale": scale.reshape(len(w), -1),
        "torchao.zero": zero.reshape(len(w), -1),
    }
    x = torch.linspace(-3, 3, 100)  # zero is not among them: its negative power is infinite
    shrunk = {f"shrunk.{p}.{beta}": shrink_lp_op(x, beta, p) for p, beta in SHRINKS}
    tensors = {"w": w, "x": x, **shrunk, **found, "inert.codes": inert_codes, "inert.zero": inert_zero, **other}
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "hqq.safetensors", metadata=PROVENANCE)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
