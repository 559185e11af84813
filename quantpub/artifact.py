"""The artifact directory is the state: the checkpoint an engine loads, and beside it `.quantpub/`, what is known of it.

    DIR/                       config.json, *.safetensors, index, tokenizer files: what `vllm serve DIR` reads
    DIR/README.md              the model card, rendered from evidence
    DIR/.quantpub/run.json     source and commit, digests, versions, one record per finished stage
    DIR/.quantpub/recipe.yaml  the recipe, resolved
    DIR/.quantpub/plan.jsonl   one line per source tensor: what becomes of it
    DIR/.quantpub/journal.jsonl   one line per finished shard, with its sha256
    DIR/.quantpub/calibration.json   what a calibrated recipe saw: data, sample ids, tokens, experts, what was smoothed
    DIR/.quantpub/smoothing.safetensors   the vectors that were folded into weights
    DIR/.quantpub/{verify,profile,eval}.json, plots/   evidence; every number on the card comes from here
    DIR/.quantpub/SHA256SUMS   every other file, `sha256  path` a line, sorted

No file holds a time, a host name or a local path: the same inputs give the same bytes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantpub.errors import InputError
from quantpub.files import TEMPORARY, atomic_write, dump_json, sha256_file, sha256_json

if TYPE_CHECKING:
    from quantpub.recipe import Recipe

META = ".quantpub"
SUMS = f"{META}/SHA256SUMS"
CALIBRATION, SMOOTHING = "calibration.json", "smoothing.safetensors"
PROOFS = "repack.jsonl"  # of one that was repacked, what became of each weight
JOURNAL = ("shard", "sha256", "source_sha256")
DOWNLOADED = re.compile(r"\.gitattributes|\.cache/huggingface/.*")


class Artifact:
    """A directory that `quantpub quantize` finished. Later stages read it and add evidence to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.meta = path / META
        self._written: set[str] = set()
        self._removed: set[str] = set()

    @classmethod
    def open(cls, path: Path | str) -> Artifact:
        """Errors: InputError when the folder is missing, is no artifact, or was not finished."""
        artifact = cls(Path(path))
        if not artifact.path.is_dir():
            raise InputError(
                "no such folder", where=str(path), next="name the folder that `quantpub quantize -o` wrote"
            )
        if not (artifact.meta / "run.json").is_file():
            raise InputError(
                "not a quantpub artifact: it has no .quantpub/run.json",
                where=str(path),
                next="make one with `quantpub quantize MODEL -r RECIPE -o DIR`",
            )
        if "quantize" not in artifact.run()["stages"]:
            raise InputError(
                "quantizing was not finished here",
                where=str(path),
                next="run the same `quantpub quantize` command again: it resumes",
            )
        return artifact

    def run(self) -> dict[str, Any]:
        """Errors: InputError when it is damaged."""
        return self.read_json("run.json", ("stages",))

    def config(self) -> dict[str, Any]:
        """Errors: InputError when it is missing or damaged."""
        path = self.path / "config.json"
        try:
            config: dict[str, Any] = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not valid JSON"
            what = f"the model's configuration cannot be read: {why}"
            raise InputError(
                what, where=str(path), next="copy config.json from the source model, or quantize again"
            ) from None
        if not isinstance(config, dict):
            raise InputError("it is not an object", where=str(path), next="quantize again")
        return config

    def recipe(self) -> Recipe:
        """The recipe that it was made by. Errors: InputError when it is missing or damaged."""
        from quantpub.recipe import load_recipe

        path = self.meta / "recipe.yaml"
        if not path.is_file():
            advice = "remove the folder and quantize again"
            raise InputError("damaged: the recipe that it was made by is missing", where=str(path), next=advice)
        return load_recipe(str(path))

    def has(self, name: str) -> bool:
        """Whether the evidence file `.quantpub/name` exists."""
        return (self.meta / name).is_file()

    def read_json(self, name: str, keys: tuple[str, ...] = ()) -> dict[str, Any]:
        """The evidence file `.quantpub/name`. Errors: InputError when it is missing, damaged, or lacks one of `keys`."""
        path = self.meta / name
        try:
            value: dict[str, Any] = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise InputError(
                "the evidence file is missing", where=str(path), next="run the stage that makes it"
            ) from None
        except ValueError as error:
            raise InputError(
                f"not valid JSON: {error}", where=str(path), next="run the stage that makes it again"
            ) from None
        if not isinstance(value, dict) or not all(key in value for key in keys):
            advice = "remove the folder and quantize again"
            raise InputError("damaged: it does not hold what quantpub wrote", where=str(path), next=advice)
        return value

    def write(self, relative: str, data: bytes) -> None:
        """Write one file of the artifact, whole or not at all. `seal` afterwards."""
        path = self.path / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, data)
        self._written |= {relative} - {SUMS}

    def remove(self, relative: str) -> None:
        """Take back one file that a former run of the same stage wrote. `seal` afterwards."""
        (self.path / relative).unlink(missing_ok=True)
        self._removed.add(relative)

    def write_evidence(self, name: str, value: dict[str, Any]) -> None:
        """Write `.quantpub/name` and seal. The stage's own summary goes to `record`."""
        self.write(f"{META}/{name}", dump_json(value))
        self.seal()

    def record(self, stage: str, value: dict[str, Any]) -> None:
        """Put one stage's summary into run.json, and seal."""
        self.mark("stages", dict(sorted({**self.run()["stages"], stage: value}.items())))

    def mark(self, key: str, value: Any) -> None:
        """Set one entry of run.json, and seal."""
        self.write(f"{META}/run.json", dump_json(self.run() | {key: value}))
        self.seal()

    def files(self) -> list[str]:
        """Every file of the artifact as a relative posix path, sorted; SHA256SUMS and temporaries left out."""
        found = (p for p in self.path.rglob("*") if p.is_file() and not p.name.startswith(TEMPORARY))
        return sorted(name for p in found if (name := p.relative_to(self.path).as_posix()) != SUMS)

    def sums(self) -> dict[str, str]:
        """path → sha256, as SHA256SUMS states it."""
        path = self.path / SUMS
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
        return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}

    def seal(self) -> None:
        """Write SHA256SUMS, from the journal for weights, which were hashed as they were written.

        Once there is one, only files written through this object get a new line: what anyone else changed since must
        stay visible as damage.
        """
        known, stated = self.journal(), self.sums()
        fresh = self._written if stated else set(self.files())
        made = {name: known[name] if name in known else sha256_file(self.path / name) for name in fresh}
        lines = sorted((name, digest) for name, digest in {**stated, **made}.items() if name not in self._removed)
        self.write(SUMS, "".join(f"{digest}  {name}\n" for name, digest in lines).encode())
        self._written.clear()
        self._removed.clear()

    def foreign_evidence(self) -> list[str]:
        """Evidence files that say they were measured on other weights."""
        own = sha256_json(self.journal())
        measured = (name for name in ("profile.json", "eval.json") if self.has(name))
        return [
            f"{name} was measured on other weights"
            for name in measured
            if self.read_json(name).get("weights_sha256", own) != own
        ]

    def journal(self) -> dict[str, str]:
        """shard → sha256 of every finished shard."""
        return {shard: entry["sha256"] for shard, entry in self.journal_entries().items()}

    def journal_entries(self) -> dict[str, dict[str, str]]:
        """shard → its line of the journal. A line cut off by a crash is not finished. Errors: InputError when damaged."""
        path = self.meta / "journal.jsonl"
        if not path.is_file():
            return {}
        whole = [line for line in path.read_text("utf-8", "replace").splitlines(keepends=True) if line.endswith("\n")]
        try:
            entries = [json.loads(line) for line in whole]
            return {entry["shard"]: {key: str(entry[key]) for key in JOURNAL} for entry in entries}
        except (ValueError, KeyError, TypeError):
            advice = "remove the folder and quantize again"
            raise InputError("damaged: it does not hold what quantpub wrote", where=str(path), next=advice) from None

    def damage(self) -> list[str]:
        """Files that are missing or whose bytes differ from SHA256SUMS, and files that it does not list.

        What the Hub and its client add to a download is not counted.
        """
        sums, present = self.sums(), {name for name in self.files() if not DOWNLOADED.fullmatch(name)}
        changed = [name for name, digest in sums.items() if name in present and sha256_file(self.path / name) != digest]
        return sorted([*changed, *(set(sums) - present), *(present - set(sums))])
