"""The whole publication, against a Hub of this process, with nothing left out but the network.

The client runs in a process of its own (client.py): huggingface_hub reads HF_ENDPOINT, HF_HOME and its switches once,
when it is imported, and this process may have imported it with others. That process publishes, downloads everything to
a fresh folder, compares each sha256 with the artifact's, and publishes again; this one holds the Hub, and says what it
saw. Uploads go by plain LFS. The disk needed is that of one more copy of the artifact: the Hub keeps what it receives
by reference to the artifact itself.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import quantpub
from quantpub import errors
from quantpub.artifact import Artifact
from quantpub.errors import GateError, QuantpubError, UnavailableError
from quantpub.hub import LoopbackHub
from quantpub.publish.plan import Change, read_plan
from quantpub.publish.readback import Verified
from quantpub.publish.result import PublishResult, Rehearsal


def rehearse(artifact: Artifact, repo_id: str) -> PublishResult:
    """Errors: as `publish` raises them; GateError when what came back is not the artifact."""
    plan = read_plan(artifact)
    with tempfile.TemporaryDirectory(prefix="quantpub-rehearsal-") as scratch, LoopbackHub() as hub:
        _require_room(Path(scratch), sum(file.size for file in plan.values()))
        hub.refer(artifact.path)
        said = _client(artifact, repo_id, hub, Path(scratch))
        commits, requests = len(hub.history(repo_id)) - 1, len(hub.log)
    identical = said["downloaded"] - len(said["different"])
    shown = Rehearsal(said["downloaded"], identical, commits, said["second"]["changed"], requests)
    if said["different"] or commits != 1 or shown.second_changed:
        raise GateError(
            f"the rehearsal failed: {shown}, different: {', '.join(said['different']) or 'nothing'}",
            where=repo_id,
            next="report this: it is a fault of quantpub",
        )
    return _result(said["first"], shown)


def _require_room(scratch: Path, needed: int) -> None:
    free = shutil.disk_usage(scratch).free
    if free < needed:
        raise UnavailableError(
            f"a rehearsal needs {needed:,} bytes of disk, {free:,} are free",
            where=str(scratch),
            next="set TMPDIR to a folder with more room",
        )


def _client(artifact: Artifact, repo_id: str, hub: LoopbackHub, scratch: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "quantpub.publish.client", str(artifact.path.resolve()), repo_id, str(scratch)]
    # no time limit: it uploads and downloads the whole artifact, and each of its calls has one
    done = subprocess.run(command, env=_environment(hub, scratch), capture_output=True, text=True, cwd=scratch)
    try:
        said: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise QuantpubError(f"the client ended with {done.returncode}: {done.stderr[-2000:]}", where=repo_id) from None
    if "error" in said:
        raise _error(said["error"])
    return said


def _environment(hub: LoopbackHub, scratch: Path) -> dict[str, str]:
    """This process's, without what would steer the client elsewhere: settings of the Hub's client, and proxies."""
    steering = ("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_OFFLINE")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(steering) and not name.lower().endswith("_proxy")
    }
    here = str(Path(quantpub.__file__).parents[1])
    path = os.pathsep.join(part for part in (here, os.environ.get("PYTHONPATH")) if part)
    return {
        **kept,
        "PYTHONPATH": path,
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": hub.token,
        "HF_HOME": str(scratch / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def _error(said: dict[str, Any]) -> QuantpubError:
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    kinds = {kind.code: kind for kind in classes if issubclass(kind, QuantpubError)}
    return kinds[said["code"]](said["what"], where=said["where"], next=said["next"])


def _result(first: dict[str, Any], rehearsal: Rehearsal) -> PublishResult:
    files = tuple(Change(**file) for file in first["files"])
    plain = {**first, "files": files, "warnings": tuple(first["warnings"]), "verified": Verified(**first["verified"])}
    return PublishResult(**plain, rehearsal=rehearsal)
