"""What made an evidence file: command, versions, GPU, driver. Without quantpub and torch, for any interpreter."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def gpu() -> tuple[str, str]:
    """(name, driver) of the first GPU. Fails where there is none: evidence without a device is none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    name, driver = said.splitlines()[0].split(", ")
    return name, driver


def made_by(command: str, packages: Sequence[str], **more: object) -> dict[str, object]:
    name, driver = gpu()
    versions = {package: installed(package) for package in packages}
    return {"command": command, "versions": versions, "gpu": name, "driver": driver, **more}


def write(path: str, made: dict[str, object], **content: object) -> None:
    Path(path).write_text(json.dumps({"made_by": made, **content}, indent=1) + "\n")
