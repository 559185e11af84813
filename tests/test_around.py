"""What runs beside the linears: a part that fails costs the others nothing, and what torch stood in for is named.

No GPU: each part is replaced by what it would have found, or by the error of a device that is too small.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantpub import around as module
from quantpub.around import Parts, around, attention_times
from quantpub.attention import STANDS_IN, Batch
from quantpub.gpus import GPUS
from quantpub.schedule import vllm_limits
from quantpub.served import served
from quantpub.serving_costs import Rest

MODEL = served(
    {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 100}
    | {"num_hidden_layers": 2}
)
LIMITS = vllm_limits(GPUS["H200"])
FOUND: dict[str, Any] = {  # function of the module → what it gives
    "bandwidth": 4e12, "rates": {"bf16": 7e14}, "decode_times": {"decode": [[128, 2304, 20.0]]},
    "prefill_times": {"prefill": [[2048, 10.0]]}, "head_times": [[1, 300.0]], "elementwise_times": [[1, 9.0]],
    "sustained": {"sustained": 0.9}, "whole_layers": {"prompts": [2048, 16384, 99.0]}, "mixed_ratio": {"mixed": 1.1},
}  # fmt: skip
PART = {  # the same → the part that is missing without it
    "bandwidth": "bandwidth", "rates": "compute", "decode_times": "decode", "prefill_times": "prefill", "mixed_ratio": "mixed",
    "head_times": "head", "elementwise_times": "elementwise", "sustained": "sustained", "whole_layers": "whole layers",
}  # fmt: skip
FIELD = {"whole layers": "prompts"}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A device on which the engine's kernels are there and every part is measured."""
    monkeypatch.setattr(module, "Stopwatch", lambda: None)
    monkeypatch.setattr(module, "find_attention", lambda model: SimpleNamespace(name="FA3"))
    monkeypatch.setattr(module, "has", lambda op: True)
    for name, found in FOUND.items():
        monkeypatch.setattr(module, name, lambda *_, found=found: found)
    return monkeypatch


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail


def test_all_of_it_has_no_failures_and_no_stand_ins(engine: pytest.MonkeyPatch) -> None:
    found = around(MODEL, LIMITS)
    assert "failed" not in found and "stood_in" not in found["rest"]
    assert found["machine"] == {"bandwidth": 4e12, "compute": {"bf16": 7e14}}
    assert Rest.from_json(found["rest"]) == Rest(
        {(128, 2304): 20.0}, {2048: 10.0}, {1: 300.0}, {1: 9.0}, 0.9, 1.1, prompts=(2048, 16384, 99.0)
    )


@pytest.mark.parametrize("name", FOUND)
def test_a_part_that_fails_is_named_and_the_others_are_kept(name: str, engine: pytest.MonkeyPatch) -> None:
    whole = around(MODEL, LIMITS)
    engine.setattr(module, name, failing(torch.cuda.OutOfMemoryError("out of\n memory " + "x" * 400)))
    found, part = around(MODEL, LIMITS), PART[name]
    assert list(found["failed"]) == [part] and len(found["failed"][part]) <= 200
    assert found["failed"][part].startswith("OutOfMemoryError out of memory x")
    for block in ("machine", "rest"):
        assert found[block] == {k: v for k, v in whole[block].items() if k != FIELD.get(part, part)}


def test_an_op_of_another_version_is_a_part_that_fails(engine: pytest.MonkeyPatch) -> None:
    engine.setattr(module, "whole_layers", failing(AttributeError("no such op")))
    engine.setattr(module, "head_times", failing(TypeError("takes 5 arguments")))
    assert around(MODEL, LIMITS)["failed"] == {
        "head": "TypeError takes 5 arguments",
        "whole layers": "AttributeError no such op",
    }


def test_an_error_of_ones_own_hand_is_no_part_that_fails(engine: pytest.MonkeyPatch) -> None:
    engine.setattr(module, "head_times", failing(KeyboardInterrupt()))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        around(MODEL, LIMITS)


@pytest.mark.parametrize(
    ("attention", "ops", "named"),
    [
        (f"{STANDS_IN}: ImportError", True, ["decode", "prefill"]),
        ("FA3", False, ["elementwise"]),
        (f"{STANDS_IN}: ImportError", False, ["decode", "prefill", "elementwise"]),
    ],
)
def test_what_torch_stood_in_for_is_named(
    attention: str, ops: bool, named: list[str], engine: pytest.MonkeyPatch
) -> None:
    engine.setattr(module, "find_attention", lambda model: SimpleNamespace(name=attention))
    engine.setattr(module, "has", lambda op: ops)
    assert around(MODEL, LIMITS)["rest"]["stood_in"] == named
    engine.setattr(module, "decode_times", failing(RuntimeError("no room")))
    without = [part for part in named if part != "decode"]
    assert around(MODEL, LIMITS)["rest"]["stood_in"] == without


def test_attention_is_timed_by_batch_and_what_is_mixed_against_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch takes 1 µs a token of its queries and half as much again when it is mixed: 128 and 7 · 2048 tokens."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 40, 1 << 40))

    class Watch:
        cache = 1 << 20

        def us(self, batch: Batch, copies: Any) -> float:
            mixed = len(set(batch.lengths)) > 1
            return batch.tokens * (1.5 if mixed else 1.0)

    attention: Any = SimpleNamespace(name="FA3", run=lambda batch: batch, operands=lambda batch, place: (batch, place))
    watch: Any = Watch()
    found = attention_times(MODEL, 16384, attention, watch, Parts())
    assert found["decode"][0] == [1, 128, 1.0] and len(found["decode"]) == 28 and found["mixed"] == 1.5
    assert found["prefill"] == [[p, float(p)] for p in module.PROMPTS]
    assert "mixed" not in attention_times(MODEL, 2048, attention, watch, Parts())  # no room beside one prompt
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 1 << 40))
    assert attention_times(MODEL, 16384, attention, watch, Parts()) == {"decode": [], "prefill": []}
