"""What another tool folded into a model before it quantized it: found by holding the checkpoint against its source.

AWQ and SmoothQuant scale channels: a norm, or the rows of a linear, are divided by s, and the columns of what reads them
multiplied. Nothing in the checkpoint says so. s is read off the norm, or from each row's projection on the source's, and what
it should have made of the readers is then what their weights are compared with: a factor that was folded on one side only
stays visible there.

Legend: N rows, K columns, F factors of a fold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from quantpub.checkpoint import Slice, read_slice
from quantpub.folds import NORM, Fold, folds
from quantpub.qtensor import dequantize
from quantpub.smoothing import Smoothing

if TYPE_CHECKING:
    from quantpub.verify.base import Subject

NOISE = 0.05  # of a factor: what rounding weights makes of 1
CERTAIN = 9  # times the median deviation, six standard deviations: so far rounding takes no column of many


def folded(subject: Subject, parts: Mapping[str, Slice]) -> Smoothing | None:
    """The factors found, or None. parts: the tensors of the source."""
    config = subject.held.text_config
    shapes = {str(line["as"]): tuple(line["shape"]) for line in subject.decoder.actions}
    found = [fold for fold in folds(str(config.get("model_type")), config, shapes) if _there(fold, shapes, parts)]
    s: dict[str, torch.Tensor] = {}
    smoothing = Smoothing(found, s)
    for fold in sorted(found, key=lambda fold: fold.kind != NORM):
        s_F = _of_norm(subject, fold, parts) if fold.kind == NORM else _of_rows(subject, fold, parts, smoothing)
        if s_F is not None and bool((s_F.log().abs() > NOISE).any()):
            s[fold.source] = s_F
    return smoothing if s else None


def _there(fold: Fold, shapes: Mapping[str, tuple[int, ...]], parts: Mapping[str, Slice]) -> bool:
    names = (f"{fold.source}.weight", *(f"{reader}.weight" for reader in fold.readers))
    return all(name in parts and shapes.get(name) == parts[name].info.shape for name in names)


def _of_norm(subject: Subject, fold: Fold, parts: Mapping[str, Slice]) -> torch.Tensor | None:
    """Where the readers' columns carry the factor, too: a norm that was merely changed is none that was folded."""
    name, one = f"{fold.source}.weight", float(fold.less_one)
    before, after = _weight(subject, parts[name]).float() + one, subject.decoder.tensor(name).float() + one
    sound = (before * after > 0) & torch.isfinite(after)
    s_F = torch.where(sound, before / after, torch.ones_like(before))
    readers = [reader for reader in fold.readers if reader in subject.quantized]
    if not readers or not bool((s_F.log().abs() > NOISE).any()):
        return s_F
    found_F = _of_columns(subject, readers, parts).log()
    off_F = found_F - s_F.log()
    off_F = off_F - off_F.median()  # rows of a reader may be scaled themselves
    noise = min(float(each.abs().median()) for each in (off_F, found_F - found_F.median()))
    carried = off_F.abs() <= (s_F.log().abs() / 2).clamp(min=CERTAIN * noise)
    return torch.where(carried, s_F, torch.ones_like(s_F))


def _of_columns(subject: Subject, readers: Sequence[str], parts: Mapping[str, Slice]) -> torch.Tensor:
    """By columns: what of the readers found lies along those of the source."""
    along, length = [], []
    for reader in readers:
        before = _weight(subject, parts[f"{reader}.weight"]).float()
        along.append((before * dequantize(subject.decoder.qtensor(reader))).sum(0))
        length.append(before.square().sum(0))
    found_F = torch.stack(along).sum(0) / torch.stack(length).sum(0)
    return torch.where(torch.isfinite(found_F) & (found_F > 0), found_F, torch.ones_like(found_F))


def _of_rows(subject: Subject, fold: Fold, parts: Mapping[str, Slice], smoothing: Smoothing) -> torch.Tensor | None:
    """By rows: what of the source, its columns folded already, lies along what was found."""
    if fold.source not in subject.quantized:
        return None
    name = f"{fold.source}.weight"
    before = smoothing.apply(name, _weight(subject, parts[name]).float())[fold.rows()]
    after = dequantize(subject.decoder.qtensor(fold.source))[fold.rows()]
    s_F = (before * after).sum(1) / after.square().sum(1)
    s_F = torch.where(torch.isfinite(s_F) & (s_F > 0), s_F, torch.ones_like(s_F))
    return s_F if float(s_F.log().abs().median()) > NOISE else None


def _weight(subject: Subject, part: Slice) -> torch.Tensor:
    assert subject.source is not None
    return read_slice(subject.source.source, part)
