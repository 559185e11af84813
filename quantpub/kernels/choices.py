"""Which kernels a profile takes: those asked for, or all; each with why it cannot run here or refuses a GEMM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from quantpub.cures import Cure, cures
from quantpub.decode import Decoder
from quantpub.gemms import Gemm
from quantpub.kernels import BASELINE, KERNELS
from quantpub.kernels.base import Kernel, Weight
from quantpub.layouts import LAYOUTS
from quantpub.layouts.base import Layout
from quantpub.merged import load as load_merged
from quantpub.registry import load
from quantpub.scheme import preset


@dataclass(frozen=True)
class Choice:
    """A kernel asked for. unavailable: why no GEMM runs on it, or None. refused: GEMM → why that one does not.

    cure: what the weights are repacked to first, where the kernel does not read the artifact's own layout.
    """

    kernel: Kernel
    unavailable: str | None
    refused: dict[str, str]
    cure: Cure | None = None

    def takes(self, gemm: Gemm) -> bool:
        return self.unavailable is None and gemm.name not in self.refused

    def weight(self, own: Weight) -> Weight:
        """What the kernel is given of the artifact's weight."""
        if self.cure is None:
            return own
        q, layout = self.cure.convert(own.q), _layout(self.cure.layout)
        return Weight(q, layout.pack(q), layout.name)

    def as_json(self) -> dict[str, object]:
        facts = {
            "name": self.kernel.name,
            "layout": self.kernel.layout,
            "package": self.kernel.package,
            "row": self.kernel.row,
        }
        repacked = {"repacked": self.cure.as_json()} if self.cure else {}
        return {**facts, **repacked, "unavailable": self.unavailable}


def _layout(name: str) -> Layout:
    found: Layout = load(LAYOUTS, "layout", name)
    return found


def baseline() -> Kernel:
    found: Kernel = load(KERNELS, "kernel", BASELINE)
    return found


def choose(kernels: Sequence[str] | None, decoder: Decoder, gemms: Sequence[Gemm], device: str) -> list[Choice]:
    """Errors: UsageError for a name that is not known."""
    names = dict.fromkeys(KERNELS if kernels is None else kernels)
    return [_choice(load(KERNELS, "kernel", name), decoder, gemms, device) for name in names if name != BASELINE]


def _choice(kernel: Kernel, decoder: Decoder, gemms: Sequence[Gemm], device: str) -> Choice:
    if device not in kernel.devices:
        where = " and ".join(kernel.devices)
        return Choice(kernel, f"it runs on {where}; this was measured on {device}", {})
    own = _own(kernel, decoder, gemms)
    if gemms and own.unavailable is None:
        return own
    repacked = _repacked(kernel, decoder, gemms)
    return _fitting(repacked, decoder, gemms) if repacked and repacked.unavailable is None else own


def _own(kernel: Kernel, decoder: Decoder, gemms: Sequence[Gemm]) -> Choice:
    refused = {}
    for gemm in gemms:
        treatment = decoder.treated(gemm.members[0])
        if reason := kernel.refuses(treatment.scheme, treatment.layout.name, gemm.n, gemm.k):
            refused[gemm.name] = reason
    return Choice(kernel, _unavailable(kernel, refused, gemms), refused)


def _repacked(kernel: Kernel, decoder: Decoder, gemms: Sequence[Gemm]) -> Choice | None:
    """The kernel on a cure of the recipe's own treatment, where there is one."""
    treatment = decoder.treatments[0]
    for cure in cures(treatment.layout.name, treatment.scheme.name):
        if cure.layout not in (kernel.reads or ()):
            continue
        scheme, refused = preset(cure.scheme, treatment.scheme.group_size), {}
        for gemm in gemms:
            if decoder.place(gemm.members[0]) != 0:
                refused[gemm.name] = "a rule of the recipe gives it another layout"
            elif reason := kernel.refuses(scheme, cure.layout, gemm.n, gemm.k):
                refused[gemm.name] = reason
        return Choice(kernel, _unavailable(kernel, refused, gemms), refused, cure)
    return None


def _fitting(choice: Choice, decoder: Decoder, gemms: Sequence[Gemm]) -> Choice:
    """The choice without the GEMMs whose weights would lose more than its cure says."""
    assert choice.cure is not None
    taken = [gemm for gemm in gemms if choice.takes(gemm)]
    lost = {gemm.name: reason for gemm in taken if (reason := _misfit(choice.cure, decoder, gemm))}
    unavailable = next(iter(lost.values()), None) if len(lost) == len(taken) else None
    return replace(choice, refused=choice.refused | lost, unavailable=unavailable)


@lru_cache(maxsize=64)  # several kernels read what a cure makes, and decoding takes seconds
def _misfit(cure: Cure, decoder: Decoder, gemm: Gemm) -> str | None:
    """Why a weight would lose more than the cure says."""
    reasons = (cure.refuses(decoder.qtensor(member)) for member in gemm.members)
    return next((f"repacked as {cure.format}, {reason}" for reason in reasons if reason), None)


def _unavailable(kernel: Kernel, refused: dict[str, str], gemms: Sequence[Gemm]) -> str | None:
    if len(refused) == len(gemms):
        return next(iter(refused.values()), "the artifact has no quantized linear")
    return kernel.unavailable()


def own_weight(decoder: Decoder, gemm: Gemm, device: str, tp: int) -> Weight:
    """The artifact's weight of a GEMM, merged and cut as one of `tp` GPUs holds it."""
    q, packed = load_merged(decoder, gemm, device, tp)
    return Weight(q, packed, decoder.treated(gemm.members[0]).layout.name)
