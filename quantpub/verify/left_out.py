"""The rule of bits: number formats are those declared, and no weights were left out that were to be quantized.

Known failures: experts left in bf16 with exit code 0, 91 % of the weights; FP8 weights in what is called NVFP4. None of it is
an error to an engine's loader.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from quantpub.actions import QUANTIZE
from quantpub.adopt.base import FLOATS
from quantpub.families import LINEAR
from quantpub.layouts.base import CT
from quantpub.lookup import looked_up, method_of, readers
from quantpub.verify.base import Finding, Subject, first
from quantpub.verify.structure import bits_of_ours

EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.+)")

# Linears that engines hold in high precision whatever a config says
PLAIN = re.compile(r".*\.(eh_proj|shared_head\.head|indexer\.weights_proj)")


def left_out(subject: Subject) -> set[str]:
    """Linears that the config declares quantized, and that stand in high precision."""
    engines, plain = readers(subject.stated), set(subject.plain)
    if not engines or subject.ours:
        return set()
    linears = [*subject.quantized, *subject.plain]
    config, fused = subject.held.text_config, subject.decoder.family().fused
    model_type = str(config.get("model_type", ""))
    answers = looked_up(engines[0], subject.stated, linears, fused, list(subject.quantized), model_type)
    roles = {str(line["as"]).removesuffix(".weight"): line["role"] for line in subject.decoder.actions}
    everything = (
        method_of(subject.stated) != CT
    )  # a compressed-tensors config names what it means; others mean every linear
    reached = {
        name
        for name, answer in answers.items()
        if answer.kind == "quantized" or (everything and answer.kind == "nothing")
    }
    return {
        module
        for module in plain
        if roles[module] == LINEAR and not PLAIN.fullmatch(module) and _engine_name(module, answers) in reached
    }


def _engine_name(module: str, answers: Mapping[str, object]) -> str:
    """The engine's module that holds an expert; any other by itself: members of merged modules are the matter of `names`."""
    found = EXPERT.match(f"{module}.")
    return found[1] if found and found[1] in answers else module


def bits(subject: Subject) -> Finding:
    """Bits on disk are those declared: a number format is what it is called, and nothing large was left out."""
    if subject.ours:
        return bits_of_ours(subject)
    problems = subject.opened.adopted.said("bits")
    lines = subject.decoder.actions
    family = subject.decoder.family()
    packed = [line for line in lines if line["action"] != QUANTIZE and _left_whole(subject, line)]
    problems += [
        f"{line['as']} holds experts {line['shape']} in {line['dtype']}: they were left out of the quantization"
        for line in packed
    ]
    if missed := left_out(subject):
        sizes = {str(line["as"]).removesuffix(".weight"): math.prod(line["shape"]) for line in lines}
        share = 100 * sum(sizes[module] for module in missed) / sum(sizes.values())
        problems.append(
            f"{len(missed)} linears that the config declares quantized stand in high precision, {share:.0f} % of all "
            f"parameters: {min(missed)}"
        )
    total = sum(info.nbytes for tensors, _ in subject.held.headers.values() for info in tensors.values())
    parameters = sum(math.prod(line["shape"]) for line in lines)
    assert family is not None
    return first(problems, f"{8 * total / max(1, parameters):.2f} bits over all parameters")


def _left_whole(subject: Subject, line: Mapping[str, Any]) -> bool:
    """Whether a 3-D parameter holds experts, in high precision, that the config does not ask to be so."""
    name, shape = str(line["as"]), line["shape"]
    members = subject.decoder.family().expert_members(name)
    if len(shape) != 3 or line["dtype"] not in FLOATS or not (members or ".experts." in name):
        return False
    prefix = f"{name.rpartition('.experts.')[0]}.experts"
    experts = [f"{prefix}.0.{member}" for member in ("gate_proj", "up_proj", "down_proj")]
    fused, model_type = subject.decoder.family().fused, str(subject.held.text_config.get("model_type", ""))
    engines = readers(subject.stated)
    answers = [looked_up(e, subject.stated, experts, fused, (), model_type).get(prefix) for e in engines]
    return not (answers and all(answer and answer.kind == "ignored" for answer in answers))
