"""Rules that hold the artifact against the checkpoint it was made from."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quantpub.checkpoint import Checkpoint, Slice
from quantpub.families import FAMILIES, GENERIC
from quantpub.shards import raw_bytes
from quantpub.verify.base import NO_SOURCE, Finding, Problem, Subject, failed, first, skipped
from quantpub.verify.whole import LM_HEAD, tied

COMPUTED = re.compile(r".*\.(rotary_emb\.inv_freq|masked_bias)")
TAKE_IT = "take that file from the source as it is, or make the checkpoint again"
IN_RANGE = "cast it to bfloat16, or keep the source's dtype: float16 ends at 65504"
REMOTE = "not looked at: it needs the weights, which --download fetches"


def source_parts(checkpoint: Checkpoint) -> dict[str, Slice]:
    """name → where the source holds it."""
    family = FAMILIES.get(str(checkpoint.config.get("model_type")), GENERIC)
    return {part.name: part for shard in checkpoint.shards for part in checkpoint.slices(shard, family)}


def coverage(subject: Subject) -> Finding:
    """Law 3 seen from outside: the plan names every source tensor once, and the small files came along unchanged."""
    if subject.source is None:
        return skipped(NO_SOURCE)
    parts = source_parts(subject.source)
    counts = Counter(name for line in subject.decoder.actions for name in _of_source(subject, line))
    if not subject.quantized_here:
        parts = _wanted(subject, parts, counts)
    problems = [f"source tensor {name} has {counts[name]} actions" for name in parts if counts[name] != 1]
    problems += [f"{name} is in the plan, not in the source" for name in counts if name not in parts]
    problems += _reshaped(subject, parts)
    for name in subject.source.companions if subject.quantized_here else ():
        ours = subject.artifact.path / name
        if not ours.is_file() or _digest(ours.read_bytes()) != _digest(subject.source.source.path(name).read_bytes()):
            problems.append(Problem(f"{name} is not the source's", TAKE_IT))
    return first(problems, f"{len(parts)} source tensors{_beside(subject, subject.source.companions)}")


def _beside(subject: Subject, names: Sequence[str]) -> str:
    """Tokenizer and other small files: of another tool's, which may rightly write them anew, only that they are there."""
    if subject.quantized_here:
        return f", {len(names)} files beside them"
    missing = [name for name in names if name not in subject.held.source.files]
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return (
        f"; files beside them, as the tokenizer, were not compared{f': {missing[0]}{more} missing' if missing else ''}"
    )


def _of_source(subject: Subject, line: Mapping[str, Any]) -> list[str]:
    """The names by which `source_parts` knows what a line is of: experts in one parameter are many."""
    name, members = str(line["as"]), subject.decoder.family().expert_members(str(line["as"]))
    if not members or len(line["shape"]) != 3:
        return [name]
    prefix = name.rpartition(".experts.")[0]
    return [f"{prefix}.experts.{i}.{member}.weight" for i in range(line["shape"][0]) for member in members]


def _wanted(subject: Subject, parts: Mapping[str, Slice], counts: Counter[str]) -> dict[str, Slice]:
    """Without what other tools rightly leave out or add: buffers that are computed anew, and a head tied to the embedding."""
    odd = {name for name in parts if COMPUTED.fullmatch(name) and not counts[name]}
    if tied(subject) and (LM_HEAD in parts) != (LM_HEAD in counts):
        odd.add(LM_HEAD)
        counts.pop(LM_HEAD, None)
    return {name: part for name, part in parts.items() if name not in odd}


def _reshaped(subject: Subject, parts: Mapping[str, Slice]) -> list[str]:
    shapes = {str(line["as"]): tuple(line["shape"]) for line in subject.decoder.actions}
    wrong = (name for name, part in parts.items() if shapes.get(name, part.info.shape) != part.info.shape)
    return [f"{name} is {list(shapes[name])}, the source's {list(parts[name].info.shape)}" for name in wrong]


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def copies(subject: Subject) -> Finding:
    """Embeddings, norms, routers, heads: what was not quantized must not have been touched, but by the factors of smoothing.

    Without a source no more is known than that they are numbers. What the source lacks is a matter of `coverage`.
    """
    names = subject.decoder.copied()
    if not subject.weights:
        return skipped(NO_SOURCE if subject.source is None else REMOTE)
    if subject.source is None:
        odd = next((name for name in names if not _finite(subject.decoder.tensor(name))), None)
        return failed(f"{odd} holds what is not a finite number") if odd else skipped(NO_SOURCE)
    parts = source_parts(subject.source)
    compared = [name for name in names if name in parts]
    problems = [problem for name in compared if (problem := _differs(subject, name, parts[name]))]
    smoothed = sum(line["action"] == "smooth" for line in subject.decoder.actions)
    folded = f", {smoothed} of them after the factors of smoothing" if smoothed else ""
    return first(problems, f"{len(compared)} tensors byte-identical{folded or _altered(subject, compared, parts)}")


def _altered(subject: Subject, compared: Sequence[str], parts: Mapping[str, Slice]) -> str:
    """Of another tool's: with what the source's tensors were altered before they were compared."""
    if subject.quantized_here:
        return ""
    dtypes = {name: subject.held.info(name).dtype for name in compared}
    cast = [name for name in compared if dtypes[name] != parts[name].info.dtype]
    to = " and ".join(sorted({dtypes[name] for name in cast}))
    sources = subject.smoothing.vectors() if subject.smoothing is not None else {}
    folded = sum(name.rpartition(".")[0] in sources for name in compared)
    after = [f"{len(cast)} of them after a cast to {to}"] if cast else []
    after += [f"{folded} of them after factors that were found folded into them"] if folded else []
    return "".join(f", {each}" for each in after)


def _finite(tensor: torch.Tensor) -> bool:
    return not tensor.dtype.is_floating_point or bool(torch.isfinite(tensor.float()).all())


def _differs(subject: Subject, name: str, part: Slice) -> str | None:
    """Another tool may have cast the whole model to its dtype, where that holds its numbers."""
    found, due = subject.decoder.tensor(name), subject.due(part)
    if raw_bytes(found) != raw_bytes(due if subject.quantized_here else due.to(found.dtype)):
        return f"{name} differs from the source"
    lost = found.dtype != due.dtype and not _finite(found) and _finite(due)
    if not lost:
        return None
    return Problem(f"{name} was cast to {subject.held.info(name).dtype}, which does not hold its numbers", IN_RANGE)
