"""The commands about speed: `profile` measures it, `advise` predicts it before anything is quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quantpub.errors import GateError, InputError, UsageError
from quantpub.options import MOST, FormatOpt, JsonOpt, ModelArg, RevisionOpt, integers, names, out

MANY = 8  # artifacts that an error names
CheckpointsArg = Annotated[
    list[Path],
    typer.Argument(
        metavar="CHECKPOINT...",
        help="Folders that `quantpub quantize` wrote. Of several, or with a profile.json from elsewhere: side by side.",
    ),
]
WorkloadOpt = Annotated[
    str | None,
    typer.Option("--workload", "-w", help="interactive, serving, prefill-heavy, decode-heavy, or like 1024:256@64."),
]


def profile(
    checkpoints: CheckpointsArg,
    m: Annotated[str | None, typer.Option("--m", help="Rows of activations to time, like 1,16,256.")] = None,
    kernels: Annotated[str | None, typer.Option("--kernels", help="Only these kernels, separated by commas.")] = None,
    budget_seconds: Annotated[float | None, typer.Option(help="Stop timing after so long.")] = None,
    workload: WorkloadOpt = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    tp: Annotated[int, typer.Option("--tensor-parallel", min=1, max=MOST, help="GPUs that share the model.")] = 1,
    engine_python: Annotated[
        str | None, typer.Option(help="The Python that the engine is installed in, to time its kernels there.")
    ] = None,
    format: FormatOpt = "auto",
    json: JsonOpt = False,
) -> None:
    """Time the artifact's own tensors on the kernels of this machine, against bf16. Wrong results are errors, not times.

    On a GPU the recipe's gate is answered for its workload; exit code 3 when it failed.
    """
    if engine_python is not None:
        from quantpub.engines.elsewhere import again

        raise typer.Exit(again(engine_python))
    asked: dict[str, Any] = {
        "m": integers("--m", m),
        "kernels": names("--kernels", kernels, "quantpub list kernels"),
        "budget_seconds": budget_seconds,
        "device": device,
        "tp": tp,
        "workload": workload,
    }
    named = _opened(list(dict.fromkeys(checkpoints)))
    found = {str(path): _profiled(path, one, asked, len(named)) for path, one in named.items()}
    _report(found)
    for path, evidence in found.items():
        verdict = evidence["verdict"]
        if verdict["gate"] == "failed":
            raise GateError(verdict["reason"], where=path, next=verdict.get("next"))


def _opened(paths: list[Path]) -> dict[Path, Any]:
    """Artifacts and read profiles, all of them before the first is timed."""
    from quantpub.artifact import Artifact
    from quantpub.compare import read

    carried = [path.suffix == ".json" and not path.is_dir() for path in paths]
    if carried == [True]:
        raise UsageError(f"{paths[0]} is a profile already", next="name an artifact's folder, or several to compare")
    for path in paths:
        _no_folder_of_artifacts(path)
    return {path: read(path) if done else Artifact.open(path) for path, done in zip(paths, carried, strict=True)}


def _no_folder_of_artifacts(path: Path) -> None:
    """Of a recipe with several layouts each lies in a folder of its own. Errors: InputError that names them."""
    from quantpub.artifact import META

    run = Path(META, "run.json")
    inside = sorted(found.parents[1] for found in path.glob(f"*/{run}"))
    if inside and not (path / run).is_file():
        more = f" and {len(inside) - MANY} more" if len(inside) > MANY else ""
        advice = f"name one or several of {', '.join(map(str, inside[:MANY]))}{more}"
        raise InputError("it is no artifact, but holds one for each layout", where=str(path), next=advice)


def _profiled(path: Path, opened: Any, asked: dict[str, Any], among: int) -> dict[str, Any]:
    from quantpub.profile import profile as run

    if isinstance(opened, dict):
        return opened
    with out.bar(f"profiling {path.name}" if among > 1 else "profiling", 0) as advance:
        found: dict[str, Any] = run(opened, **asked, progress=advance)
        return found


def _report(found: dict[str, dict[str, Any]]) -> None:
    from quantpub.compare import comparison, labels
    from quantpub.show_speed import show_comparison, show_profile

    failed = any(evidence["verdict"]["gate"] == "failed" for evidence in found.values())
    if len(found) == 1:
        (evidence,) = found.values()
        out.result(evidence, lambda: show_profile(out, evidence), quiet=evidence["verdict"]["gate"], ok=not failed)
        return
    profiles = dict(zip(labels(list(map(Path, found))), found.values(), strict=True))
    facts = comparison(profiles)
    gates = "\n".join(str(one["gate"]) for one in facts.values())
    out.result({"profiles": facts}, lambda: show_comparison(out, facts), quiet=gates, ok=not failed)


def advise(
    model: ModelArg,
    gpu: Annotated[str, typer.Option("--gpu", help="Like H200, A100-80 or L4.")],
    workload: Annotated[
        str, typer.Option("--workload", "-w", help="A workload's name, or like 1024:256@64.")
    ] = "serving",
    memory: Annotated[str | None, typer.Option(help="Memory to keep to, like 80GB; the GPU's own by default.")] = None,
    engine: Annotated[str, typer.Option(help="The engine that will serve it.")] = "vllm",
    revision: RevisionOpt = None,
    format: FormatOpt = "auto",
    json: JsonOpt = False,
) -> None:
    """Which recipe and layout to choose for a model on a GPU: from the roofline and from profiles measured here."""
    from quantpub.advising import advise as run
    from quantpub.checkpoint import open_config
    from quantpub.show_speed import show_advice

    with out.working("reading config.json"):
        config = open_config(model, revision)
    advice = run(config, str(model), gpu, workload, memory, engine)
    best = advice["choices"][0]["recipe"] if advice["choices"] else "none"
    out.result(advice, lambda: show_advice(out, advice), quiet=best)
