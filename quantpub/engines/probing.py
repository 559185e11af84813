"""What every probe of an engine does alike, in the engine's own interpreter: read a request, load, generate, score, reply.

    request   {"folder", "windows": [[token id]], "prompt": [token id], "generate", "out", "tokenizer", "options": {…}} on stdin
    reply     one JSON object, the last line of stdout: {"loaded", "version", "device", "kernels", "warnings", "generated",
              "finite", …}, with {"error": one line, "kind"} where something failed; what the engine prints goes to stderr
    files     out/window-<i>.safetensors: logprobs_TV, or top_ids_TK, top_logprobs_TK and own_T where an engine gives no more

logprobs_TV: natural logarithms in float32, row t is of the token after position t. own_T: of the token that does follow.
Legend: T positions of a window (an engine may leave out the last), V vocabulary, K most likely tokens.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

LOUD = ("vllm", "sglang", "transformers", "compressed_tensors")  # loggers that may keep their lines from the root
KERNEL = re.compile(r"Using \w+Kernel for [\w-]+|Selected \w+ for \w+|Using [^\n]{1,60} (?:MoE )?backend[^\n]{0,60}")
PATH = re.compile(r"(?<![\w.:/])(?:~|\.{1,2})?/(?:[^\s/'\":,;()\[\]]+/)*([^\s/'\":,;()\[\]]*)")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
MEMORY = re.compile(r"out of memory|OutOfMemory|Free memory on device|No available memory|not enough memory", re.I)
LINE, LINES = 300, 60  # characters of a warning, and warnings, that are kept


@dataclass(frozen=True)
class Request:
    """windows, prompt: token ids. generate: how many tokens at most. tokenizer: whether the folder holds one."""

    folder: str
    windows: list[list[int]]
    prompt: list[int]
    generate: int
    out: str
    tokenizer: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Positions that the engine has to hold, with one to spare."""
        return max([len(self.prompt) + self.generate, *(len(window) + 1 for window in self.windows)]) + 1


class Engine(Protocol):
    """A loaded checkpoint."""

    def facts(self) -> dict[str, Any]:
        """kernels: module → class name, and what else there is to tell of the loaded model."""

    def generate(self, ids: list[int], count: int) -> tuple[list[int], str | None]:
        """The greedy continuation, and its text where there is a tokenizer."""

    def score(self, ids: list[int]) -> dict[str, Any]:
        """The tensors of one window's file."""

    def close(self) -> None:
        """Ends what would outlive this process."""


class Heard(logging.Handler):
    """warnings: what the engine warned of. kernels: what it logged of kernels. facts: known before anything is loaded."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.warnings: dict[str, None] = {}
        self.kernels: dict[str, None] = {}
        self.facts: dict[str, Any] = {}

    def listen(self) -> None:
        """Once the engine is imported: importing it sets up its loggers anew."""
        for name in (None, *LOUD):
            logger = logging.getLogger(name)
            if self not in logger.handlers:
                logger.addHandler(self)
        warnings.showwarning = lambda message, category, *_, **__: self.warn(f"{category.__name__}: {message}")

    def warn(self, text: str) -> None:
        if len(self.warnings) < LINES and (line := one_line(text)):
            self.warnings.setdefault(line)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
        except Exception:  # an engine's faulty log line is not ours to fail of
            return
        self.kernels |= dict.fromkeys(one_line(found) for found in KERNEL.findall(text))
        if record.levelno >= logging.WARNING:
            self.warn(text)


def one_line(text: object, limit: int = LINE) -> str:
    """Without colours, and without paths, of which only the last part stays."""
    return PATH.sub(r"\1", COLOUR.sub("", " ".join(str(text).split())))[:limit]


def failure(error: BaseException) -> dict[str, str]:
    """kind: memory, install (a package is missing), or error."""
    said = str(error)
    line = one_line(f"{type(error).__name__}: {said}" if said else type(error).__name__)
    if MEMORY.search(line) or "OutOfMemory" in type(error).__name__:
        return {"error": line, "kind": "memory"}
    return {"error": line, "kind": "install" if isinstance(error, ImportError) else "error"}


def serve(load: Callable[[Request, Heard], Engine]) -> None:
    """Answer the request on stdin. Engines print to stdout: it becomes stderr, and the reply is alone on the real one."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        out.write(json.dumps(_reply(load)) + "\n")
    sys.stdout.flush()
    os._exit(0)  # an engine's own taking down may hang, and has nothing more to say


def _reply(load: Callable[[Request, Heard], Engine]) -> dict[str, Any]:
    heard, reply = Heard(), dict[str, Any](loaded=False)
    try:
        request, started = Request(**json.load(sys.stdin)), time.monotonic()
        engine = load(request, heard)
        reply |= {"loaded": True, "load_seconds": round(time.monotonic() - started, 2), **engine.facts()}
        reply |= _run(engine, request)
        reply["seconds"] = round(time.monotonic() - started, 2)
        engine.close()
    except (Exception, SystemExit) as error:  # whatever it is, the reply is one JSON object
        traceback.print_exc()
        reply |= failure(error)
    return {**heard.facts, **reply, "warnings": list(heard.warnings), "kernel_lines": list(heard.kernels)}


def _run(engine: Engine, request: Request) -> dict[str, Any]:
    tokens, text = engine.generate(request.prompt, request.generate)
    files = (Path(request.out, f"window-{i}.safetensors") for i in range(len(request.windows)))
    finite = [_save(engine.score(ids), file) for ids, file in zip(request.windows, files, strict=True)]
    return {"generated": {"tokens": tokens, "text": text}, "finite": all(finite)}


def _save(tensors: Mapping[str, Any], path: Path) -> bool:
    """Whether they are finite: no NaN, nothing above 0; minus infinity is an impossible token's."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    figures = [tensor for name, tensor in tensors.items() if tensor.is_floating_point()]
    return all(bool((tensor <= 1e-3).all()) for tensor in figures)


def top(rows: Iterable[Iterable[tuple[float, int]]], own: list[float]) -> dict[str, Any]:
    """The tensors of a window of which an engine gave only the most likely tokens: (logprob, id) of each position."""
    import torch

    pairs = [sorted(row, reverse=True) for row in rows]
    width = min(map(len, pairs))
    return {
        "top_ids_TK": torch.tensor([[token for _, token in row[:width]] for row in pairs]),
        "top_logprobs_TK": torch.tensor([[value for value, _ in row[:width]] for row in pairs], dtype=torch.float32),
        "own_T": torch.tensor(own, dtype=torch.float32),
    }
