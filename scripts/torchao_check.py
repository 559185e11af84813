"""Loads tile-packed checkpoints through transformers and torchao on a GPU, and compares them with torchao's own HQQ.

usage: python scripts/torchao_check.py OUT.json BASE TOKENS.json ARTIFACT ...     (a CUDA host with transformers, torchao)

Perplexity and KL to the bf16 base (nats per token), all through tinygemm in bf16; windows of token ids from TOKENS.json.
`torchao` is the base quantized on the spot by torchao: int4, groups of 128, HQQ, tile-packed.
"""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from provenance import made_by, write


def load(folder: str, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map="cuda", output_loading_info=True, **options
    )
    problems = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    return model.eval(), problems


def quantized_by_torchao(base: str) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig
    from transformers import TorchAoConfig

    config = Int4WeightOnlyConfig(
        group_size=128, int4_packing_format="tile_packed_to_4d", int4_choose_qparams_algorithm="hqq"
    )
    return load(base, quantization_config=TorchAoConfig(config, modules_to_not_convert=["lm_head"]))


@torch.no_grad()
def log_probs(model: Any, x_BT: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(part.cuda()).logits.float().log_softmax(-1).cpu() for part in x_BT.split(4)])


def kinds(model: Any) -> dict[str, int]:
    """Tensor classes of the linears: what the loader really made."""
    found: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            name = type(module.weight.data if hasattr(module.weight, "data") else module.weight).__name__
            found[name] = found.get(name, 0) + 1
    return found


def figures(model: Any, problems: dict[str, list[str]], x_BT: torch.Tensor, base: torch.Tensor) -> dict[str, Any]:
    found = log_probs(model, x_BT)
    nll = -found[:, :-1].gather(-1, x_BT[:, 1:, None]).mean().item()
    kl_B = (base.exp() * (base - found)).sum(-1).mean(-1)
    return {
        "perplexity": round(math.exp(nll), 4),
        "kl": round(kl_B.mean().item(), 5),
        "kl_stderr": round((kl_B.std() / math.sqrt(len(kl_B))).item(), 5),
        "linears": kinds(model),
        "loader_said": problems,
    }


def main(out: str, base: str, tokens: str, *folders: str) -> None:
    x_BT = torch.tensor(json.loads(Path(tokens).read_text()))
    model, problems = load(base)
    reference = log_probs(model, x_BT)
    rows = {"bf16": figures(model, problems, x_BT, reference)}
    makers: dict[str, Any] = {"torchao": lambda: quantized_by_torchao(base)} | {f: partial(load, f) for f in folders}
    for name, make in makers.items():
        try:
            rows[Path(name).name] = figures(*make(), x_BT, reference)
        except Exception as error:  # said in the evidence, not hidden
            rows[Path(name).name] = {"failed": f"{type(error).__name__}: {error!s:.300}"}
        print(name, rows[Path(name).name])
    made = made_by("scripts/torchao_check.py", ("torch", "torchao", "transformers"), windows=list(x_BT.shape))
    write(out, made, rows=rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
