"""Rules about what is not there: weights that were to be quantized and are not, and tensors that the architecture needs.

Known failures: experts left in bf16 with exit code 0, 91 % of the weights; experts that were not written at all; a head that
was lost. None of it is an error to an engine's loader.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping

from quantpub.actions import QUANTIZE
from quantpub.adopt.generic import GENERIC
from quantpub.families import EMBEDDING, HEAD, LINEAR
from quantpub.layouts.base import CT
from quantpub.lookup import looked_up, method_of, readers
from quantpub.verify.base import Finding, Subject, first
from quantpub.verify.structure import bits_of_ours

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.+)")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


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
    return {module for module in plain if roles[module] == LINEAR and _engine_name(module, answers) in reached}


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
    packed = [
        line for line in lines if line["action"] != QUANTIZE and _holds_experts(subject, line["as"], line["shape"])
    ]
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


def _holds_experts(subject: Subject, name: str, shape: list[int]) -> bool:
    return len(shape) == 3 and (bool(subject.decoder.family().expert_members(name)) or ".experts." in name)


def complete(subject: Subject) -> Finding:
    """Every layer has what the others of its kind have, every expert too; embedding and head are there."""
    family, config = subject.decoder.family(), subject.held.text_config
    if family is GENERIC:
        return first(
            [], f"architecture {config.get('model_type')!r} is not known here: only files and names were compared"
        )
    problems = [] if subject.ours else subject.opened.adopted.said("complete")
    lines = subject.decoder.actions
    roles = Counter(line["role"] for line in lines)
    if not roles[EMBEDDING]:
        problems.append("there is no embedding")
    tied = config.get("tie_word_embeddings", subject.held.config.get("tie_word_embeddings", False))
    if not tied and not any(line["role"] == HEAD and "lm_head" in line["as"] for line in lines):
        problems.append("there is no lm_head, and the config does not tie it to the embedding")
    layers = _layers([str(line["as"]) for line in lines])
    count = config.get("num_hidden_layers")
    problems += [f"layer {i} is missing" for i in range(int(count or 0)) if i not in layers]
    problems += _incomplete(layers)
    problems += _experts([str(line["as"]) for line in lines], config)
    return first(problems, f"{len(layers)} layers, {len(lines)} tensors")


def _layers(names: list[str]) -> dict[int, frozenset[str]]:
    """layer → the names of its tensors, experts counted as one."""
    found: dict[int, set[str]] = {}
    for name in names:
        if match := LAYER.fullmatch(name):
            found.setdefault(int(match[1]), set()).add(re.sub(r"\.experts\.\d+\.", ".experts.", match[2]))
    return {layer: frozenset(parts) for layer, parts in found.items()}


def _incomplete(layers: Mapping[int, frozenset[str]]) -> list[str]:
    """Layers that lack something which another one has that has all of theirs."""
    kinds = Counter(layers.values())
    problems = []
    for layer, parts in sorted(layers.items()):
        if whole := next((other for other in kinds if parts < other), None):
            problems.append(f"layer {layer} lacks {min(whole - parts)}, which other layers have")
    return problems


def _experts(names: list[str], config: Mapping[str, object]) -> list[str]:
    found: dict[str, dict[str, set[int]]] = {}
    for name in names:
        if match := EXPERT.fullmatch(name):
            found.setdefault(match[1], {}).setdefault(match[3], set()).add(int(match[2]))
    stated = next((value for key in EXPERTS if isinstance(value := config.get(key), int)), None)
    problems = []
    for prefix, members in sorted(found.items()):
        due = set(range(stated)) if stated else set().union(*members.values())
        for member, there in members.items():
            if missing := sorted(due - there):
                problems.append(f"{prefix}.{missing[0]}.{member} is missing ({len(missing)} of {len(due)} experts)")
    return problems
