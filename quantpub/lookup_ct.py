"""How engines look up a module in a compressed-tensors config. An entry is a name, `re:` and a pattern, or a class name.

    vLLM 0.33            ignore: merged name, else all members or none     target: name → members → class
    vLLM 0.25            ignore: members, all or none                      target: name → class → members
    SGLang 0.5.23        ignore: members, all or none; by suffix too       target: name → class → members, or an error

Patterns match from the start (`re.match`) and need not reach the end: `re:.*v_proj` matches qkv_proj. A class name counts
where the class of the engine's module contains it: `Linear` reaches every linear and the experts, never a head. Of merged
members that match targets one by one, the first member's is taken for all. Of experts, those of expert 0 are asked, by
gate_proj, up_proj and down_proj whatever their names (vLLM 0.33: by their names).
transformers goes by the library's own match, to which a head is a Linear, too.
Sources: vllm .../quantization/compressed_tensors/{utils,compressed_tensors}.py and compressed_tensors_moe.py;
sglang .../quantization/compressed_tensors/{utils,compressed_tensors}.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from quantpub.lookup_names import EXPERTS, HEAD, NOTHING, SGLANG, VLLM, Answer, Entries, Module, error, ignored

_CLASSES = {"linear": "ParallelLinear", "head": "ParallelLMHead", "experts": "RoutedExperts"}
_ASKED = ("gate_proj", "up_proj", "down_proj")
_STORED = ("w1", "w3", "w2")


class CtNames:
    """One config, read once. Errors: ValueError for a pattern that is no regular expression."""

    def __init__(self, engine: str, config: Mapping[str, Any]) -> None:
        self.engine = engine
        self.ignore = Entries(config.get("ignore") or [])
        self.groups = _groups(config, skip_attention=engine != SGLANG)
        self.targets = Entries(self.groups)

    def answer(self, module: Module) -> Answer:
        if module.kind != EXPERTS or module.members == (module.name,):
            return self._one(module.name, module.shards, module.kind)
        own = self.engine == VLLM and "w1" in module.leaves()
        names = [f"{module.name}.0.{leaf}" for leaf in (_STORED if own else _ASKED)]
        answers = [self._one(name, (), EXPERTS) for name in names]
        wrong = next((answer for answer in answers if answer.kind == "error"), None)
        if wrong is None and len({answer.scheme for answer in answers}) > 1:
            return error("gate, up and down of its experts resolve to different schemes")
        return wrong or answers[-1]

    def _one(self, name: str, shards: tuple[str, ...], kind: str) -> Answer:
        try:
            entry = self._ignoring(name, shards)
        except ValueError as problem:
            return error(str(problem))
        if entry is not None:
            return ignored(entry)
        found = self._target(name, shards, kind)
        if found is not None:
            return Answer("quantized", found, self.groups[found])
        if self.engine == SGLANG and kind != HEAD and self.groups:
            return error("no target and no ignore entry reaches it: unable to find matching target")
        return NOTHING

    def _ignoring(self, name: str, shards: tuple[str, ...]) -> str | None:
        direct = self._ignored(name)
        if not shards or (direct is not None and (self.engine == VLLM or name in self.ignore)):
            return direct
        found = [self._ignored(shard) for shard in shards]
        if any(found) and not all(found):
            kept = [shard.rpartition(".")[2] for shard, entry in zip(shards, found, strict=True) if entry is None]
            by = next(entry for entry in found if entry)
            raise ValueError(f"ignore names some of its members and not {', '.join(kept)} (by {by!r})")
        return found[0]

    def _ignored(self, name: str) -> str | None:
        return self.ignore.first(name) or (self.ignore.suffix(name) if self.engine == SGLANG else None)

    def _target(self, name: str, shards: tuple[str, ...], kind: str) -> str | None:
        if kind == HEAD and self.engine == SGLANG:
            return self.targets.first(name) or self.targets.suffix(name)
        direct = self.targets.first(name)
        if direct is not None:
            return direct
        if self.engine == VLLM:
            return self._of_shards(shards) or self._of_class(kind)
        return self._of_class(kind) or self._of_shards(shards)

    def _of_shards(self, shards: tuple[str, ...]) -> str | None:
        found = [self.targets.first(shard) for shard in shards]
        return found[0] if found and all(found) else None

    def _of_class(self, kind: str) -> str | None:
        name = "FusedMoE" if self.engine == SGLANG and kind == EXPERTS else _CLASSES[kind]
        for entry in self.targets:
            if Entries([entry]).first(name) if entry.startswith("re:") else entry.lower() in name.lower():
                return entry
        return "Linear" if kind == EXPERTS and "Linear" in self.targets else None


def loaded_by(config: Mapping[str, Any], linear: str) -> str | None:
    """The target by which compressed-tensors itself, as transformers loads with it, takes a torch Linear for quantized.

    Its class counts for a head as for any other. Errors: ValueError for a pattern that is no regular expression.
    """
    ignored_by = Entries(config.get("ignore") or [])
    if "Linear" in ignored_by or ignored_by.first(linear) is not None:
        return None
    targets = Entries(target for group in config["config_groups"].values() for target in group.get("targets") or ())
    return targets.first(linear) or ("Linear" if "Linear" in targets else None)


def _groups(config: Mapping[str, Any], skip_attention: bool) -> dict[str, str]:
    """Target → its group; groups of equal content have the first one's name. A later group takes a target over."""
    found: dict[str, str] = {}
    names: dict[str, str] = {}
    for name, group in (config.get("config_groups") or {}).items():
        targets = list(group.get("targets") or [])
        if skip_attention and len(targets) == 1 and targets[0].endswith("Attention"):
            continue
        content = {key: group.get(key) for key in ("weights", "input_activations", "format")}
        same = names.setdefault(json.dumps(content, sort_keys=True), name)
        found |= dict.fromkeys(targets, same)
    return found
