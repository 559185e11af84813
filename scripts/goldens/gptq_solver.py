"""Golden codes of GPTQ for given scales, made by llm-compressor on the CPU.

usage: python -P scripts/goldens/gptq_solver.py FOLDER        (llmcompressor 0.14)
writes FOLDER/gptq_solver.safetensors; nothing of quantpub is used.

    w           bf16 [12, 160]: one normal weight, columns of several sizes
    x           int8 [256, 160]: inputs, correlated, of very different sizes; x.T @ x / 256 is exact in float32
    CASE.scale, CASE.zero    float32 and int8, given to `quantize_weight`; scales of either sign where there is no zero
    CASE.codes  what it makes of w with them, the Hessian, blocks of 128 columns and a damping of 0.01
CASE is NUM.ORDER: sym, asym (int4, groups of 32) or row (int8, whole rows), and original or falling.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from safetensors.torch import save_file

SEED, ROWS, COLUMNS, TOKENS, GROUP, DAMP = 17, 12, 160, 256, 32, 0.01
PROVENANCE = {"made by": "scripts/goldens/gptq_solver.py", "seed": str(SEED), "device": "cpu"} | {
    name: version(name) for name in ("llmcompressor", "compressed-tensors", "torch")
}
KINDS = {
    "sym": {"num_bits": 4, "strategy": "group", "group_size": GROUP, "symmetric": True},
    "asym": {"num_bits": 4, "strategy": "group", "group_size": GROUP, "symmetric": False},
    "row": {"num_bits": 8, "strategy": "channel", "symmetric": True},
}
ORDERS = {"original": None, "falling": "static"}


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(SEED)
    w = torch.randn(ROWS, COLUMNS) * 0.02 * torch.rand(COLUMNS).add(0.5)
    mixed = torch.randn(TOKENS, 24) @ torch.randn(24, COLUMNS) / 24**0.5 + 0.3 * torch.randn(TOKENS, COLUMNS)
    x = (mixed * torch.logspace(0.3, 1.3, COLUMNS)[torch.randperm(COLUMNS)]).round().clamp(-127, 127)
    return w.bfloat16(), x.to(torch.int8)


def steps(w: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale [R, G] and zero: the range of each group, a little narrowed so that some weights are clipped."""
    group = KINDS[kind].get("group_size", COLUMNS)
    groups, half = w.float().view(ROWS, -1, group), 2 ** (KINDS[kind]["num_bits"] - 1)
    low, high = groups.amin(-1).clamp(max=0) * 0.9, groups.amax(-1).clamp(min=0) * 0.9
    if kind == "asym":
        scale = ((high - low) / (2 * half - 1)).bfloat16().float()
        return scale, (-half - low / scale).round().clamp(-half, half - 1).to(torch.int8)
    scale = (torch.maximum(-low, high) / (half - 0.5)).bfloat16().float()
    return torch.where(high > -low, -scale, scale), torch.zeros_like(scale, dtype=torch.int8)


def solved(w: torch.Tensor, x: torch.Tensor, kind: str, order: str) -> dict[str, torch.Tensor]:
    hessian = (x.double().T @ x.double() / TOKENS).float()
    scale, zero = steps(w, kind)
    args = QuantizationArgs(**KINDS[kind], actorder=ORDERS[order])
    values, _, fallback = quantize_weight(
        w.float()[None].clone(), hessian[None].clone(), scale[None], zero[None], None, args, percdamp=DAMP
    )
    assert not fallback.any()
    each = COLUMNS // scale.shape[1]
    codes = values[0] / scale.repeat_interleave(each, 1) + zero.float().repeat_interleave(each, 1)
    assert (codes - codes.round()).abs().max() < 1e-3
    return {"codes": codes.round().to(torch.int8), "scale": scale, "zero": zero}


def main(folder: Path) -> None:
    w, x = drawn()
    found = {
        f"{kind}.{order}.{name}": part
        for kind in KINDS
        for order in ORDERS
        for name, part in solved(w, x, kind, order).items()
    }
    save_file({"w": w, "x": x, **found}, folder / "gptq_solver.safetensors", metadata=PROVENANCE)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
