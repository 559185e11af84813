"""Registries are literal dicts `name -> Entry`: listing them imports nothing, using one imports its module."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from quantpub.errors import UsageError, closest


class Entry(NamedTuple):
    target: str  # "package.module:attribute"
    summary: str  # one line, for `quantpub list`


def load(registry: Mapping[str, Entry], kind: str, name: str) -> Any:
    """The object behind a registered name. Raises UsageError with the closest names."""
    if name not in registry:
        raise UsageError(f"unknown {kind} {name!r}", next=closest(name, registry))
    module, attribute = registry[name].target.split(":")
    return getattr(importlib.import_module(module), attribute)
