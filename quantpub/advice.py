"""What a plan says beyond sizes: the kernel that each engine is expected to run, whether the shapes fit it, and notes.

A note is a sentence with an id, for what people find out too late: a layout that is fast for one user and slow for a
hundred, a checkpoint whose engine could have made it itself, a GPU on which a format only falls back. Notes come from the
tables, from measurements of our own (`measured`), and from nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantpub.families import Family
from quantpub.gemms import Shapes, fuse, is_expert
from quantpub.hardware import GENERATIONS, TILES, misfit
from quantpub.kernel_tables import expected
from quantpub.measured import INT4_DEVICE, pays_up_to, table
from quantpub.scheme import Scheme
from quantpub.targets import TARGETS, VERSIONS, unloadable

# Algorithms that look at nothing but the weight, as an engine can when it loads a bf16 checkpoint
DATA_FREE = ("rtn", "fp8")
# scheme → what makes vLLM do the same when it loads a bf16 checkpoint (read: vLLM config/quantization.py)
ONLINE = {"FP8_DYNAMIC": "--quantization fp8_per_channel", "FP8_BLOCK": "--quantization fp8_per_block"}
INT4 = ("W4A16", "W4A16_ASYM")
SHOWN = (1, 4, 16, 64, 256, 1024, 4096)  # of the batch sizes that were measured; the evidence file has them all
FP4 = ("NVFP4", "NVFP4A16")


@dataclass(frozen=True)
class Weight:
    """One weight as an engine multiplies by it, members merged, with how it is stored."""

    module: str
    n: int
    k: int
    scheme: Scheme
    layout: str

    @property
    def expert(self) -> bool:
        return is_expert(self.module)


def weights(shapes: Shapes, stored: Mapping[str, tuple[Scheme, str]], family: Family) -> list[Weight]:
    """The merged weights. stored: module → (scheme, name of the layout)."""
    return [
        Weight(module, sum(shapes[member][0] for member in members), shapes[members[0]][1], *stored[members[0]])
        for module, members in fuse(shapes, family).items()
    ]


def in_question(wanted: Mapping[str, str], layout: str) -> list[str]:
    """The recipe's engines for the layout; where it names none, all whose tables speak of it."""
    named = [engine for engine, name in wanted.items() if name == layout]
    return named or [name for name, target in TARGETS.items() if layout in target.loads or layout in target.refuses]


def unmerged(shapes: Shapes, rows: Mapping[str, int], family: Family) -> str | None:
    """Why no engine can merge some set of weights: one that another follows ends within a block. rows: of each one's blocks."""
    for members in fuse(shapes, family).values():
        for member in members[:-1]:
            n, side = shapes[member][0], rows[member]
            if n % side:
                return f"{member}: {n} out_features end within a block of {side}, and engines merge it with the next"
    return None


def refusal(engine: str, found: Sequence[Weight], apart: str | None, kept: bool = False) -> str | None:
    """Why the engine cannot load a checkpoint of these weights, or None.

    apart: why none can that merges linears. kept: there are experts that stay in high precision.
    """
    target, kinds = TARGETS[engine], dict.fromkeys((w.layout, w.scheme.name, w.expert) for w in found)
    reasons = [reason for kind in kinds if (reason := unloadable(engine, *kind, kept))]
    if len({weight.scheme for weight in found}) > 1 and target.mixed:
        reasons.append(target.mixed)
    if apart and target.merges:
        reasons.append(apart)
    return reasons[0] if reasons else None


def kernels(found: Sequence[Weight], names: Iterable[str]) -> list[dict[str, Any]]:
    """One entry for each engine, version, way of storing and GPU generation; where nothing was established, none.

    gemms: merged weights of that kind. aligned: how many of them the kernel takes as they are, None when its wants are
    not known. misaligned: the first that it does not take, why, and what happens then.
    """
    kinds: dict[tuple[str, str, int, bool], list[Weight]] = {}
    for weight in found:
        kinds.setdefault((weight.layout, weight.scheme.name, weight.scheme.group_size, weight.expert), []).append(
            weight
        )
    return [
        entry
        for engine in names
        for version in VERSIONS[engine]
        for (layout, scheme, group, expert), members in kinds.items()
        for generation in GENERATIONS
        if (entry := _entry(engine, version, layout, scheme, group, expert, generation, members))
    ]


def _entry(
    engine: str,
    version: str,
    layout: str,
    scheme: str,
    group: int,
    expert: bool,
    generation: str,
    members: Sequence[Weight],
) -> dict[str, Any] | None:
    cell = expected(engine, version, layout, scheme, generation, expert)
    if cell.kernel is None and cell.refused is None:
        return None
    facts: dict[str, Any] = {
        "engine": engine,
        "version": version,
        "gpu": generation,
        "layout": layout,
        "scheme": scheme,
        "experts": expert,
        "kernel": cell.kernel,
        "refused": cell.refused,
        "source": cell.source,
        "gemms": len(members),
    }
    return facts | (_alignment(cell.kernel, engine, version, group, members) if cell.kernel else {})


def _alignment(kernel: str, engine: str, version: str, group: int, members: Sequence[Weight]) -> dict[str, Any]:
    odd = [(weight, why) for weight in members if (why := misfit(kernel, weight.n, weight.k, group, engine, version))]
    if not odd:
        return {"aligned": len(members) if kernel in TILES else None, "misaligned": None}
    weight, why = odd[0]
    first = {"gemm": weight.module, "n": weight.n, "k": weight.k, "reason": why.reason, "effect": why.effect}
    return {"aligned": len(members) - len(odd), "misaligned": first}


@dataclass(frozen=True)
class Case:
    """What notes are about: a plan's layouts, schemes, algorithms, and the engines that load it.

    tuned: whether an algorithm has parameters of its own.
    """

    layouts: frozenset[str]
    schemes: frozenset[str]
    algorithms: frozenset[str]
    engines: tuple[str, ...]
    tuned: bool = False


def case(found: Sequence[Weight], algorithms: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Case:
    """algorithms: each with its name and parameters."""
    layouts, schemes = frozenset(w.layout for w in found), frozenset(w.scheme.name for w in found)
    called = frozenset(algorithm["name"] for algorithm in algorithms)
    return Case(layouts, schemes, called, tuple(names), any(set(algorithm) > {"name"} for algorithm in algorithms))


def notes(about: Case) -> list[dict[str, str]]:
    """The notes that hold for the plan, each with its id."""
    said = ((name, note(about)) for name, note in NOTES.items())
    return [{"id": name, "note": text} for name, text in said if text]


def _tile_batch(about: Case) -> str | None:
    if "torchao-tile" not in about.layouts:
        return None
    best = pays_up_to("tinygemm")
    return (
        f"tinygemm is faster than bf16 up to {best} tokens in a batch and far slower beyond: for a server take a ct-pack "
        f"recipe. {_measured('tinygemm')}"
    )


def _measured(kernel: str) -> str:
    speeds = ", ".join(f"{speedup:.2f}× at {m}" for m, speedup in table(kernel) if m in SHOWN)
    return f"Measured on an {INT4_DEVICE}, linears of Qwen3-8B against bf16: {speeds}."


def _tile_limits(about: Case) -> str | None:
    if "torchao-tile" not in about.layouts:
        return None
    return (
        "vLLM loads it for dense linears only, not for experts or lm_head; over several GPUs the in_features of each must "
        "stay a multiple of 1024; a ROCm GPU reads a file packed for CUDA as garbage."
    )


def _torchao_nvfp4(about: Case) -> str | None:
    if "torchao-nvfp4" not in about.layouts:
        return None
    return (
        "torchao dequantizes such a weight in every forward: memory is saved, and each forward is slower than in 16 bits. For "
        "a server take ct-nvfp4 or modelopt-nvfp4, the same numbers. vLLM loads it for dense linears only, whose members it "
        "merges at multiples of 128 rows."
    )


def _online(about: Case) -> str | None:
    flags = [ONLINE.get(scheme) for scheme in about.schemes]
    if len(flags) != 1 or not flags[0] or "vllm" not in about.engines:
        return None
    if about.tuned or not about.algorithms <= set(DATA_FREE):
        return None
    return (
        f"No need to publish for speed alone: vLLM makes weights of the same format from the bf16 checkpoint with "
        f"`{flags[0]}`. What a published one has beyond that: half the download, a faster start, and bytes that were "
        "verified and evaluated."
    )


def _int8_blackwell(about: Case) -> str | None:
    if "ct-int" not in about.layouts:
        return None
    return (
        "Not for Blackwell: vLLM loads it there and dies at the first forward, SGLang refuses it. Take an FP8 recipe for "
        "those GPUs."
    )


def _fp4_fallback(about: Case) -> str | None:
    if not about.schemes & set(FP4) or about.layouts == {"torchao-nvfp4"}:
        return None
    activations = " and activations stay in 16 bits" if "NVFP4" in about.schemes else ""
    return (
        f"Before Blackwell (below compute capability 10.0) it runs by a weight-only fallback, Marlin or Humming"
        f"{activations}: memory is saved, no FP4 arithmetic is done."
    )


def _int4_batch(about: Case) -> str | None:
    if not about.schemes & set(INT4) or not about.layouts & {"ct-pack", "gptq", "gptq-v2", "awq"}:
        return None
    machete, marlin = pays_up_to("Machete"), pays_up_to("Marlin")
    return (
        f"Int4 weights pay while the batch is small: on Hopper Machete beats bf16 up to {machete} tokens in a batch and "
        f"Marlin up to {marlin}; beyond, bf16 is faster. Machete: {_measured('Machete')}"
    )


def _mxfp4(about: Case) -> str | None:
    if "MXFP4A16" not in about.schemes:
        return None
    return (
        "vLLM on Blackwell rounds the activations to MXFP4 too, whatever the checkpoint says; before Blackwell it runs "
        "weight-only. SGLang and TensorRT-LLM do not load it."
    )


def _bitsandbytes(about: Case) -> str | None:
    if "bnb-int8" not in about.layouts or "vllm" not in about.engines:
        return None
    return (
        "vLLM loads it up to 0.27, on one GPU and without CUDA graphs; since 0.28 it needs vllm-bnb-plugin. For a server "
        "take an INT8 or FP8 recipe."
    )


def _machete_zero(about: Case) -> str | None:
    if "W4A16_ASYM" not in about.schemes or not about.layouts & {"ct-pack", "awq"} or "vllm" not in about.engines:
        return None
    return (
        "Machete, which vLLM runs on Hopper, adds the zero pre-multiplied and rounded to bf16: up to one last place; "
        "Marlin is exact. Measured on an H200, docs/evidence/h200-kernels-pycode-llama-28m.json."
    )


NOTES: dict[str, Callable[[Case], str | None]] = {
    "tile-packed-batch": _tile_batch,
    "tile-packed-limits": _tile_limits,
    "torchao-nvfp4": _torchao_nvfp4,
    "online-fp8": _online,
    "int8-blackwell": _int8_blackwell,
    "fp4-before-blackwell": _fp4_fallback,
    "int4-large-batch": _int4_batch,
    "mxfp4-engines": _mxfp4,
    "machete-zero": _machete_zero,
    "bitsandbytes-vllm": _bitsandbytes,
}
