"""What the Hub makes of a model card: the YAML between the two `---` lines at the top of README.md, and its complaints.

Errors refuse the card, and any commit that holds it; warnings are only shown (hub-docs, model cards; `validate-yaml`).
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)
_MODEL_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
_RELATIONS = ("adapter", "merge", "quantized", "finetune")


def metadata(card: str) -> dict[str, Any] | None:
    """The front matter, or None when there is none. Errors: ValueError when it is not a YAML mapping."""
    match = _FRONT_MATTER.search(card)
    if not match:
        return None
    try:
        value = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise ValueError(f"invalid YAML: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("the metadata is not a mapping")
    return value


def judge(card: str) -> dict[str, list[dict[str, str]]]:
    """The reply of `validate-yaml`."""
    try:
        data = metadata(card)
    except ValueError as error:
        return {"errors": [{"message": str(error)}], "warnings": []}
    if data is None:
        return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
    return {"errors": [{"message": message} for message in _errors(data)], "warnings": []}


def _errors(data: dict[str, Any]) -> list[str]:
    found = [
        f'"{key}" must be a string'
        for key in ("license", "library_name", "pipeline_tag", "license_link")
        if key in data and not isinstance(data[key], str)
    ]
    if isinstance(data.get("license"), str) and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", data["license"]):
        found.append('"license" must be one of the known identifiers')
    if data.get("base_model_relation", "quantized") not in _RELATIONS:
        found.append(f'"base_model_relation" must be one of {", ".join(_RELATIONS)}')
    bases = data.get("base_model", [])
    for base in [bases] if isinstance(bases, str) else bases:
        if not isinstance(base, str) or not _MODEL_ID.fullmatch(base):
            found.append(f'"base_model" is not a model id: {base}')
    for key in ("tags", "language", "datasets"):
        if not isinstance(data.get(key, []), (str, list)):
            found.append(f'"{key}" must be a list of strings')
    return found
