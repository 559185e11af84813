"""How engines look up a module in the other methods' configs, each a function (engine, config, stored) → (module → Answer).

    modelopt     ignore or exclude_modules. vLLM: the name or all its members; the entry anywhere in the name; a glob.
                 SGLang: an entry as dotted parts of the path; a glob of the name or of one part of it
    gptq         dynamic: patterns of the engine's own name, `-:` leaves out, others override; vLLM also reads
                 modules_in_block_to_quantize, parts of names, and where it is absent what is stored
    awq          modules_to_not_convert: anywhere in the name
    fp8          ignored_layers, else modules_to_not_convert. vLLM: whole names; SGLang: dotted parts of the path
    torchao      vLLM only. modules_to_not_convert: dotted parts of the engine's own name; the keys of FqnToConfig: names
                 and patterns of the whole name. Neither experts nor a head
    auto-round   extra_config: names and patterns; block_name_to_quantize: how names start

stored: the modules whose weights are quantized. Sources: vllm .../quantization/{modelopt,auto_gptq,auto_awq,fp8,torchao}.py,
inc/config_parser.py, utils/{quant_utils,gptq_utils}.py; sglang .../quantization/{modelopt_quant,fp8,auto_round,utils}.py,
gptq/gptq.py and awq/awq.py. vLLM takes `path*` for `path` and `path.*` where a model renames modules; it is read so here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from quantpub.lookup_names import EXPERTS, HEAD, LINEAR, NOTHING, SGLANG, Answer, Module, error, ignored, pattern

Lookup = Callable[[Module], Answer]
Match = Callable[[str], str | None]  # a name → the entry that reaches it
_SOME = "the config leaves out some of its members and not all of them"
_GLUED = (
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
)  # SGLang seeks these inside the last part of a name


def modelopt(engine: str, config: Mapping[str, Any], stored: Collection[str]) -> Lookup:
    inner = config.get("quantization") if isinstance(config.get("quantization"), dict) else None
    source = inner or config
    entries = list(source.get("exclude_modules" if inner else "ignore") or source.get("exclude_modules") or [])
    algo = str(source.get("quant_algo") or "modelopt").upper()
    layers = source.get("quantized_layers") or {}
    skip = _modelopt_sglang(entries) if engine == SGLANG else _modelopt_vllm(entries)

    def look(module: Module) -> Answer:
        left = skip(module)
        if left.kind != "quantized":
            return left
        return _per_layer(module, layers) if algo == "MIXED_PRECISION" else Answer("quantized", "", algo)

    return look


def _modelopt_vllm(entries: Sequence[str]) -> Lookup:
    globs = [part for entry in entries for part in _split_star(entry)]

    def look(module: Module) -> Answer:
        left = _whole_names(globs, module)
        if left.kind != "quantized":
            return left
        for entry in globs:
            if entry in module.name or fnmatchcase(module.name, entry):
                return ignored(entry)
        return left

    return look


def _split_star(entry: str) -> list[str]:
    return [entry[:-1], f"{entry[:-1]}.*"] if len(entry) > 1 and entry[-1] == "*" and entry[-2] != "." else [entry]


def _modelopt_sglang(entries: Sequence[str]) -> Lookup:
    compiled = [(entry, pattern(entry.replace(".", r"\.").replace("*", ".*"))) for entry in entries]
    glued = {entry: tail for entry in entries if (tail := entry.rpartition(".")[2]) in _GLUED}

    def look(module: Module) -> Answer:
        left = Answer("quantized") if module.kind == EXPERTS else _paths(entries, module)
        if left.kind != "quantized":
            return left
        for entry, glob in compiled:
            if any(glob.fullmatch(part) for part in (module.name, *module.name.split("."))):
                return ignored(entry)
        last = module.name.rpartition(".")[2]
        return next((ignored(entry) for entry, tail in glued.items() if tail in last), left)

    return look


def _per_layer(module: Module, layers: Mapping[str, Any]) -> Answer:
    names = [name for name in (module.name, *module.shards) if name in layers]
    if not names and module.kind == EXPERTS:
        names = [name for name in layers if name.startswith(f"{module.name}.")][:1]
    algos = sorted({str(layers[name].get("quant_algo", "")).upper() for name in names})
    if len(algos) > 1 and module.name not in layers:
        return error(f"quantized_layers gives its members {' and '.join(algos)}")
    return Answer("quantized", names[0], algos[0]) if names else NOTHING


def _members(match: Match, module: Module) -> Answer:
    """All of the members or none."""
    found = [match(member) for member in module.shards or (module.name,)]
    if any(entry is not None for entry in found) and None in found:
        return error(f"{_SOME}, by {next(entry for entry in found if entry is not None)!r}")
    return ignored(found[0]) if found[0] is not None else Answer("quantized")


def _whole_names(entries: Collection[str], module: Module) -> Answer:
    """vLLM's exact match: the merged name, or all members; experts where an entry lies within them."""
    if module.name in entries:
        return ignored(module.name)
    if "experts" in module.name and not module.shards:
        within = (entry for entry in entries if "experts" in entry and module.name in entry)
        return next((ignored(entry) for entry in within), Answer("quantized"))
    return _members(lambda name: name if name in entries else None, module)


def _paths(entries: Sequence[str], module: Module) -> Answer:
    """SGLang's match of dotted parts; it looks at the members of a merged linear, never at its merged name."""
    found = _members(lambda name: _path(entries, name), module)
    if found.kind == "quantized" and "experts" in module.name and not module.shards:
        within = (entry for entry in entries if "experts" in entry and module.name in entry)
        return next((ignored(entry) for entry in within), found)
    return found


def _path(entries: Iterable[str], name: str) -> str | None:
    return next((entry for entry in entries if f".{entry.rstrip('.')}." in f".{name}."), None)


def gptq(engine: str, config: Mapping[str, Any], stored: Collection[str]) -> Lookup:
    rules = [_rule(key, value) for key, value in (config.get("dynamic") or {}).items()]
    listed = _flat(config.get("modules_in_block_to_quantize") or []) or list(stored)

    def look(module: Module) -> Answer:
        if module.kind == HEAD and not config.get("lm_head"):
            return NOTHING
        if engine == SGLANG and module.kind == EXPERTS:
            return Answer("quantized", "", "gptq")
        if engine != SGLANG and module.kind != EXPERTS:
            reached = _members(lambda name: next((part for part in listed if part in name), None), module)
            if listed and reached.kind != "ignored":
                return NOTHING if reached.kind == "quantized" else reached
        return next((answer for glob, answer in rules if glob.match(module.name)), Answer("quantized", "", "gptq"))

    return look


def _rule(key: str, value: Any) -> tuple[Any, Answer]:
    if key.startswith("-:"):
        return pattern(key[2:]), ignored(key)
    return pattern(key.removeprefix("+:")), Answer("quantized", key, f"gptq {json.dumps(value, sort_keys=True)}")


def _flat(value: Any) -> list[str]:
    return [part for item in value for part in _flat(item)] if isinstance(value, list) else [str(value)]


def awq(engine: str, config: Mapping[str, Any], stored: Collection[str]) -> Lookup:
    entries = config.get("modules_to_not_convert") or []

    def within(name: str) -> str | None:
        return next((entry for entry in entries if entry in name), None)

    def look(module: Module) -> Answer:
        if module.kind == HEAD and not config.get("lm_head"):
            return NOTHING
        if engine != SGLANG and not entries and module.kind == LINEAR:  # it leaves out what is not stored quantized
            found = _members(lambda name: None if name in stored else "", module)
        elif (entry := within(module.name)) is not None:
            return ignored(entry)
        else:
            found = _members(within, module) if engine != SGLANG else Answer("quantized")
        return Answer("quantized", "", "awq") if found.kind == "quantized" else found

    return look


def fp8(engine: str, config: Mapping[str, Any], stored: Collection[str]) -> Lookup:
    first = config.get("ignored_layers")
    entries = list(first or config.get("modules_to_not_convert") or [])
    if engine == SGLANG:
        bases = [entry.removeprefix("model.") for entry in entries]
        entries = [name for base in bases for name in (base, f"model.{base}")]

    def look(module: Module) -> Answer:
        if module.kind == HEAD:
            return NOTHING
        found = _paths(entries, module) if engine == SGLANG else _whole_names(entries, module)
        return Answer("quantized", "", "fp8") if found.kind == "quantized" else found

    return look


def torchao(engine: str, config: Mapping[str, Any], stored: Collection[str]) -> Lookup:
    kind = (config.get("quant_type") or {}).get("default") or {}
    data = kind.get("_data") if isinstance(kind, dict) and isinstance(kind.get("_data"), dict) else {}
    keys: Mapping[str, Any] = (data or {}).get("module_fqn_to_config") or (data or {}).get("fqn_to_config") or {}
    entries = [*(config.get("modules_to_not_convert") or []), *(key for key, value in keys.items() if value is None)]
    patterns = [(key, pattern(key[3:])) for key in keys if key.startswith("re:")]

    def look(module: Module) -> Answer:
        if module.kind != LINEAR:
            return NOTHING
        if (entry := _path(entries, module.name)) is not None:
            return ignored(entry)
        if not keys:
            return Answer("quantized", "", "torchao")
        named = next((key for key, glob in patterns if glob.fullmatch(module.name)), "_default")
        key = module.name if module.name in keys else named
        return NOTHING if keys.get(key) is None else Answer("quantized", key, _short(keys[key]))

    return look


def _short(value: Any) -> str:
    return f"torchao {json.dumps(value, sort_keys=True)}"


_Treated = tuple[int, Any, Any, str]  # bits, group size, symmetric, and the entry that says so


def auto_round(engine: str, config: Mapping[str, Any], stored: Collection[str]) -> Lookup:
    """An entry of a module's own name that states no bits leaves it out in vLLM, and keeps the config's in SGLang."""
    extra: Mapping[str, Any] = config.get("extra_config") or {}
    blocks = config.get("block_name_to_quantize") or config.get("to_quant_block_names") or []
    starts = tuple(blocks.split(",") if isinstance(blocks, str) else _flat(blocks))
    globs = [(key, pattern(key)) for key in extra if set(key) & set("*+?^$()[]{}|\\")]

    def entry(name: str) -> str | None:
        return name if name in extra else next((key for key, glob in globs if _reaches(engine, glob, name)), None)

    def of(name: str, quantized: bool) -> _Treated:
        key = entry(name)
        own = extra[key] if key is not None else {}
        base = config if quantized else {"bits": 16, "group_size": -1}
        bits, size = (own.get(part, base.get(part)) for part in ("bits", "group_size"))
        return int(bits or 16), size, own.get("sym", base.get("sym", True)), key or ""

    def look(module: Module) -> Answer:
        own = next((key for key in (module.name, f"model.{module.name}") if key in extra), None)
        if engine != SGLANG and own is not None and int(extra[own].get("bits", 16)) >= 16:
            return ignored(own)
        tail = next((key for key in extra if module.name.endswith(f".{key}")), None) if engine != SGLANG else None
        if module.name in extra or tail is not None:
            return _treated(of(module.name if module.name in extra else str(tail), True))
        quantized = module.name.startswith(starts) if starts else module.kind != HEAD
        names = [key for key in extra if key.startswith(module.name)] if module.kind == EXPERTS else [*module.shards]
        if not extra or (engine != SGLANG and (module.kind == EXPERTS or not any(map(entry, names)))):
            names = []
        found = [of(name, quantized) for name in names] or [of(module.name, quantized)]
        if len({each[:3] for each in found}) > 1:
            return error("extra_config treats its members differently")
        return _treated(found[0])

    return look


def _treated(found: _Treated) -> Answer:
    bits, size, symmetric, key = found
    if bits >= 16:
        return ignored(key) if key else NOTHING
    stated = {"bits": bits, "group_size": size, "sym": symmetric}
    return Answer("quantized", key, f"auto-round {json.dumps(stated, sort_keys=True)}")


def _reaches(engine: str, glob: Any, name: str) -> bool:
    return bool(glob.fullmatch(name) if engine == SGLANG else glob.search(name))
