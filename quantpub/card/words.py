"""Figures and makers as words, for every part of the card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def size(nbytes: float) -> str:
    """Decimal units, three digits."""
    unit, name = next(((u, n) for u, n in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")) if nbytes >= u), (1, "B"))
    return f"{nbytes / unit:.3g} {name}"


def made_by(evidence: Mapping[str, Any]) -> str:
    """Versions and device of one measurement, in a line."""
    made = evidence.get("made_by", {})
    versions = ", ".join(f"{name} {version}" for name, version in made.get("versions", {}).items())
    device, gpu = made.get("device", {}), made.get("device", {}).get("gpu")
    if gpu:
        machine = f"{gpu['name']}, driver {gpu.get('driver')}, CUDA {gpu.get('cuda')}"
    else:
        machine = f"{device['cpu']}, {device.get('threads')} threads" if device.get("cpu") else ""
    return "; ".join(part for part in (versions, machine) if part)


def together(names: Sequence[str]) -> str:
    """One, one and another, several."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
