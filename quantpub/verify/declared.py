"""Rules about what a checkpoint declares: whether engines parse it, find every module by it, and what it says of the cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpub.ct_config import ct_problems, problems_of_method
from quantpub.kv_cache import ATTENTION
from quantpub.kv_check import kv_problems, scale_of
from quantpub.layouts.base import CT
from quantpub.lookup import head_problems, method_of, name_problems, readers
from quantpub.lookup_names import TITLES, VLLM, VLLM_25, asks, engine_modules
from quantpub.targets import TARGETS
from quantpub.tp_cut import tp_table
from quantpub.verify.base import Finding, Problem, Subject, failed, first
from quantpub.verify.engine import kinds
from quantpub.verify.language import language
from quantpub.verify.left_out import left_out
from quantpub.verify.whole import tied

AGREE = "hf_quant_config.json is read first"  # so begins what the two files of ModelOpt say differently
ENGINES = ("vLLM", "SGLang", "TensorRT-LLM")  # a sentence that begins so is about what that engine does not load
TABLES = {VLLM_25: VLLM}  # whose table of layouts speaks for a lookup

IGNORE = "name the head in ignore, as llm-compressor does"
UNMERGED = "serve it with transformers, which merges nothing, or quantize again with a scale a row or a tensor"


def parses(subject: Subject) -> Finding:
    """Known failure: a config of a newer tool that the engine's pinned library refuses, or one that engines read otherwise."""
    stated = subject.stated
    beside = (
        "quantization_config" in subject.held.config
    )  # where the file is all there is, there is nothing to agree with
    nested = (subject.held.json("hf_quant_config.json") or None) if beside else None
    problems = ct_problems(stated) if method_of(stated) == CT else problems_of_method(stated, nested)
    problems += _beside(stated, subject.held.json("quantize_config.json"), "quantize_config.json")
    meant = {TARGETS[name].summary for name in subject.artifact.run().get("engines", [])} if subject.ours else set()
    told = [p for p in problems if p.startswith(ENGINES) and not any(engine in p.partition(":")[0] for engine in meant)]
    refused = [problem for problem in told if AGREE not in problem]
    said = f"; refused by {'; '.join(refused)}" if refused else ""
    return first(
        [problem for problem in problems if problem not in refused],
        f"{method_of(stated)}: well-formed{said}",
    )


def _beside(stated: Mapping[str, Any], other: Mapping[str, Any], name: str) -> list[str]:
    """What the file beside config.json says otherwise: engines differ in which of the two they read."""
    keys = ("group_size", "bits", "sym", "desc_act", "checkpoint_format")
    pairs = [(key, stated.get(key), other.get(key)) for key in keys if key in stated and key in other]
    return [f"{name} says {key} = {theirs}, config.json {ours}" for key, ours, theirs in pairs if ours != theirs]


def names(subject: Subject) -> Finding:
    """Known failure: names that engines resolve differently, or a pattern that reaches more than was meant."""
    config, fused = subject.held.text_config, subject.decoder.family().fused
    missed = left_out(subject)
    plain = [module for module in subject.plain if module not in missed]
    unasked = _unasked(subject)
    model_type = str(config.get("model_type", ""))
    problems = name_problems(subject.stated, subject.quantized, plain, fused, model_type, unasked)
    problems += _never_asked(subject)
    problems += [Problem(text, IGNORE) for text in ([] if tied(subject) else head_problems(subject.stated, plain))]
    modules = len(engine_modules([*subject.quantized, *plain], fused))
    rest = "".join(f"; experts not as {TITLES[e]} has them: {why}" for e, why in unasked.items() if e != VLLM_25)
    return first(
        problems, f"{modules} modules of the engines, {len(subject.quantized)} quantized linears in them{rest}"
    )


def _unasked(subject: Subject) -> dict[str, str]:
    """Engines that load no experts in high precision beside these quantized linears → why."""
    layouts = sorted({layout for layout, _, _, kept in kinds(subject.decoder) if kept})
    loads = {engine: TARGETS[TABLES.get(engine, engine)].loads for engine in readers(subject.stated)}
    found = {engine: [held[layout].kept for layout in layouts if layout in held] for engine, held in loads.items()}
    return {engine: reasons[0] for engine, reasons in found.items() if reasons and reasons[0]}


def _never_asked(subject: Subject) -> list[str]:
    """Quantized modules that engines hold in high precision whatever the config says: they would not find their weights."""
    engines, model_type = readers(subject.stated), str(subject.held.text_config.get("model_type", ""))
    modules = engine_modules(subject.quantized, subject.decoder.family().fused)
    asked = {m for module in modules for m in module.members if any(asks(e, module, model_type) for e in engines)}
    odd = [module for module in subject.quantized if module not in asked]
    more = f" (and {len(odd) - 1} modules alike)" if len(odd) > 1 else ""
    return [f"{odd[0]} is quantized, and engines hold it in high precision{more}"] if odd and engines else []


def kv_cache(subject: Subject) -> Finding:
    """Known failure: a declared FP8 cache without calibrated scales, which clips keys and values."""
    held = subject.held
    scales = [name for name in held.place if scale_of(name)]
    values = {name: float(held.tensor(name)) if held.info(name).nbytes <= 8 else None for name in scales}
    problems = kv_problems(subject.stated, values, sorted(_attentions(subject)))
    if method_of(subject.stated) == "modelopt":  # its exporter raises every scale to 1 at least
        problems = [
            problem for problem in problems if "every scale of the KV cache is 1.0" not in problem or subject.ours
        ]
    return first(problems, f"{len(scales)} scales" if scales else "none is declared")


def _attentions(subject: Subject) -> set[str]:
    """Those of the language model's own layers, by the checkpoint's names: layers that predict further tokens have no scales."""
    count, found = subject.held.text_config.get("num_hidden_layers"), set()
    for name in (str(line["as"]) for line in subject.decoder.actions):
        own = language(name)
        here = ATTENTION.match(own)
        if here and not (isinstance(count, int) and int(here[1]) >= count):
            found.add(name.removesuffix(own[here.end() :]))
    return found


def tensor_parallel(subject: Subject) -> Finding:
    """Known failure: a group or block that a GPU's share would cut through, found out when it is served."""
    decoder = subject.decoder
    parts = {
        module: (t.scheme, t.layout, n, k) for module, (n, k) in decoder.modules() for t in [decoder.treated(module)]
    }
    table = tp_table(parts, decoder.family(), subject.held.text_config)
    said = {str(size): reasons[0] if reasons else "ok" for size, reasons in table.items()}
    subject.figures["tensor_parallel"] = said
    asked = subject.tp or 1
    if asked not in table:
        return failed(f"{subject.tp} GPUs are not one of {', '.join(said)}")
    alone = _unmerged(subject) if asked == 1 else ""
    problems = [] if alone else [_uncut(asked, why) for why in table[asked][:1]]
    if subject.ours:
        recorded = subject.artifact.run()["stages"]["quantize"].get("tensor_parallel", {})
        problems += [
            f"run.json says of {size} GPUs {recorded[size]}, the tensors {found}"
            for size, found in said.items()
            if recorded.get(size, found) != found
        ]
    short = {size: "yes" if found == "ok" else "no" for size, found in said.items()}
    if alone and table[1]:
        short["1"] = f"by {alone}; no engine that merges linears takes it: {table[1][0]}"
    return first(problems, "; ".join(f"{size}: {found}" for size, found in short.items()))


def _unmerged(subject: Subject) -> str:
    """The engines that one of ours was made for, where none of them merges linears; else nothing."""
    meant = subject.artifact.run().get("engines", []) if subject.ours else []
    return "" if any(TARGETS[name].merges for name in meant) else " and ".join(TARGETS[name].summary for name in meant)


def _uncut(size: int, why: str) -> str:
    if size > 1:
        return f"it cannot be cut for {size} GPUs: {why}"
    return Problem(f"no engine that merges linears takes it: {why}", UNMERGED)
