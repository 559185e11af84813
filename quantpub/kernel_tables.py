"""Which kernel an engine is expected to run, as data: by engine, version, layout, scheme and GPU generation.

The kernels are those that the engine's own order of choice gives for a shape that fits (`hardware.misfit` judges shapes)
and bf16 activations, without overrides. A cell that nothing established says so; it is never filled in from a neighbour.
The versions are the oldest and the newest that were read (`targets.VERSIONS`); what lies between may have either.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from quantpub.hardware import GENERATIONS
from quantpub.kernel_rows import ROWS, Row
from quantpub.targets import VERSIONS, unloadable

UNKNOWN = "not established"
KNOWN_BY_TABLE = "read: the table of layouts"


@dataclass(frozen=True)
class Expected:
    """kernel, or refused: why none runs, or neither where nothing was established. source: read or seen where."""

    kernel: str | None = None
    refused: str | None = None
    source: str = UNKNOWN

    @property
    def seen(self) -> bool:
        return self.source.startswith("seen")

    @property
    def words(self) -> str:
        """The cell as people read it."""
        return self.kernel or (f"refused: {self.refused}" if self.refused else UNKNOWN)


@dataclass(frozen=True)
class Seen:
    """A run that is recorded: the kernel, and the words of the engine's log that say so."""

    engine: str
    version: str
    layout: str
    scheme: str
    generation: str
    kernel: str
    said: str
    evidence: str
    experts: bool = False


_DENSE_RUN, _MOE_RUN = (
    "docs/evidence/h200-vllm-layouts-pycode-llama-28m.json",
    "docs/evidence/h200-vllm-layouts-pycode-qwen3moe-27m.json",
)


def _dense(layout: str, scheme: str, kernel: str, said: str) -> Seen:
    return Seen("vllm", "0.25.1", layout, scheme, "sm90", kernel, said, _DENSE_RUN)


def _experts(layout: str, scheme: str, kernel: str, said: str) -> Seen:
    return Seen("vllm", "0.25.1", layout, scheme, "sm90", kernel, said, _MOE_RUN, True)


# FP8 blocks ran on CUTLASS there, with DeepGEMM, which the engine prefers, switched off: not what it would choose
SEEN = (
    _dense("ct-pack", "W4A16", "Machete", "Using MacheteLinearKernel for CompressedTensorsWNA16"),
    _dense("ct-pack", "W4A16_ASYM", "Machete", "Using MacheteLinearKernel for CompressedTensorsWNA16"),
    _dense("ct-pack", "W8A16", "Machete", "Using MacheteLinearKernel for CompressedTensorsWNA16"),
    _dense("gptq", "W4A16", "Machete", "Using MacheteLinearKernel for AutoGPTQLinearMethod"),
    _dense("awq", "W4A16_ASYM", "Machete", "Using MacheteLinearKernel for AutoAWQMarlinLinearMethod"),
    _dense("ct-int", "W8A8", "CUTLASS INT8", "Selected CutlassInt8ScaledMMLinearKernel"),
    _dense("ct-float", "FP8_DYNAMIC", "CUTLASS FP8", "Selected CutlassFP8ScaledMMLinearKernel"),
    _dense("ct-nvfp4", "NVFP4A16", "Marlin NVFP4 W4A16", "Using MarlinNvFp4LinearKernel"),
    _dense("ct-mxfp4", "MXFP4A16", "Marlin MXFP4 W4A16", "Using MarlinMxFp4LinearKernel"),
    _experts("ct-pack", "W4A16", "Marlin MoE", "Using 'MARLIN' WNA16 MoE backend"),
    _experts("ct-pack", "W4A16_ASYM", "Marlin MoE", "Using 'MARLIN' WNA16 MoE backend"),
    _experts("ct-int", "W8A8", "Triton INT8 MoE", "Using TRITON Int8 MoE backend"),
    _experts("ct-float", "FP8_DYNAMIC", "CUTLASS FP8 MoE", "Using VLLM_CUTLASS Fp8 MoE backend"),
    _experts("ct-nvfp4", "NVFP4A16", "Marlin NVFP4 MoE", "Using 'MARLIN' NvFp4 MoE backend"),
    _experts("modelopt-nvfp4", "NVFP4A16", "Marlin NVFP4 MoE", "Using 'MARLIN' NvFp4 MoE backend"),
)


def expected(engine: str, version: str, layout: str, scheme: str, generation: str, experts: bool = False) -> Expected:
    """The cell. What was seen comes before what was read; where neither says anything, it is not established."""
    assert version in VERSIONS[engine], f"{engine} {version} was not read"
    assert generation in GENERATIONS, generation
    if reason := unloadable(engine, layout, scheme, experts):
        return Expected(refused=reason, source=KNOWN_BY_TABLE)
    for run in SEEN:
        if (run.engine, run.version, run.layout, run.scheme, run.generation, run.experts) == (
            engine, version, layout, scheme, generation, experts,
        ):  # fmt: skip
            return Expected(run.kernel, source=f"seen: {run.evidence}")
    for row in ROWS:
        if row.engine == engine and version in row.versions and layout in row.layouts and scheme in row.schemes:
            found = _cell(row, generation) if row.experts == experts else None
            if found:
                return found
    return Expected()


def _cell(row: Row, generation: str) -> Expected | None:
    for generations, kernel in row.kernels.items():
        if generation in generations.split():
            return Expected(kernel, source=row.source)
    for generations, reason in row.refused.items():
        if generation in generations.split():
            return Expected(refused=reason, source=row.source)
    return None


def by_outcome(cells: Iterable[tuple[str, Expected]]) -> list[tuple[str, tuple[str, ...], bool]]:
    """(what becomes of the weight, the generations where it does, whether that was seen) of (generation, cell) pairs."""
    found: dict[tuple[str, bool], list[str]] = {}
    for generation, cell in cells:
        found.setdefault((cell.words, cell.seen), []).append(generation)
    return [(words, tuple(generations), seen) for (words, seen), generations in found.items()]


def hardware_rows(engine: str, layout: str, scheme: str) -> list[tuple[str, str, str, str]]:
    """(version, generations, kernel or what refuses, `seen` or `read`) for every generation, as cards show it."""
    return [
        (version, ", ".join(generations), words, "–" if words == UNKNOWN else "seen" if seen else "read")
        for version in VERSIONS[engine]
        for words, generations, seen in by_outcome(
            (generation, expected(engine, version, layout, scheme, generation)) for generation in GENERATIONS
        )
    ]
