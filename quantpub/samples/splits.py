"""Which files of a dataset repository are a split: as its card says, or else as the files are named.

A card's metadata may list them: `configs: [{config_name, default?, data_dir?, data_files}]`, where data_files is one
pattern or several (split train), a mapping of splits to patterns, or a list of {split, path}. Without it, the usual names:

    data/train_sft-00000-of-00003-a3ecf92756993583.parquet    split train_sft
    train.jsonl, en/train-00000-of-00002.parquet              split train, of configuration en where there is a folder
    default/train/0000.parquet                                split train of default (refs/convert/parquet)

Source: the documentation of dataset repositories on the Hub ("Data files Configuration", "File names and splits").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from quantpub.errors import InputError
from quantpub.samples.request import FORMATS, OWN_FILE

Splits = dict[tuple[str, str], list[str]]  # (configuration, split) → files in order
CONVERTED = "refs/convert/parquet"
_TIERS = ((".parquet",), (".jsonl", ".ndjson"), (".json",), (".txt",))  # a repository's data are the first that it has
_NUMBERING = re.compile(r"[-_.]?\d+-of-\d+([-_.]\w+)?$|[-_.]\d+$")
_NO_DATA = re.compile(r"dataset_infos?\.json|licen[cs]e\.txt|readme\.txt|requirements\.txt|\.git.*", re.IGNORECASE)


def files_of(asked: str | None, names: Iterable[str], card: Mapping[str, Any], where: str) -> tuple[str, list[str]]:
    """(the split as it would be named in full, its files in order). asked: `split`, `configuration/split` or None.

    Errors: InputError that lists the splits there are.
    """
    splits, default = _of_card(card, sorted(names)), _default(card)
    splits = splits or _of_names(sorted(names))
    if not splits:
        raise InputError(
            "the dataset has no parquet, jsonl or txt files",
            where=where,
            next=f"try its conversion, as revision: {re.split('[@:]', where)[0]}@{CONVERTED}; or {OWN_FILE}",
        )
    found = _find(asked, splits, default)
    if found is None:
        what = f"no split {asked!r}" if asked else "it has several splits, and none was named"
        raise InputError(f"{what}; there are {_listed(splits)}", where=where, next="name one after a colon")
    return _title(found, splits), splits[found]


def _find(asked: str | None, splits: Splits, default: str) -> tuple[str, str] | None:
    """The split that was asked for, if just one can be meant; train, or the only one, when none was named."""
    config, _, split = (asked or "").rpartition("/")
    if asked is None and len(splits) == 1:
        return next(iter(splits))
    fits = [key for key in splits if key[1] == (split or "train") and (not config or key[0] == config)]
    if len(fits) > 1:
        fits = [key for key in fits if key[0] == default] or [key for key in fits if key[0] in ("default", "")]
    if not fits and asked == "train" and len(splits) == 1 and not _is_usual(next(iter(splits))[1]):
        return next(iter(splits))
    return fits[0] if len(fits) == 1 else None


def _is_usual(split: str) -> bool:
    return split in ("train", "training", "validation", "valid", "val", "dev", "test", "eval")


def _title(key: tuple[str, str], splits: Splits) -> str:
    alone = len({config for config, _ in splits}) == 1
    return key[1] if alone or not key[0] else "/".join(key)


def _listed(splits: Splits) -> str:
    titles = sorted(_title(key, splits) for key in splits)
    return ", ".join(titles[:12]) + (f" and {len(titles) - 12} more" if len(titles) > 12 else "")


def _configs(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    configs = card.get("configs")
    return [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []


def _default(card: Mapping[str, Any]) -> str:
    return next((str(config.get("config_name")) for config in _configs(card) if config.get("default")), "default")


def _of_card(card: Mapping[str, Any], names: list[str]) -> Splits:
    splits: Splits = {}
    for config in _configs(card):
        folder = f"{config['data_dir']}/" if config.get("data_dir") else ""
        for split, patterns in _data_files(config.get("data_files")):
            matches = [re.compile(_pattern(folder + pattern)) for pattern in patterns]
            if files := [name for name in names if _is_data(name) and any(m.fullmatch(name) for m in matches)]:
                splits[str(config.get("config_name", "default")), split] = _best(files)
    return splits


def _data_files(value: Any) -> list[tuple[str, list[str]]]:
    """[(split, patterns)] of any of the ways to write them."""
    if isinstance(value, dict):
        return [(str(split), _strings(paths)) for split, paths in value.items()]
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        return [(str(entry.get("split", "train")), _strings(entry.get("path"))) for entry in value]
    return [("train", _strings(value))]


def _strings(value: Any) -> list[str]:
    entries = value if isinstance(value, list) else [value]
    return [entry.removeprefix("./") for entry in entries if isinstance(entry, str)]


def _pattern(glob: str) -> str:
    """A glob as a regular expression: `**` crosses folders, `*` and `?` do not."""
    tokens = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^\]/]+\])", glob)
    return "".join(
        tokens.get(p) or (p.replace("[!", "[^", 1) if p[:1] == "[" and p[-1:] == "]" else re.escape(p)) for p in pieces
    )


def _of_names(names: list[str]) -> Splits:
    for tier in _TIERS:
        splits: Splits = {}
        for name in names:
            if _is_data(name) and name.endswith(tier):
                splits.setdefault(_key(PurePosixPath(name)), []).append(name)
        if splits:
            return splits
    return {}


def _key(path: PurePosixPath) -> tuple[str, str]:
    """(configuration, split) as the name says; a file that has but a number is of the split of its folder."""
    folders = [part for part in path.parent.parts if part != "data"]
    split = _NUMBERING.sub("", path.stem)
    if (not split or split.isdigit()) and folders:
        split = folders.pop()
    return "/".join(folders), split or path.stem


def _is_data(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") for part in path.parts)
    return path.suffix in FORMATS and not hidden and not _NO_DATA.fullmatch(path.name)


def _best(files: list[str]) -> list[str]:
    """Of a split that is there in several formats, the first."""
    return next(found for tier in _TIERS if (found := [name for name in files if name.endswith(tier)]))
