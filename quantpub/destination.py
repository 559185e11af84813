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
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from quantpub import __version__
from quantpub.artifact import CALIBRATION, META, PROOFS, SMOOTHING, SUMS, Artifact
from quantpub.calibrated import Calibrated
from quantpub.checkpoint import INDEX
from quantpub.claims import ELSEWHERE, begun, taken
from quantpub.errors import ConflictError, UnavailableError
from quantpub.files import disk_errors, dump_json, sha256_file, sweep_temporaries, write_point
from quantpub.plan import Plan
from quantpub.plan_engines import engines_of
from quantpub.plan_facts import summary
from quantpub.plan_files import artifact_config, config_files, index_json
from quantpub.shards import ShardWriter, to_bytes

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
    "notes",
)
OWN = (f"{META}/recipe.yaml", f"{META}/plan.jsonl", f"{META}/journal.jsonl")


class Destination:
    """A plan and the folder it goes to. finished: shards that need not be made again. Use `begin`, `add`, `commit`, `end`."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        """Errors: ConflictError when the folder holds anything but this very artifact, begun or finished."""
        self.plan, self.artifact = plan, Artifact(folder)
        self.digest = plan.digest()
        self.finished: set[str] = set()
        self._writers: dict[str, ShardWriter] = {}
        self._opening = threading.Lock()
        self._locked: int | None = None
        with disk_errors(folder):
            claimed = self._claimed()
        self.complete = claimed and self._is_complete()
        self._shared: str | None = None
        self._ours = not claimed  # what a former run began is not ours to take back
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]

    def _claimed(self) -> bool:
        """Whether the folder belongs to this digest (True) or to nothing yet (False)."""
        run = begun(self.artifact)
        if run is not None and run.get("digest") != self.digest:
            raise taken(self.artifact, run)
        return run is not None

    def _is_complete(self) -> bool:
        """Finished, of this source, and every file that this stage wrote is as it was written."""
        if "quantize" not in self.artifact.run()["stages"] or not (self.artifact.path / SUMS).is_file():
            return False
        written = {*self.plan.shards, *self.plan.checkpoint.companions, "config.json", *config_files(self.plan), *OWN}
        if self.plan.checkpoint.indexed:
            written.add(INDEX)
        if self.plan.calibration:
            written.add(f"{META}/{CALIBRATION}")
        if self.plan.recipe.transform:
            written.add(f"{META}/{SMOOTHING}")
        if self.plan.origin is not None:
            written.add(f"{META}/{PROOFS}")
        if damaged := [name for name in self.artifact.damage() if name in written]:
            raise self._changed(f"{damaged[0]} is missing or no longer has its sha256")
        if set(self._kept()) != set(self.plan.shards):
            raise self._changed("the source it was made from is not the same any more")
        return True

    def _changed(self, what: str) -> ConflictError:
        where = str(self.artifact.path)
        return ConflictError(f"the finished artifact: {what}", where=where, next=f"remove the folder, or {ELSEWHERE}")

    def _kept(self, shared: str | None = None) -> dict[str, dict[str, str]]:
        """Journal entries whose shard still has its sha256 and whose source shard does: whole files, read now.

        shared: where a shard's bytes hang on weights of other shards, the digest of what they share; it too must be as it was.
        """
        path = self.artifact.path
        return {
            shard: entry
            for shard, entry in self.artifact.journal_entries().items()
            if shard in self.plan.shards
            and (path / shard).is_file()
            and sha256_file(path / shard) == entry["sha256"]
            and entry["source_sha256"] in self.plan.source_digests(shard)
            and (shared is None or entry.get("shared") == shared)
        }

    def begin(self, shared: str | None = None) -> None:
        """Make or reopen the folder, and lock it until `unlock` or the end of this process. shared: see `_kept`.

        Errors: UnavailableError when it cannot be written or the disk has too little room, ConflictError when another
        process is writing there.
        """
        with disk_errors(self.artifact.path):
            self.artifact.meta.mkdir(parents=True, exist_ok=True)
            self._lock()
        if self._claimed() and self._is_complete():  # another run ended between the first look and the lock
            self.complete = True
            return
        with disk_errors(self.artifact.path):
            sweep_temporaries(self.artifact.path)
            self._shared, kept = shared, self._kept(shared)
            self._write_journal(kept)
            self._require_room(kept)
        self.artifact.write(f"{META}/run.json", dump_json(self._run()))
        self.artifact.write(f"{META}/recipe.yaml", self.plan.recipe.as_yaml().encode())
        self.artifact.write(f"{META}/plan.jsonl", self.plan.as_jsonl())
        self.finished = set(kept)

    def _lock(self) -> None:
        """A lock on the folder itself: it leaves no file, and the kernel drops it with the process, however that ends."""
        held = os.open(self.artifact.meta, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._locked = held
        except BlockingIOError:
            os.close(held)  # what the other is writing is not ours to sweep
            self._ours = False
            where, advice = str(self.artifact.path), f"wait for it to end, or {ELSEWHERE}"
            raise ConflictError("another process is quantizing into this folder", where=where, next=advice) from None

    def unlock(self) -> None:
        """Sweep what an interruption left half-written, wherever it struck, and let others in."""
        if self._locked is not None:
            with contextlib.suppress(OSError):
                sweep_temporaries(self.artifact.path)
            os.close(self._locked)
            self._locked = None

    def _require_room(self, kept: Collection[str]) -> None:
        needed = sum(self.plan.shard_bytes(shard) for shard in self.plan.shards if shard not in kept)
        free = shutil.disk_usage(self.artifact.path).free
        if needed > free:
            raise UnavailableError(
                f"the disk has {free / 1e6:,.1f} MB free, the artifact needs {needed / 1e6:,.1f} MB more",
                where=str(self.artifact.path),
                next="free some space, or choose another disk with -o, and run again",
            )

    def _write_journal(self, entries: Mapping[str, Mapping[str, str]]) -> None:
        """These entries in the plan's order: without a line that a crash cut off, and without shards that are gone."""
        if self.artifact.has("journal.jsonl"):
            lines = (json.dumps(entries[shard]) + "\n" for shard in self.plan.shards if shard in entries)
            self.artifact.write(f"{META}/journal.jsonl", "".join(lines).encode())

    def _run(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "quantpub": __version__,
            "source": dict(plan.origin or plan.checkpoint.source.identity()),
            "digest": self.digest,
            "recipe": plan.recipe.name,
            "recipe_sha256": plan.recipe.digest(),
            "scheme": plan.scheme.as_json(),
            "layout": plan.layout.name,
            "treatments": [treatment.as_json() for treatment in plan.treatments],
            **({"calibration": plan.calibration} if plan.calibration else {}),
            "engines": [engine for engine, reason in engines_of(plan).items() if reason is None],
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "stages": {},
        }

    def needs(self, shard: str) -> bool:
        return not self.complete and shard not in self.finished

    def add(self, shard: str, outputs: dict[str, memoryview], offset: int) -> None:
        """Put output tensors, or pieces of them, in their places in a shard being written. From any thread."""
        writer = self._writer(shard)
        for name, data in outputs.items():
            writer.write(name, data, offset)

    def _writer(self, shard: str) -> ShardWriter:
        with self._opening:
            if shard not in self._writers:
                path = self.artifact.path / shard
                self._writers[shard] = ShardWriter(path, self.plan.outputs(shard), self.plan.metadata)
            return self._writers[shard]

    def copy(self, shard: str, name: str, path: Path, start: int, nbytes: int, offset: int = 0) -> None:
        """Put (a piece of) a tensor in its place, straight from a file of the source."""
        with path.open("rb", buffering=0) as f:
            self._writer(shard).copy(name, f.fileno(), start, nbytes, offset)

    def commit(self, shard: str, source_sha256: str) -> None:
        self.closed(shard)(source_sha256)

    def closed(self, shard: str) -> Callable[[str], None]:
        """What commits this shard, once its source's sha256 is known; the next one can be written meanwhile."""
        writer = self._writer(shard)  # a shard without tensors is a file too
        del self._writers[shard]
        return lambda source_sha256: self._journal(shard, writer.commit(), source_sha256)

    def _journal(self, shard: str, sha256: str, source_sha256: str) -> None:
        line = {"shard": shard, "sha256": sha256, "source_sha256": source_sha256}
        line |= {"shared": self._shared} if self._shared else {}
        path = self.artifact.meta / "journal.jsonl"
        with disk_errors(path), path.open("a") as f:
            write_point("journal")
            f.write(json.dumps(line) + "\n")
            f.flush()
            os.fsync(f.fileno())
            write_point("journaled")

    def end(self, device: str, found: Calibrated) -> None:
        """Everything but the weights. found: what calibration gave."""
        if self.plan.digest() != self.digest:
            what, advice = (
                "the source changed while it was quantized",
                "keep it unchanged and run the same command again",
            )
            raise UnavailableError(what, where=self.plan.checkpoint.source.label, next=advice)
        entries = self.artifact.journal_entries()
        if self.plan.unsealed:
            entries = {s: line | {"source_sha256": self.plan.source_digests(s)[-1]} for s, line in entries.items()}
        self._write_journal(entries)
        for name in self.plan.checkpoint.companions:
            self.artifact.write(name, self.plan.checkpoint.source.read(name))
        if self.plan.checkpoint.indexed:
            self.artifact.write(INDEX, dump_json(index_json(self.plan)))
        for name, content in config_files(self.plan).items():
            self.artifact.write(name, dump_json(content))
        if self.plan.calibration:
            self.artifact.write(f"{META}/{CALIBRATION}", dump_json(found.evidence()))
        if found.smoothing is not None:
            self.artifact.write(f"{META}/{SMOOTHING}", to_bytes(found.smoothing.vectors()))
        self.artifact.write("config.json", dump_json(artifact_config(self.plan)))
        facts = summary(self.plan)
        self.artifact.record("quantize", {"device": torch.device(device).type} | {key: facts[key] for key in RECORDED})

    def abandon(self) -> None:
        """Leave no half-written shard."""
        while self._writers:
            self._writers.popitem()[1].abandon()

    def remove(self) -> None:
        """Take back what this run wrote: its input can never be finished. What a former run left stays."""
        if not self._ours:
            return
        written = (*self.plan.shards, *self.plan.checkpoint.companions, "config.json", *config_files(self.plan), INDEX)
        with contextlib.suppress(OSError):
            for name in written:
                (self.artifact.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.artifact.meta, ignore_errors=True)
            for folder in self._made:
                folder.rmdir()

    def undo_if_empty(self) -> None:
        """A run that failed before its first shard leaves nothing behind."""
        if self._ours and not self.artifact.has("journal.jsonl"):
            self.remove()

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
