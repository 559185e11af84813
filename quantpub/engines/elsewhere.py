"""A command of ours run again by another Python: the one that holds the engine whose kernels are to be timed.

Of quantpub that Python sees only this package's own files, and nothing else of the environment that quantpub is installed in.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from quantpub.errors import INTERRUPTED, UnavailableError, UsageError

OPTION = "--engine-python"
NEEDS = ("torch", "safetensors", "typer", "rich", "pydantic", "yaml")
LACKS = "lacks:"  # the word by which a Python is told from a program that ends as quietly
PROBE = "import importlib.util as u, sys; print(sys.argv[1], *[n for n in sys.argv[2:] if u.find_spec(n) is None])"
PATIENCE = 60  # seconds for a Python to say what it lacks

HOME = Path(__file__).resolve().parent.parent
_RUN = (
    "import runpy, sys\n"
    "from importlib.util import module_from_spec, spec_from_file_location\n"
    "home = sys.argv.pop()\n"
    "sys.argv[0] = 'quantpub'\n"
    "spec = spec_from_file_location('quantpub', home + '/__init__.py', submodule_search_locations=[home])\n"
    "module = sys.modules['quantpub'] = module_from_spec(spec)\n"
    "spec.loader.exec_module(module)\n"
    "runpy.run_module('{module}', run_name='__main__')\n"
)


def command(python: str, module: str, arguments: Sequence[str] = ()) -> list[str]:
    """What runs a module of ours there; to be started with PYTHONSAFEPATH, or the working folder holds packages, too."""
    return [python, "-c", _RUN.format(module=module), *arguments, str(HOME)]


def again(python: str, arguments: Sequence[str] | None = None) -> int:
    """Run this very command line, without OPTION, by `python`; its streams are ours. Returns its exit code.

    Errors: UsageError when it cannot be started or lacks a package that we need; UnavailableError when it was killed.
    """
    env = os.environ | {"PYTHONSAFEPATH": "1"}  # what lies in the working folder is no package
    if missing := _missing(python, env):
        raise UsageError(
            f"that Python lacks {', '.join(missing)}", where=f"{OPTION} {python}", next="install them beside the engine"
        )
    rest = without(sys.argv[1:] if arguments is None else arguments)
    code = _run(command(python, "quantpub.cli", rest), env)
    if code < 0:
        raise UnavailableError(
            f"it was ended by signal {-code}", where=f"{OPTION} {python}", next="free some memory and run it again"
        )
    return code


def _run(command: Sequence[str], env: dict[str, str]) -> int:
    """Its exit code. Ctrl-C reaches us alone and is passed on, so that what it writes is whole and it ends by itself."""
    child = subprocess.Popen(command, env=env, process_group=0)
    try:
        return child.wait()
    except BaseException:
        child.send_signal(signal.SIGINT)
        try:
            code = child.wait()
        except BaseException:  # interrupted once more
            child.kill()
            raise
        if code != INTERRUPTED:
            raise
        return code


def without(arguments: Sequence[str]) -> list[str]:
    """The arguments but OPTION and its value."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument.startswith(f"{OPTION}="):
            skip = False
        elif argument == OPTION:
            skip = True
        else:
            kept.append(argument)
    return kept


def _missing(python: str, env: dict[str, str]) -> list[str]:
    try:
        done = subprocess.run(
            [python, "-c", PROBE, LACKS, *NEEDS], env=env, capture_output=True, text=True, timeout=PATIENCE, check=True
        )
        word, *missing = done.stdout.strip().rpartition("\n")[2].split() or [""]
        if word != LACKS or not set(missing) <= set(NEEDS):
            raise ValueError
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        why = error.strerror if isinstance(error, OSError) else "it did not answer"
        why = "it does not answer as one" if isinstance(error, ValueError) else why
        raise UsageError(
            f"not a Python that can be run: {(why or str(error)).lower()}",
            where=f"{OPTION} {python}",
            next="name the interpreter of the environment that the engine is installed in",
        ) from None
    return missing
