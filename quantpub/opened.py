"""A quantized checkpoint by its folder or Hub id: ours, with all that we know of it, or another tool's, adopted.

Of a checkpoint on the Hub the small files are fetched, and of the weights headers alone; a tensor brings the file that it
lies in, or itself alone where files are not to be fetched.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quantpub.adopt import Adopted, adopt
from quantpub.adopt.decoder import AdoptedDecoder
from quantpub.artifact import META, Artifact
from quantpub.checkpoint import NOT_COMPANIONS, is_companion
from quantpub.decode import Decoder
from quantpub.held import Held, open_held
from quantpub.ranges import AT_ONCE
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

    def lineage(self) -> dict[str, Any]:
        """What a repacked artifact says of this one. Of one of ours also what made it, and how it was repacked before."""
        treatments = self.decoder.treatments
        found = {"layouts": list(dict.fromkeys(t.layout.name for t in treatments)), **self.held.source.identity()}
        if self.artifact is None:
            return found | {"quantized_by": self.adopted.method.tool}
        run = self.artifact.run()
        before, made = run["stages"].get("repack"), run["stages"]["quantize"]
        if before is not None:
            return found | {"digest": run["digest"], "repack": before}
        own = {"quantpub": run["quantpub"], "versions": run["versions"], "device": made["device"]}
        return found | {"digest": run["digest"], "base_bytes": made["source_bytes"], **own}


def open_quantized(model: str, revision: str | None = None, whole: bool = True) -> Opened:
    """whole: see `open_held`. Errors: those of `open_held`; InputError when one of ours was not finished."""
    held = open_held(model, revision, whole)
    if f"{META}/run.json" not in held.source.files:
        return Opened(held, None)
    return Opened(held, Artifact.open(_folder(held.source)))


def _folder(source: Source) -> Path:
    """Where the small files lie: what is known of the artifact, and what is beside its weights."""
    if isinstance(source, LocalSource):
        return source.folder
    small = [
        name for name in source.files if name.startswith(f"{META}/") or is_companion(name) or name in NOT_COMPANIONS
    ]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(source.path, small):
            pass
    return source.path("config.json").parent
