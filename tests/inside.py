"""Probes answering in this process, as `canary.run` would from processes: importing an engine anew for each takes seconds."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import DEMO_MODEL

from quantpub.engines import canary as stage
from quantpub.engines import probing
from quantpub.engines.canary import Run, Settings
from quantpub.engines.canary_tokens import Tokens, has_tokenizer

Answers = list[Path]
BASES = tempfile.TemporaryDirectory(prefix="quantpub-bases-")  # is removed with this process
_demo: dict[tuple[Tokens, int], Run] = {}  # the demo model's own answers are the base's of most


@contextlib.contextmanager
def inside() -> Iterator[Answers]:
    """`canary.run` answered here. Yields the folders that were run, in their order."""
    ran: Answers = []

    def run(
        engine: str,
        folder: Path,
        tokens: Tokens,
        out: Path,
        python: str | None = None,
        settings: Settings | None = None,
    ) -> Run:
        ran.append(folder)
        known = (tokens, (settings or Settings()).generate)
        if folder != DEMO_MODEL or engine != "transformers":
            return _answer(engine, folder, tokens, out, settings or Settings())
        if known not in _demo:
            kept = Path(tempfile.mkdtemp(prefix="base-", dir=BASES.name))
            _demo[known] = _answer(engine, folder, tokens, kept, settings or Settings())
        return _demo[known]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of models this small two of them take longer, several times so on a machine that is busy
    handlers = {name: list(logging.getLogger(name).handlers) for name in (None, *probing.LOUD)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warnings, "showwarning", warnings.showwarning)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(stage, "run", run)
        try:
            yield ran
        finally:
            torch.set_num_threads(threads)
            for name, before in handlers.items():
                logging.getLogger(name).handlers[:] = before


def _answer(engine: str, folder: Path, tokens: Tokens, out: Path, settings: Settings) -> Run:
    out.mkdir(parents=True, exist_ok=True)
    options = {"dtype": "auto", "device": "cpu", **settings.options}
    windows, prompt = [*map(list, tokens.windows)], [*tokens.prompt]
    request = probing.Request(str(folder), windows, prompt, settings.generate, str(out), has_tokenizer(folder), options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(json.dumps(dataclasses.asdict(request))))
        found = Run(probing._reply(import_module(f"quantpub.engines.probe_{engine}").load), out)
    (out / "log").write_text(found.error or "")
    return found
