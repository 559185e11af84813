"""Anybody's quantized checkpoint, read as ours are: modules with schemes and layouts, and a plan that says what each tensor is.

`adopt` takes what the checkpoint declares and what its headers hold, and answers with lines like those of our own plan, so
that everything behind `Decoder` (verifying, repacking, evaluating) sees no difference. What does not fit is said, not raised.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from quantpub.actions import COPY, QUANTIZE
from quantpub.adopt import ct, int4, modelopt, others
from quantpub.adopt.base import MAINS, MARKS, Method, Module, Read, Reader, Uncalibrated, Unreadable, misfit, modules_of
from quantpub.algorithms import ADOPTED
from quantpub.errors import InputError
from quantpub.families import FAMILIES, GENERIC, LINEAR, Family
from quantpub.held import Held
from quantpub.kv_cache import LETTERS
from quantpub.kv_check import declared_cache
from quantpub.layouts import LAYOUTS, PEER_LAYOUTS
from quantpub.layouts.base import Layout, Spec
from quantpub.registry import load
from quantpub.treatments import Treatment

METHODS: dict[str, Reader] = {
    "compressed-tensors": ct.method,
    "modelopt": modelopt.method,
    "modelopt_fp4": modelopt.method,
    "gptq": int4.gptq,
    "awq": int4.awq,
    "auto-round": int4.auto_round,
    "fp8": others.fp8,
    "torchao": others.torchao,
    "bitsandbytes": others.bitsandbytes,
}
# A key that only files of this method hold, where they do not name it
UNNAMED = {"quantization": "modelopt", "w_bit": "awq", "desc_act": "gptq"}
# Methods that are not read → (whose, what runs it)
OTHERS = {
    "mlx": ("MLX", "mlx-lm"),
    "hqq": ("HQQ", "transformers with hqq"),
    "aqlm": ("AQLM", "transformers with aqlm"),
    "quanto": ("Quanto", "transformers with optimum-quanto"),
    "quark": ("Quark", "vLLM"),
    "mxfp4": ("transformers' MXFP4", "vLLM"),
    "exl2": ("ExLlamaV2", "ExLlamaV2"),
    "exl3": ("ExLlamaV3", "ExLlamaV3"),
    "bitnet": ("BitNet", "transformers"),
}
# Architectures that quantpub does not quantize, with the names of one that it does
ALIASES = {"kimi_k2": "deepseek_v3", "deepseek_v32": "deepseek_v3", "glm_moe_dsa": "deepseek_v3"}
READABLE = {**LAYOUTS, **PEER_LAYOUTS}
SIDE = 1024  # rows that every layout takes
INPUT_SCALES = ("input_scale", "input_global_scale", "_weight_act_per_tensor_scale")
NONE = "the config declares a quantization, and no module holds quantized weights"
KV_SCALES = {"k_scale": "k", "v_scale": "v", "kv_scale": "kv"}


@dataclass(frozen=True)
class Adopted:
    """treatments, lines: as an artifact's. problems: (rule, sentence) of what is not as it should be.

    shared: scales of the KV cache that are of keys and values alike, which no layout of ours has: no line holds them.
    """

    held: Held
    method: Method
    family: Family
    treatments: tuple[Treatment, ...]
    lines: list[dict[str, Any]]
    problems: list[tuple[str, str]] = field(default_factory=list)
    shared: tuple[str, ...] = ()

    def said(self, rule: str) -> list[str]:
        return [sentence for of, sentence in self.problems if of == rule]


def family_of(held: Held) -> Family:
    """Of the language model; one that is not known by name is told by the endings of its tensors' names."""
    name = str(held.config.get("model_type"))
    return FAMILIES.get(ALIASES.get(name, name), GENERIC)


def adopt(held: Held) -> Adopted:
    """Errors: InputError when the checkpoint is not quantized, or by a method that is not read."""
    method, family = _method(held), family_of(held)
    modules, rest = modules_of(held)
    treatments: dict[Treatment, int] = {}
    problems = [] if modules or _cache_alone(held.quantization) else [("tensors", NONE)]
    lines = [line for module in modules if (line := _quantized(held, method, family, module, treatments, problems))]
    scales = {name for name in rest if name.rpartition(".")[2] in KV_SCALES}
    lines += [_copied(held, family, name, problems) for name in rest if name not in scales]
    shared = _shared(lines, scales)
    _attach(held, lines, scales - set(shared), problems)
    return Adopted(held, method, family, tuple(treatments), lines, problems, shared)


def _cache_alone(config: Mapping[str, Any]) -> bool:
    """Whether the config quantizes the KV cache and nothing else."""
    return declared_cache(config) is not None and not config.get("config_groups") and not config.get("quant_algo")


def _method(held: Held) -> Method:
    config, where = held.quantization, held.source.where("config.json")
    name = str(config.get("quant_method") or next((method for key, method in UNNAMED.items() if key in config), ""))
    if not config:
        raise InputError(
            "the checkpoint is not quantized: its config says nothing of it",
            where=where,
            next="quantize it with `quantpub quantize`",
        )
    if name not in METHODS:
        if by := _maker(name, config, held):
            raise InputError(
                f"it is a checkpoint of {by[0]}, which is not read",
                where=where,
                next=f"judge it by its answers in {by[1]}, or start from the full-precision model: `quantpub quantize`",
            )
        raise InputError(
            f"quant_method {name!r} is not read", where=where, next=f"those that are: {', '.join(METHODS)}"
        )
    try:
        return METHODS[name](held)
    except Unreadable as reason:
        raise InputError(str(reason), where=where, next="mend config.json, or make the checkpoint again") from None


def _maker(name: str, config: Mapping[str, Any], held: Held) -> tuple[str, str] | None:
    """Whose checkpoint it is, where that is known and it is not read, and what runs it. MLX names no method."""
    mlx = not name and (held.metadata.get("format") == "mlx" or {"bits", "group_size"} <= config.keys())
    return OTHERS.get("mlx" if mlx else name)


def _quantized(
    held: Held,
    method: Method,
    family: Family,
    module: Module,
    treatments: dict[Treatment, int],
    problems: list[tuple[str, str]],
) -> dict[str, Any] | None:
    """The line of one quantized module, or None where it cannot be read: the problem says why."""
    try:
        read = method.read(module)
        layout: Layout = load(READABLE, "layout", read.layout)
        dtype = module.scale_dtype(held.dtype)
        if "pre_quant_scale" in module.tensors:
            raise Unreadable("its inputs are scaled by a pre_quant_scale of its own, which no other layout holds")
        # of the scheme alone: what another tool wrote of other shapes can be read all the same
        if reason := layout.reject(read.scheme, SIDE, SIDE * max(1, read.scheme.group_size), dtype):
            _require_input_scale(module, read)
            raise Unreadable(reason)
    except Unreadable as reason:
        problems.append((reason.rule, f"{module.name}: {reason}"))
        return None
    role = family.role(f"{module.name}.weight")
    if role is None:
        problems.append(("complete", f"the {family.name} family has no linear {module.name}"))
    spec = layout.spec(read.scheme, *read.shape, dtype)
    if declared := _other_number(module, read, spec):
        problems.append(("bits", declared))
        return None
    found = _misfits(module, spec, read.idle)
    problems += [("tensors", sentence) for sentence in found]
    if any(suffix not in module.tensors for suffix in spec) or found:
        return None
    place = treatments.setdefault(
        Treatment(read.scheme, _Named({"name": ADOPTED, "by": method.tool}), layout), len(treatments)
    )
    return _line(held, module, read, spec, dtype, place) | {"role": role or LINEAR}


def _require_input_scale(module: Module, read: Read) -> None:
    """Of a scheme that is not read it is still known that it takes one. Errors: Uncalibrated."""
    act = read.scheme.act
    if act is not None and act.calibrated and not any(suffix in module.tensors for suffix in INPUT_SCALES):
        raise Uncalibrated("the config states calibrated scales of activations, and input_scale is missing")


class _Named(dict[str, Any]):
    """An algorithm's name and parameters that can be a key."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items())))


def _other_number(module: Module, read: Read, spec: Spec) -> str | None:
    """Where codes are of another number format than the one that is declared, or None.

    Codes under the name that only another format has are a matter of names: the tensors of this one are missing.
    """
    found, due = module.tensors[module.main], spec[next(suffix for suffix in MAINS if suffix in spec)][0]
    if found.dtype == due or (module.main not in spec and module.main != "weight"):
        return None
    return (
        f"{module.name} is declared {read.scheme.name}, and holds {found.dtype} {list(found.shape)} where {due} belongs"
    )


def _misfits(module: Module, spec: Spec, idle: Collection[str]) -> list[str]:
    missing = [f"{module.name}.{suffix} is missing" for suffix in spec if suffix not in module.tensors]
    extra = [
        f"{module.name}.{suffix} belongs to no module"
        for suffix in module.tensors
        if suffix not in spec and suffix not in KV_SCALES and suffix not in idle
    ]
    wrong = (
        (suffix, misfit(module.tensors[suffix], dtype, shape))
        for suffix, (dtype, shape) in spec.items()
        if suffix in module.tensors
    )
    return missing + extra + [f"{module.name}.{suffix} {reason}" for suffix, reason in wrong if reason]


def _line(held: Held, module: Module, read: Read, spec: Spec, dtype: str, place: int) -> dict[str, Any]:
    outputs = {f"{module.name}.{suffix}": module.tensors[suffix] for suffix in spec}
    weight = f"{module.name}.weight"
    return {
        "tensor": weight,
        "as": weight,
        "shard": held.place[f"{module.name}.{module.main}"],
        "dtype": dtype,
        "shape": list(read.shape),
        "action": QUANTIZE,
        "reason": None,
        "treatment": place,
        "outputs": {name: [info.dtype, list(info.shape)] for name, info in outputs.items()},
    }


def _copied(held: Held, family: Family, name: str, problems: list[tuple[str, str]]) -> dict[str, Any]:
    info, role = held.info(name), family.role(name)
    if name.rpartition(".")[2] in MARKS:
        problems.append(("tensors", f"{name} belongs to no module"))
    elif role is None and not (len(info.shape) == 3 and family.expert_members(name)):
        problems.append(("complete", f"the {family.name} family has no tensor {name}"))
    return {
        "tensor": name,
        "as": name,
        "shard": held.place[name],
        "dtype": info.dtype,
        "shape": list(info.shape),
        "role": role or GENERIC.role(name),
        "action": COPY,
        "reason": "as it was found",
        "treatment": None,
        "outputs": {name: [info.dtype, list(info.shape)]},
    }


def _attach(held: Held, lines: list[dict[str, Any]], scales: set[str], problems: list[tuple[str, str]]) -> None:
    """The scales of the KV cache to the projections that make keys and values, as our own plans have them."""
    for module, line in ((str(line["as"]).removesuffix(".weight"), line) for line in lines):
        attention, _, leaf = module.rpartition(".")
        for letter in LETTERS.get(leaf, ""):
            name = _scale_name(attention, module, letter, held.place)
            if name is not None:
                scales.discard(name)
                info = held.info(name)
                line.setdefault("kv", {})[name] = [info.dtype, list(info.shape)]
    problems += [("tensors", f"{name} belongs to no attention") for name in sorted(scales)]


def _shared(lines: list[dict[str, Any]], scales: set[str]) -> tuple[str, ...]:
    """Scales of keys and values alike, of attentions that are there."""
    modules = {str(line["as"]).removesuffix(".weight") for line in lines}
    named = sorted(name for name in scales if name.endswith(".kv_scale"))
    return tuple(name for name in named if {name.replace(".kv_scale", f".{of}") for of in LETTERS} & modules)


def _scale_name(attention: str, module: str, letter: str, place: Mapping[str, str]) -> str | None:
    names = (f"{attention}.{letter}_scale", f"{module}.{letter}_scale", f"{attention}.{letter}_proj.{letter}_scale")
    return next((name for name in names if name in place), None)
