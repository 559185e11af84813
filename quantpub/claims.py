"""Whose an output folder is: nothing's yet, this very run's, or something else's, which is never touched."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantpub.artifact import Artifact
from quantpub.errors import ConflictError
from quantpub.files import TEMPORARY, disk_errors
from quantpub.plan import Plan
from quantpub.sources import LocalSource, Source

ELSEWHERE = "choose another folder with -o"


def folders(plans: Sequence[Plan], out: Path) -> list[Path]:
    """Where each plan's artifact goes: a single one into `out` itself, several into `out/<layout>`."""
    return [out if len(plans) == 1 else out / plan.layout.name for plan in plans]


def require_apart(source: Source, out: Path) -> None:
    """Errors: ConflictError when the artifact would come to lie in the folder that it is made from."""
    if isinstance(source, LocalSource) and out.resolve().is_relative_to(source.folder.resolve()):
        same = out.resolve() == source.folder.resolve()
        what = (
            "the output folder is the checkpoint itself" if same else "the output folder lies in the checkpoint's own"
        )
        raise ConflictError(what, where=str(out), next=ELSEWHERE)


def require_free(plans: Sequence[Plan], out: Path) -> None:
    """What can be told of the folders before a calibration, which takes long. Errors: ConflictError, UnavailableError."""
    for plan, folder in zip(plans, folders(plans, out), strict=True):
        with disk_errors(folder):
            run = begun(Artifact(folder))
        ours = plan.recipe.digest(), plan.layout.name
        if run is not None and (run.get("recipe_sha256"), run.get("layout")) != ours:
            raise taken(Artifact(folder), run)


def begun(artifact: Artifact) -> dict[str, Any] | None:
    """run.json of the folder, None where there is nothing yet. Errors: ConflictError when it holds anything else."""
    path = artifact.path
    if os.path.lexists(path) and not path.is_dir():
        raise ConflictError("a file of this name exists", where=str(path), next=ELSEWHERE)
    if artifact.has("run.json"):
        return artifact.run()
    found = (p for p in path.rglob("*") if p.is_file() and not p.name.startswith(TEMPORARY))
    if held := next(found, None):
        raise ConflictError(f"the folder holds something else ({held.name})", where=str(path), next=ELSEWHERE)
    return None


def taken(artifact: Artifact, run: Mapping[str, Any]) -> ConflictError:
    name = run.get("source", {}).get("name") or run.get("source", {}).get("repo")
    held = f"{name}, recipe {run.get('recipe')}, layout {run.get('layout')}, or an older state of the same source"
    return ConflictError(f"the folder holds another artifact ({held})", where=str(artifact.path), next=ELSEWHERE)
