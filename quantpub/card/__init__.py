"""Stage `card`: README.md rendered from the artifact's evidence files, and from nothing else (law 6).

    facts        evidence files → what the template shows, every figure formatted once
    components   what is quantized, from config.json's quantization_config and the plan
    speed, gpu   what a profile says: on any device, and on a GPU beside that
    limits       what a reader must not conclude

A section without evidence says that it was not measured, and which command would measure it. `check` renders again and
compares: a figure that was written by hand, or is older than its evidence, is named with its line.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from quantpub.artifact import META, Artifact
from quantpub.card.facts import STAGES, Facts, facts, read
from quantpub.errors import InputError, UsageError
from quantpub.plots import Plot, plots
from quantpub.sources import HUB_ID

README, TEMPLATE = "README.md", "card.md.j2"
PLOTS = f"{META}/plots"
PACKAGE = Path(__file__).parent.parent
LOCAL_PATH = re.compile(r"(?<![\w.~/-])(?:/(?:home|root|tmp|Users|work|mnt|data)/|[A-Za-z]:\\)")


def card(artifact: Artifact, repo_id: str | None = None) -> dict[str, Any]:
    """Write README.md and the plots. `repo_id` is remembered: a later card without one still speaks of it.

    Errors: UsageError (repo_id), InputError (evidence that is damaged or contradicts itself).
    """
    if repo_id is not None and not HUB_ID.fullmatch(repo_id):
        raise UsageError(f"{repo_id!r} is not a Hub id", next="give it as owner/name")
    repo_id = repo_id or _remembered(artifact)
    if strange := artifact.foreign_evidence():
        raise InputError(strange[0], where=str(artifact.meta), next="measure this artifact again")
    found = facts(artifact, repo_id)
    due = plots(read(artifact, "profile"), read(artifact, "verify"))
    for plot in due:
        if _outdated(artifact, plot):
            for name, data in plot.files().items():
                artifact.write(f"{PLOTS}/{name}", data)
    artifact.write(README, render(found).encode())
    artifact.record("card", {"repo_id": repo_id})
    missing = [stage for stage in STAGES if not artifact.has(f"{stage}.json")]
    shown = [f"{PLOTS}/{name}" for plot in due for name in plot.names]
    return {"card": README, "repo_id": repo_id, "plots": shown, "not_measured": missing}


def check(artifact: Artifact) -> list[str]:
    """Why README.md is not what the evidence renders; nothing when it is."""
    path = artifact.path / README
    if not path.is_file():
        return ["there is no README.md"]
    text, found = path.read_bytes().decode("utf-8", "replace"), facts(artifact, _remembered(artifact))
    return [*_differences(text, render(found)), *_front_matter(text, found["front"]), *_paths(text), *_stale(artifact)]


def render(found: Facts) -> str:
    """The card's text. Errors: InputError when evidence lacks a figure that the template names."""
    import jinja2
    import yaml

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([str(folder) for folder in folders()]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["yaml"] = lambda value: yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    environment.filters["cell"] = lambda value: " ".join(str(value).split()).replace("|", "\\|")
    environment.filters["capitalised"] = lambda text: text[:1].upper() + text[1:].rstrip(".")
    environment.filters["decibel"] = lambda value: f"{value:.1f} dB"
    try:
        text = environment.get_template(TEMPLATE).render(found)
    except jinja2.UndefinedError as error:
        raise InputError(
            f"an evidence file lacks a figure: {error.message}", where=META, next="run the stage that makes it again"
        ) from None
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def folders() -> list[Path]:
    """Where the template is looked up, first match wins: an installed copy, a source checkout."""
    return [PACKAGE / "_data" / "model_cards", PACKAGE.parent / "model_cards"]


def _remembered(artifact: Artifact) -> str | None:
    repo_id: str | None = artifact.run()["stages"].get("card", {}).get("repo_id")
    return repo_id


def _differences(text: str, expected: str) -> list[str]:
    """One reason per changed place: the line, what it says and what the evidence says."""
    said, meant = text.splitlines(), expected.splitlines()
    reasons = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, said, meant, autojunk=False).get_opcodes():
        if kind != "equal":
            reasons.append(f"line {a + 1}: the card says {_quoted(said[a:b])}, the evidence {_quoted(meant[c:d])}")
    if not reasons and text != expected:
        reasons.append("line ends or spaces differ from what the evidence renders")
    return reasons


def _quoted(lines: list[str]) -> str:
    return " / ".join(f"{line:.200}" for line in lines) if lines else "nothing"


def _front_matter(text: str, expected: Facts) -> list[str]:
    """Whether huggingface_hub reads the metadata, and reads what was meant."""
    from huggingface_hub import ModelCard

    try:
        data: Facts = ModelCard(text).data.to_dict()
    except Exception as error:
        return [f"huggingface_hub cannot read its front matter: {' '.join(str(error).split()):.160}"]
    return [
        f"front matter: {key} is {data.get(key)!r}, the evidence gives {expected.get(key)!r}"
        for key in sorted({*data, *expected})
        if data.get(key) != expected.get(key)
    ]


def _paths(text: str) -> list[str]:
    lines = enumerate(text.splitlines(), 1)
    return [f"line {i}: it names a local path" for i, line in lines if LOCAL_PATH.search(line)]


def _stale(artifact: Artifact) -> list[str]:
    """Plots of other figures, an evaluation of other weights, weights of another size than was planned."""
    reasons = [
        f"{path} does not show the evidence's figures"
        for plot in plots(read(artifact, "profile"), read(artifact, "verify"))
        for path in _outdated(artifact, plot)
    ]
    journal = artifact.journal()
    reasons += artifact.foreign_evidence()
    planned = artifact.run()["stages"]["quantize"]["output_bytes"]
    present = sum((artifact.path / shard).stat().st_size for shard in journal if (artifact.path / shard).is_file())
    return reasons + ([f"the weights are {present} bytes, run.json says {planned}"] if present != planned else [])


def _outdated(artifact: Artifact, plot: Plot) -> list[str]:
    """The plot's files that are missing or were drawn from other figures."""
    paths = (f"{PLOTS}/{name}" for name in plot.names)
    return [path for path in paths if not _carries(artifact.path / path, plot.digest)]


def _carries(path: Path, digest: str) -> bool:
    return path.is_file() and digest.encode() in path.read_bytes()
