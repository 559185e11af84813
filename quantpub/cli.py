"""The command line: one short function a command; `ending` renders errors, `output` everything else.

stdout is data (`--json`: exactly one object), stderr is talk. Nothing here imports torch until a command needs it.
Exit codes: 0 ok, 1 bug, 2 usage, 3 bad input or failed gate, 4 auth, 5 conflict, 6 unavailable (run again), 130 interrupted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quantpub import __version__, ending, env
from quantpub.cli_repack import repack
from quantpub.cli_speed import advise, profile
from quantpub.cli_verify import verify
from quantpub.errors import GateError, UsageError, closest
from quantpub.options import (
    BaselineOpt,
    CalibrationOpt,
    CheckpointArg,
    EngineOpt,
    FormatOpt,
    JsonOpt,
    LayoutOpt,
    LengthOpt,
    ModelArg,
    OutOpt,
    RecipeOpt,
    RevisionOpt,
    SamplesOpt,
    SeedOpt,
    out,
)

app = typer.Typer(
    name="quantpub",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Quantize a language model, prove it on the engine that will serve it, and publish it.",
)


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)  # noqa: T201
        raise typer.Exit


def _plans(
    model: str, recipe: str, engines: list[str] | None, layouts: list[str] | None, revision: str | None
) -> list[Any]:
    from quantpub.checkpoint import open_checkpoint
    from quantpub.plan import make_plan
    from quantpub.plan_engines import require_engines
    from quantpub.recipe import load_recipe

    chosen = load_recipe(recipe)
    names = chosen.layouts(engines or [], layouts or [])
    chosen.require_bindable()
    with out.working("reading headers"):
        checkpoint = open_checkpoint(model, revision)
        plans = [make_plan(checkpoint, chosen, name) for name in names]
    for each in plans:
        require_engines(each, engines or [])
    return plans


@app.command()
def plan(
    model: ModelArg,
    recipe: RecipeOpt,
    engine: EngineOpt = None,
    layout: LayoutOpt = None,
    revision: RevisionOpt = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="Also list what becomes of every tensor.")] = False,
    format: FormatOpt = "auto",
    json: JsonOpt = False,
) -> None:
    """What every tensor becomes, bytes, bits per weight, memory, and what is refused: from headers alone."""
    from quantpub.plan import require_runnable
    from quantpub.plan_facts import summary
    from quantpub.show import show_plans

    plans = _plans(model, recipe, engine, layout, revision)
    found = [summary(p) | ({"actions": [a.as_json() for a in p.actions]} if tensors else {}) for p in plans]
    out.result(
        {"plans": found},
        lambda: show_plans(out, found),
        quiet=str(found[0]["output_bytes"]),
        ok=not any(p.rejections for p in plans),
    )
    for p in plans:
        require_runnable(p)


@app.command()
def quantize(
    model: ModelArg,
    recipe: RecipeOpt,
    output: OutOpt,
    engine: EngineOpt = None,
    layout: LayoutOpt = None,
    revision: RevisionOpt = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    calibration: CalibrationOpt = None,
    num_samples: SamplesOpt = None,
    max_seq_len: LengthOpt = None,
    seed: SeedOpt = None,
    format: FormatOpt = "auto",
    json: JsonOpt = False,
) -> None:
    """Quantize MODEL into DIR, shard by shard. Run the same command again after an interruption: it resumes."""
    from quantpub.calibrating import Asked, calibrate
    from quantpub.claims import require_free
    from quantpub.plan import require_runnable
    from quantpub.quantize import quantize as run
    from quantpub.quantize import require_device
    from quantpub.show import show_quantized

    require_device(device)
    plans = _plans(model, recipe, engine, layout, revision)
    for each in plans:
        require_runnable(each)
    require_free(plans, output)
    with out.bar("calibrating", 0) as calibrated:
        found = calibrate(plans, Asked(calibration, num_samples, max_seq_len, seed), device, calibrated)
    if not env.first():
        return  # of the processes that torchrun started, one writes
    with out.bar("quantizing", sum(action.part.info.nbytes for action in plans[0].actions)) as advance:
        reports = run(found.plans, output, device, advance, found.statistics, found.solved)
    out.result(
        reports[0] if len(reports) == 1 else {"artifacts": reports},
        lambda: show_quantized(out, reports),
        quiet=str(output),
    )


app.command()(verify)
app.command()(repack)
app.command()(profile)
app.command()(advise)


@app.command()
def eval(
    checkpoint: CheckpointArg,
    baseline: BaselineOpt,
    data: Annotated[Path, typer.Option(help='Text to measure on: .jsonl with "text", or .txt.')],
    windows: Annotated[int, typer.Option(min=1, help="At most so many windows.")] = 64,
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    format: FormatOpt = "auto",
    json: JsonOpt = False,
) -> None:
    """Perplexity, KL divergence to the base and top-1 agreement on a text, in float32."""
    from quantpub.artifact import Artifact
    from quantpub.evaluate import check_gate, evaluate
    from quantpub.show import show_eval

    artifact = Artifact.open(checkpoint)
    with out.bar("evaluating", 0) as advance:
        evidence = evaluate(artifact, baseline, data, windows=windows, window=window, progress=advance)
    out.result(
        evidence, lambda: show_eval(out, evidence), quiet=str(evidence["kl"]["mean"]), ok=check_gate(evidence) is None
    )
    if reason := check_gate(evidence):
        raise GateError(reason, where=str(checkpoint), next="choose a recipe with more bits, or calibration")


@app.command()
def card(
    checkpoint: CheckpointArg,
    repo_id: Annotated[str | None, typer.Option("--repo-id", help="The Hub id the card speaks of.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only say whether README.md is what the evidence renders.")
    ] = False,
    format: FormatOpt = "auto",
    json: JsonOpt = False,
) -> None:
    """Render the model card (README.md) from the evidence files, and from nothing else."""
    from quantpub.artifact import Artifact
    from quantpub.card import card as render
    from quantpub.card import check as differences

    artifact = Artifact.open(checkpoint)
    if check:
        reasons = differences(artifact)
        out.result(
            {"card": "README.md", "differences": reasons},
            lambda: out.line("README.md says what the evidence says") if not reasons else None,
            quiet="",
            ok=not reasons,
        )
        if reasons:
            raise GateError(reasons[0], where=str(checkpoint / "README.md"), next="run `quantpub card` again")
        return
    report = render(artifact, repo_id)
    out.result(report, lambda: out.line(f"wrote {checkpoint / 'README.md'}"), quiet=str(checkpoint / "README.md"))


@app.command()
def publish(
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Where to, like owner/name.")],
    checkpoint: CheckpointArg,
    private: Annotated[
        bool, typer.Option("--private/--public", help="What it must be afterwards; public only once it was read back.")
    ] = True,
    tag: Annotated[str | None, typer.Option(help="Tag the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen; write nothing.")] = False,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Publish to a Hub on this machine, read back, compare.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    format: FormatOpt = "auto",
    json: JsonOpt = False,
) -> None:
    """Publish the artifact as one commit, then read back what the Hub holds."""
    from quantpub import publish as stage
    from quantpub.artifact import Artifact
    from quantpub.show import show_published

    artifact = Artifact.open(checkpoint)
    if not (dry_run or rehearse or yes) and not out.confirm(f"publish {checkpoint} to {repo_id}?"):
        raise UsageError("not confirmed", next="add --yes, or try --rehearse first")
    with out.working("rehearsing" if rehearse else "publishing"):
        result = (
            stage.rehearse(artifact, repo_id)
            if rehearse
            else stage.publish(artifact, repo_id, endpoint=None, token=None, private=private, tag=tag, dry_run=dry_run)
        )
    report = result.as_json()
    out.result(report, lambda: show_published(out, report, rehearse), quiet=str(report.get("commit")))


@app.command(name="list")
def list_(
    what: Annotated[
        str, typer.Argument(help="recipes, schemes, algorithms, layouts, kernels, engines, rules or failures")
    ],
    format: FormatOpt = "auto",
    json: JsonOpt = False,
) -> None:
    """What quantpub knows, by name."""
    from quantpub.listing import LISTS
    from quantpub.show import show_names

    if what not in LISTS:
        raise UsageError(f"cannot list {what!r}", next=closest(what, LISTS))
    rows = LISTS[what]()
    out.result(
        {what: rows},
        lambda: show_names(out, rows),
        quiet="\n".join(rows),
    )


@app.command()
def demo(
    output: OutOpt = Path("demo-out"),
    recipe: RecipeOpt = "fp8-dynamic",
    format: FormatOpt = "auto",
    json: JsonOpt = False,
) -> None:
    """Every stage on the bundled 2M model: quantize, verify, profile, evaluate, render the card, rehearse the publish."""
    from quantpub.demo import demo as run
    from quantpub.show import show_demo

    report = run(output, recipe, out)
    out.result(report, lambda: show_demo(out, report, output), quiet=str(output))


def main() -> None:
    """The console script."""
    ending.run(lambda: app(prog_name="quantpub", standalone_mode=False))


if __name__ == "__main__":
    main()
