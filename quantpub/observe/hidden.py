"""Hidden states between layers: kept in memory where they are few, spilled to a file where they are many.

Legend: B rows of a batch, T tokens, H hidden features.

A layer reads what the one before it wrote. Spilled, there are two files, one to read and one to write, so that a killed
run has always one that is whole; kept, they are saved now and then, as often as saving costs little. Either way a run
that is started again goes on from the last layer that is on disk.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from quantpub.files import ANY_STAGE, atomic_write, disk_errors, temporary

RARELY = 20  # saving may take one part in so many of the time since it was last done


class Hidden:
    """shapes: [B, T] of every batch. keep: the device where they stay in memory, or None: spilled.

    name: of the files, one set a process.
    """

    def __init__(
        self, folder: Path, shapes: Sequence[tuple[int, int]], h: int, dtype: torch.dtype, keep: str | None, name: str
    ) -> None:
        self.folder, self.shapes, self.h, self.dtype, self.keep, self.name = folder, shapes, h, dtype, keep, name
        self._kept: list[torch.Tensor] = []
        self._layer, self._current = 0, 0  # of the two files the one that is whole
        size = torch.empty((), dtype=dtype).element_size() * h
        self._offsets = [0]
        for b, t in shapes:
            self._offsets.append(self._offsets[-1] + b * t * size)
        self._saved, self._cost = time.monotonic(), 0.0

    def _file(self, which: int) -> Path:
        return self.folder / f"hidden-{self.name}-{which}"

    def _state(self) -> Path:
        return self.folder / f"hidden-{self.name}.json"

    @property
    def nbytes(self) -> int:
        return self._offsets[-1]

    def saved(self) -> int | None:
        """The layer whose input a former run left on disk, or None."""
        try:
            state = json.loads(self._state().read_text("utf-8"))
            self._layer, self._current = int(state["layer"]), int(state["file"])
            same = state["shapes"] == [list(shape) for shape in self.shapes] and state["h"] == self.h
            return self._layer if same and self._file(self._current).stat().st_size == self._offsets[-1] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def resume(self) -> None:
        """Go on with what `saved` found."""
        if self.keep:
            self._kept = [self._read(i).to(self.keep) for i in range(len(self.shapes))]

    def get(self, i: int, device: str) -> torch.Tensor:
        """Batch `i` of what enters the present layer, [B, T, H]."""
        return (self._kept[i] if self.keep else self._read(i)).to(device)

    def put(self, i: int, hidden_BTH: torch.Tensor) -> None:
        """Batch `i` of what leaves it (or, before `start`, of what enters the first)."""
        hidden_BTH = hidden_BTH.to(self.keep or "cpu", self.dtype)
        if self.keep is None:
            self._write(i, hidden_BTH)
        elif i < len(self._kept):
            self._kept[i] = hidden_BTH
        else:
            self._kept.append(hidden_BTH)

    def start(self) -> None:
        """Every batch of what enters the first layer was put."""
        self._layer = -1
        self.next(save=False)

    def next(self, save: bool = True) -> None:
        """Every batch of the layer was put: go on to the next. Errors: UnavailableError when the disk is full."""
        self._layer += 1
        if self.keep is None:
            self._mark()
        elif save and (began := time.monotonic()) - self._saved > RARELY * self._cost:
            for i, hidden in enumerate(self._kept):
                self._write(i, hidden.cpu())
            self._mark()
            self._saved = time.monotonic()
            self._cost = max(self._saved - began, 0.01)

    def _mark(self) -> None:
        """The file that was written is the whole one now."""
        self._current = 1 - self._current
        state = {
            "layer": self._layer,
            "file": self._current,
            "shapes": [list(shape) for shape in self.shapes],
            "h": self.h,
        }
        atomic_write(self._state(), json.dumps(state).encode())

    def _read(self, i: int) -> torch.Tensor:
        start, end = self._offsets[i : i + 2]
        raw = torch.empty(end - start, dtype=torch.uint8)
        with self._file(self._current).open("rb", buffering=0) as f:
            f.seek(start)
            view = memoryview(raw.numpy().data)
            while view and (got := f.readinto(view)):
                view = view[got:]
        return raw.view(self.dtype).view(*self.shapes[i], self.h)

    def _write(self, i: int, hidden_BTH: torch.Tensor) -> None:
        path = self._file(1 - self._current)
        data = memoryview(hidden_BTH.contiguous().view(-1).view(torch.uint8).numpy().data)
        with disk_errors(path, ANY_STAGE), path.open("r+b" if path.exists() else "w+b", buffering=0) as f:
            f.seek(self._offsets[i])
            while data:
                data = data[f.write(data) :]

    def remove(self) -> None:
        for path in (self._file(0), self._file(1), self._state(), temporary(self._state())):
            path.unlink(missing_ok=True)
