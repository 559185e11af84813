"""The whole straight line on the bundled 2M model, each stage as its own command would run it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from quantpub.artifact import Artifact
from quantpub.errors import InputError
from quantpub.output import Output

PACKAGE = Path(__file__).parent
REPO = "quantpub-demo/pycode-tiny-2m-w4a16"


def bundled() -> Path:
    """The demo's model and text: in an installed copy, or in a source checkout."""
    for folder in (PACKAGE / "_data" / "demo", PACKAGE.parent / "demo"):
        if (folder / "model" / "config.json").is_file():
            return folder
    raise InputError("the demo model is missing", where=str(PACKAGE), next="install quantpub again")


def demo(out_dir: Path, recipe: str, out: Output) -> dict[str, Any]:
    """Quantize, verify, profile, evaluate, render the card, rehearse the publish. Returns where things are."""
    source = bundled()
    _fresh(out_dir)
    report: dict[str, Any] = {"artifact": str(out_dir), "card": str(out_dir / "README.md"), "plots": str(out_dir / ".quantpub" / "plots")}
    for place, (title, stage) in enumerate(_stages(source, out_dir, recipe, out).items(), 1):
        out.talk(f"[{place}/6] {title}")
        report[title.split()[0]] = stage()
    return report


def _fresh(out_dir: Path) -> None:
    """A former demo's folder is replaced; anything else is left to the quantize stage to refuse."""
    if (out_dir / ".quantpub" / "run.json").is_file():
        shutil.rmtree(out_dir)


def _stages(source: Path, out_dir: Path, recipe: str, out: Output) -> dict[str, Any]:
    model = str(source / "model")
    return {
        f"quantize {model} with {recipe} for vllm": lambda: _quantize(model, recipe, out_dir, out),
        "verify every tensor against the source": lambda: _verify(out_dir, model, out),
        "profile this machine's kernels": lambda: _profile(out_dir, out),
        "eval perplexity and KL to the base": lambda: _eval(out_dir, model, source / "eval.jsonl", out),
        "card from the evidence": lambda: _card(out_dir),
        "publish, rehearsed on a Hub on this machine": lambda: _publish(out_dir, out),
    }


def _quantize(model: str, recipe: str, out_dir: Path, out: Output) -> Any:
    from quantpub.checkpoint import open_checkpoint
    from quantpub.plan import make_plan
    from quantpub.quantize import quantize
    from quantpub.recipe import load_recipe

    chosen = load_recipe(recipe)
    plans = [make_plan(open_checkpoint(model), chosen, layout) for layout in chosen.layouts(["vllm"], [])]
    with out.bar("quantizing", sum(action.part.info.nbytes for action in plans[0].actions)) as advance:
        return quantize(plans, out_dir, progress=advance)[0]


def _verify(out_dir: Path, model: str, out: Output) -> Any:
    from quantpub.verify.run import verify

    with out.bar("verifying", 0) as advance:
        evidence = verify(Artifact.open(out_dir), model, advance)
    return {"verdict": evidence["verdict"], **evidence["tensors"]}


def _profile(out_dir: Path, out: Output) -> Any:
    from quantpub.profile import profile

    with out.bar("profiling", 0) as advance:
        return profile(Artifact.open(out_dir), budget_seconds=8.0, progress=advance)["verdict"]


def _eval(out_dir: Path, model: str, data: Path, out: Output) -> Any:
    from quantpub.evaluate import evaluate

    with out.bar("evaluating", 0) as advance:
        evaluate(Artifact.open(out_dir), model, data, windows=16, progress=advance)
    return Artifact.open(out_dir).run()["stages"]["eval"]


def _card(out_dir: Path) -> Any:
    from quantpub.card import card

    return card(Artifact.open(out_dir), REPO)


def _publish(out_dir: Path, out: Output) -> Any:
    from quantpub.publish import rehearse

    with out.working("rehearsing"):
        return rehearse(Artifact.open(out_dir), REPO).as_json()
