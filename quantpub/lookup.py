"""What vLLM and SGLang make of a checkpoint's modules, by name alone, and whether that is what the weights are.

A checkpoint whose names resolve wrongly loads without a word: a quantized weight is read as bf16, a bf16 weight as codes, or
a merged linear takes one member's scheme for all. Rules of the lookups: lookup_names.py, lookup_ct.py, lookup_others.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from quantpub import lookup_others as others
from quantpub.layouts.base import CT
from quantpub.lookup_ct import CtNames, loaded_by
from quantpub.lookup_names import (
    EXPERTS,
    HEAD,
    NOTHING,
    SGLANG,
    TITLES,
    VLLM,
    VLLM_25,
    Answer,
    Fused,
    Module,
    alone,
    asks,
    engine_modules,
    error,
)

_HEADS = ("lm_head", "language_model.lm_head")
_BOTH = (VLLM, VLLM_25, SGLANG)
_MALFORMED = (ValueError, TypeError, AttributeError, KeyError, OverflowError)  # of what strangers wrote
_OTHERS: dict[str, tuple[tuple[str, ...], Callable[[str, Mapping[str, Any], Collection[str]], others.Lookup]]] = {
    "modelopt": (_BOTH, others.modelopt),
    "gptq": (_BOTH, others.gptq),
    "awq": (_BOTH, others.awq),
    "fp8": (_BOTH, others.fp8),
    "torchao": ((VLLM, VLLM_25), others.torchao),
    "auto-round": (_BOTH, others.auto_round),
}


def method_of(config: Mapping[str, Any]) -> str:
    """The `quant_method`; "" where nothing says it. ModelOpt's variants count as one."""
    nested = isinstance(config.get("quantization"), dict) and "quant_algo" in config["quantization"]
    method = (
        str(config.get("quant_method") or ("modelopt" if nested else "")).lower().replace("auto_round", "auto-round")
    )
    return "modelopt" if method.startswith("modelopt") else CT if method == "compressed_tensors" else method


def readers(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The engines that look names up in a config of this method; none where the method is not known here."""
    method = method_of(config)
    return _BOTH if method == CT else _OTHERS[method][0] if method in _OTHERS else ()


def looked_up(
    engine: str,
    config: Mapping[str, Any],
    linears: Iterable[str],
    fused: Fused,
    stored: Collection[str] = (),
    model_type: str = "",
) -> dict[str, Answer]:
    """Engine module → what `config` (a quantization_config) says of it, of each module that the engine asks for.

    engine: vllm, vllm-0.25 or sglang. linears: the checkpoint's linears, quantized or not. fused: the family's. stored: the
    quantized ones, which some methods infer from the file. model_type: routers are asked for in few models only.
    """
    look = _lookup(engine, config, stored)
    modules = engine_modules(linears, fused)
    return {module.name: look(module) for module in modules if asks(engine, module, model_type)}


def _lookup(engine: str, config: Mapping[str, Any], stored: Collection[str]) -> others.Lookup:
    """The engine's answers; every one is an error where the config is not made as its method makes them."""
    assert engine in readers(config), f"{engine} has no lookup for {method_of(config)!r}"
    try:
        look = _found_by(engine, config, stored)
    except _MALFORMED as problem:
        answer = error(f"the config cannot be read: {problem}")
        return lambda module: answer

    def guarded(module: Module) -> Answer:
        try:
            return look(module)
        except _MALFORMED as problem:
            return error(f"the config cannot be read: {problem}")

    return guarded


def _found_by(engine: str, config: Mapping[str, Any], stored: Collection[str]) -> others.Lookup:
    if method_of(config) == CT:
        return CtNames(engine, config).answer
    return _OTHERS[method_of(config)][1](engine, config, stored)


def name_problems(
    config: Mapping[str, Any],
    quantized: Mapping[str, Any],
    unquantized: Collection[str],
    fused: Fused,
    model_type: str = "",
    without: Collection[str] = (),
) -> list[str]:
    """One sentence for each way in which engines take modules for what their weights are not; alike layers share one.

    quantized: module → anything that is equal for equal schemes. unquantized: every other linear, router and head.
    without: engines that are not asked about experts in high precision, since they load none.
    """
    modules = engine_modules([*quantized, *unquantized], fused)
    looks = {engine: _lookup(engine, config, set(quantized)) for engine in readers(config)}
    found = _Findings()
    for module in modules:
        if mixed := _mixed(module, quantized):
            found.add((), module, mixed)
            continue
        kept = module.kind == EXPERTS and module.members[0] not in quantized
        asked = [e for e in looks if asks(e, module, model_type) and not (kept and e in without)]
        answers = {engine: looks[engine](module) for engine in asked}
        if clash := _clash(answers):
            found.add((), module, clash)
            continue
        for engine, answer in answers.items():
            if wrong := _wrong(module, answer, quantized) or _drawn(module, answer, looks[engine]):
                found.add((engine,), module, wrong)
    return found.sentences()


def head_problems(config: Mapping[str, Any], unquantized: Iterable[str]) -> list[str]:
    """A head in high precision that engines leave alone, and that transformers takes for quantized: it needs an entry in ignore.

    unquantized: linears that are not quantized; of heads only those with weights of their own.
    """
    heads = [name for name in unquantized if name.rpartition(".")[2] == "lm_head"] if method_of(config) == CT else []
    try:  # within other models the head has one name in the file, and another in the class
        found = {head: [loaded_by(config, name) for name in (head, *_HEADS)] for head in heads}
    except _MALFORMED:
        return []  # said of every module
    return [
        f"transformers: {head}: its weights are in high precision, but it is looked up as quantized, by {by[0]!r}: it would be "
        "loaded with scales that no file holds"
        for head, by in found.items()
        if all(by)
    ]


def _mixed(module: Module, quantized: Mapping[str, Any]) -> str | None:
    kinds: dict[str, str] = {}
    for member in module.members:
        if member in quantized:
            kinds.setdefault(str(quantized[member]), member)
    kept = next((member for member in module.members if member not in quantized), None)
    leaf = _inner(module)
    if kinds and kept is not None:
        return f"engines hold it in one module, but {leaf(kept)} is not quantized and {leaf(next(iter(kinds.values())))} is"
    if len(kinds) > 1:
        listed = " and ".join(f"{leaf(member)} {kind}" for kind, member in kinds.items())
        return f"engines hold it in one module, but its members are of different schemes: {listed}"
    return None


def _inner(module: Module) -> Callable[[str], str]:
    prefix = f"{module.name}." if module.kind == EXPERTS else module.name.rpartition(".")[0] + "."
    return lambda member: member.removeprefix(prefix)


def _clash(answers: Mapping[str, Answer]) -> str | None:
    said = {engine: answer for engine, answer in answers.items() if answer.kind != "error"}
    if len({answer.scheme for answer in said.values()}) < 2:
        return None
    return "engines disagree: " + "; ".join(f"{TITLES[engine]}: {said[engine].described()}" for engine in said)


def _wrong(module: Module, answer: Answer, quantized: Mapping[str, Any]) -> str | None:
    stored = module.members[0] in quantized
    if answer.kind == "error":
        return answer.by
    if stored and answer == NOTHING and module.kind == HEAD:
        return "its weights are quantized, but nothing names it, and a class name as `Linear` does not reach a head"
    if stored != (answer.kind == "quantized"):
        is_not = "quantized" if stored else "in high precision"
        return f"its weights are {is_not}, but it is looked up as {answer.described()}"
    return None


def _drawn(module: Module, answer: Answer, look: others.Lookup) -> str | None:
    """Of a quantized module whose members, each asked for by its own name, would have another scheme."""
    if not module.shards or answer.kind != "quantized":
        return None
    for member in module.shards:
        own = look(alone(member))
        if own.kind == "quantized" and own.scheme != answer.scheme:
            leaf = member.rpartition(".")[2]
            return f"looked up as {answer.described()}; {leaf} by itself is {own.described()}"
    return None


class _Findings:
    """Sentences that differ in digits alone, as those of layers do, count as one."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Module, str, list[str], set[str]]] = {}

    def add(self, engines: tuple[str, ...], module: Module, text: str) -> None:
        form = re.sub(r"\d+", "#", f"{module.name} {text}")
        _, _, who, where = self._seen.setdefault(form, (module, text, [], set()))
        who += [engine for engine in engines if engine not in who]
        where.add(module.name)

    def sentences(self) -> list[str]:
        return [self._sentence(*entry) for entry in self._seen.values()]

    def _sentence(self, module: Module, text: str, engines: list[str], where: set[str]) -> str:
        # vLLM 0.25 is named where it stands alone
        named = [TITLES[engine] for engine in engines if engine != VLLM_25 or VLLM not in engines]
        who = f"{' and '.join(named)}: " if named else ""
        more = f" (and {len(where) - 1} modules alike)" if len(where) > 1 else ""
        return f"{who}{module.name}: {text}{more}"
