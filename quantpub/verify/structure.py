"""Rules that need the artifact alone: its files, names, shapes, dtypes and configuration."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from quantpub.adopt import NONE
from quantpub.artifact import SUMS
from quantpub.checkpoint import public_config
from quantpub.decode import outputs_of
from quantpub.sources import LocalSource
from quantpub.verify.base import NO_SOURCE, Finding, Problem, Subject, counted, first, skipped
from quantpub.verify.computed import differences, settings, stray_ids

QUANTIZE_IT = "quantize it, or take quantization_config out of config.json"
IN_VOCABULARY = (
    "let config.json name tokens that the vocabulary has, or raise vocab_size with the rows of the embedding"
)


def files(subject: Subject) -> Finding:
    """Catches a shard that was truncated, exchanged or edited after it was sealed. On the Hub, by the sha256 it states."""
    source = subject.held.source
    if isinstance(source, LocalSource):
        damaged = subject.artifact.damage()
        return first(
            [f"{name} is not what SHA256SUMS states" for name in damaged], f"{len(subject.artifact.sums())} files"
        )
    sums = subject.artifact.sums()
    wrong = [name for name, digest in sums.items() if name not in source.files or source.sha256(name) != digest]
    wrong += sorted(set(source.files) - set(sums) - {SUMS})
    return first(
        [f"{name} is not what SHA256SUMS states" for name in wrong], f"{len(sums)} files, by the Hub's own sha256"
    )


def index(subject: Subject) -> Finding:
    """Known failure: a resumed run that wrote modules twice. The index and the headers must be the same map."""
    held = subject.held
    return first(list(held.problems), f"{len(held.place)} tensors in {counted(len(held.headers), 'shard')}")


def tensors(subject: Subject) -> Finding:
    """The exact set of suffixes, dtypes and shapes: engines do not check that a quantized checkpoint is complete."""
    if not subject.ours:
        adopted = subject.opened.adopted
        problems = [Problem(text, QUANTIZE_IT) if text == NONE else text for text in adopted.said("tensors")]
        return first(problems, f"{len(subject.held.place)} tensors, {len(subject.decoder.modules())} quantized modules")
    decoder, problems = subject.decoder, []
    expected = {
        name: (dtype, tuple(shape)) for line in decoder.actions for name, (dtype, shape) in outputs_of(line).items()
    }
    for module, (n, k) in decoder.modules():
        treatment = decoder.treated(module)
        for suffix, spec in treatment.layout.spec(treatment.scheme, n, k, decoder.source_dtype(module)).items():
            expected[f"{module}.{suffix}"] = spec
    headers = subject.held.headers
    found = {name: (info.dtype, info.shape) for infos, _ in headers.values() for name, info in infos.items()}
    problems += [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} belongs to no module" for name in found if name not in expected]
    problems += [
        f"{name} is {found[name]}, expected {spec}" for name, spec in expected.items() if found.get(name, spec) != spec
    ]
    metadata = decoder.metadata()
    for shard in dict.fromkeys(line["shard"] for line in decoder.actions):
        if shard in headers and headers[shard][1] != metadata:
            problems.append(f"the header of {shard} lacks entries that loaders of this layout read, or has others")
    return first(problems, f"{len(found)} tensors, {len(decoder.modules())} quantized modules")


def readable(subject: Subject) -> Finding:
    """What another tool wrote, and is not read here, is not judged either: it leaves the verdict incomplete."""
    reasons = [] if subject.ours else subject.opened.adopted.said("readable")
    if not reasons:
        return first([], f"{len(subject.decoder.modules())} modules")
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    return skipped(f"{reasons[0]}{more}", f"judge it with what made it, {subject.opened.adopted.method.tool}")


def config(subject: Subject) -> Finding:
    """Ours in every key: each Linear that is not quantized is named in `ignore` in full. Of another tool's what is computed."""
    return _config_of_ours(subject) if subject.ours else _computed(subject)


def _computed(subject: Subject) -> Finding:
    """Known failure: settings that were lost or changed on the way, with which the right weights answer worse."""
    found = subject.held.config
    if subject.source is None:
        return first(_stray(found, None), f"token ids lie within the vocabulary; against the source {NO_SOURCE}")
    source = subject.source.config
    compared = settings(found).keys() & settings(source).keys()
    return first(
        [*differences(found, source), *_stray(found, source)],
        f"{len(compared)} settings of what is computed are the source's",
    )


def _stray(found: Mapping[str, Any], source: Mapping[str, Any] | None) -> list[str]:
    return [Problem(text, IN_VOCABULARY) for text in stray_ids(found, source)]


def _config_of_ours(subject: Subject) -> Finding:
    stated, decoder = subject.artifact.config(), subject.decoder
    stating, expecting = stated.get("quantization_config", {}), decoder.declared()
    quantized, listed = {module for module, _ in decoder.modules()}, set(stating.get("ignore") or ())
    problems = [f"{module} is quantized, but listed in ignore" for module in sorted(quantized & listed)]
    if "ignore" in expecting:
        problems += [
            f"{module} is not quantized, and not listed in ignore"
            for module in decoder.ignored()
            if module not in listed
        ]
    problems += [
        f"quantization_config says {key} = {_short(stating.get(key))}, the layout {_short(expecting.get(key))}"
        for key in sorted({*stating, *expecting})
        if stating.get(key) != expecting.get(key)
    ]
    for name, content in decoder.files().items():
        path = subject.artifact.path / name
        if not path.is_file() or json.loads(path.read_text("utf-8")) != content:
            problems.append(f"{name} is not what the layout states")
    if subject.source is not None and subject.quantized_here:
        expected = public_config(subject.source)
        ours = {key: value for key, value in stated.items() if key not in ("quantization_config", "_name_or_path")}
        problems += [f"{key} is not the source's" for key in {*ours, *expected} if ours.get(key) != expected.get(key)]
    elif subject.source is not None:
        problems += differences(stated, subject.source.config)
    method = " ".join(str(stating[key]) for key in ("quant_method", "format") if key in stating)
    return first(problems, f"{method}, {len(decoder.ignored())} modules in high precision")


def _short(value: object) -> str:
    return f"{json.dumps(value):.60}"


def bits_of_ours(subject: Subject) -> Finding:
    """The bytes on disk say what was really done: they must be those that the run declared."""
    record = subject.artifact.run()["stages"]["quantize"]
    headers = subject.held.headers
    on_disk = {name: info for infos, _ in headers.values() for name, info in infos.items()}
    owned = [
        name
        for line in subject.decoder.actions
        if line["action"] == "quantize"
        for name in line["outputs"]
        if name in on_disk
    ]
    weights = sum(math.prod(shape) for _, shape in subject.decoder.modules())
    actual = round(8 * sum(on_disk[name].nbytes for name in owned) / weights, 4) if weights else None
    size = sum(subject.held.source.files[shard] for shard in headers)
    problems = (
        [f"{actual} bits a quantized weight on disk, {record['bits_per_quantized_weight']} declared"]
        if actual != record["bits_per_quantized_weight"]
        else []
    )
    problems += [f"{size} bytes on disk, {record['output_bytes']} declared"] if size != record["output_bytes"] else []
    used = [subject.decoder.treated(module).scheme.weight.number.bits for module, _ in subject.decoder.modules()]
    bits_of_code = min(used, default=0)
    if actual is not None and actual < bits_of_code:
        problems.append(f"{actual} bits a weight cannot hold {bits_of_code}-bit codes")
    return first(problems, f"{actual} bits a quantized weight, {record['bits_per_weight']} over all parameters")
