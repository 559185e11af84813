"""What a calibrated recipe saw, as the card tells it: which data, how much of it, and what reached the experts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from quantpub.artifact import CALIBRATION, Artifact
from quantpub.card.words import made_by

Facts = dict[str, Any]


def calibration(artifact: Artifact) -> Facts | None:
    """None where no data was used. Errors: InputError when the evidence is damaged."""
    if "calibration" not in artifact.run():
        return None
    evidence = artifact.read_json(CALIBRATION, ("data", "made_by"))
    data = evidence["data"]
    return {
        "rows": [*_data(data), *_experts(evidence), *_smoothing(evidence)],
        "command": _command(data),
        "made_by": made_by(evidence),
        "unseen": evidence.get("unseen", []),
    }


def _data(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("Data", _name(data))]
    if "sha256" in data:
        rows.append(("sha256 of the file", f"`{data['sha256']}`"))
    applied = data.get("chat_template", {}).get("applied")
    rows += [
        ("Samples", f"{data['used']} of {data['documents']:,}, chosen by seed {data['seed']}"),
        ("Tokens", f"{data['tokens']:,}, at most {data['max_seq_len']:,} a sample"),
        ("Chat template", "the model's own" if applied else "not applied"),
    ]
    return rows


def _name(data: Mapping[str, Any]) -> str:
    if data["kind"] == "file":
        return f"`{data['file']}`, a local file"
    return f"`{data['repo']}` at commit `{data['commit'][:7]}`, split `{data['split']}`"


def _command(data: Mapping[str, Any]) -> str:
    name = data["file"] if data["kind"] == "file" else f"{data['repo']}@{data['commit']}:{data['split']}"
    settings = f"--num-samples {data['num_samples']} --max-seq-len {data['max_seq_len']} --seed {data['seed']}"
    return f"--calibration {name} {settings}"


def _experts(evidence: Mapping[str, Any]) -> list[tuple[str, str]]:
    counts = [count for layer in evidence.get("experts", {}).values() for count in layer]
    if not counts:
        return []
    said = f"{min(counts):,} least, {statistics.median(counts):,.0f} in the median, {max(counts):,} most"
    empty = sum(count == 0 for count in counts)
    shown = f"; {empty} of {len(counts)} got none and were shown tokens of their layer" if empty else ""
    return [("Tokens that the router sent to an expert", said + shown)]


def _smoothing(evidence: Mapping[str, Any]) -> list[tuple[str, str]]:
    folded = evidence.get("smoothing", {})
    if not folded:
        return []
    return [("Inputs smoothed by factors folded into what comes before", f"{len(folded)}")]
