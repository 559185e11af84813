"""Stage `verify`: run every rule, write verify.json."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantpub.artifact import Artifact
from quantpub.checkpoint import Checkpoint, open_checkpoint
from quantpub.errors import InputError, QuantpubError
from quantpub.evidence import made_by
from quantpub.families import FAMILIES
from quantpub.registry import load
from quantpub.verify import RULES
from quantpub.verify.base import FAILED, SKIPPED, Finding, Subject, failed
from quantpub.verify.source import source_parts

LOCAL = re.compile(r"(?<![\w.~/-])/(?:[^\s/'\"]+/)+([^\s/'\"]+)")  # an absolute path, and its last part
SOURCE = "name the model the artifact was made from"


def verify(
    artifact: Artifact, source: str | None = None, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Run all rules, with `source` (a folder or Hub id) those that compare with it too. Writes and returns the evidence.

    A Hub source is read at the commit that run.json names. Errors: InputError when the source is another model.
    """
    checkpoint = _source(artifact, source)
    subject = Subject(artifact, checkpoint, progress)
    findings = {name: _judge(name, subject) for name in RULES}
    evidence = {
        "made_by": made_by("verify", {"source": checkpoint.source.identity() if checkpoint else None}),
        "checks": [{"id": name, **finding.as_json()} for name, finding in findings.items()],
        **subject.figures,
        "verdict": verdict(findings),
    }
    artifact.write_evidence("verify.json", evidence)
    counts = {status: sum(f.status == status for f in findings.values()) for status in ("passed", "failed", "skipped")}
    artifact.record("verify", {"verdict": evidence["verdict"], **counts})
    return evidence


def _judge(name: str, subject: Subject) -> Finding:
    """A rule's finding; an artifact so damaged that the rule cannot even look has failed it."""
    rule: Callable[[Subject], Finding] = load(RULES, "rule", name)
    try:
        return rule(subject)
    except QuantpubError as error:
        return failed(_nameless(f"{error.where}: {error.what}" if error.where else error.what, subject))
    except Exception as error:  # whatever it is, the artifact does not bear looking at
        said = _nameless(" ".join(str(error).split()), subject)
        return failed(f"the check could not be carried out: {type(error).__name__}: {said:.200}")


def _nameless(text: str, subject: Subject) -> str:
    """The text with files named as the artifact or the source names them: no evidence file holds a path."""
    folders = [subject.artifact.path]
    if subject.source is not None:
        folders.append(Path(subject.source.source.where("config.json")).parent)
    for folder in sorted({str(each) for path in folders for each in (path, path.absolute(), path.resolve())}, key=len):
        text = re.sub(rf"(?<![\w./-]){re.escape(folder)}/", "", text)
    return LOCAL.sub(r"\1", text)


def verdict(findings: dict[str, Finding]) -> str:
    """passed only when every rule was run and passed; a rule that was skipped leaves it `incomplete`."""
    statuses = {finding.status for finding in findings.values()}
    return "failed" if FAILED in statuses else "incomplete" if SKIPPED in statuses else "passed"


def _source(artifact: Artifact, source: str | None) -> Checkpoint | None:
    recorded = artifact.read_json("run.json", ("source", "stages"))["source"]
    if source is None:
        return None
    checkpoint = open_checkpoint(
        source, recorded["commit"] if recorded["kind"] == "hub" and recorded["repo"] == source else None
    )
    if checkpoint.config.get("model_type") not in FAMILIES:
        raise InputError(
            f"unknown architecture {checkpoint.config.get('model_type')!r}: another model", where=source, next=SOURCE
        )
    found = {part.name: part.info.shape for part in source_parts(checkpoint).values()}
    planned = {line["as"]: tuple(line["shape"]) for line in Subject(artifact, checkpoint).decoder.actions}
    if not any(found.get(name) == shape for name, shape in planned.items()):
        raise InputError("no tensor of it is in the artifact: another model", where=source, next=SOURCE)
    if differing := [name for name, shape in planned.items() if found.get(name, shape) != shape]:
        raise InputError(f"{differing[0]} has another shape in the artifact: another model", where=source, next=SOURCE)
    return checkpoint


def failures(evidence: dict[str, Any]) -> str | None:
    """The failed checks in one line, or None."""
    bad = [f"{check['id']}: {check['detail']}" for check in evidence["checks"] if check["status"] == FAILED]
    return "; ".join(bad) if bad else None
