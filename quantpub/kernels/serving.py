"""Which of the measured kernels the serving engine would run: its own selector's answer, put beside our kernels.

`runs`: GEMM → our kernel. `unknown`: GEMM → why no measured kernel stands for it; a gate is then not proven.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quantpub.cures import Cure
from quantpub.decode import Decoder
from quantpub.engines.ask import choices
from quantpub.engines.choice import ENGINE, Ask
from quantpub.experts import ExpertLayer
from quantpub.gemms import TOP_K, Gemm
from quantpub.hardware import GENERATIONS, following, misfit
from quantpub.kernel_tables import expected
from quantpub.kernels import KERNELS
from quantpub.kernels.base import Kernel
from quantpub.kernels.moe import MOE_KERNELS
from quantpub.kernels.moe_base import MoeKernel
from quantpub.kernels.moe_vllm import TRITON_INT8, int8_experts
from quantpub.registry import load
from quantpub.targets import VERSIONS

GENERATION = {8: "sm80", 9: "sm90", 10: "sm100", 12: "sm120"}  # by the major number of the compute capability


def asks(decoder: Decoder, gemms: Sequence[Gemm], tp: int) -> list[Ask]:
    """What is asked of the selector: one entry a GEMM."""
    return [_ask(decoder, gemm, tp) for gemm in gemms]


def expert_asks(decoder: Decoder, layers: Sequence[ExpertLayer]) -> list[Ask]:
    """Of every layer of experts both GEMMs, as engines name them; what tells the layer from others follows the name."""
    return [ask for layer in layers for ask in _expert_asks(decoder, layer)]


def _expert_asks(decoder: Decoder, layer: ExpertLayer) -> list[Ask]:
    gate, up, down = (module.rpartition(".")[2] for module in layer.members[0])
    both = next(name for name, leaves in decoder.family().fused.items() if leaves == (gate, up))
    k, i = layer.hidden, layer.intermediate
    return [
        Ask(_gemm(layer, leaf), *sides, layer.scheme, layer.layout, layer.experts, layer.top_k, layer.tp, members)
        for leaf, sides, members in ((both, (2 * i, k), 2), (down, (k, i), 1))
    ]


def _gemm(layer: ExpertLayer, leaf: str) -> str:
    module, kind = _parts(layer.name)
    return f"{module}.{leaf}{kind}"


def _layer(ask: Ask) -> str:
    """The name of the layer that a GEMM of experts is of, by the GEMM's: the inverse of `_gemm`."""
    module, kind = _parts(ask.gemm)
    return module.rpartition(".")[0] + kind


def _parts(name: str) -> tuple[str, str]:
    """(the module, a space and what tells it from others of that name, or "")."""
    module, space, kind = name.partition(" ")
    return module, space + kind


def _ask(decoder: Decoder, gemm: Gemm, tp: int) -> Ask:
    treatment, top_k = decoder.treated(gemm.members[0]), decoder.artifact.config().get(TOP_K) or 0
    return Ask(
        gemm.name,
        gemm.n,
        gemm.k,
        treatment.scheme,
        treatment.layout.name,
        gemm.experts,
        top_k if gemm.experts else 0,
        tp,
        len(gemm.members),
    )


def rows_of(kernel: Kernel | MoeKernel) -> tuple[str, ...]:
    """What the engines' kernel tables call it."""
    found = getattr(kernel, "rows", None) or (kernel.row,)
    return tuple(row for row in found if row)


def by_row(experts: bool) -> dict[str, list[str]]:
    """The tables' name → ours; several of ours may be one of theirs, for other schemes."""
    kernels: list[Kernel | MoeKernel] = (
        [load(MOE_KERNELS, "MoE kernel", name) for name in MOE_KERNELS]
        if experts
        else [load(KERNELS, "kernel", name) for name in KERNELS]
    )
    found: dict[str, list[str]] = {}
    for kernel in kernels:
        for row in rows_of(kernel):
            found.setdefault(row, []).append(kernel.name)
    return found


def generation() -> str:
    """The GPU's, as the kernel tables name it; "" for one that they do not have."""
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}" if (major, minor) in ((7, 5), (8, 9)) else GENERATION.get(major, "")


def engine_block(
    reply: Mapping[str, Any], asked: Sequence[Ask], layers: Sequence[ExpertLayer], taken: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """The evidence's `engine`: the answers, and what they mean for the measured kernels.

    taken: GEMM → the kernels that were measured on the artifact's own layout. An engine that could not be asked is answered
    for by the kernel tables. Both GEMMs of grouped experts have one kernel, and one entry under the layer's name.
    """
    grouped, here = {layer.name for layer in layers}, reply.get("generation") or generation()
    version = str(reply.get("version", ""))
    found = [choice.as_json() for choice in choices(reply, asked, here)]
    facts = {"engine": ENGINE, "version": "", "generation": here} | dict(reply) | {"choices": found}
    runs, unknown = dict[str, str](), dict[str, str]()
    for choice, ask in zip(found, asked, strict=True):
        whole = ask.experts > 0 and _layer(ask) in grouped
        name, known = _layer(ask) if whole else ask.gemm, _known(choice["kernel"] or "", whole, version)
        if kernel := next((one for one in known if one in taken.get(name, ())), None):
            runs[name] = kernel
        else:
            unknown[name] = _why(choice, known)
    certain = {
        name: kernel for name, kernel in runs.items() if name not in unknown
    }  # both GEMMs of experts, or neither
    return {**facts, "runs": certain, "unknown": unknown}


def _known(row: str, experts: bool, version: str) -> list[str]:
    """Our kernels that are a row of the tables. Of INT8 experts one row is two kernels, of different versions."""
    if experts and row == TRITON_INT8.row:
        return [name] if (name := int8_experts(version)) else []
    return by_row(experts).get(row, [])


def _why(choice: Mapping[str, Any], known: Sequence[str]) -> str:
    if choice["kernel"] == TRITON_INT8.row and not known:
        return (
            f"the engine would run {choice['kernel']} for {choice['gemm']}, on int8 or bf16 activations by its version, "
            "which is not known"
        )
    if choice["kernel"]:
        return (
            f"the engine would run {choice['kernel']} for {choice['gemm']}, which is not among the kernels timed here"
        )
    return f"no kernel is known for {choice['gemm']}: {choice['error'] or choice['source']}"


def cure_kernels(block: Mapping[str, Any], cure: Cure, n: int, k: int, group: int) -> set[str]:
    """Our kernel that the engine would run for a repacked weight, by the tables; none where they do not say."""
    engine, generation = block["engine"], block["generation"]
    version = block["version"] if block["version"] in VERSIONS[engine] else VERSIONS[engine][0]
    row = expected(engine, version, cure.layout, cure.scheme, generation).kernel if generation in GENERATIONS else None
    while row and misfit(row, n, k, group, engine, version):
        row = following(row, engine, version)
    return set(by_row(False).get(row or "", []))
