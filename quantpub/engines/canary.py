"""Does the checkpoint work in the real engine? It is loaded there, generates, and is compared with its base model there.

Each checkpoint runs in a process of its own, in the engine's own interpreter, one after the other: `probe_<engine>.py`. The
base's log-probabilities are the measure: a canary fails when the mean KL exceeds what our own evaluation lets expect, when logits
are not finite, when the engine left parameters as they were initialized, scales unused or every module as if it were not
quantized, when the text is one token again and again, or when the checkpoint does not load (`canary_faults`). The text's length
is a figure.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantpub.engines.canary_faults import Expected, faults, ignored_scales
from quantpub.engines.canary_figures import Unlike, figures, repeats, texts
from quantpub.engines.canary_tokens import Tokens, canary_tokens, has_tokenizer
from quantpub.engines.elsewhere import LACKS, OPTION, PATIENCE, PROBE, command
from quantpub.engines.probing import one_line
from quantpub.errors import UnavailableError, UsageError

ENGINES = ("vllm", "transformers", "sglang")
NEEDS = ("torch", "safetensors")  # beside the engine itself
TIMEOUT = 1800.0  # seconds of one checkpoint: a large one is read from disk, and kernels are compiled
GENERATE = 32
KILLED = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ELSEWHERE = {  # what is not the checkpoint's fault
    "memory": ("found too little memory", "free some of the device's memory and run it again"),
    "install": ("lacks a package", "install what it names into the engine's environment, and run it again"),
}
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
    "quantizer",
    "kind",
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
    expected: Expected | None = None,
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
        return report(engine, found, before, tokens, expected)


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
        raise UsageError(f"not a Python that can be run: {why}", where=where, next=ADVICE) from None
    if word != LACKS or missing:
        why = f"that Python lacks {', '.join(missing)}" if word == LACKS else "it does not answer as a Python"
        raise UsageError(why, where=where, next=_install(missing) if word == LACKS else ADVICE)


ADVICE = f"name with {OPTION} the interpreter of the environment that the engine is installed in"


def _install(missing: Sequence[str]) -> str:
    return f"{ADVICE}, or install it there: pip install {' '.join(missing)}"


def _env() -> dict[str, str]:
    return os.environ | {"PYTHONSAFEPATH": "1"}  # what lies in the working folder is no package


def run(
    engine: str, folder: Path, tokens: Tokens, out: Path, python: str | None = None, settings: Settings | None = None
) -> Run:
    """Load one checkpoint in the engine; its log-probabilities are written below `out`, a folder that is made.

    Errors: UnavailableError when it was killed, took too long, found too little memory or lacks a package.
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
    if (kind := reply.get("kind")) in ELSEWHERE:
        what, advice = ELSEWHERE[kind]
        raise UnavailableError(f"{engine} {what}: {reply['error']}", where=str(folder), next=advice)
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
            advice = "load it in the engine alone once: kernels that were compiled are kept; then run this again"
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


def report(
    engine: str, found: Run, base: Run | None, tokens: Tokens, expected: Expected | None = None
) -> dict[str, Any]:
    """What one run comes to beside the base's: plain data with a verdict, passed, failed or not compared, and its reason.

    Where it failed, `next` says what to do about the first fault.
    """
    reply, expected = found.reply, expected or Expected()
    facts = {"engine": engine, "loaded": reply["loaded"], "ids": tokens.source}
    facts |= {"max_kl": expected.max_kl, "max_kl_is": expected.basis}
    facts |= {name: reply[name] for name in TOLD if name in reply}
    if found.error:
        facts["error"] = found.error
    facts["missing"], facts["unexpected"] = _names(reply.get("missing")), _unused(reply.get("unexpected"))
    sound = base if base is not None and not base.error else None
    if "generated" in reply:
        facts["generated"] = texts(tokens.prompt, reply["generated"], sound.reply["generated"] if sound else None)
    why = _not_compared(base, found)
    if why is None and sound is not None:
        try:
            facts |= figures(sound.folder, found.folder, tokens.windows)
        except Unlike as error:
            why = str(error)
    return facts | _verdict(facts, expected, _repeats(facts, sound, tokens), tokens, why)


def _names(names: list[str] | None) -> dict[str, Any] | None:
    """None: the engine does not tell."""
    return None if names is None else {"count": len(names), "names": names[:SHOWN]}


def _unused(names: list[str] | None) -> dict[str, Any] | None:
    scales = ignored_scales(names or ())
    return None if names is None else {**(_names(names) or {}), "scale_count": len(scales), "scales": scales[:SHOWN]}


def _not_compared(base: Run | None, found: Run) -> str | None:
    if base is None:
        return "no base model was given"
    if base.error:
        return f"the base model does not run in this engine: {base.error}"
    if not base.reply.get("finite"):
        return "the base model's own logits are not finite in this engine"
    return None if not found.error else "the checkpoint did not run to its end"


def _verdict(
    facts: Mapping[str, Any], expected: Expected, repeats: bool, tokens: Tokens, why: str | None
) -> dict[str, str]:
    found, rest = faults(facts, expected, repeats, tokens.is_text), _left(facts["unexpected"])
    if found:
        return {"verdict": "failed", "reason": "; ".join(fault.what for fault in found) + rest, "next": found[0].next}
    if why is not None:
        return {"verdict": "not compared", "reason": f"it loads and generates; {why}{rest}"}
    kl = facts["kl"]
    spread = "" if kl["stderr"] is None else f" ± {kl['stderr']:.5f}"
    said = f"KL {kl['mean']:.5f}{spread} is within {expected.max_kl:g} nats per token, {expected.basis}"
    return {"verdict": "passed", "reason": said + rest}


def _left(unexpected: Mapping[str, Any] | None) -> str:
    """Not a fault by itself: a checkpoint may hold layers that the engine has no use for."""
    if not unexpected or not unexpected["count"] or unexpected["scales"]:
        return ""
    return f"; {unexpected['count']} of its tensors were not used: {unexpected['names'][0]}"


def _repeats(facts: Mapping[str, Any], base: Run | None, tokens: Tokens) -> bool:
    """One token again and again, where the base's continuation, or text, is none."""
    if "generated" not in facts or not repeats(facts["generated"]["tokens"]):
        return False
    return not repeats(base.reply["generated"]["tokens"]) if base is not None else tokens.is_text
