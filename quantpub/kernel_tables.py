"""What engines loaded here, and which kernel each is expected to run: by version, layout, scheme and GPU generation.

The kernels are those that the engine's own order of choice gives for a shape that fits (`hardware.misfit` judges shapes)
and bf16 activations, without overrides. A cell that nothing established says so; it is never filled in from a neighbour.
The versions are the oldest and the newest that were read (`targets.VERSIONS`); what lies between may have either.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from quantpub.hardware import GENERATIONS
from quantpub.kernel_rows import VLLM_ROWS, Row
from quantpub.kernel_rows_others import OTHER_ROWS
from quantpub.targets import TARGETS, VERSIONS, Target, unloadable

UNKNOWN = "not established"
KNOWN_BY_TABLE = "read: the table of layouts"

ROWS = (*VLLM_ROWS, *OTHER_ROWS)


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
    """Weights of one kind in a checkpoint that an engine loaded here. checkpoint: its recipe and layout, as in the evidence.

    kernel: what the engine chose, and the words of its log that say so; None where the log names none, or where the
    engine was kept from its own choice. aside: what was unlike a plain start.
    """

    engine: str
    version: str
    generation: str
    layout: str
    scheme: str
    checkpoint: str
    evidence: str
    experts: bool = False
    kernel: str | None = None
    said: str | None = None
    aside: str = ""

    @property
    def words(self) -> str:
        return f"seen: {self.version} on {MACHINES[self.generation]}{self.aside} ({self.evidence})"


MACHINES = {"sm90": "an H200", "cpu": "a CPU"}
_LLAMA, _MOE, _TORCHAO = (
    f"docs/evidence/h200-{name}.json"
    for name in ("vllm-layouts-pycode-llama-28m", "vllm-layouts-pycode-qwen3moe-27m", "torchao-pycode-llama-28m")
)
_NO_DEEPGEMM = ", with DeepGEMM, its own choice, switched off"


def _vllm(
    recipe: str, layout: str, scheme: str, kernel: str | None = None, said: str | None = None, stored: str = ""
) -> Seen:
    """A run of vLLM. layout: the checkpoint's; stored: that of these weights, where it is another."""
    name = f"{recipe}-{layout}"
    return Seen("vllm", "0.25.1", "sm90", stored or layout, scheme, name, _LLAMA, kernel=kernel, said=said)


def _moe(recipe: str, layout: str, scheme: str, kernel: str, said: str) -> tuple[Seen, Seen]:
    """Its experts and its attention."""
    run = replace(_vllm(recipe, layout, scheme), evidence=_MOE)
    return replace(run, experts=True, kernel=kernel, said=said), run


def _canary(name: str, layout: str, scheme: str) -> Seen:
    """A run of vLLM beside the base model: its logits are those of our own evaluation."""
    return Seen("vllm", "0.25.1", "sm90", layout, scheme, name, "docs/evidence/h200-canary-dense-28m.json")


def _transformers(checkpoint: str, layout: str, scheme: str, evidence: str, experts: bool = False) -> Seen:
    version, machine = ("5.17.0", "sm90") if evidence == _TORCHAO else ("5.23.0", "cpu")
    return Seen("transformers", version, machine, layout, scheme, checkpoint, evidence, experts)


_PARTNERS, _OTHERS, _PEERS, _LOG = (
    "tests/test_partners.py",
    "tests/test_layouts_others.py",
    "tests/test_layouts_peers.py",
    "docs/log.md",
)
SEEN = (
    _vllm("w4a16", "ct-pack", "W4A16", "Machete", "Using MacheteLinearKernel for CompressedTensorsWNA16"),
    _vllm("w4a16-asym", "ct-pack", "W4A16_ASYM", "Machete", "Using MacheteLinearKernel for CompressedTensorsWNA16"),
    _vllm("w8a16", "ct-pack", "W8A16", "Machete", "Using MacheteLinearKernel for CompressedTensorsWNA16"),
    _vllm("w4a16", "gptq", "W4A16", "Machete", "Using MacheteLinearKernel for AutoGPTQLinearMethod"),
    _vllm("w4a16-asym", "awq", "W4A16_ASYM", "Machete", "Using MacheteLinearKernel for AutoAWQMarlinLinearMethod"),
    _vllm("int8-dynamic", "ct-int", "W8A8", "CUTLASS INT8", "Selected CutlassInt8ScaledMMLinearKernel"),
    _vllm("fp8-dynamic", "ct-float", "FP8_DYNAMIC", "CUTLASS FP8", "Selected CutlassFP8ScaledMMLinearKernel"),
    replace(_vllm("fp8-block", "hf-fp8", "FP8_BLOCK"), aside=_NO_DEEPGEMM),
    replace(_vllm("fp8-block", "ct-float", "FP8_BLOCK"), aside=_NO_DEEPGEMM),
    _vllm("nvfp4a16", "ct-nvfp4", "NVFP4A16", "Marlin NVFP4 W4A16", "Using MarlinNvFp4LinearKernel"),
    _vllm("nvfp4a16", "modelopt-nvfp4", "NVFP4A16"),
    _vllm("mxfp4", "ct-mxfp4", "MXFP4A16", "Marlin MXFP4 W4A16", "Using MarlinMxFp4LinearKernel"),
    _vllm("int4-hqq-tile", "torchao-tile", "W4A16_FLOAT_ZERO"),
    _vllm("w4a16-fp8-down", "ct-pack", "W4A16"),
    _vllm("w4a16-fp8-down", "ct-pack", "FP8_DYNAMIC", stored="ct-float"),
    _canary("w4a16-ct-pack-as-gptq-v2", "gptq-v2", "W4A16"),
    _canary("fp8-dynamic-ct-float-as-modelopt-fp8-channel", "modelopt-fp8-channel", "FP8_DYNAMIC"),
    replace(_canary("fp8-block-hf-fp8-as-modelopt-fp8-block", "modelopt-fp8-block", "FP8_BLOCK"), aside=_NO_DEEPGEMM),
    _canary("fp8-static-kv-modelopt-fp8", "modelopt-fp8", "FP8"),
    _canary("nvfp4a16-torchao-nvfp4", "torchao-nvfp4", "NVFP4A16"),
    _canary("llm-int8-bnb-int8", "bnb-int8", "LLM_INT8"),
    *_moe("w4a16", "ct-pack", "W4A16", "Marlin MoE", "Using 'MARLIN' WNA16 MoE backend"),
    *_moe("w4a16-asym", "ct-pack", "W4A16_ASYM", "Marlin MoE", "Using 'MARLIN' WNA16 MoE backend"),
    *_moe("int8-dynamic", "ct-int", "W8A8", "Triton INT8 MoE", "Using TRITON Int8 MoE backend"),
    *_moe("fp8-dynamic", "ct-float", "FP8_DYNAMIC", "CUTLASS FP8 MoE", "Using VLLM_CUTLASS Fp8 MoE backend"),
    *_moe("nvfp4a16", "ct-nvfp4", "NVFP4A16", "Marlin NVFP4 MoE", "Using 'MARLIN' NvFp4 MoE backend"),
    *_moe("nvfp4a16", "modelopt-nvfp4", "NVFP4A16", "Marlin NVFP4 MoE", "Using 'MARLIN' NvFp4 MoE backend"),
    _transformers("w4a16-ct-pack", "ct-pack", "W4A16", _PARTNERS),
    _transformers("w4a16-asym-ct-pack", "ct-pack", "W4A16_ASYM", _PARTNERS),
    _transformers("w8a16-ct-pack", "ct-pack", "W8A16", _PARTNERS),
    _transformers("int8-dynamic-ct-int", "ct-int", "W8A8", _PARTNERS),
    _transformers("fp8-dynamic-ct-float", "ct-float", "FP8_DYNAMIC", _PARTNERS),
    _transformers("fp8-static-ct-float", "ct-float", "FP8", _PARTNERS),
    _transformers("nvfp4a16-ct-nvfp4", "ct-nvfp4", "NVFP4A16", _PARTNERS),
    _transformers("nvfp4-ct-nvfp4", "ct-nvfp4", "NVFP4", _PARTNERS),
    _transformers("mxfp4-ct-mxfp4", "ct-mxfp4", "MXFP4A16", _PARTNERS),
    _transformers("fp8-block-hf-fp8", "hf-fp8", "FP8_BLOCK", _OTHERS),
    _transformers("int4-hqq-tile-torchao-tile", "torchao-tile", "W4A16_FLOAT_ZERO", _TORCHAO),
    _transformers("nvfp4a16-torchao-nvfp4", "torchao-nvfp4", "NVFP4A16", _PEERS),
    *(_transformers("w4a16-ct-pack", "ct-pack", "W4A16", _LOG, experts) for experts in (False, True)),
    *(_transformers("fp8-dynamic-ct-float", "ct-float", "FP8_DYNAMIC", _LOG, experts) for experts in (False, True)),
    *(_transformers("experts of hf-fp8", "hf-fp8", "FP8_BLOCK", _OTHERS, experts) for experts in (False, True)),
)
Kind = tuple[str, str, bool]  # layout, scheme, whether it is experts' weights


def loaded(engine: str, kinds: Iterable[Kind]) -> list[Seen]:
    """The runs here in which the engine loaded one checkpoint with all these kinds of weights, the first such checkpoint's."""
    wanted, found = set(kinds), dict[tuple[str, str], list[Seen]]()
    for run in SEEN:
        if run.engine == engine and (run.layout, run.scheme, run.experts) in wanted:
            found.setdefault((run.evidence, run.checkpoint), []).append(run)
    return next((runs for runs in found.values() if len(runs) == len(wanted)), [])


def basis(engine: str, kind: Kind) -> str:
    """How it is known that the engine loads this kind of weights: the run here, where there was one, and what was read."""
    read = TARGETS[engine].loads[kind[0]].source
    return "; ".join([*(run.words for run in loaded(engine, [kind])), read])


def expected(engine: str, version: str, layout: str, scheme: str, generation: str, experts: bool = False) -> Expected:
    """The cell. What was seen comes before what was read; where neither says anything, it is not established."""
    assert version in VERSIONS[engine], f"{engine} {version} was not read"
    assert generation in GENERATIONS, generation
    if reason := unloadable(engine, layout, scheme, experts):
        return Expected(refused=reason, source=KNOWN_BY_TABLE)
    for run in SEEN:
        if run.kernel and (run.engine, run.version, run.layout, run.scheme, run.generation, run.experts) == (
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


def hardware_rows(engine: str, layout: str, scheme: str, experts: bool = False) -> list[tuple[str, str, str, str]]:
    """(version, generations, kernel or what refuses, `seen` or `read`) for every generation, as cards show it."""
    return [
        (version, ", ".join(generations), words, "–" if words == UNKNOWN else "seen" if seen else "read")
        for version in VERSIONS[engine]
        for words, generations, seen in by_outcome(
            (generation, expected(engine, version, layout, scheme, generation, experts)) for generation in GENERATIONS
        )
    ]


def engine_rows() -> list[tuple[str, str, str]]:
    """(engine, layouts it loads by version, those seen here in bold, layouts it refuses), as README shows them."""
    return [
        (target.summary, _loaded(engine, target), _codes(target.refuses) or "–") for engine, target in TARGETS.items()
    ]


def _loaded(engine: str, target: Target) -> str:
    """A layout is bold where a scheme of it was seen."""
    seen, versions = {run.layout for run in SEEN if run.engine == engine}, dict[str, list[str]]()
    for name, loads in target.loads.items():
        versions.setdefault(loads.versions, []).append(f"**`{name}`**" if name in seen else f"`{name}`")
    return "; ".join(f"{version}: {', '.join(names)}" for version, names in versions.items())


def _codes(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def engine_table() -> str:
    """The engines in Markdown, as README holds them."""
    rows = [("engine", "loads (bold: seen here, the rest read in its source)", "refuses"), ("---",) * 3, *engine_rows()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
