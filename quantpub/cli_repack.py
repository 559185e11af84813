"""The command that gives a quantized checkpoint another layout: ours, or anybody's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from quantpub.errors import InputError, UsageError, closest
from quantpub.options import FormatOpt, JsonOpt, OutOpt, RevisionOpt, out

if TYPE_CHECKING:
    from quantpub.opened import Opened

# The rules of `verify` that another tool's checkpoint must pass before it is written anew as one of ours: of its headers alone.
# Not `names`: the config is written anew, with names that engines find.
SOUND = ("index", "tensors", "bits", "complete", "kv-cache")


def repack(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A quantized checkpoint's folder, or a Hub id.")
    ],
    layout: Annotated[str, typer.Option("--layout", help="The layout to write (see `quantpub list layouts`).")],
    output: OutOpt,
    revision: RevisionOpt = None,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Write it although the layout cannot hold the very same weights.")
    ] = False,
    format: FormatOpt = "auto",
    json: JsonOpt = False,
) -> None:
    """Write a quantized checkpoint in another layout, without quantizing again; prove that its weights are the same."""
    _require_layout(layout)
    from quantpub.opened import open_quantized
    from quantpub.repack import repack as run
    from quantpub.repacking import make_repack
    from quantpub.show import show_repacked

    with out.working("reading headers"):
        opened = open_quantized(checkpoint, revision)
        made = make_repack(opened, layout)
        _require_sound(opened)
    total = sum(made.plan.shard_bytes(shard) for shard in made.plan.shards)
    with out.bar("repacking", total) as advance:
        report = run(made, output, accept_loss, advance)
    out.result(report, lambda: show_repacked(out, report), quiet=str(output))


def _require_sound(opened: Opened) -> None:
    """Errors: InputError with the finding of the first rule that fails. Ours was judged when it was made."""
    from quantpub.registry import load
    from quantpub.verify import CHECKS, RULES
    from quantpub.verify.base import FAILED, Subject

    subject = Subject(opened, None, weights=False)
    parses = opened.artifact is not None or load(RULES, "rule", "parses")(subject).status != FAILED
    for name in SOUND if opened.artifact is None else ():
        if not parses and "parses" in CHECKS[name].needs:
            continue  # names that no engine can look up; written anew they are others
        finding = load(RULES, "rule", name)(subject)
        if finding.status == FAILED:
            what, advice = f"{name}: {finding.detail}", "quantize again from the full-precision model"
            raise InputError(what, where=opened.held.source.label, next=advice)


def _require_layout(layout: str) -> None:
    from quantpub.layouts import KERNEL_LAYOUTS, LAYOUTS

    if layout in KERNEL_LAYOUTS:
        advice = f"name a layout on disk: {', '.join(LAYOUTS)}"
        raise UsageError(
            f"{layout} is what a kernel eats: engines make it when they load, and none reads it from disk", next=advice
        )
    if layout not in LAYOUTS:
        raise UsageError(f"unknown layout {layout!r}", next=closest(layout, LAYOUTS))
