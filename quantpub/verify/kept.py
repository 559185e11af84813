"""Which evidence of `verify` is kept beside the checkpoint: never less than what is there of the same files.

A run with --tp, or in an engine that was not made for it, asks a narrower question than whether the checkpoint is sound;
a run without a source, or without an engine, asks fewer. Such answers are told, and kept only where nothing that says more is
there. What fails is always kept, but for the narrower question's own answer.
"""

from __future__ import annotations

from typing import Any

from quantpub.artifact import META, Artifact
from quantpub.errors import QuantpubError, UnavailableError
from quantpub.files import dump_json, sha256_json
from quantpub.verify.base import FAILED, PASSED

NAME, CARD, NOT_KEPT = "verify.json", "README.md", "not_kept"


def keep(artifact: Artifact, evidence: dict[str, Any], tp: int | None) -> dict[str, Any]:
    """Write it, or add under NOT_KEPT why it is not. Returns the evidence. Errors: UnavailableError, half way."""
    evidence = evidence | {"files_sha256": files_sha256(artifact)}
    if why := narrower(evidence, tp) or weaker(evidence, _former(artifact)):
        return evidence | {NOT_KEPT: why}
    try:
        artifact.write(f"{META}/{NAME}", dump_json(evidence))
    except UnavailableError as error:
        return evidence | {NOT_KEPT: f"the evidence could not be kept: {error.what}"}
    artifact.seal()
    statuses = [check["status"] for check in evidence["checks"]]
    counts = {status: statuses.count(status) for status in ("passed", "failed", "skipped")}
    artifact.record("verify", {"verdict": evidence["verdict"], **counts})
    return evidence


def files_sha256(artifact: Artifact) -> str:
    """Of what an engine reads, as SHA256SUMS states it: without the evidence and the card."""
    sums = {name: digest for name, digest in artifact.sums().items() if not name.startswith(f"{META}/")}
    return sha256_json({name: digest for name, digest in sums.items() if name != CARD})


def _former(artifact: Artifact) -> dict[str, Any]:
    """What is kept; nothing where it is damaged."""
    try:
        found = artifact.read_json(NAME, ("checks", "verdict")) if artifact.has(NAME) else {}
        whole = all(isinstance(check["id"] + check["status"], str) for check in found.get("checks", []))
        return found if whole and isinstance(found.get("engine", {}), dict) else {}
    except (QuantpubError, TypeError, KeyError):
        return {}


def narrower(evidence: dict[str, Any], tp: int | None) -> str | None:
    """Why the answer is that to a narrower question, or None."""
    bad = {check["id"] for check in evidence["checks"] if check["status"] == FAILED}
    seen = evidence.get("engine", {})
    if tp is not None and bad <= {"tensor-parallel"} and seen.get("verdict") != FAILED:
        return f"not kept as evidence: it says only whether {tp} GPUs can share it"
    if seen.get("ran") is False and not bad:
        return f"not kept as evidence: {seen['engine']} is not what it was made for"
    return None


def weaker(evidence: dict[str, Any], former: dict[str, Any]) -> str | None:
    """Why the evidence that is there says more of the same files, or None."""
    same = former.get("files_sha256") == evidence["files_sha256"]
    if evidence["verdict"] == FAILED or not same or former["verdict"] == FAILED:
        return None
    here = {check["id"] for check in evidence["checks"] if check["status"] == PASSED}
    lost = [check["id"] for check in former["checks"] if check["status"] == PASSED and check["id"] not in here]
    if lost:
        return f"not kept as evidence: what is there of these files says more, with {', '.join(lost[:3])}"
    engine = former.get("engine", {})
    if engine.get("verdict") == PASSED and evidence.get("engine", {}).get("verdict") != PASSED:
        return f"not kept as evidence: what is there of these files says more, with its run in {engine['engine']}"
    return None
