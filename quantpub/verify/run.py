"""Stage `verify`: run every rule, write verify.json."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantpub.artifact import Artifact
from quantpub.checkpoint import Checkpoint, open_checkpoint
from quantpub.errors import InputError, QuantpubError, UnavailableError
from quantpub.evidence import made_by
from quantpub.families import FAMILIES
from quantpub.opened import Opened
from quantpub.registry import load
from quantpub.verify import CHECKS, RULES
from quantpub.verify.base import FAILED, PASSED, SKIPPED, Finding, Subject, failed, skipped
from quantpub.verify.kept import keep
from quantpub.verify.source import source_parts

LOCAL = re.compile(r"(?<![\w.~/-])/(?:[^\s/'\"]+/)+([^\s/'\"]+)")  # an absolute path, and its last part
SOURCE = "name the model the artifact was made from"


def verify(
    checkpoint: Artifact | Opened,
    source: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    weights: bool = True,
    tp: int | None = None,
    engine: Callable[[], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Run all rules, with `source` (a folder or Hub id) those that compare with it too. Returns the evidence.

    checkpoint: ours in a folder, where the evidence is written to unless what is there says more (`kept`); or anything
    opened. weights: whether whole weights may be read, as of one on the Hub. tp: GPUs that it must be cut for. engine: runs
    it in an engine, once the rules have passed, and says what it saw (`verify.engine`). A Hub source is read at the commit
    that run.json names.
    Errors: InputError when the source is another model.
    """
    if isinstance(checkpoint, Opened) and checkpoint.artifact is None:
        checkpoint.adopted  # noqa: B018 - what is not quantized at all has nothing to be judged by
    found = _source(checkpoint, source)
    subject = Subject(checkpoint, found, progress, weights=weights, tp=tp)
    findings = judge(subject)
    evidence = {
        "made_by": made_by("verify", {"source": found.source.identity() if found else None}),
        "checks": [{"id": name, **finding.as_json()} for name, finding in findings.items()],
        **subject.figures,
        "verdict": verdict(findings),
    }
    if engine is not None and evidence["verdict"] != "failed":
        evidence["engine"] = engine()
        evidence["verdict"] = "failed" if evidence["engine"]["verdict"] == "failed" else evidence["verdict"]
    return keep(checkpoint, evidence, tp) if isinstance(checkpoint, Artifact) else evidence


def judge(subject: Subject) -> dict[str, Finding]:
    """Rule → finding. A rule whose needs did not pass is not asked: one fault is reported once, by the rule that knows it."""
    findings: dict[str, Finding] = {}
    for name, rule in CHECKS.items():
        if rule.ours and not subject.ours:
            continue
        lacking = [need for need in rule.needs if need in findings and findings[need].status != PASSED]
        if lacking and findings[lacking[0]].status == FAILED:
            findings[name] = skipped(f"not looked at: {lacking[0]} failed")
        else:
            findings[name] = skipped(f"not looked at: {lacking[0]}") if "readable" in lacking else _judge(name, subject)
    return findings


def _judge(name: str, subject: Subject) -> Finding:
    """A rule's finding; a checkpoint so damaged that the rule cannot even look has failed it."""
    rule: Callable[[Subject], Finding] = load(RULES, "rule", name)
    try:
        return rule(subject)
    except UnavailableError:
        raise
    except QuantpubError as error:
        return failed(_nameless(f"{error.where}: {error.what}" if error.where else error.what, subject))
    except Exception as error:  # whatever it is, the artifact does not bear looking at
        said = _nameless(" ".join(str(error).split()), subject)
        return failed(f"the check could not be carried out: {type(error).__name__}: {said:.200}")


def _nameless(text: str, subject: Subject) -> str:
    """The text with files named as the artifact or the source names them: no evidence file holds a path."""
    sources = [subject.source.source] if subject.source is not None else []
    if isinstance(subject.checkpoint, Artifact):
        folders = [subject.checkpoint.path]
    else:
        folders, sources = [], [*sources, subject.checkpoint.held.source]
    folders += [Path(source.where("config.json")).parent for source in sources]
    for folder in sorted({str(each) for path in folders for each in (path, path.absolute(), path.resolve())}, key=len):
        text = re.sub(rf"(?<![\w./-]){re.escape(folder)}/", "", text)
    return LOCAL.sub(r"\1", text)


def verdict(findings: dict[str, Finding]) -> str:
    """passed only when every rule was run and passed; a rule that was skipped leaves it `incomplete`."""
    statuses = {finding.status for finding in findings.values()}
    return "failed" if FAILED in statuses else "incomplete" if SKIPPED in statuses else "passed"


def _source(checkpoint: Artifact | Opened, source: str | None) -> Checkpoint | None:
    if source is None:
        return None
    artifact = checkpoint if isinstance(checkpoint, Artifact) else checkpoint.artifact
    recorded = artifact.read_json("run.json", ("source", "stages"))["source"] if artifact else {"kind": None}
    found = open_checkpoint(
        source, recorded["commit"] if recorded["kind"] == "hub" and recorded["repo"] == source else None
    )
    if artifact is not None and found.config.get("model_type") not in FAMILIES:
        raise InputError(
            f"unknown architecture {found.config.get('model_type')!r}: another model", where=source, next=SOURCE
        )
    _require_same_model(Subject(checkpoint, found), source)
    return found


def _require_same_model(subject: Subject, source: str) -> None:
    """Errors: InputError when no tensor of the source is there, or one of ours has another shape in it."""
    assert subject.source is not None
    found = {part.name: part.info.shape for part in source_parts(subject.source).values()}
    planned = {line["as"]: tuple(line["shape"]) for line in subject.decoder.actions}
    if planned and not any(found.get(name) == shape for name, shape in planned.items()):
        raise InputError("no tensor of it is in the artifact: another model", where=source, next=SOURCE)
    differing = [name for name, shape in planned.items() if found.get(name, shape) != shape]
    if subject.ours and differing:
        raise InputError(f"{differing[0]} has another shape in the artifact: another model", where=source, next=SOURCE)


def remedy(evidence: dict[str, Any]) -> str | None:
    """What to do about the first failed check."""
    found = (str(c.get("next", CHECKS[c["id"]].next)) for c in evidence["checks"] if c["status"] == FAILED)
    return next(found, evidence.get("engine", {}).get("next"))


def failures(evidence: dict[str, Any]) -> str | None:
    """The failed checks in one line, or None."""
    bad = [f"{check['id']}: {check['detail']}" for check in evidence["checks"] if check["status"] == FAILED]
    seen = evidence.get("engine", {})
    bad += [f"in {seen['engine']}: {seen['reason']}"] if seen.get("verdict") == "failed" else []
    return "; ".join(bad) if bad else None
