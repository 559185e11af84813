"""The check in the real engine: the checkpoint is loaded there, and its logits are compared with those of its base there.

The engine needs files: of a checkpoint on the Hub they are fetched, where that was asked for. What the tables know that the
engine does not load is said, and not tried: some engines load it without a word, and compute with codes as if they were weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantpub.actions import QUANTIZE
from quantpub.artifact import Artifact
from quantpub.decode import Decoder
from quantpub.engines.canary import canary
from quantpub.engines.canary_faults import FACTOR, LOOSE, NOISE, Expected
from quantpub.errors import QuantpubError, UsageError
from quantpub.files import sha256_json
from quantpub.gemms import is_expert, some_experts
from quantpub.opened import Opened
from quantpub.sources import LocalSource, Source, open_source
from quantpub.targets import TARGETS, unloadable

NOT_ESTABLISHED = "not established"  # what `unloadable` says of a layout that nobody has read the engine for
TIMES = ("seconds", "load_seconds")  # evidence is the same each time
Kinds = set[tuple[str, str, bool, bool]]  # layout, scheme, whether of experts, whether some stay as they were


def in_engine(
    checkpoint: Artifact | Opened, source: str | None, engine: str, python: str | None, download: bool = False
) -> dict[str, Any]:
    """What the engine made of it, plain data with a verdict. source: the base, None: it is only loaded and run.

    Errors: UsageError, UnavailableError.
    """
    decoder = _decoder(checkpoint)
    if decoder is not None and (refusal := refused(engine, kinds(decoder))):
        return refusal
    folder = _folder(checkpoint, download)
    base = None if source is None else _fetched(open_source(source, None))
    found = canary(engine, folder, base, python=python, expected=expected(checkpoint, decoder))
    return {name: value for name, value in found.items() if name not in TIMES}


def _decoder(checkpoint: Artifact | Opened) -> Decoder | None:
    """None where it is of a kind that is not read."""
    try:
        return Decoder(checkpoint) if isinstance(checkpoint, Artifact) else checkpoint.decoder
    except QuantpubError:
        return None


def kinds(decoder: Decoder) -> Kinds:
    """What its quantized modules are."""
    treated = ((name, decoder.treated(name)) for name, _ in decoder.modules())
    kept = some_experts(line["tensor"] for line in decoder.actions if line["action"] != QUANTIZE)
    return {(t.layout.name, t.scheme.name, is_expert(name), kept) for name, t in treated}


def refused(engine: str, found: Kinds) -> dict[str, Any] | None:
    """What `in_engine` says where the engine does not load one of these, or None."""
    reasons = {kind: unloadable(engine, *kind) for kind in sorted(found)} if engine in TARGETS else {}
    known = {kind: why for kind, why in reasons.items() if why and why != NOT_ESTABLISHED}
    if not known:
        return None
    (layout, _, experts, _), why = next(iter(known.items()))
    others = [name for name in TARGETS if not any(unloadable(name, *kind) for kind in found)]
    advice = f"it is loaded by {', '.join(others)}; or repack it" if others else "repack it"
    return {
        "engine": engine,
        "loaded": False,
        "ran": False,
        "verdict": "failed",
        "reason": f"{layout}{' of experts' if experts else ''} is not loaded there, and was not tried: {why}",
        "next": f"{advice} into a layout that {engine} loads (`quantpub list engines`)",
    }


def expected(checkpoint: Artifact | Opened, decoder: Decoder | None) -> Expected:
    """The limit of the KL: by our own evaluation of these bytes, else by the recipe's gate three times over, else absolute.

    A canary is a few hundred tokens, and looks for weights that are wrong, not for those that are worse.
    """
    quantized = None if decoder is None else bool(decoder.modules())
    artifact = checkpoint if isinstance(checkpoint, Artifact) else checkpoint.artifact
    if artifact is not None and (measured := _evaluated(artifact)) is not None:
        basis = f"{FACTOR:g} times the {measured:.5f} of its evaluation and {NOISE:g}"
        return Expected(round(FACTOR * measured + NOISE, 5), basis, quantized)
    gate = artifact.recipe().gate.max_kl if artifact is not None else None
    if gate is not None:
        return Expected(max(3 * gate, 0.2), f"three times its recipe's gate of {gate:g}, or 0.2", quantized)
    if decoder is None:
        return Expected(LOOSE, "the limit of a format that is not read, which may be of two bits")
    return Expected(quantized=quantized)


def _evaluated(artifact: Artifact) -> float | None:
    """The KL of stage `eval`, where it was measured on the weights that are there."""
    if not artifact.has("eval.json"):
        return None
    found = artifact.read_json("eval.json", ("kl",))
    own = sha256_json(artifact.journal())
    mean = found["kl"].get("mean") if found.get("weights_sha256", own) == own else None
    return mean if isinstance(mean, float) else None


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
