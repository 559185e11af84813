"""The check in the real engine: the checkpoint is loaded there, and its logits are compared with those of its base there.

The engine needs files: of a checkpoint on the Hub they are fetched, where that was asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantpub.artifact import Artifact
from quantpub.engines.canary import MAX_KL, canary
from quantpub.errors import UsageError
from quantpub.opened import Opened
from quantpub.sources import LocalSource, Source, open_source


def in_engine(
    checkpoint: Artifact | Opened, source: str | None, engine: str, python: str | None, download: bool = False
) -> dict[str, Any]:
    """What the engine made of it, plain data with a verdict. source: the base, None: it is only loaded and run.

    Of one of ours the limit of the KL is its recipe's gate, three times over: a canary is a few hundred tokens, and looks for
    weights that are wrong, not for those that are worse. Errors: UsageError, UnavailableError.
    """
    folder = _folder(checkpoint, download)
    base = None if source is None else _fetched(open_source(source, None))
    return canary(engine, folder, base, python=python, max_kl=_limit(checkpoint))


def _limit(checkpoint: Artifact | Opened) -> float:
    artifact = checkpoint if isinstance(checkpoint, Artifact) else checkpoint.artifact
    gate = artifact.recipe().gate.max_kl if artifact else None
    return MAX_KL if gate is None else max(3 * gate, 0.2)


def _folder(checkpoint: Artifact | Opened, download: bool) -> Path:
    if isinstance(checkpoint, Artifact):
        return checkpoint.path
    source = checkpoint.held.source
    if not isinstance(source, LocalSource) and not download:
        total = sum(source.files[shard] for shard in checkpoint.held.headers) / 1e9
        raise UsageError("an engine needs the weights", where=source.label, next=f"add --download, for {total:.2f} GB")
    return _fetched(source)


def _fetched(source: Source) -> Path:
    """The folder where all of its files lie."""
    if isinstance(source, LocalSource):
        return source.folder
    for name in source.files:
        if "/" not in name:
            source.path(name)
    return source.path("config.json").parent
