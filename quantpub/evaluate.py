"""Stage `eval`: perplexity, KL to the base model and top-1 agreement of an artifact on a text, in float32.

Protocol: documents are joined with the model's bos token before each; the text is cut into windows of 512 tokens, the
first 64 count, each starting afresh. KL(base ‖ artifact) in nats and top-1 agreement are means over every position,
perplexity over every position that has a next token in its window. Standard errors are over windows: two artifacts that
differ by less were not told apart. Both models see the same batch; of logits, only one batch is ever held.

Legend: B windows in a batch, T tokens in a window, V vocabulary.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quantpub.activations import known
from quantpub.artifact import Artifact
from quantpub.checkpoint import INDEX, Checkpoint, open_checkpoint
from quantpub.decode import Decoder
from quantpub.errors import InputError
from quantpub.evidence import made_by
from quantpub.files import sha256_file, sha256_json
from quantpub.forward import ArtifactModel, load_baseline, load_tokenizer, quiet_transformers

WINDOWS, WINDOW, BATCH = 64, 512, 4
DIGITS = 7  # figures are rounded here: float32 sums in another order differ beyond
ADVICE = 'give a .jsonl file whose lines are objects with a "text", or a .txt file'
SAME = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")
Progress = Callable[[int, int], None]  # windows done, windows in all


@dataclass(frozen=True)
class Row:
    """One window: nats per token of the base and the artifact, KL to the base, part of equal first choices."""

    base_nll: float
    nll: float
    kl: float
    top1: float


def evaluate(
    artifact: Artifact,
    baseline: str,
    data: Path,
    *,
    windows: int = WINDOWS,
    window: int = WINDOW,
    batch: int = BATCH,
    device: str = "cpu",
    progress: Progress = lambda n, total: None,
) -> dict[str, Any]:
    """Measure `artifact` against `baseline` (a folder or a Hub id) on `data`; write eval.json. Returns the evidence.

    Errors: InputError (data, baseline, damaged artifact, logits that are not finite), AuthError, UnavailableError.
    """
    documents = read_documents(data)
    decoder, checkpoint = Decoder(artifact), _baseline(artifact, baseline)
    with quiet_transformers(), torch.inference_mode():
        folder = _fetched(checkpoint)
        separator = _separator(checkpoint)
        tokens_BT, used = tokenize(documents, folder, separator, windows, window, data)
        model, base = ArtifactModel(decoder, device), load_baseline(folder, device)
        rows = list(_rows(base, model, tokens_BT.to(device), batch, progress))
    _require_finite(rows, artifact)
    settings = {
        "windows": len(rows),
        "window": window,
        "batch": batch,
        "dtype": "float32",
        "separator": separator,
        "baseline": checkpoint.source.identity().get("repo") or folder.name,
        "data": data.name,
    }
    evidence = {
        "made_by": made_by("eval", settings, ("torch", "transformers")),
        "weights_sha256": sha256_json(artifact.journal()),
        "baseline": {**checkpoint.source.identity(), "is_source": _is_source(artifact, checkpoint)},
        "data": {"file": data.name, "sha256": sha256_file(data), "documents": used, "tokens": tokens_BT.numel()},
        "activations": _activations(model),
        **figures(rows),
    }
    evidence["verdict"] = verdict(evidence, artifact.recipe().gate.max_kl)
    artifact.write_evidence("eval.json", evidence)
    artifact.record("eval", {"kl": evidence["kl"]["mean"], "gate": evidence["verdict"]["gate"]})
    return evidence


def read_documents(path: Path) -> list[str]:
    """The texts of a .jsonl file ("text" of each line), or a .txt file as one. Errors: InputError."""
    if path.suffix not in (".jsonl", ".txt"):
        raise InputError(f"{path.suffix or 'no ending'} is no kind of evaluation data", where=str(path), next=ADVICE)
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 (byte {error.start})", where=str(path), next="convert the file to UTF-8") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"cannot be read: {reason}", where=str(path), next=ADVICE) from None
    if not text.strip():
        raise InputError("the file is empty", where=str(path), next=ADVICE)
    if path.suffix == ".txt":
        return [text]
    return [_document(line, f"{path}:{i}") for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _document(line: str, where: str) -> str:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise InputError(f"not valid JSON: {error}", where=where, next=ADVICE) from None
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise InputError('the line has no "text"', where=where, next=ADVICE)
    text: str = entry["text"]
    return text


def tokenize(
    documents: list[str], folder: Path, separator: int | None, windows: int, window: int, data: Path
) -> tuple[torch.Tensor, int]:
    """The first whole windows [B, T] of the joined documents, and how many documents those took. Errors: InputError."""
    tokenizer, used = load_tokenizer(folder), 0
    ids: list[int] = []
    for text in documents:
        if len(ids) >= windows * window:
            break
        ids += ([] if separator is None else [separator]) + tokenizer(text, add_special_tokens=False)["input_ids"]
        used += 1
    whole = min(len(ids) // window, windows)
    if not whole:
        raise InputError(
            f"the text has {len(ids)} tokens, one window needs {window}",
            where=str(data),
            next="give a longer text, or a smaller window",
        )
    return torch.tensor(ids[: whole * window]).view(whole, window), used


def _rows(base: Any, model: ArtifactModel, tokens_BT: torch.Tensor, batch: int, progress: Progress) -> Iterator[Row]:
    done = 0
    for x_BT in torch.split(tokens_BT, batch):
        base_BTV, out_BTV = base(x_BT, use_cache=False).logits, model.forward(x_BT)
        for ids_T, base_TV, out_TV in zip(x_BT, base_BTV, out_BTV, strict=True):
            yield compare(ids_T, base_TV, out_TV)
        done += len(x_BT)
        progress(done, len(tokens_BT))


def compare(ids_T: torch.Tensor, base_TV: torch.Tensor, out_TV: torch.Tensor) -> Row:
    """The figures of one window from both models' logits."""
    base_TV, out_TV = base_TV.float().log_softmax(-1), out_TV.float().log_softmax(-1)
    next_T1 = ids_T[1:, None]
    kl = (base_TV.exp() * (base_TV - out_TV)).sum(-1).mean()
    top1 = (base_TV.argmax(-1) == out_TV.argmax(-1)).float().mean()
    return Row(
        -base_TV[:-1].gather(-1, next_T1).mean().item(),
        -out_TV[:-1].gather(-1, next_T1).mean().item(),
        kl.item(),
        top1.item(),
    )


def figures(rows: list[Row]) -> dict[str, Any]:
    """The means over windows with their standard errors. The perplexity ratio's error is that of paired windows."""
    base, nll = _mean([row.base_nll for row in rows]), _mean([row.nll for row in rows])
    delta = _mean([row.nll - row.base_nll for row in rows])
    return {
        "perplexity": {"base": _exp(base), "artifact": _exp(nll), "ratio": _exp(delta)},
        "kl": {"unit": "nats per token", **_mean([row.kl for row in rows])},
        "top1": _mean([row.top1 for row in rows]),
    }


def _mean(values: list[float]) -> dict[str, float | None]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return _figure(statistics.fmean(values), error)


def _figure(mean: float, stderr: float | None) -> dict[str, float | None]:
    return {"mean": round(mean, DIGITS), "stderr": None if stderr is None else round(stderr, DIGITS)}


def _exp(nats: dict[str, float | None]) -> dict[str, float | None]:
    """e to the mean, its standard error to first order."""
    assert nats["mean"] is not None
    value = math.exp(nats["mean"])
    return _figure(value, None if nats["stderr"] is None else value * nats["stderr"])


def verdict(evidence: dict[str, Any], max_kl: float | None) -> dict[str, Any]:
    """gate: passed, failed or no gate; reason. Only the KL to the very model it was made from can pass."""
    if max_kl is None:
        gate, reason = "no gate", "the recipe sets no max_kl"
    elif not evidence["baseline"]["is_source"]:
        gate, reason = "failed", "the baseline is not the checkpoint that this artifact was made from"
    else:
        mean, stderr = evidence["kl"]["mean"], evidence["kl"]["stderr"]
        gate, word = ("passed", "is within") if mean <= max_kl else ("failed", "exceeds")
        spread = "" if stderr is None else f" ± {stderr:.5f}"
        reason = f"KL {mean:.5f}{spread} {word} the recipe's {max_kl} nats per token"
    return {"gate": gate, "reason": reason, "max_kl": max_kl}


def check_gate(evidence: dict[str, Any]) -> str | None:
    """Why the evidence does not pass its recipe's gate, or None."""
    outcome = evidence["verdict"]
    return str(outcome["reason"]) if outcome["gate"] == "failed" else None


def _baseline(artifact: Artifact, baseline: str) -> Checkpoint:
    """The baseline, at the commit the artifact was made from where it is the same repository. Errors: InputError."""
    source = artifact.run()["source"]
    checkpoint = open_checkpoint(baseline, source.get("commit") if source.get("repo") == baseline else None)
    config = artifact.config()
    for key in SAME:
        if checkpoint.config.get(key) != config.get(key):
            raise InputError(
                f"the baseline has {key} {checkpoint.config.get(key)}, the artifact {config.get(key)}",
                where=checkpoint.source.where("config.json"),
                next="name the model it was made from",
            )
    return checkpoint


def _fetched(checkpoint: Checkpoint) -> Path:
    """The folder of the baseline's files, downloaded where it is on the Hub."""
    index = [INDEX] if checkpoint.indexed else []
    for name in (*checkpoint.companions, *index, *checkpoint.shards):
        checkpoint.source.path(name)
    return checkpoint.source.path("config.json").parent


def _separator(checkpoint: Checkpoint) -> int | None:
    """The token before each document: bos, or eos where the model has no bos."""
    for key in ("bos_token_id", "eos_token_id"):
        value = checkpoint.config.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int):
            return value
    return None


def _is_source(artifact: Artifact, checkpoint: Checkpoint) -> bool:
    """Whether the baseline's shards are, by sha256, those that the artifact was made from, repacked or not."""
    journal = {shard: entry["source_sha256"] for shard, entry in artifact.journal_entries().items()}
    made_from = artifact.run()["source"].get("weights") or journal
    return bool(made_from == {shard: checkpoint.source.sha256(shard) for shard in checkpoint.shards})


def _activations(model: ArtifactModel) -> dict[str, Any]:
    """How activations were rounded, and the quantized parameters whose input could not be rounded."""
    acts = [asdict(act) for act in dict.fromkeys(model.acts) if act and known(act)]
    cache = {"kv_cache": f"fp8_e4m3, {len(model.kv_scales)} attentions"} if model.kv_scales else {}
    return {"quantized": acts, "not_emulated": model.not_emulated(), **cache}


def _require_finite(rows: list[Row], artifact: Artifact) -> None:
    bad = sum(not math.isfinite(row.kl + row.nll) for row in rows)
    if bad:
        raise InputError(
            f"the artifact's or the baseline's logits are not finite in {bad} of {len(rows)} windows",
            where=str(artifact.path),
            next="run `quantpub verify` on the artifact",
        )
