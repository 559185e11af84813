"""Rules about what must not be in a checkpoint at all: code, pickles, secrets, paths of the machine that made it."""

from __future__ import annotations

from quantpub.artifact import META
from quantpub.hygiene import bad_name, is_searched, remote_code, secrets_in
from quantpub.sources import LocalSource
from quantpub.verify.base import Finding, Subject, counted, first

CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json")


def safe_files(subject: Subject) -> Finding:
    """Known failure: weights in pickles, and code that runs when the model is loaded."""
    source = subject.held.source
    names = [name for name in source.files if not name.startswith(".cache/")]
    bad = [f"{name}: {reason}" for name in names if name != ".gitattributes" and (reason := bad_name(name))]
    if isinstance(source, LocalSource):
        bad += [f"{name} is a link" for name in names if source.is_link(name) and subject.ours]
    return first(bad, f"{len(names)} files, weights in safetensors only")


def remote(subject: Subject) -> Finding:
    """Known failure: `trust_remote_code` by default. What a config asks for must be declared, and named on the card."""
    problems = [
        f"{name}: {reason}"
        for name in CONFIGS
        if name in subject.held.source.files
        for reason in remote_code(subject.held.json(name))
    ]
    return first(problems, "no configuration asks for code of its own")


def private(subject: Subject) -> Finding:
    """Tokens, keys and local paths, in the texts that people and tools write; a vocabulary may hold any string."""
    source = subject.held.source
    texts = [name for name in source.files if is_searched(name) or (name.startswith(META) and is_searched(name))]
    problems = [
        f"{name}:{line}: {kind}"
        for name in texts
        for line, kind in secrets_in(bytes(source.read(name)).decode("utf-8", "replace"))
    ]
    return first(problems, f"{counted(len(texts), 'text')}, no secrets and no local paths")
