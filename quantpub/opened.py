"""A quantized checkpoint by its folder or Hub id: ours, with all that we know of it, or another tool's, adopted.

Of a checkpoint on the Hub the small files are fetched, and of the weights headers alone; tensors are read when asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from quantpub.adopt import Adopted, adopt
from quantpub.adopt.decoder import AdoptedDecoder
from quantpub.artifact import META, Artifact
from quantpub.decode import Decoder
from quantpub.held import SUFFIX, Held, open_held
from quantpub.sources import LocalSource, Source


@dataclass(frozen=True)
class Opened:
    """artifact: None where the checkpoint is not ours."""

    held: Held
    artifact: Artifact | None

    @cached_property
    def decoder(self) -> Decoder:
        """Errors: InputError when its plan is damaged, or it is not quantized by a method that is read."""
        return Decoder(self.artifact, self.held.source) if self.artifact else AdoptedDecoder(self.adopted)

    @cached_property
    def adopted(self) -> Adopted:
        """The checkpoint by what it declares alone, ours too. Errors: as of `decoder`."""
        return adopt(self.held)


def open_quantized(model: str, revision: str | None = None) -> Opened:
    """Errors: those of `open_held`; InputError when one of ours was not finished."""
    held = open_held(model, revision)
    if f"{META}/run.json" not in held.source.files:
        return Opened(held, None)
    return Opened(held, Artifact.open(_folder(held.source)))


def _folder(source: Source) -> Path:
    """Where the small files lie."""
    if isinstance(source, LocalSource):
        return source.folder
    for name in source.files:
        if not name.endswith(SUFFIX):
            source.path(name)
    return source.path("config.json").parent
