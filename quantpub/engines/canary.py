"""Does the checkpoint work in the real engine? It is loaded there, generates, and is compared with its base model there.

Each checkpoint runs in a process of its own, in the engine's own interpreter, one after the other: `probe_<engine>.py`. The
base's log-probabilities are the measure: a canary fails when the mean KL exceeds a limit that no sound 4-bit model comes near
(a model of wrong scales is several nats away), when logits are not finite, when the engine left parameters as they were
initialized, when the text is one token again and again, or when the checkpoint does not load. The text's length is a figure.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantpub.engines.canary_figures import Unlike, figures, repeats, texts
from quantpub.engines.canary_tokens import Tokens, canary_tokens, has_tokenizer
from quantpub.engines.elsewhere import LACKS, OPTION, PATIENCE, PROBE, command
from quantpub.engines.probing import one_line
from quantpub.errors import UnavailableError, UsageError

ENGINES = ("vllm", "transformers", "sglang")
NEEDS = ("torch", "safetensors")  # beside the engine itself
MAX_KL = 1.0  # nats per token
TIMEOUT = 1800.0  # seconds of one checkpoint: a large one is read from disk, and kernels are compiled
GENERATE = 32
KILLED = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SHOWN = 20  # names of missing tensors that are listed
TOLD = (
    "version",
    "device",
    "dtype",
    "seconds",
    "load_seconds",
    "kernels",
    "kernel_rows",
    "kernel_lines",
    "warnings",
    "finite",
)


@dataclass(frozen=True)
class Settings:
    """timeout: seconds of one checkpoint. options: the probe's own: memory (part of the GPU's), dtype, device, engine."""

    timeout: float = TIMEOUT
    generate: int = GENERATE
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """What the engine said of one checkpoint, and the folder of its log-probabilities."""

    reply: dict[str, Any]
    folder: Path

    @property
    def error(self) -> str | None:
        return self.reply.get("error")


def canary(
    engine: str,
    folder: Path,
    base: Path | None = None,
    tokens: Tokens | None = None,
    python: str | None = None,
    *,
    max_kl: float = MAX_KL,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Run `folder`, and `base` before it, in `engine`. python: its interpreter, None: this one. Returns plain data.

    Errors: UsageError (engine or interpreter), InputError (no configuration), UnavailableError (killed, timeout, memory).
    """
    require(engine, python)
    tokens, settings = tokens or canary_tokens(folder, base), settings or Settings()
    with tempfile.TemporaryDirectory(prefix="quantpub-canary-") as temporary:
        before = None if base is None else run(engine, base, tokens, Path(temporary, "base"), python, settings)
        found = run(engine, folder, tokens, Path(temporary, "checkpoint"), python, settings)
        return report(engine, found, before, tokens, max_kl)


def require(engine: str, python: str | None) -> None:
    """Errors: UsageError when there is no such engine, or the interpreter is none or lacks it."""
    if engine not in ENGINES:
        raise UsageError(f"no engine {engine!r}", where="--engine", next=f"known: {', '.join(ENGINES)}")
    where = f"{OPTION} {python}" if python else sys.executable
    asked = [python or sys.executable, "-c", PROBE, LACKS, engine, *NEEDS]
    try:
        done = subprocess.run(asked, env=_env(), capture_output=True, text=True, timeout=PATIENCE, check=True)
        word, *missing = done.stdout.strip().rpartition("\n")[2].split() or [""]
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        why = str(error.strerror or error).lower() if isinstance(error, OSError) else "it does not answer as one"
        raise UsageError(f"not a Python that can be run: {why}", where=where, next=_ADVICE) from None
    if word != LACKS or missing:
        why = f"that Python lacks {', '.join(missing)}" if word == LACKS else "it does not answer as a Python"
        raise UsageError(why, where=where, next=_ADVICE)


_ADVICE = "name the interpreter of the environment that the engine is installed in"


def _env() -> dict[str, str]:
    return os.environ | {"PYTHONSAFEPATH": "1"}  # what lies in the working folder is no package


def run(
    engine: str, folder: Path, tokens: Tokens, out: Path, python: str | None = None, settings: Settings | None = None
) -> Run:
    """Load one checkpoint in the engine; its log-probabilities are written below `out`, a folder that is made.

    Errors: UnavailableError when it was killed, took too long or found too little memory.
    """
    settings = settings or Settings()
    out.mkdir(parents=True)
    request = {
        "folder": str(folder.resolve()),
        "windows": tokens.windows,
        "prompt": tokens.prompt,
        "generate": settings.generate,
        "out": str(out),
        "tokenizer": has_tokenizer(folder),
        "options": dict(settings.options),
    }
    reply = _answer(
        command(python or sys.executable, f"quantpub.engines.probe_{engine}"), request, out, settings.timeout
    )
    if reply.get("kind") == "memory":
        advice = "free some of the device's memory and run it again"
        raise UnavailableError(f"{engine} found too little memory: {reply['error']}", where=str(folder), next=advice)
    return Run(reply, out)


def _answer(process: list[str], request: Mapping[str, Any], out: Path, timeout: float) -> dict[str, Any]:
    """Files, not pipes: nobody reads along, and an engine logs more than a pipe holds."""
    asked, said, log = out / "asked", out / "said", out / "log"
    asked.write_text(json.dumps(request))
    with asked.open("rb") as stdin, said.open("wb") as stdout, log.open("wb") as stderr:
        child = subprocess.Popen(process, stdin=stdin, stdout=stdout, stderr=stderr, env=_env(), process_group=0)
        try:
            code = child.wait(timeout)
        except subprocess.TimeoutExpired:
            advice = "give it more time, or a smaller checkpoint"
            raise UnavailableError(
                f"the engine gave no answer within {timeout:g} s", where=request["folder"], next=advice
            ) from None
        finally:
            _end(child)
    if -code in KILLED:
        advice = "free some memory and run it again"
        raise UnavailableError(f"the engine was ended by signal {-code}", where=request["folder"], next=advice)
    return _last_object(said) or {"loaded": False, "error": _last_words(code, log), "kind": "crash"}


def _end(child: subprocess.Popen[bytes]) -> None:
    """With all that it started: a process that is left would hold the device's memory."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _last_object(path: Path) -> dict[str, Any] | None:
    for line in reversed(path.read_text(errors="replace").splitlines()):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and "loaded" in value:
            return value
    return None


def _last_words(code: int, log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    how = f"was ended by signal {-code}" if code < 0 else f"ended with {code}"
    return f"the engine {how} and no answer" + (f": {one_line(lines[-1])}" if lines else "")


def report(engine: str, found: Run, base: Run | None, tokens: Tokens, max_kl: float = MAX_KL) -> dict[str, Any]:
    """What one run comes to beside the base's: plain data with a verdict, passed, failed or not compared, and its reason."""
    reply = found.reply
    facts = {"engine": engine, "loaded": reply["loaded"], "ids": tokens.source, "max_kl": max_kl}
    facts |= {name: reply[name] for name in TOLD if name in reply}
    if found.error:
        facts["error"] = found.error
    facts["missing"], facts["unexpected"] = _names(reply.get("missing")), _names(reply.get("unexpected"))
    sound = base if base is not None and not base.error else None
    if "generated" in reply:
        facts["generated"] = texts(tokens.prompt, reply["generated"], sound.reply["generated"] if sound else None)
    why = _not_compared(base, found)
    if why is None and sound is not None:
        try:
            facts |= figures(sound.folder, found.folder, tokens.windows)
        except Unlike as error:
            why = str(error)
    return facts | _verdict(facts, sound, tokens, why)


def _names(names: list[str] | None) -> dict[str, Any] | None:
    """None: the engine does not tell."""
    return None if names is None else {"count": len(names), "names": names[:SHOWN]}


def _not_compared(base: Run | None, found: Run) -> str | None:
    if base is None:
        return "no base model was given"
    if base.error:
        return f"the base model does not run in this engine: {base.error}"
    if not base.reply.get("finite"):
        return "the base model's own logits are not finite in this engine"
    return None if not found.error else "the checkpoint did not run to its end"


def _verdict(facts: Mapping[str, Any], base: Run | None, tokens: Tokens, why: str | None) -> dict[str, str]:
    faults, unused = _faults(facts, base, tokens), _unused(facts["unexpected"])
    if faults:
        return {"verdict": "failed", "reason": "; ".join(faults) + unused}
    if why is not None:
        return {"verdict": "not compared", "reason": f"it loads and generates; {why}{unused}"}
    kl = facts["kl"]
    spread = "" if kl["stderr"] is None else f" ± {kl['stderr']:.5f}"
    return {
        "verdict": "passed",
        "reason": f"KL {kl['mean']:.5f}{spread} is within {facts['max_kl']} nats per token{unused}",
    }


def _unused(unexpected: Mapping[str, Any] | None) -> str:
    """Not a fault by itself: a checkpoint may hold layers that the engine has no use for."""
    if not unexpected or not unexpected["count"]:
        return ""
    return f"; {unexpected['count']} of its tensors were not used: {unexpected['names'][0]}"


def _faults(facts: Mapping[str, Any], base: Run | None, tokens: Tokens) -> list[str]:
    faults = []
    if facts.get("error"):
        faults.append(f"it {'does not run' if facts['loaded'] else 'does not load'}: {facts['error']}")
    if (missing := facts["missing"]) and missing["count"]:
        faults.append(f"{missing['count']} tensors are missing and were left as initialized: {missing['names'][0]}")
    if facts.get("finite") is False:
        faults.append("its logits are not finite")
    elif fault := _excess(facts.get("kl"), facts["max_kl"]):
        faults.append(fault)
    if "generated" in facts and repeats(facts["generated"]["tokens"]):
        usual = repeats(base.reply["generated"]["tokens"]) if base is not None else not tokens.is_text
        faults += [] if usual else ["its text is one token again and again"]
    return faults


def _excess(kl: Mapping[str, Any] | None, limit: float) -> str | None:
    if kl is None:
        return None
    if kl["mean"] is None:
        return "KL is not finite: what the base expects, it holds impossible"
    return f"KL {kl['mean']:.5f} exceeds {limit} nats per token" if kl["mean"] > limit else None
