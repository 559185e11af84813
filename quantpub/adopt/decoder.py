"""A decoder of an adopted checkpoint: the one door through which every stage sees weights, for what others made."""

from __future__ import annotations

from pathlib import Path

import torch

from quantpub.adopt import Adopted
from quantpub.adopt.base import fitted
from quantpub.artifact import Artifact
from quantpub.decode import Decoder
from quantpub.errors import InputError
from quantpub.families import Family
from quantpub.layouts.base import Config, Tensors


class AdoptedDecoder(Decoder):
    """Differences from our own: numbers may stand in a narrower float, and the declared config is the one found."""

    def __init__(self, adopted: Adopted) -> None:
        self.adopted = adopted
        source = adopted.held.source
        self._read(Artifact(Path(source.path("config.json")).parent), source, list(adopted.treatments), adopted.lines)

    def family(self) -> Family:
        return self.adopted.family

    def declared(self) -> Config:
        return self.adopted.held.quantization

    def files(self) -> dict[str, Config]:
        return {}

    def packed(self, module: str) -> Tensors:
        """suffix → tensor as the layout states it. Errors: InputError when they do not say what the weight is."""
        treatment, (n, k) = self.treated(module), self._shape(module)
        found = super().packed(module)
        spec = treatment.layout.spec(treatment.scheme, n, k, self.source_dtype(module))
        tensors = {suffix: fitted(tensor, *spec[suffix]) for suffix, tensor in found.items()}
        if reason := treatment.layout.ambiguous(tensors, treatment.scheme, (n, k)):
            raise InputError(reason, where=module, next="quantize it again from the full-precision model")
        return tensors

    def kv_scales(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """As of ours; one scale of keys and values alike counts as both."""
        found = {name: self.adopted.held.tensor(name).float().reshape(()) for name in self.adopted.shared}
        return super().kv_scales() | {name.removesuffix(".kv_scale"): (scale, scale) for name, scale in found.items()}

    def _place_of(self, name: str) -> str:
        return self.adopted.held.place[name]
