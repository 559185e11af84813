"""What may never be published: code and pickles, links, secrets, and paths of the machine that made the artifact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpub.artifact import Artifact
from quantpub.hygiene import CARD, bad_name, is_searched, secrets_in
from quantpub.publish.headers import SUFFIX, header_problem, read_header

__all__ = ["CARD", "bad_name", "failed_gates", "refusals", "secrets_in"]


def refusals(artifact: Artifact) -> list[str]:
    """Every reason not to publish this directory, each naming its file."""
    files = artifact.files()
    named = [f"{path}: {reason}" for path in files if (reason := bad_name(path))]
    found = [reason for path in files for reason in (*_found_in(artifact, path), *_unreadable(artifact, path))]
    return [*_card(artifact), *_links(artifact), *artifact.foreign_evidence(), *named, *found]


def _card(artifact: Artifact) -> list[str]:
    try:
        (artifact.path / CARD).read_text("utf-8")
    except FileNotFoundError:
        return [f"{CARD} is missing: write it with `quantpub card`"]
    except UnicodeDecodeError:
        return [f"{CARD}: not UTF-8"]
    return []


def _links(artifact: Artifact) -> list[str]:
    links = sorted(path for path in artifact.path.rglob("*") if path.is_symlink())
    return [f"{path.relative_to(artifact.path).as_posix()}: a symbolic link" for path in links]


def _found_in(artifact: Artifact, path: str) -> list[str]:
    if not is_searched(path) or (artifact.path / path).is_symlink():
        return []
    text = (artifact.path / path).read_text("utf-8", "replace")
    return [f"{path}:{line}: {kind}" for line, kind in secrets_in(text)]


def _unreadable(artifact: Artifact, path: str) -> list[str]:
    if not path.endswith(SUFFIX):
        return []
    source = artifact.path / path
    problem = header_problem(read_header(source), source.stat().st_size)
    return [f"{path}: {problem}"] if problem else []


def failed_gates(artifact: Artifact) -> list[str]:
    """Every gate that the evidence says failed. What was not measured is stated on the card; what failed is not published."""
    found = []
    for name in ("verify.json", "profile.json", "eval.json"):
        evidence = artifact.read_json(name) if artifact.has(name) else {}
        verdict = evidence.get("verdict")
        gate = verdict.get("gate") if isinstance(verdict, dict) else verdict
        if gate == "failed":
            found.append(f"{name}: {verdict.get('reason') if isinstance(verdict, dict) else _first_failed(evidence)}")
    return found


def _first_failed(evidence: Mapping[str, Any]) -> str:
    """The first rule of `verify` that failed and what it saw, with the number of the others; else what the engine made of it."""
    checks = evidence.get("checks") or []
    bad = [f"{check['id']}: {check['detail']}" for check in checks if check.get("status") == "failed"]
    seen = evidence.get("engine") or {}
    bad += [f"in {seen['engine']}: {seen['reason']}"] if seen.get("verdict") == "failed" else []
    if not bad:
        return "see its checks"
    return bad[0] + (f" (and {len(bad) - 1} more)" if len(bad) > 1 else "")
