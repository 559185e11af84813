"""What is wrong with a checkpoint by what one run in an engine told, and what to do about each kind of fault.

Limits, in nats per token, beside the base's own run in the same engine:

    KL       FACTOR times what our own evaluation of the checkpoint measured, and NOISE more: FACTOR because the evaluation's text
             is another than the canary's, NOISE because the engine computes in 16 bits, with kernels of its own. On one text
             the two are nearer: of 67 checkpoints in vLLM none was more than 0.0014 nats above our own figure.
             MAX_KL where nothing was measured. At four bits a model of 2 million parameters has 0.2, and larger ones less;
             scales that are swapped give two and more. LOOSE of a format that is not read: at two bits and
             fewer sound checkpoints come near one.
    NLL      the same limit, where only the most likely tokens are compared: their KL is a lower bound, and hides what
             is wrong below them. Of text alone: how likely random ids are says nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_KL, LOOSE = 0.5, 1.0
FACTOR, NOISE = 2.0, 0.05
# a tensor that makes weights of codes, by its last name: not the scales of activations, keys and values
OF_WEIGHTS = re.compile(
    r"(?:weight|(?:gate|up|down|gate_up|w\d+)_proj)_(?:global_|scale_|block_)*(?:scale\w*|zero_point)"
)
OF_WEIGHTS_TOO = ("scales", "qzeros", "SCB", "scale_inv")
BESIDE = ("scale", "zero_point", "g_idx", "bias")  # tensors that are no weights
UNQUANTIZED = "Unquantized"


@dataclass(frozen=True)
class Expected:
    """max_kl: nats per token. basis: where that limit is from. quantized: whether modules are, None: not known."""

    max_kl: float = MAX_KL
    basis: str = "the limit without an evaluation"
    quantized: bool | None = None


@dataclass(frozen=True)
class Fault:
    what: str
    next: str


NOT_LOADED = (
    "read the engine's last line; if it refuses the format, repack it into a layout that it loads "
    "(`quantpub list engines`), if it does not know the model, take a newer version of the engine"
)
CRASH = "load it in the engine alone and read its log: what ends a process is the engine's own fault, or its kernels'"
MISSING = "make the checkpoint again under the names that the engine looks for, or take a version that knows the model"
UNUSED = "serve it with another engine, or repack it into a layout that this one loads (`quantpub list engines`)"
NOT_FINITE = "run it in bfloat16 where it ran in float16, and with another kernel; else quantize again"
TOO_FAR = (
    "where the rules passed with --source, the weights are right and the engine computes with them otherwise: "
    "compare with --engine transformers, and its kernel with `quantpub profile`; else quantize again"
)
REPEATS = "compare with --engine transformers; if it repeats there too, quantize again with more bits"


def faults(facts: Mapping[str, Any], expected: Expected, repeats: bool, text: bool) -> list[Fault]:
    """In the order in which they explain each other. repeats: its continuation, and not the base's. text: so are the ids."""
    found = [_ended(facts) if facts.get("error") else None, _missing(facts["missing"]), _unused(facts["unexpected"])]
    found += [_plain(facts) if expected.quantized and facts["loaded"] else None]
    found += [_far(facts, expected.max_kl, text)]
    if repeats:
        found += [Fault("its text is one token again and again", REPEATS)]
    return [fault for fault in found if fault is not None]


def _ended(facts: Mapping[str, Any]) -> Fault:
    how = "does not run" if facts["loaded"] else "does not load"
    return Fault(f"it {how}: {facts['error']}", CRASH if facts.get("kind") == "crash" else NOT_LOADED)


def _missing(missing: Mapping[str, Any] | None) -> Fault | None:
    if not missing or not missing["count"]:
        return None
    what = f"{missing['count']} tensors are missing and were left as initialized: {missing['names'][0]}"
    return Fault(what, MISSING)


def _unused(unexpected: Mapping[str, Any] | None) -> Fault | None:
    if not unexpected or not unexpected["scales"]:
        return None
    what = f"{unexpected['scale_count']} scales of weights were not used, though the weights were: {unexpected['scales'][0]}"
    return Fault(what, UNUSED)


def ignored_scales(unused: Iterable[str]) -> list[str]:
    """Of the tensors that an engine did not use, scales and zeros of modules whose weights it did use.

    Where the codes are unused too it has no use for the module, as for layers that predict further tokens.
    """
    scales, others = [], set()
    for name in unused:
        module, _, leaf = name.rpartition(".")
        if OF_WEIGHTS.fullmatch(leaf) or leaf in OF_WEIGHTS_TOO:
            scales.append((name, module))
        elif not any(word in leaf for word in BESIDE):
            others.add(module)
    return [name for name, module in scales if module not in others]


def _plain(facts: Mapping[str, Any]) -> Fault | None:
    """Where an engine tells its modules' kernels, or that it has no method for the quantization at all."""
    kernels = facts.get("kernels")
    if kernels and all(UNQUANTIZED in kernel for kernel in kernels.values()):
        return Fault("none of its modules is quantized in the engine", UNUSED)
    if not kernels and "quantizer" in facts and facts["quantizer"] is None:
        return Fault("the engine took no notice of its quantization: none of its modules is quantized there", UNUSED)
    return None


def _far(facts: Mapping[str, Any], limit: float, text: bool) -> Fault | None:
    if facts.get("finite") is False:
        return Fault("its logits are not finite", NOT_FINITE)
    if (kl := facts.get("kl")) is None:
        return None
    if kl["mean"] is None:
        return Fault("KL is not finite: what the base expects, it holds impossible", TOO_FAR)
    if kl["mean"] > limit:
        return Fault(f"KL {kl['mean']:.5f} exceeds {limit} nats per token", TOO_FAR)
    worse = _worsening(facts["perplexity"])
    if not text or kl["over"] == "the whole vocabulary" or worse <= limit:
        return None
    said = f"{worse:.5f} nats" if math.isfinite(worse) else "without bound"
    return Fault(f"the text's own tokens are less likely by {said}, which exceeds {limit} per token", TOO_FAR)


def _worsening(perplexity: Mapping[str, float | None]) -> float:
    """Nats per token of the text that the checkpoint's is worse than the base's; infinite where it has no figure."""
    base, found = perplexity["base"], perplexity["checkpoint"]
    if base is None:
        return 0.0
    return math.inf if found is None else math.log(found) - math.log(base)
