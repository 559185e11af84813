"""The command that checks a quantized checkpoint: ours or anybody's, in a folder or on the Hub, alone or in its engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantpub.errors import GateError, UsageError
from quantpub.options import FormatOpt, JsonOpt, RevisionOpt, out

if TYPE_CHECKING:
    from quantpub.artifact import Artifact
    from quantpub.opened import Opened


def verify(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT|REPO_ID", help="A quantized checkpoint's folder, or a Hub id.")
    ],
    source: Annotated[str | None, typer.Option(help="The model it was made from: folder or Hub id.")] = None,
    revision: RevisionOpt = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch the weights of a Hub id, and check them too.")
    ] = False,
    tp: Annotated[int | None, typer.Option("--tp", help="So many GPUs must be able to share it: 1, 2, 4 or 8.")] = None,
    engine: Annotated[
        str | None, typer.Option(help="Also load it in this engine: vllm, transformers or sglang.")
    ] = None,
    engine_python: Annotated[
        str | None, typer.Option("--engine-python", metavar="PYTHON", help="The interpreter that has the engine.")
    ] = None,
    format: FormatOpt = "auto",
    json: JsonOpt = False,
) -> None:
    """Check names, bytes, shapes, config, scales and values; with --engine, load it there and compare with its base."""
    _require(engine, engine_python, tp)
    from quantpub.opened import Opened
    from quantpub.show import show_checks
    from quantpub.verify.kept import NOT_KEPT
    from quantpub.verify.run import failures, remedy
    from quantpub.verify.run import verify as run

    weights = download or Path(checkpoint).is_dir()
    opened = _opened(checkpoint, revision, weights)
    if engine and not weights and isinstance(opened, Opened):
        raise _too_much(opened)

    def load() -> dict[str, Any]:
        from quantpub.verify.engine import in_engine

        return in_engine(opened, source, str(engine), engine_python, download)

    with out.bar("verifying", 0) as advance:
        evidence = run(opened, source, advance, weights=weights, tp=tp, engine=load if engine else None)
    if isinstance(opened, Opened):
        evidence = {"checkpoint": opened.held.source.identity(), **evidence}
    failed = failures(evidence)
    out.result(evidence, lambda: show_checks(out, evidence), quiet=evidence["verdict"], ok=failed is None)
    if why := evidence.get(NOT_KEPT):
        out.talk(why)
    if failed:
        raise GateError(failed, where=checkpoint, next=remedy(evidence) or "do not publish it")


def _require(engine: str | None, python: str | None, tp: int | None) -> None:
    """Before anything is read. Errors: UsageError."""
    from quantpub.tp_cut import TP_SIZES

    if tp is not None and tp not in TP_SIZES:
        raise UsageError(f"no engine shares a model among {tp} GPUs", where="--tp", next=f"known: {_listed(TP_SIZES)}")
    if python and not engine:
        raise UsageError("--engine-python goes with --engine", next="name the engine, as --engine vllm")
    if engine:
        from quantpub.engines.canary import require

        require(engine, python)


def _listed(sizes: tuple[int, ...]) -> str:
    return ", ".join(map(str, sizes))


def _opened(checkpoint: str, revision: str | None, whole: bool) -> Artifact | Opened:
    """One of ours in a folder as an artifact, which keeps the evidence; anything else opened.

    The Hub's cache is not written to. whole: whether weights of one on the Hub may be fetched.
    """
    from quantpub.artifact import META, Artifact
    from quantpub.opened import open_quantized
    from quantpub.sources import cached_repo

    folder = Path(checkpoint)
    if not revision and (folder / META / "run.json").is_file() and cached_repo(folder) is None:
        return Artifact.open(folder)
    with out.working("reading headers"):
        return open_quantized(checkpoint, revision, whole)


def _too_much(opened: Opened) -> UsageError:
    held = opened.held
    size = sum(held.source.files[shard] for shard in held.headers) / 1e9
    return UsageError("an engine needs the weights", where=held.source.label, next=f"add --download, for {size:.2f} GB")
