"""One artifact being written: where it stands, what a former run finished there, and how it becomes whole.

Order is what makes a crash harmless. First `.quantpub/run.json` claims the folder for one digest (source, recipe, layout).
Then each shard: temporary file, fsync, rename, a journal line with its sha256. Then tokenizer and licence files and the
index. `config.json` comes last of what an engine reads, so that a half-made folder never loads; the record of the stage
in run.json and SHA256SUMS come last of all.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from quantpub import __version__
from quantpub.artifact import META, SUMS, Artifact
from quantpub.checkpoint import INDEX
from quantpub.errors import ConflictError, UnavailableError
from quantpub.files import TEMPORARY, disk_errors, dump_json, sha256_file, sweep_temporaries, write_point
from quantpub.plan import Plan, artifact_config, index_json, summary
from quantpub.shards import ShardWriter

RECORDED = (
    "shards",
    "tensors",
    "quantized",
    "copied",
    "parameters",
    "quantized_parameters",
    "source_bytes",
    "output_bytes",
    "bits_per_quantized_weight",
    "bits_per_weight",
    "tensor_parallel",
)
ELSEWHERE = "choose another folder with -o"


class Destination:
    """A plan and the folder it goes to. finished: shards that need not be made again. Use `begin`, `add`, `commit`, `end`."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        """Errors: ConflictError when the folder holds anything but this very artifact, begun or finished."""
        self.plan, self.artifact = plan, Artifact(folder)
        self.created = not folder.exists()
        self.digest = plan.digest()
        self.finished: set[str] = set()
        self.complete = self._claimed() and self._is_complete()
        self._writer: ShardWriter | None = None
        self._locked: int | None = None

    def _claimed(self) -> bool:
        """Whether the folder belongs to this digest (True) or to nothing yet (False)."""
        path = self.artifact.path
        if path.exists() and not path.is_dir():
            raise ConflictError("a file of this name exists", where=str(path), next=ELSEWHERE)
        if not self.artifact.has("run.json"):
            held = (
                [p for p in path.rglob("*") if p.is_file() and not p.name.startswith(TEMPORARY)]
                if path.exists()
                else []
            )
            if held:
                raise ConflictError(
                    f"the folder holds something else ({held[0].name})", where=str(path), next=ELSEWHERE
                )
            return False
        run = self.artifact.run()
        if run.get("digest") != self.digest:
            name = run["source"].get("name") or run["source"].get("repo")
            raise ConflictError(
                f"the folder holds another artifact ({name}, recipe {run['recipe']}, layout {run['layout']}, "
                "or an older state of the same source)",
                where=str(path),
                next=ELSEWHERE,
            )
        return True

    def _is_complete(self) -> bool:
        """Finished, and every shard still has its sha256."""
        if "quantize" not in self.artifact.run()["stages"] or not (self.artifact.path / SUMS).is_file():
            return False
        if set(self._intact()) == set(self.plan.shards):
            return True
        raise ConflictError(
            "the finished artifact was changed since: a shard no longer has its sha256",
            where=str(self.artifact.path),
            next=f"remove the folder, or {ELSEWHERE}",
        )

    def _intact(self) -> dict[str, str]:
        path = self.artifact.path
        return {
            shard: digest
            for shard, digest in self.artifact.journal().items()
            if (path / shard).is_file() and sha256_file(path / shard) == digest
        }

    def begin(self) -> None:
        """Make or reopen the folder, and lock it until `unlock` or the end of this process.

        Errors: UnavailableError when it cannot be written or the disk has too little room, ConflictError when another
        process is writing there.
        """
        with disk_errors(self.artifact.path):
            self.artifact.meta.mkdir(parents=True, exist_ok=True)
            self._lock()
            sweep_temporaries(self.artifact.path)
            kept = self._intact()
            self._trim_journal(kept)
            self._require_room(kept)
        self.artifact.write(f"{META}/run.json", dump_json(self._run()))
        self.artifact.write(f"{META}/recipe.yaml", self.plan.recipe.as_yaml().encode())
        self.artifact.write(f"{META}/plan.jsonl", self.plan.as_jsonl())
        self.finished = set(kept)

    def _lock(self) -> None:
        """A lock on the folder itself: it leaves no file, and the kernel drops it with the process, however that ends."""
        self._locked = os.open(self.artifact.meta, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.created = False  # the other one's, not ours to take back
            where, advice = str(self.artifact.path), f"wait for it to end, or {ELSEWHERE}"
            raise ConflictError("another process is quantizing into this folder", where=where, next=advice) from None

    def unlock(self) -> None:
        if self._locked is not None:
            os.close(self._locked)
            self._locked = None

    def _require_room(self, kept: dict[str, str]) -> None:
        needed = sum(self.plan.shard_bytes(shard) for shard in self.plan.shards if shard not in kept)
        free = shutil.disk_usage(self.artifact.path).free
        if needed > free:
            self.undo_if_empty()
            raise UnavailableError(
                f"the disk has {free / 1e6:,.1f} MB free, the artifact needs {needed / 1e6:,.1f} MB more",
                where=str(self.artifact.path),
                next="free some space, or choose another disk with -o, and run again",
            )

    def _trim_journal(self, kept: dict[str, str]) -> None:
        """Drop a line that a crash cut off and lines whose shard is gone; the rest in the plan's order."""
        path = self.artifact.meta / "journal.jsonl"
        if path.is_file():
            lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            order = {shard: place for place, shard in enumerate(self.plan.shards)}
            entries = {json.loads(line)["shard"]: line for line in lines}
            lines = [entries[shard] for shard in sorted(entries, key=order.__getitem__) if shard in kept]
            self.artifact.write(f"{META}/journal.jsonl", "".join(lines).encode())

    def _run(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "quantpub": __version__,
            "source": plan.checkpoint.source.identity(),
            "digest": self.digest,
            "recipe": plan.recipe.name,
            "recipe_sha256": plan.recipe.digest(),
            "scheme": plan.scheme.as_json(),
            "layout": plan.layout.name,
            "engines": [engine for engine, layout in plan.recipe.engines.items() if layout == plan.layout.name],
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "stages": {},
        }

    def needs(self, shard: str) -> bool:
        return not self.complete and shard not in self.finished

    def add(self, shard: str, outputs: dict[str, memoryview], offset: int) -> None:
        """Put output tensors, or pieces of them, in their places in the shard being written."""
        if self._writer is None:
            self._writer = ShardWriter(self.artifact.path / shard, self.plan.outputs(shard), self.plan.metadata)
        for name, data in outputs.items():
            self._writer.write(name, data, offset)

    def commit(self, shard: str, source_sha256: str) -> None:
        self.add(shard, {}, 0)  # a shard without tensors is a file too
        assert self._writer is not None
        line = {"shard": shard, "sha256": self._writer.commit(), "source_sha256": source_sha256}
        self._writer = None
        path = self.artifact.meta / "journal.jsonl"
        with disk_errors(path), path.open("a") as f:
            write_point("journal")
            f.write(json.dumps(line) + "\n")
            f.flush()
            os.fsync(f.fileno())
            write_point("journaled")

    def end(self, device: str) -> None:
        """Everything but the weights."""
        self._trim_journal(self.artifact.journal())
        source = self.plan.checkpoint.source
        for name in self.plan.checkpoint.companions:
            self.artifact.write(name, source.path(name).read_bytes())
        if self.plan.checkpoint.indexed:
            self.artifact.write(INDEX, dump_json(index_json(self.plan)))
        self.artifact.write("config.json", dump_json(artifact_config(self.plan)))
        facts = summary(self.plan)
        self.artifact.record("quantize", {"device": torch.device(device).type} | {key: facts[key] for key in RECORDED})

    def abandon(self) -> None:
        """Leave no half-written shard."""
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None

    def remove(self) -> None:
        """Take back what this run began in a folder it made itself: its input can never be finished."""
        if self.created:
            shutil.rmtree(self.artifact.path, ignore_errors=True)

    def undo_if_empty(self) -> None:
        """A run that failed before its first shard leaves no folder behind."""
        if self.created and not self.artifact.journal():
            with contextlib.suppress(OSError):
                shutil.rmtree(self.artifact.path)

    def report(self, changed: bool) -> dict[str, Any]:
        record = self.artifact.run()["stages"]["quantize"]
        return {
            "artifact": str(self.artifact.path),
            "changed": changed,
            "shards_resumed": len(self.finished),
            "recipe": self.plan.recipe.name,
            "layout": self.plan.layout.name,
            **record,
        }
