"""The whole straight line on the bundled 2M model, each stage as its own command would run it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantpub.artifact import Artifact
from quantpub.errors import InputError
from quantpub.output import Output
from quantpub.recipe import load_recipe

PACKAGE = Path(__file__).parent
MODEL = "pycode-tiny-2m"
WINDOWS = 16


def bundled() -> Path:
    """The demo's model and text: in an installed copy, or in a source checkout."""
    for folder in (PACKAGE / "_data" / "demo", PACKAGE.parent / "demo"):
        if (folder / MODEL / "config.json").is_file():
            return folder
    raise InputError("the demo model is missing", where=str(PACKAGE), next="install quantpub again")


@dataclass(frozen=True)
class Demo:
    """source: the bundled folder. repo: the Hub id that the card and the rehearsal speak of."""

    source: Path
    folder: Path
    recipe: str
    out: Output

    @property
    def model(self) -> str:
        return str(self.source / MODEL)

    @property
    def repo(self) -> str:
        return f"quantpub-demo/{MODEL}-{Path(self.recipe).stem}"

    def quantize(self) -> dict[str, Any]:
        from quantpub.checkpoint import open_checkpoint
        from quantpub.plan import make_plan
        from quantpub.quantize import quantize

        chosen = load_recipe(self.recipe)
        (layout,) = chosen.layouts(["vllm"], [])
        plan = make_plan(open_checkpoint(self.model), chosen, layout)
        with self.out.bar("quantizing", sum(action.part.info.nbytes for action in plan.actions)) as advance:
            report = quantize([plan], self.folder, progress=advance)[0]
        Artifact.open(self.folder).mark("demo", MODEL)
        return report

    def verify(self) -> dict[str, Any]:
        from quantpub.verify.run import verify

        with self.out.bar("verifying", 0) as advance:
            evidence = verify(Artifact.open(self.folder), self.model, advance)
        return {"verdict": evidence["verdict"], **evidence["tensors"]}

    def profile(self) -> dict[str, Any]:
        from quantpub.profile import profile

        with self.out.bar("profiling", 0) as advance:
            verdict: dict[str, Any] = profile(Artifact.open(self.folder), budget_seconds=8.0, progress=advance)[
                "verdict"
            ]
        return verdict

    def eval(self) -> dict[str, Any]:
        from quantpub.evaluate import evaluate

        with self.out.bar("evaluating", 0) as advance:
            data = self.source / "eval.jsonl"
            found = evaluate(Artifact.open(self.folder), self.model, data, windows=WINDOWS, progress=advance)
        return {"kl": found["kl"], "perplexity": found["perplexity"], "verdict": found["verdict"]}

    def card(self) -> dict[str, Any]:
        from quantpub.card import card

        return card(Artifact.open(self.folder), self.repo)

    def publish(self) -> dict[str, Any]:
        from quantpub.publish import rehearse

        with self.out.working("rehearsing"):
            return rehearse(Artifact.open(self.folder), self.repo).as_json()


def demo(folder: Path, recipe: str, out: Output) -> dict[str, Any]:
    """Quantize, verify, profile, evaluate, render the card, rehearse the publish. Returns each stage's result."""
    run = Demo(bundled(), folder, recipe, out)
    stages: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
        "quantize": (f"the bundled {MODEL} by recipe {recipe}, for vLLM", run.quantize),
        "verify": ("every tensor against the source", run.verify),
        "profile": ("this machine's kernels on the artifact's own tensors", run.profile),
        "eval": ("perplexity and KL to the base", run.eval),
        "card": ("the model card, from the evidence", run.card),
        "publish": ("a rehearsal on a Hub on this machine", run.publish),
    }
    load_recipe(recipe)  # a wrong name is said before anything is done
    _make_room(folder)
    report: dict[str, Any] = {}
    for place, (name, (what, stage)) in enumerate(stages.items(), 1):
        out.talk(f"[{place}/{len(stages)}] {name}: {what}")
        report[name] = stage()
    return report


def _make_room(folder: Path) -> None:
    """A former demo's folder is replaced; anything else is left for the quantize stage to refuse."""
    artifact = Artifact(folder)
    if artifact.has("run.json") and artifact.run().get("demo") == MODEL:
        shutil.rmtree(folder)
