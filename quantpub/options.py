"""Arguments and options that several commands share, each said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantpub.errors import UsageError, closest
from quantpub.output import FORMATS, Output

out = Output()
MOST = 1 << 20  # of any whole number


def _format(value: str) -> str:
    if value not in FORMATS:
        raise typer.BadParameter(f"{value!r}: {closest(value, FORMATS)}")
    out.use(value)
    return value


def _json(value: bool) -> bool:
    if value:
        out.use("json")
    return value


ModelArg = Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint's folder, or a Hub id like owner/name.")]
CheckpointArg = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="The folder that `quantpub quantize` wrote.")]
RecipeOpt = Annotated[
    str, typer.Option("--recipe", "-r", help="A recipe's name (see `quantpub list recipes`) or YAML file.")
]
EngineOpt = Annotated[
    list[str] | None, typer.Option("--engine", help="Write the layout this engine loads (repeatable).")
]
LayoutOpt = Annotated[list[str] | None, typer.Option("--layout", help="Write this layout (repeatable).")]
RevisionOpt = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub id; its commit is recorded.")
]
OutOpt = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="The artifact's folder; an interrupted run resumes there.")
]
BaselineOpt = Annotated[
    str, typer.Option("--baseline", metavar="MODEL", help="The full-precision model: folder or Hub id.")
]
CalibrationOpt = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|DATASET", help="Calibration data: jsonl, txt, parquet, or owner/name[@revision][:split]."
    ),
]
SamplesOpt = Annotated[int | None, typer.Option("--num-samples", min=1, help="At most so many samples.")]
LengthOpt = Annotated[int | None, typer.Option("--max-seq-len", min=2, help="Of each so many tokens.")]
SeedOpt = Annotated[int | None, typer.Option("--seed", help="Which samples are taken.")]
FormatOpt = Annotated[
    str, typer.Option("--format", callback=_format, help="auto, human, json or quiet.", metavar="FORMAT")
]
JsonOpt = Annotated[bool, typer.Option("--json", callback=_json, help="Print exactly one JSON object.")]


def integers(option: str, text: str | None) -> list[int] | None:
    """The value of an option like 1,16,256, each from 1 to MOST. Errors: UsageError."""
    if text is None:
        return None
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(1 <= value <= MOST for value in values):
        raise UsageError(
            f"{option} takes whole numbers from 1 to {MOST}, separated by commas, not {text!r:.60}",
            next=f"write it like {option} 1,16,256",
        )
    return values


def names(option: str, text: str | None, listed: str) -> list[str] | None:
    """The value of an option like marlin,machete. listed: the command that lists them. Errors: UsageError."""
    if text is None:
        return None
    values = [part.strip() for part in text.split(",")]
    if not all(values):
        raise UsageError(f"{option} takes names, separated by commas, not {text!r:.60}", next=f"see `{listed}`")
    return values
