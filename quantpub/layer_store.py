"""What is found out layer by layer and kept: a folder of safetensors files, one a decoder layer, and a journal of them.

    FOLDER/journal.jsonl        one line a finished layer: its number and the sha256 of its file
    FOLDER/layer-00012.safetensors
    FOLDER/record.json          written last: what made it, and the journal's digest; only then is the folder whole

A layer counts when its line is in the journal and its file has that sha256: what a killed run left half done is made
again, and what was damaged since is recognised.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from quantpub.errors import ConflictError, InputError
from quantpub.files import ANY_STAGE, atomic_write, disk_errors, dump_json, sha256_file, sha256_json, write_point

JOURNAL, RECORD = "journal.jsonl", "record.json"


class LayerStore:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.safetensors"

    def finished(self) -> dict[int, str]:
        """layer → sha256, as far as the journal goes without a gap and files are as it says."""
        found: dict[int, str] = {}
        for layer, digest in enumerate(self._journal()):
            if not self.path(layer).is_file() or sha256_file(self.path(layer)) != digest:
                break
            found[layer] = digest
        return found

    def _journal(self) -> list[str]:
        try:
            lines = (self.folder / JOURNAL).read_text("utf-8").splitlines(keepends=True)
            entries = [json.loads(line) for line in lines if line.endswith("\n")]
            return [str(entry["sha256"]) for entry in sorted(entries, key=lambda entry: int(entry["layer"]))]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def whole(self) -> dict[str, Any] | None:
        """The record, where every layer that it speaks of is there and unharmed; None otherwise."""
        try:
            record: dict[str, Any] = json.loads((self.folder / RECORD).read_text("utf-8"))
            layers = record["layers"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        finished = self.finished()
        return record if len(finished) == layers and record.get("sha256") == _digest(finished) else None

    def begin(self, layers: int) -> None:
        """Make the folder; keep the first `layers` finished layers, remove every other trace. Errors: UnavailableError."""
        with disk_errors(self.folder, ANY_STAGE):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / RECORD).unlink(missing_ok=True)
        kept = dict(list(self.finished().items())[:layers])
        lines = "".join(_line(layer, digest) for layer, digest in kept.items())
        atomic_write(self.folder / JOURNAL, lines.encode())

    def add(self, layer: int, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
        """Write one layer's file and its line. metadata: JSON, kept in the file's header."""
        from safetensors.torch import save

        path = self.path(layer)
        data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"json": json.dumps(metadata)})
        atomic_write(path, data)
        with disk_errors(path, ANY_STAGE), (self.folder / JOURNAL).open("a") as f:
            write_point("layer")
            f.write(_line(layer, sha256_file(path)))
            f.flush()
            os.fsync(f.fileno())

    def end(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The record, written: from now on the folder is whole."""
        finished = self.finished()
        whole = {**record, "layers": len(finished), "sha256": _digest(finished)}
        atomic_write(self.folder / RECORD, dump_json(whole))
        return whole

    def read(self, layer: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """A layer's tensors and metadata. Errors: InputError when it cannot be read."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path(layer), "pt") as f:
                metadata = json.loads(f.metadata()["json"])
                return {name: f.get_tensor(name) for name in f.keys()}, metadata  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            what, advice = "this part of a calibration cannot be read", "run the same command again: it is made again"
            raise InputError(what, where=str(self.path(layer)), next=advice) from None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Errors: ConflictError when another process works on the same calibration."""
        with disk_errors(self.folder, ANY_STAGE):
            self.folder.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            what = "another process is making this very calibration"
            raise ConflictError(what, where=str(self.folder), next="wait for it; then it costs nothing") from None
        finally:
            os.close(fd)


def _line(layer: int, digest: str) -> str:
    return json.dumps({"layer": layer, "sha256": digest}) + "\n"


def _digest(finished: Mapping[int, str]) -> str:
    return sha256_json(sorted(finished.items()))
