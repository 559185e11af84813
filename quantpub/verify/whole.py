"""The rule of completeness: what the architecture and the config promise is there, and of the sizes that they state.

Known failures: experts that were not written at all; a head that was lost, or one that engines replace by the embedding; a
layer without one of its linears. An engine's loader fills what is missing with whatever the memory held, and does not say so
of a quantized checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from quantpub.actions import QUANTIZE
from quantpub.families import EMBEDDING, GENERIC, HEAD, Family
from quantpub.shards import raw_bytes
from quantpub.verify.base import Finding, Subject, counted, first
from quantpub.verify.language import LAYER, family_of_text, language, lost_norms, model_type_of

EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.+)")
ANY_EXPERT = ("mlp.experts.0.up_proj", "block_sparse_moe.experts.0.w1")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Architectures whose configs tie the head to the embedding where they do not say
TIED = frozenset(
    {"gemma", "gemma2", "gemma3_text", "smollm3", "cohere", "cohere2", "ernie4_5", "starcoder2", "ernie4_5_moe"}
)
# Architectures whose heads have a size of their own where the config does not state it
HEAD_DIMS = {
    **dict.fromkeys(("ministral3", "qwen3", "ernie4_5", "seed_oss", "glm", "glm4", "minimax_m2"), 128),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), 256),
}
JOINS = "eh_proj.weight"  # what joins a layer that predicts further tokens to the model
EMBED, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
# A linear → those that stand beside it, each as alternatives
BESIDE: dict[str, tuple[tuple[str, ...], ...]] = {
    "q_proj": (("k_proj", "kv_a_proj_with_mqa"), ("o_proj",)),
    "k_proj": (("q_proj",), ("v_proj",), ("o_proj",)),
    "v_proj": (("k_proj",),),
    "o_proj": (("q_proj", "q_b_proj", "qkv_proj"),),
    "q_a_proj": (("q_b_proj",), ("kv_a_proj_with_mqa",)),
    "kv_a_proj_with_mqa": (("kv_b_proj",),),
    "qkv_proj": (("o_proj",),),
    "gate_proj": (("up_proj",), ("down_proj",)),
    "up_proj": (("down_proj",),),
    "gate_up_proj": (("down_proj",),),
    "down_proj": (("up_proj", "gate_up_proj"),),
    "w1": (("w2",), ("w3",)),
    "w2": (("w1",),),
    "w3": (("w1",),),
    "c_fc": (("c_proj",),),
    "c_proj": (("c_fc",),),
}
WORDS = {"kv": "num_key_value_heads · head_dim"}
# A linear → (which side, the key of the config that states it)
SIDES: dict[str, tuple[tuple[int, str], ...]] = {
    "self_attn.k_proj": ((1, "hidden_size"), (0, "kv")),
    "self_attn.v_proj": ((1, "hidden_size"), (0, "kv")),
    "self_attn.o_proj": ((0, "hidden_size"),),
    "mlp.gate_proj": ((1, "hidden_size"), (0, "intermediate_size")),
    "mlp.up_proj": ((1, "hidden_size"), (0, "intermediate_size")),
    "mlp.down_proj": ((0, "hidden_size"), (1, "intermediate_size")),
}


def complete(subject: Subject) -> Finding:
    """Every layer has what the others of its kind have, every expert too; embedding and head are there."""
    family, config = family_of_text(subject.held.text_config), subject.held.text_config
    if family is GENERIC:
        return first(
            [], f"architecture {config.get('model_type')!r} is not known here: only files and names were compared"
        )
    lines = subject.decoder.actions
    shapes = {language(str(line["as"])): tuple(line["shape"]) for line in lines}
    layers = _layers(shapes)
    problems = [] if subject.ours else subject.opened.adopted.said("complete")
    if not any(line["role"] == EMBEDDING for line in lines):
        problems.append("there is no embedding")
    if not tied(subject) and not any(line["role"] == HEAD and "lm_head" in line["as"] for line in lines):
        problems.append("there is no lm_head, and the config does not tie it to the embedding")
    problems += _count(layers, config) + _incomplete(layers) + _alone(shapes)
    problems += _experts(shapes, family, config)
    seen = " ".join(problems)
    counted_on = {i: parts for i, parts in layers.items() if JOINS not in parts and f"layer {i} " not in seen}
    problems += lost_norms(counted_on, shapes, model_type_of(config))
    if not subject.ours:
        problems += _head(subject) + wrong_sizes(shapes, config) + lost_biases(shapes, config)
    return first(problems, f"{counted(len(layers), 'layer')}, {len(lines)} tensors")


def tied(subject: Subject) -> bool:
    """Whether the config ties the head to the embedding, in words or by its architecture's default."""
    config = subject.held.text_config
    default = str(config.get("model_type")) in TIED
    return bool(config.get("tie_word_embeddings", subject.held.config.get("tie_word_embeddings", default)))


def _head(subject: Subject) -> list[str]:
    """A tied head of its own weights: vLLM leaves it out, and computes with the embedding."""
    lines = {language(str(line["as"])): line for line in subject.decoder.actions}
    head, embedding = lines.get(LM_HEAD), lines.get(EMBED)
    if not tied(subject) or head is None or embedding is None:
        return []
    said = "the config ties lm_head to the embedding, and it is"
    if QUANTIZE in (head["action"], embedding["action"]):
        return [f"{said} quantized" if head["action"] == QUANTIZE else f"{said} not quantized as that is"]
    if head["shape"] != embedding["shape"]:
        return [f"{said} {head['shape']} where that is {embedding['shape']}"]
    one, other = (str(line["as"]) for line in (head, embedding))
    same = not subject.weights or raw_bytes(subject.decoder.tensor(one)) == raw_bytes(subject.decoder.tensor(other))
    return [] if same else [f"{said} another tensor: engines differ in which of the two they take"]


def _layers(names: Mapping[str, object]) -> dict[int, frozenset[str]]:
    """layer → the names of its tensors, experts counted as one."""
    found: dict[int, set[str]] = {}
    for name in names:
        if match := LAYER.fullmatch(name):
            found.setdefault(int(match[1]), set()).add(re.sub(r"\.experts\.\d+\.", ".experts.", match[2]))
    return {layer: frozenset(parts) for layer, parts in found.items()}


def _count(layers: Mapping[int, frozenset[str]], config: Mapping[str, Any]) -> list[str]:
    """A layer that predicts further tokens stands behind the others, and is known by what joins it to the model."""
    count = config.get("num_hidden_layers")
    if not isinstance(count, int):
        return []
    missing = [f"layer {i} is missing" for i in range(count) if i not in layers]
    beyond = [i for i, parts in layers.items() if i >= count and JOINS not in parts]
    return missing + [f"layer {i} is there, and num_hidden_layers is {count}: engines leave it out" for i in beyond]


def _incomplete(layers: Mapping[int, frozenset[str]]) -> list[str]:
    """Layers that lack something which another one has that has all of theirs, and does not predict further tokens."""
    kinds = dict.fromkeys(parts for parts in layers.values() if JOINS not in parts)
    problems = []
    for layer, parts in sorted(layers.items()):
        if whole := next((other for other in kinds if parts < other), None):
            problems.append(f"layer {layer} lacks {min(whole - parts)}, which other layers have")
    return problems


def _alone(shapes: Mapping[str, object]) -> list[str]:
    """Linears without those that stand beside them in every architecture. Missing experts are counted elsewhere."""
    modules = {name.removesuffix(".weight") for name in shapes if name.endswith(".weight") and ".experts." not in name}
    return list(dict.fromkeys(sentence for module in sorted(modules) for sentence in _lacking(module, modules)))


def _lacking(module: str, modules: set[str]) -> Iterator[str]:
    prefix, _, leaf = module.rpartition(".")
    for names in BESIDE.get(leaf, ()) if LAYER.fullmatch(module) else ():
        if not any(f"{prefix}.{name}" in modules for name in names):
            yield f"{prefix}.{names[0]} is missing"


def _experts(shapes: Mapping[str, object], family: Family, config: Mapping[str, Any]) -> list[str]:
    found: dict[str, dict[str, set[int]]] = {}
    for name in shapes:
        if match := EXPERT.fullmatch(name):
            found.setdefault(match[1], {}).setdefault(match[3], set()).add(int(match[2]))
    stated = next((value for key in EXPERTS if isinstance(value := config.get(key), int)), None)
    if not found and stated and stated > 1 and any(family.role(f"model.layers.0.{name}.weight") for name in ANY_EXPERT):
        fused = any(family.expert_members(name) for name in shapes)
        return [] if fused else [f"the config states {stated} experts a layer, and there are none"]
    problems = []
    for prefix, members in sorted(found.items()):
        due = set(range(stated)) if stated else set().union(*members.values())
        for member, there in members.items():
            if missing := sorted(due - there):
                problems.append(f"{prefix}.{missing[0]}.{member} is missing ({len(missing)} of {len(due)} experts)")
            elif more := sorted(there - due):
                problems.append(f"{prefix}.{more[0]}.{member} is there, and the config states {len(due)} experts")
    return problems


def wrong_sizes(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> list[str]:
    """Shapes that are not those of the config: engines allocate by it, and stop or cut. One sentence a key."""
    due = _stated(config)
    found: dict[str, str] = {}
    for name, shape in shapes.items():
        for side, key in _sides(name, shape):
            if key in due and shape[side] != due[key]:
                found.setdefault(key, f"the config's {WORDS.get(key, key)} is {due[key]}, and {name} is {list(shape)}")
    return list(found.values())


def _stated(config: Mapping[str, Any]) -> dict[str, int]:
    found = {key: config.get(key) for key in ("hidden_size", "vocab_size", "intermediate_size")}
    heads, head_dim = config.get("num_attention_heads"), config.get("head_dim")
    kv = config.get("num_key_value_heads") or heads
    if isinstance(heads, int) and isinstance(found["hidden_size"], int) and heads:
        head_dim = head_dim or HEAD_DIMS.get(model_type_of(config)) or found["hidden_size"] // heads
    if isinstance(kv, int) and isinstance(head_dim, int) and "kv_lora_rank" not in config:
        found["kv"] = kv * head_dim
    return {key: value for key, value in found.items() if isinstance(value, int)}


def _sides(name: str, shape: tuple[int, ...]) -> tuple[tuple[int, str], ...]:
    if name in (EMBED, LM_HEAD) and len(shape) == 2:
        return (0, "vocab_size"), (1, "hidden_size")
    if name == "model.norm.weight":
        return ((0, "hidden_size"),)
    match = LAYER.fullmatch(name)
    return SIDES.get(match[2].removesuffix(".weight"), ()) if match and len(shape) == 2 else ()


def lost_biases(shapes: Mapping[str, object], config: Mapping[str, Any]) -> list[str]:
    """A config that promises biases, of a checkpoint that holds none of them."""
    due = {"mlp": config.get("mlp_bias")}
    due["self_attn"] = config.get("attention_bias") or config.get("model_type") == "qwen2"
    held = {part for part in due if any(f".{part}." in name and name.endswith("_proj.bias") for name in shapes)}
    there = {part for part in due if any(f".{part}." in name for name in shapes)}
    return [
        f"the config states biases of {part}, and there are none" for part in due if due[part] and part in there - held
    ]
