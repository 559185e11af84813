"""From what was asked for to token ids: where the data lies, its documents, those that are picked, their ids.

Documents are picked by seed (picking.py) among those that have at least max(2, min(32, max_seq_len)) tokens; too short
ones, and conversations that the chat template refuses, are counted and left out. Each is cut after max_seq_len tokens.
Only as many are tokenized as are needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from quantpub.checkpoint import Checkpoint
from quantpub.errors import InputError
from quantpub.files import sha256_file
from quantpub.samples.dataset import download
from quantpub.samples.documents import DataFile, Documents, Row
from quantpub.samples.encoder import Encoder, Refused
from quantpub.samples.identity import length
from quantpub.samples.lines import JsonLines
from quantpub.samples.parquet import Parquet
from quantpub.samples.picking import ORDER, pick
from quantpub.samples.request import FORMATS, OWN_FILE, Request, named
from quantpub.samples.rows import IDS, Kind, content, kind_of, row_id
from quantpub.samples.text import windows
from quantpub.sources import read_errors

SHORTEST = 32
Progress = Callable[[int, int], None]  # samples ready, samples in all


@dataclass(frozen=True, eq=False)
class Samples:
    """rows: token ids, each int64 [T] with T ≤ max_seq_len. record: what they are, as JSON for evidence."""

    rows: tuple[torch.Tensor, ...]
    record: dict[str, Any]


@dataclass(frozen=True)
class _Sample:
    ids: list[int]
    name: tuple[str, str | int] | None


def read_samples(request: Request, checkpoint: Checkpoint, progress: Progress = lambda done, total: None) -> Samples:
    """The samples, in the order of the data. Errors: InputError, AuthError, UnavailableError."""
    from quantpub.forward import quiet_transformers

    encoder = Encoder(checkpoint, length(request, checkpoint))
    files, record = _files(request)
    kind = FORMATS[files[0].path.suffix]
    with quiet_transformers():
        if kind == "text":
            rows, found = _of_text(files, request, encoder, progress)
        else:
            documents = Parquet(files) if kind == "parquet" else JsonLines(files)
            rows, found = _of_documents(documents, request, encoder, files[0].label, progress)
    progress(len(rows), len(rows))
    settings = {"num_samples": request.num_samples, "max_seq_len": encoder.limit, "seed": request.seed}
    totals = {"used": len(rows), "tokens": sum(map(len, rows)), "token_ids_sha256": sha256_ids(rows)}
    return Samples(
        tuple(torch.tensor(ids, dtype=torch.int64) for ids in rows),
        {**record, "format": kind, **found, **settings, "minimum_tokens": shortest(encoder.limit), **totals},
    )


def shortest(limit: int) -> int:
    """Tokens that a sample has at least."""
    return max(2, min(SHORTEST, limit))


def sha256_ids(rows: Iterable[Sequence[int]]) -> str:
    """Of each row its length and its ids, as little-endian int64."""
    digest = hashlib.sha256()
    for ids in rows:
        digest.update(b"".join(number.to_bytes(8, "little") for number in (len(ids), *ids)))
    return digest.hexdigest()


def _files(request: Request) -> tuple[list[DataFile], dict[str, Any]]:
    data = named(request.data)
    if isinstance(data, Path):
        with read_errors(data):
            record = {"kind": "file", "file": data.name, "sha256": sha256_file(data)}
        return [DataFile(data, request.data)], record
    found = download(data, request)
    return [DataFile(path, f"{found.label}/{name}") for name, path in found.files.items()], found.record


def _of_text(
    files: list[DataFile], request: Request, encoder: Encoder, progress: Progress
) -> tuple[list[list[int]], dict[str, Any]]:
    if len(files) > 1:
        raise InputError(f"the split is {len(files)} texts", where=files[0].label, next=f"name one text: {OWN_FILE}")
    wanted = request.num_samples
    found = windows(files[0], encoder, wanted, shortest(encoder.limit), lambda done: progress(done, wanted))
    for place, ids in found.samples:
        encoder.require_known(ids, f"{files[0].label}: {found.unit} {place}")
    return [ids for _, ids in found.samples], {
        "columns": [],
        "chat_template": encoder.template_record(applied=False),
        "documents": 1,
        "too_short": found.passed,
        "samples": [place for place, _ in found.samples],
        "samples_are": found.unit,
        "order": "even strides",
    }


def _of_documents(
    documents: Documents, request: Request, encoder: Encoder, label: str, progress: Progress
) -> tuple[list[list[int]], dict[str, Any]]:
    if not len(documents):
        raise InputError("the file is empty", where=label, next=OWN_FILE)
    kind = kind_of(documents.names(), encoder.has_template, documents.where(0))
    maker, wanted = _Maker(documents, kind, encoder), min(request.num_samples, len(documents))
    picked = pick(len(documents), wanted, request.seed, maker.make, lambda done: progress(done, wanted))
    if not picked.samples:
        raise maker.nothing(label)
    refused = sum(place in maker.refused for place in picked.passed)
    names = [sample.name for _, sample in picked.samples]
    named_by = names[0][0] if names[0] and len({name and name[0] for name in names}) == 1 else None
    return [sample.ids for _, sample in picked.samples], {
        "columns": list(kind.columns),
        "chat_template": encoder.template_record(maker.chat),
        "documents": len(documents),
        "too_short": len(picked.passed) - refused,
        "refused_by_template": refused,
        "samples": [
            name[1] if named_by and name else documents.number(place)
            for (place, _), name in zip(picked.samples, names, strict=True)
        ],
        "samples_are": named_by or documents.numbering,
        "order": ORDER,
    }


class _Maker:
    """Makes samples of rows. refused: places whose conversation the chat template does not take, and why."""

    def __init__(self, documents: Documents, kind: Kind, encoder: Encoder) -> None:
        self.documents, self.kind, self.encoder = documents, kind, encoder
        self.chat = (kind.conversation or kind.pair) and encoder.has_template()
        self.refused: dict[int, str] = {}

    def make(self, places: Sequence[int]) -> dict[int, _Sample]:
        """The samples of those of the places that are long enough."""
        columns = (*self.kind.columns, *self.kind.optional, *IDS)
        rows = dict(self.documents.read(places, columns))
        ids = self._ids({place: self._content(place, row) for place, row in rows.items()})
        fit = {place: found for place, found in ids.items() if len(found) >= shortest(self.encoder.limit)}
        for place, found in fit.items():
            self.encoder.require_known(found, self.documents.where(place))
        return {place: _Sample(found, row_id(rows[place])) for place, found in fit.items()}

    def _content(self, place: int, row: Row) -> list[int] | str | None:
        """Ids or a text; None for a conversation that is refused."""
        found: Any = content(self.kind, row, self.chat, self.documents.where(place))
        if not self.chat:
            return cast(list[int] | str, found)
        try:
            return self.encoder.render(found)
        except Refused as reason:
            self.refused[place] = str(reason)
            return None

    def _ids(self, contents: dict[int, list[int] | str | None]) -> dict[int, list[int]]:
        texts = {place: text for place, text in contents.items() if isinstance(text, str)}
        encoded = self.encoder.encode(list(texts.values()), special=not self.chat)
        given = {place: ids[: self.encoder.limit] for place, ids in contents.items() if isinstance(ids, list)}
        return {**given, **dict(zip(texts, encoded, strict=True))}

    def nothing(self, label: str) -> InputError:
        """Why there is no sample at all."""
        if self.refused:
            return InputError(
                f"the model's chat template refuses the conversations: {next(iter(self.refused.values()))}",
                where=label,
                next='give rows with "text", or conversations as the template wants them',
            )
        return InputError(
            f"none of its {len(self.documents)} documents has {shortest(self.encoder.limit)} tokens",
            where=label,
            next="give longer texts",
        )
