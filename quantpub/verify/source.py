"""Rules that hold the artifact against the checkpoint it was made from."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping

from quantpub.adopt.generic import GENERIC
from quantpub.checkpoint import Checkpoint, Slice
from quantpub.families import FAMILIES
from quantpub.shards import raw_bytes
from quantpub.verify.base import Finding, Subject, first, skipped

NO_SOURCE = "not looked at: no --source was given"
REMOTE = "not looked at: it needs the weights, which --download fetches"


def source_parts(checkpoint: Checkpoint) -> dict[str, Slice]:
    """name → where the source holds it."""
    family = FAMILIES.get(str(checkpoint.config.get("model_type")), GENERIC)
    return {part.name: part for shard in checkpoint.shards for part in checkpoint.slices(shard, family)}


def coverage(subject: Subject) -> Finding:
    """Law 3 seen from outside: the plan names every source tensor once, and the small files came along unchanged."""
    if subject.source is None:
        return skipped(NO_SOURCE)
    counts = Counter(line["as"] for line in subject.decoder.actions)
    parts = source_parts(subject.source)
    problems = [f"source tensor {name} has {counts[name]} actions" for name in parts if counts[name] != 1]
    problems += [f"{name} is in the plan, not in the source" for name in counts if name not in parts]
    problems += _reshaped(subject, parts)
    for name in subject.source.companions if subject.ours else ():
        ours = subject.artifact.path / name
        if not ours.is_file() or _digest(ours.read_bytes()) != _digest(subject.source.source.path(name).read_bytes()):
            problems.append(f"{name} is not the source's")
    return first(problems, f"{len(parts)} source tensors, {len(subject.source.companions)} files beside them")


def _reshaped(subject: Subject, parts: Mapping[str, Slice]) -> list[str]:
    shapes = {str(line["as"]): tuple(line["shape"]) for line in subject.decoder.actions}
    wrong = (name for name, part in parts.items() if shapes.get(name, part.info.shape) != part.info.shape)
    return [f"{name} is {list(shapes[name])}, the source's {list(parts[name].info.shape)}" for name in wrong]


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def copies(subject: Subject) -> Finding:
    """Embeddings, norms, routers, heads: what was not quantized must not have been touched, but by the factors of smoothing."""
    if subject.source is None:
        return skipped(NO_SOURCE)
    if not subject.weights:
        return skipped(REMOTE)
    parts, names = source_parts(subject.source), subject.decoder.copied()
    problems = [
        f"{name} differs from the source"
        for name in names
        if name not in parts or not _same_bytes(subject, name, parts[name])
    ]
    smoothed = sum(line["action"] == "smooth" for line in subject.decoder.actions)
    folded = f", {smoothed} of them after the factors of smoothing" if smoothed else ""
    return first(problems, f"{len(names)} tensors byte-identical{folded}")


def _same_bytes(subject: Subject, name: str, part: Slice) -> bool:
    """Another tool may have cast the whole model to its dtype."""
    found, due = subject.decoder.tensor(name), subject.due(part)
    return raw_bytes(found) == raw_bytes(due if subject.ours else due.to(found.dtype))
