"""Asks an engine's selector in the engine's own interpreter: a request as JSON on stdin, one JSON object on stdout.

    request   {"config": the model's config.json, "asks": [{"gemm", "n", "k", "scheme", "layout", "group", "experts",
              "top_k", "tp", "members"}, …]}; n and k are one GPU's; from "group" on a key may be missing (`choice.Ask`)
    reply     {"engine", "version", "device", "generation", "environment", "choices": […]}, or {"error": one line}

vLLM takes seconds to import: `start` it first, do other work, and `wait` for the reply. Of quantpub the other interpreter
sees only this package's own files, and nothing else of the environment that quantpub is installed in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantpub.engines.choice import Ask, Choice, by_table
from quantpub.engines.elsewhere import command

TIMEOUT = 180.0  # seconds from the start on: importing vLLM from a cold disk takes a minute


class Asking:
    """A question under way, or the reason for which it could not be put."""

    def __init__(self, python: str, request: Mapping[str, Any], timeout: float) -> None:
        self._python, self._timeout, self._deadline = python, timeout, time.monotonic() + timeout
        self._folder = tempfile.TemporaryDirectory(prefix="quantpub-ask-")
        self._failed: str | None = None
        self._process = self._launch(Path(self._folder.name), json.dumps(request))

    def _launch(self, folder: Path, request: str) -> subprocess.Popen[bytes] | None:
        """Files, not pipes: nobody reads along, and an engine logs more than a pipe holds."""
        env = os.environ | {"PYTHONSAFEPATH": "1"}  # or a folder `vllm` in the working directory would be imported
        asked, out, log = folder / "asked", folder / "out", folder / "log"
        asked.write_text(request)
        with asked.open("rb") as stdin, out.open("wb") as stdout, log.open("wb") as stderr:
            try:
                run = command(self._python, "quantpub.engines.vllm_choice")
                return subprocess.Popen(run, stdin=stdin, stdout=stdout, stderr=stderr, env=env)
            except OSError as error:
                self._failed = f"{self._python} does not start: {error.strerror or error}"
                return None

    def wait(self) -> dict[str, Any]:
        """The reply. An error is a reply, too: {"error": one line}."""
        if self._process is None:
            return {"error": str(self._failed)}
        try:
            code = self._process.wait(max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.stop()
            return {"error": f"{self._python} gave no answer within {self._timeout:g} s"}
        out, log = (Path(self._folder.name, name).read_text(errors="replace") for name in ("out", "log"))
        return _last_object(out) or {"error": f"{self._python} ended with {code} and no answer{_last_words(log)}"}

    def stop(self) -> None:
        """Ends the engine's process, if it still runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


@dataclass(frozen=True)
class NoEngine:
    """In the place of a question, where nobody can be asked."""

    reason: str

    def wait(self) -> dict[str, Any]:
        return {"error": self.reason}

    def stop(self) -> None:
        """There is no process."""


def start(engine_python: str | None, request: Mapping[str, Any], timeout: float = TIMEOUT) -> Asking | NoEngine:
    """engine_python: the interpreter that has vLLM; None: this one, if it has it."""
    if engine_python is None and find_spec("vllm") is None:
        return NoEngine("vLLM is not installed in this interpreter, and no other was named")
    return Asking(engine_python or sys.executable, request, timeout)


def ask(engine_python: str | None, request: Mapping[str, Any], timeout: float = TIMEOUT) -> dict[str, Any]:
    return start(engine_python, request, timeout).wait()


def make_request(config: Mapping[str, Any], asks: Iterable[Ask]) -> dict[str, Any]:
    return {"config": {"model_type": config.get("model_type")}, "asks": [each.as_json() for each in asks]}


def choices(reply: Mapping[str, Any], asks: Sequence[Ask], generation: str) -> list[Choice]:
    """One choice an ask, in order; the kernel tables' where the reply is an error. generation: the GPU's, for these."""
    if "choices" in reply:
        found = [Choice.from_json(value) for value in reply["choices"]]
        assert len(found) == len(asks), "the reply answers another request"
        return found
    return [by_table(each, str(reply["error"]), "", generation) for each in asks]


def _last_object(text: str) -> dict[str, Any] | None:
    """The last line that is a reply; engines print on stdout as they please."""
    for line in reversed(text.splitlines()):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and ("choices" in value or "error" in value):
            return value
    return None


def _last_words(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f": {lines[-1]:.300}" if lines else ""
