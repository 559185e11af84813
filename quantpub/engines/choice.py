"""What is asked of an engine's selector, and what it answers: which kernel it runs for a GEMM, and why not an earlier one.

Plain data on both sides, so that the question crosses into an engine's own interpreter. Where the engine cannot be asked,
the kernel tables answer, and the choice says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from quantpub.hardware import EFFECTS, GENERATIONS, following, misfit
from quantpub.kernel_tables import UNKNOWN, Expected, expected
from quantpub.scheme import Scheme, preset
from quantpub.targets import VERSIONS

ENGINE, TABLE = "vllm", "table"
ROW_PARALLEL = ("down_proj", "w2")  # the second GEMM of an expert: its N is the hidden size
MERGED = ("gate_up_proj", "w13")  # the first, of gate and up: its N is twice the expert's width


@dataclass(frozen=True)
class Ask:
    """One merged GEMM of one GPU: y[M, n] = x[M, k] · W[n, k]ᵀ, bf16 activations. members: how many linears it merges.

    experts: how many a layer holds, 0 outside of MoE; top_k of them a token. tp: GPUs that share the layer.
    """

    gemm: str
    n: int
    k: int
    scheme: Scheme
    layout: str
    experts: int = 0
    top_k: int = 0
    tp: int = 1
    members: int = 1

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Ask:
        """scheme: a preset's name, with `group` for another group size, or a scheme as JSON. Errors: KeyError, UsageError."""
        facts = {
            name: int(value[name]) for name in ("experts", "top_k", "tp", "members") if value.get(name) is not None
        }
        named = value["scheme"]
        scheme = preset(named, value.get("group")) if isinstance(named, str) else Scheme.from_json(named)
        return Ask(str(value["gemm"]), int(value["n"]), int(value["k"]), scheme, str(value["layout"]), **facts)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def expert_sides(self) -> tuple[int, int]:
        """(hidden size, width of one GPU's part of an expert), from the GEMM's name and shape."""
        leaf = self.gemm.split(" ")[0].rpartition(".")[2]
        if leaf in ROW_PARALLEL:
            return self.n, self.k
        return self.k, self.n // 2 if leaf in MERGED else self.n


@dataclass(frozen=True)
class Choice:
    """kernel: a row's name as in the kernel tables, None where none runs or none is known. class_name: the engine's own.

    source: who said so. rejected: kernels that the engine tried before → its reason. error: why it could not be asked, or
    what it said when it refused.
    """

    gemm: str
    kernel: str | None
    class_name: str | None
    source: str
    rejected: dict[str, str] = field(default_factory=dict)
    error: str | None = None

    @property
    def asked(self) -> bool:
        return self.source.startswith("asked")

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Choice:
        return Choice(**value)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def by_table(ask: Ask, why: str, version: str, generation: str) -> Choice:
    """What the kernel tables say. version: the engine's, "" for one that is not known. why: it could not be asked.

    Of a version that was not read they say what they say of all that were, or nothing.
    """
    if version in VERSIONS[ENGINE]:
        return _by_table(ask, why, version, generation)
    choices = [_by_table(ask, why, read, generation) for read in VERSIONS[ENGINE]]
    if len({choice.kernel for choice in choices}) > 1:
        return Choice(ask.gemm, None, None, f"{TABLE}, {UNKNOWN}", error=why)
    return replace(choices[0], source=f"{TABLE} of {' and '.join(VERSIONS[ENGINE])}")


def _by_table(ask: Ask, why: str, version: str, generation: str) -> Choice:
    cell, rejected, effect = Expected(), dict[str, str](), None
    if generation in GENERATIONS:
        cell = expected(ENGINE, version, ask.layout, ask.scheme.name, generation, ask.experts > 0)
    kernel = cell.kernel
    while kernel and (bad := misfit(kernel, ask.n, ask.k, ask.scheme.group_size, ENGINE, version)):
        if bad.effect == EFFECTS.get((ENGINE, kernel)):
            break  # it pads, and runs
        rejected[kernel], effect = bad.reason, bad.effect
        kernel = following(kernel, ENGINE, version)
    said = (cell.refused, None if kernel else effect, why)
    return Choice(ask.gemm, kernel, None, f"{TABLE}, {cell.source}", rejected, "; ".join(filter(None, said)) or None)
