"""The command that gives a quantized checkpoint another layout: ours, or anybody's."""

from __future__ import annotations

from typing import Annotated

import typer

from quantpub.errors import UsageError, closest
from quantpub.options import FormatOpt, JsonOpt, OutOpt, RevisionOpt, out


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
        made = make_repack(open_quantized(checkpoint, revision), layout)
    total = sum(made.plan.shard_bytes(shard) for shard in made.plan.shards)
    with out.bar("repacking", total) as advance:
        report = run(made, output, accept_loss, advance)
    out.result(report, lambda: show_repacked(out, report), quiet=str(output))


def _require_layout(layout: str) -> None:
    from quantpub.layouts import KERNEL_LAYOUTS, LAYOUTS

    if layout in KERNEL_LAYOUTS:
        advice = f"name a layout on disk: {', '.join(LAYOUTS)}"
        raise UsageError(
            f"{layout} is what a kernel eats: engines make it when they load, and none reads it from disk", next=advice
        )
    if layout not in LAYOUTS:
        raise UsageError(f"unknown layout {layout!r}", next=closest(layout, LAYOUTS))
