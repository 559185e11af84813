"""What an engine is expected to run for each linear of a recipe: by its kernel tables, the kernel that takes the shape.

A recipe that an engine would serve without any gain is refused here with the reason, as is one that it does not load.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from quantpub.gpus import BF16
from quantpub.hardware import Misfit, following, misfit
from quantpub.kernel_tables import Expected, expected
from quantpub.recipe import Recipe, ignores
from quantpub.roofline import weight_bits
from quantpub.scheme import ActFormat, Scheme
from quantpub.served import Linear, Served
from quantpub.targets import TARGETS, VERSIONS
from quantpub.treatments import make_treatments

USELESS = {  # of a kernel's name → why its choice cannot pay
    "after decompression": "it is decompressed when loaded: in memory and in speed it is bf16",
    "bitsandbytes": "bitsandbytes' kernels were not measured here, and are known as slower than bf16 on most GPUs",
    "emulation": "the engine emulates it here, which is very slow",
}
FIRST = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj"}  # merged → its first member


class Refusal(Exception):
    """Why a recipe is no choice here."""


@dataclass(frozen=True)
class Runs:
    """Some layers' linear on a kernel. scheme: as it is stored; multiplied: as the kernel multiplies it. None: bf16."""

    linear: Linear
    kernel: str
    scheme: Scheme | None = None
    multiplied: Scheme | None = None

    @property
    def bytes(self) -> float:
        return weight_bits(self.scheme, self.linear.n, self.linear.k) * self.linear.weights / 8


@dataclass(frozen=True)
class Engine:
    """name: a key of TARGETS. generation: of the GPU that it runs on."""

    name: str
    generation: str

    def runs(self, served: Served, recipe: Recipe) -> tuple[str, list[Runs], list[str]]:
        """(the recipe's layout for this engine, what is run, what is to be said of it).

        Errors: Refusal, and InputError for a recipe whose rules no layout holds.
        """
        layout, said, runs = recipe.engines.get(self.name), list[str](), list[Runs]()
        if layout is None:
            raise Refusal(f"it has no layout for {TARGETS[self.name].summary}")
        for linear, scheme, held in treated(served, recipe, layout):
            run, words = self._run(linear, scheme, held) if scheme else (in_bf16(linear), [])
            runs, said = [*runs, run], [*said, *words]
        if needs := TARGETS[self.name].loads[layout].needs:
            said.append(f"{TARGETS[self.name].summary} needs {' and '.join(needs)} for it")
        return layout, runs, said

    def _run(self, linear: Linear, scheme: Scheme, layout: str) -> tuple[Runs, list[str]]:
        """And what is to be said of it."""
        version, cell = self._expected(layout, scheme, bool(linear.experts))
        if cell.kernel is None:
            raise Refusal(cell.refused or f"which kernel {TARGETS[self.name].summary} runs there is not established")
        kernel, misfit = self._fitting(cell.kernel, linear, scheme, version)
        if useless := next((why for word, why in USELESS.items() if word in kernel), None):
            raise Refusal(useless)
        run = Runs(linear, kernel, scheme, as_multiplied(scheme, kernel))
        said = [f"{misfit.reason}: {misfit.effect}"] if misfit else []
        return run, [*said, *_unlike(run)]

    def _expected(self, layout: str, scheme: Scheme, experts: bool) -> tuple[str, Expected]:
        """Of the newest version for which the tables say anything."""
        cells = [
            (version, expected(self.name, version, layout, scheme.name, self.generation, experts))
            for version in reversed(VERSIONS[self.name])
        ]
        return next(((version, cell) for version, cell in cells if cell.kernel or cell.refused), cells[0])

    def _fitting(self, kernel: str, linear: Linear, scheme: Scheme, version: str) -> tuple[str, Misfit | None]:
        """The kernel that takes the shape; what is wrong with it, where the engine has no other."""
        while bad := misfit(kernel, linear.n, linear.k, scheme.group_size, self.name, version):
            other = following(kernel, self.name, version)
            if other is None:
                return kernel, bad
            kernel = other
        return kernel, None


def in_bf16(linear: Linear) -> Runs:
    return Runs(linear, BF16)


def treated(served: Served, recipe: Recipe, layout: str) -> Iterator[tuple[Linear, Scheme | None, str]]:
    """(linear of so many layers, its scheme or None for bf16, its layout); a merged linear by its first member's name."""
    treatments = make_treatments(recipe, layout)
    for linear in served.linears:
        modules = [f"model.layers.{layer}.{_member(linear)}" for layer in range(linear.layers)]
        places = Counter(-2 if ignores(recipe.ignore, module) else recipe.rule_for(module) for module in modules)
        for place, layers in places.items():
            part = replace(linear, layers=layers, count=linear.count * layers // linear.layers)
            chosen = treatments[place + 1] if place > -2 else None
            yield part, chosen.scheme if chosen else None, chosen.layout.name if chosen else layout


def _member(linear: Linear) -> str:
    prefix, _, leaf = linear.name.rpartition(".")
    return f"{prefix}.{'0.' if linear.experts else ''}{FIRST.get(leaf, leaf)}"


def as_multiplied(scheme: Scheme, kernel: str) -> Scheme:
    """The scheme as the kernel multiplies it: one named A16 leaves activations alone, W4A4 quantizes them to FP4."""
    if "A16" in kernel:
        return replace(scheme, act=None)
    if "W4A4" in kernel and scheme.act is None:
        return replace(scheme, act=ActFormat("fp4_e2m1", "group", True, group_size=scheme.group_size))
    return scheme


def _unlike(run: Runs) -> list[str]:
    """What is to be said of a kernel that multiplies other numbers than the scheme names."""
    if run.multiplied == run.scheme:
        return []
    if run.multiplied is not None and run.multiplied.act is not None:
        return [f"{run.kernel} quantizes activations too, which its quality was not measured with"]
    return [f"weight-only there: {run.kernel} multiplies in bf16"]
