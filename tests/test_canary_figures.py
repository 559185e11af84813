"""The canary's figures, verdicts and token ids: by hand, without an engine."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantpub.engines.canary import Run, report
from quantpub.engines.canary_faults import Expected
from quantpub.engines.canary_figures import Unlike, coarse, divergence, figures, repeats, texts
from quantpub.engines.canary_tokens import Tokens, canary_tokens
from quantpub.errors import InputError

Tensors = dict[str, torch.Tensor]
IDS = Tokens(((1, 2, 3),), (1, 2), "text")


def test_divergence_by_hand() -> None:
    base, found = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.25, 0.75, 0.0]]).log()
    expected = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert divergence(base, found).item() == pytest.approx(expected, rel=1e-6)
    assert divergence(found, found).item() == 0
    assert divergence(base, torch.tensor([[1.0, 0.0, 0.0]]).log()).item() == math.inf


def test_a_coarse_divergence_is_at_most_the_true_one() -> None:
    generator = torch.Generator().manual_seed(0)
    base, found = (torch.randn(50, 40, generator=generator).mul(2).log_softmax(-1) for _ in range(2))
    true = divergence(base, found)

    def likely(rows: torch.Tensor, count: int) -> Tensors:
        values, ids = rows.topk(count, -1)
        return {"top_ids_TK": ids, "top_logprobs_TK": values}

    few, all_of_them = (coarse(likely(base, count), likely(found, count)) for count in (8, 40))
    assert (few <= true + 1e-6).all() and (few >= 0).all() and (few > 0).any()
    assert torch.allclose(all_of_them, true, atol=1e-5)
    none_shared = coarse(likely(torch.tensor([[0.9, 0.1]]).log(), 1), likely(torch.tensor([[0.2, 0.8]]).log(), 1))
    assert none_shared.item() == pytest.approx(0)  # one outcome for all tokens: nothing is told apart


def written(folder: Path, *windows: torch.Tensor) -> Path:
    folder.mkdir()
    for place, rows in enumerate(windows):
        save_file({"logprobs_TV": rows.log()}, folder / f"window-{place}.safetensors")
    return folder


def test_figures_by_hand(tmp_path: Path) -> None:
    one, other = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    base = written(tmp_path / "base", one, one)
    found = written(tmp_path / "found", other, one)
    told = figures(base, found, [(0, 1), (0, 1)])
    kl = (0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)) / 2
    assert told["kl"]["mean"] == pytest.approx(kl / 2, abs=1e-6)
    assert told["kl"]["stderr"] == pytest.approx(kl / 2, abs=1e-6)  # of the means kl and 0
    assert told["kl"]["max"] == pytest.approx(2 * kl, abs=1e-6) and told["kl"]["tokens"] == 4
    assert told["top1_agreement"] == pytest.approx(0.75)  # of 0.5 and 0.5 the first counts
    assert told["perplexity"]["base"] == pytest.approx(2)
    assert told["perplexity"]["checkpoint"] == pytest.approx(math.exp(-(math.log(0.75) + math.log(0.5)) / 2), rel=1e-5)
    json.dumps(told, allow_nan=False)


def test_figures_of_what_is_not_finite_are_none(tmp_path: Path) -> None:
    base = written(tmp_path / "base", torch.tensor([[0.5, 0.5]]))
    found = written(tmp_path / "found", torch.tensor([[math.nan, 0.5]]))
    told = figures(base, found, [(0, 1)])
    assert told["kl"]["mean"] is None and told["kl"]["max"] is None
    json.dumps(told, allow_nan=False)


def test_other_vocabularies_are_not_compared(tmp_path: Path) -> None:
    base = written(tmp_path / "base", torch.tensor([[0.5, 0.5]]))
    found = written(tmp_path / "found", torch.tensor([[0.5, 0.25, 0.25]]))
    with pytest.raises(Unlike, match=r"\[1, 2\].*\[1, 3\]"):
        figures(base, found, [(0, 1)])


def test_texts_tell_where_they_part() -> None:
    told = texts((7,), {"tokens": [1, 2, 3, 4], "text": "x"}, {"tokens": [1, 2, 9], "text": "y"})
    assert told["equal_tokens"] == 2 and told["length_ratio"] == pytest.approx(1.3333) and told["prompt"] == [7]
    assert repeats([5] * 8) and not repeats([5] * 7) and not repeats([5] * 8 + [6])


# ---- the report


def reply(tokens: tuple[int, ...] = tuple(range(9)), **more: Any) -> dict[str, Any]:
    return {"loaded": True, "finite": True, "generated": {"tokens": list(tokens), "text": None}, **more}


def pair(folder: Path, found: dict[str, Any], base: dict[str, Any] | None = None) -> dict[str, Any]:
    rows = torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 3)
    before = Run(reply() if base is None else base, written(folder / "base", rows))
    return report("vllm", Run(found, written(folder / "found", rows)), before, IDS)


def test_a_sound_run_passes(tmp_path: Path) -> None:
    told = pair(tmp_path, reply(missing=[]))
    assert (told["verdict"], told["kl"]["mean"]) == ("passed", 0)


def test_tensors_that_are_not_used_are_named_and_no_fault(tmp_path: Path) -> None:
    told = pair(tmp_path, reply(unexpected=["mtp.q.weight", "mtp.q.weight_scale", "a.k_scale", "a.input_scale"]))
    assert told["verdict"] == "passed" and told["reason"].endswith("; 4 of its tensors were not used: mtp.q.weight")


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({"loaded": False, "error": "ValueError: no", "kind": "error"}, "it does not load: ValueError: no"),
        (reply(error="RuntimeError: x", kind="error"), "it does not run: RuntimeError: x"),
        (reply(missing=["a.weight", "b.weight"]), "2 tensors are missing and were left as initialized: a.weight"),
        (reply(finite=False), "its logits are not finite"),
        (reply(tokens=(4,) * 9), "its text is one token again and again"),
    ],
)
def test_each_fault_fails(tmp_path: Path, found: dict[str, Any], reason: str) -> None:
    told = pair(tmp_path, found)
    assert told["verdict"] == "failed" and told["reason"].startswith(reason)


def test_text_that_repeats_as_the_bases_does_is_no_fault(tmp_path: Path) -> None:
    assert pair(tmp_path, reply(tokens=(4,) * 9), reply(tokens=(5,) * 9))["verdict"] == "passed"


def test_a_base_that_does_not_load_leaves_nothing_to_compare(tmp_path: Path) -> None:
    told = pair(tmp_path, reply(), {"loaded": False, "error": "KeyError: q", "kind": "error"})
    assert told["verdict"] == "not compared" and "KeyError: q" in told["reason"] and "kl" not in told


def test_the_limit_is_the_callers(tmp_path: Path) -> None:
    base = written(tmp_path / "base", torch.tensor([[0.5, 0.5]]))
    found = written(tmp_path / "found", torch.tensor([[0.25, 0.75]]))
    ids = Tokens(((0, 1),), (0,), "text")
    runs = Run(reply(), found), Run(reply(), base), ids
    verdicts = [report("vllm", *runs, Expected(limit))["verdict"] for limit in (0.1, 0.2)]
    assert verdicts == ["failed", "passed"]  # KL 0.144


def test_without_a_base_only_its_own_faults_count() -> None:
    told = report("vllm", Run(reply(), Path()), None, IDS)
    assert told["verdict"] == "not compared" and told["missing"] is None
    same = Run(reply(tokens=(4,) * 9), Path())
    assert report("vllm", same, None, IDS)["verdict"] == "failed"
    random = dataclasses.replace(IDS, source="random ids, there is no tokenizer")
    assert (
        report("vllm", same, None, random)["verdict"] == "not compared"
    )  # what such ids are followed by, nobody knows


# ---- ids


def test_ids_without_a_tokenizer_are_random_and_the_same_each_time(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"text_config": {"vocab_size": 50, "max_position_embeddings": 42}})
    )
    found = canary_tokens(tmp_path, windows=3)
    assert found == canary_tokens(tmp_path, windows=3) and found.source.startswith("random")
    assert [len(window) for window in found.windows] == [40] * 3 and len(found.prompt) == 32
    assert {token for window in found.windows for token in window} <= set(range(50))


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"vocab_size": "x"}', '{"text_config": 3, "vocab_size": 9}'])
def test_a_folder_without_a_vocabulary_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match="not a model's configuration"):
        canary_tokens(tmp_path)
