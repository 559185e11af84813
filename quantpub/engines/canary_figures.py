"""What two runs of an engine on the same ids say of each other: KL in nats, equal first choices, perplexity, text.

KL(base ‖ checkpoint) and equal first choices are means over every position that both files hold, the largest KL is of one
position, perplexity is over every position that has a next token. The standard error is over windows, as in stage `eval`.
Where an engine gave only its K most likely tokens, those that both gave and all others as one are compared: by the
data-processing inequality that is at most the true KL, and is said to be a lower bound.

Legend: T positions, V vocabulary, K most likely tokens, S pairs of equal ids.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROWS = 64  # positions compared at a time: a row of a vocabulary is 600 kB
TINY = 1e-12
DIGITS = 7


@dataclass(frozen=True)
class Window:
    """kl_T, same_T: of each position. nlls: nats per token of the base and the checkpoint. whole: of the whole vocabulary."""

    kl_T: torch.Tensor
    same_T: torch.Tensor
    nlls: tuple[float, float]
    whole: bool


class Unlike(Exception):
    """The two runs cannot be compared; its text says why."""


def figures(base: Path, found: Path, windows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """kl, top1_agreement, perplexity of both. Errors: Unlike."""
    rows = [_window(_read(base, i), _read(found, i), ids) for i, ids in enumerate(windows)]
    kls = [float(row.kl_T.mean()) for row in rows]
    count = sum(row.kl_T.numel() for row in rows)
    return {
        "kl": {
            "unit": "nats per token",
            "mean": _figure(statistics.fmean(kls)),
            "stderr": _stderr(kls),
            "max": _figure(max(float(row.kl_T.max()) for row in rows)),
            "tokens": count,
            "over": "the whole vocabulary"
            if all(row.whole for row in rows)
            else "the most likely tokens, a lower bound",
        },
        "top1_agreement": _figure(sum(float(row.same_T.sum()) for row in rows) / count),
        "perplexity": {
            name: _perplexity([row.nlls[i] for row in rows]) for i, name in enumerate(("base", "checkpoint"))
        },
    }


def _read(folder: Path, window: int) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(folder / f"window-{window}.safetensors")
    return tensors


def _window(base: dict[str, torch.Tensor], found: dict[str, torch.Tensor], ids: Sequence[int]) -> Window:
    if "logprobs_TV" in base and "logprobs_TV" in found:
        base_TV, found_TV = base["logprobs_TV"], found["logprobs_TV"]
        if base_TV.shape != found_TV.shape:
            raise Unlike(f"the base gave {list(base_TV.shape)} logits, the checkpoint {list(found_TV.shape)}")
        nlls = (own_nll(base_TV, ids), own_nll(found_TV, ids))
        pieces = zip(base_TV.split(ROWS), found_TV.split(ROWS), strict=True)
        kl_T = torch.cat([divergence(one_TV, other_TV) for one_TV, other_TV in pieces])
        return Window(kl_T, base_TV.argmax(-1) == found_TV.argmax(-1), nlls, True)
    if "top_ids_TK" not in base or "top_ids_TK" not in found:
        raise Unlike("one run gave whole rows of logits, the other only the most likely tokens")
    same_T = base["top_ids_TK"][:, 0] == found["top_ids_TK"][:, 0]
    return Window(coarse(base, found), same_T, (_mean_nll(base["own_T"]), _mean_nll(found["own_T"])), False)


def divergence(base_TV: torch.Tensor, found_TV: torch.Tensor) -> torch.Tensor:
    """KL of each position from log-probabilities. What the base holds impossible counts nothing."""
    p_TV = base_TV.exp()
    return torch.where(p_TV > 0, p_TV * (base_TV - found_TV), 0.0).sum(-1)


def coarse(base: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> torch.Tensor:
    """KL of each position over the base's own tokens and all others as one: at most the true one.

    To a token of the base that the other does not name it gives no more than to the last that it names.
    """
    equal_TKK = base["top_ids_TK"][:, :, None] == found["top_ids_TK"][:, None, :]
    p_TK, theirs_TK = base["top_logprobs_TK"].double().exp(), found["top_logprobs_TK"].double().exp()
    named_TK = (theirs_TK[:, None, :] * equal_TKK).sum(2)
    q_TK = torch.where(equal_TKK.any(2), named_TK, theirs_TK.amin(1, keepdim=True))
    p_TS = torch.cat([p_TK, (1 - p_TK.sum(1, keepdim=True)).clamp(min=0)], 1)
    q_TS = torch.cat([q_TK, torch.ones_like(q_TK[:, :1])], 1)  # the others have one at most
    return (p_TS * (p_TS.clamp(min=TINY) / q_TS.clamp(min=TINY)).log()).sum(1).clamp(min=0).float()


def own_nll(rows_TV: torch.Tensor, ids: Sequence[int]) -> float:
    """Nats per token of the window's own tokens; rows_TV may leave out the last position."""
    following = torch.tensor(ids[1:])
    return _mean_nll(rows_TV[: len(following)].gather(-1, following[:, None]))


def _mean_nll(own: torch.Tensor) -> float:
    return -float(own.double().mean())


def _perplexity(nlls: list[float]) -> float | None:
    mean = statistics.fmean(nlls)
    return _figure(math.exp(mean)) if mean < 700 else None  # NaN is not below


def _stderr(values: list[float]) -> float | None:
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return _figure(statistics.stdev(values) / math.sqrt(len(values)))


def _figure(value: float) -> float | None:
    return round(value, DIGITS) if math.isfinite(value) else None


def repeats(tokens: Sequence[int]) -> bool:
    """Whether a continuation is one token again and again."""
    return len(tokens) >= 8 and len(set(tokens)) == 1


def texts(prompt: Sequence[int], found: dict[str, Any], base: dict[str, Any] | None) -> dict[str, Any]:
    """The continuation beside the base's: where they part, and how their lengths compare."""
    said = {"prompt": list(prompt), **found}
    if base is None:
        return said
    pairs = zip(found["tokens"], base["tokens"], strict=False)
    same = next(
        (i for i, (one, other) in enumerate(pairs) if one != other), min(len(found["tokens"]), len(base["tokens"]))
    )
    ratio = round(len(found["tokens"]) / len(base["tokens"]), 4) if base["tokens"] else None
    return {**said, "base": base, "equal_tokens": same, "length_ratio": ratio}
