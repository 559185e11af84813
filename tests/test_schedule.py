"""Continuous batching: hand-computed schedules, a step-by-step simulation of its own, and what must always be conserved."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpub.errors import InputError
from quantpub.gpus import GPUS
from quantpub.schedule import EAGER, FULL, PIECES, Chunk, Limits, Step, cache_tokens, capture_sizes, steps, vllm_limits
from quantpub.served import served
from quantpub.workloads import WORKLOADS, Workload

H200 = vllm_limits(GPUS["H200"])


def ask(prompt: int, output: int, concurrency: int, requests: int | None = None) -> Workload:
    return Workload("test", prompt, output, (concurrency,), requests or concurrency, "")


def test_the_limits_are_those_of_the_offline_class() -> None:
    assert (H200.batched, H200.seqs) == (16384, 1024)
    assert (vllm_limits(GPUS["A100-80"]).batched, vllm_limits(GPUS["L4"]).seqs) == (8192, 256)
    sizes = capture_sizes(16384, 1024)
    assert sizes[:5] == (1, 2, 4, 8, 16) and sizes[-2:] == (496, 512) and 248 in sizes and 264 not in sizes
    assert len(sizes) == 3 + 31 + 17
    assert capture_sizes(100, 256)[-1] == 100  # the largest step has its own graph


def test_m_is_padded_to_a_captured_size_and_left_alone_beyond() -> None:
    assert [H200.padded(m) for m in (1, 3, 100, 256, 257, 512, 513, 16384)] == [1, 4, 104, 256, 272, 512, 513, 16384]


def test_one_request() -> None:
    assert steps(ask(100, 4, 1), H200) == [
        Step(1, 100, 104, (Chunk(100, 0, 1),), 0, 0.0, PIECES),
        Step(3, 1, 1, (), 1, 102.0, FULL),  # contexts 101, 102, 103
    ]


def test_a_prompt_that_does_not_fit_is_cut_and_goes_on_beside_decodes() -> None:
    """10 tokens a step, prompts of 6: 6+4, then one decode, the other 2, then two decodes."""
    limits = Limits(10, 8, ())
    assert steps(ask(6, 3, 2), limits) == [
        Step(1, 10, 10, (Chunk(6, 0, 1), Chunk(4, 0, 1)), 0, 0.0, EAGER),
        Step(1, 3, 3, (Chunk(2, 4, 1),), 1, 7.0, EAGER),
        Step(1, 2, 2, (), 2, 7.5, EAGER),
        Step(1, 1, 1, (), 1, 8.0, EAGER),
    ]


def test_one_output_token_needs_no_decode() -> None:
    assert steps(ask(7, 1, 3), H200) == [Step(1, 21, 24, (Chunk(7, 0, 3),), 0, 0.0, PIECES)]


def test_the_next_request_starts_when_one_ends() -> None:
    found = steps(ask(5, 2, 1, 2), H200)
    assert [(s.repeat, s.tokens, s.decodes) for s in found] == [(1, 5, 0), (1, 1, 1), (1, 5, 0), (1, 1, 1)]


def test_a_full_cache_preempts_the_last_and_computes_it_again() -> None:
    """6 blocks of 1 token, two requests of 2:3. After the prefills and a decode each it is full; the second starts again at 4."""
    found = steps(ask(2, 3, 2), Limits(10, 8, (), kv_tokens=5, block=1))
    assert [(s.tokens, s.chunks, s.decodes, s.context) for s in found] == [
        (4, (Chunk(2, 0, 2),), 0, 0.0),
        (1, (), 1, 3.0),  # room for one: the other gave its blocks up
        (1, (), 1, 4.0),
        (3, (Chunk(3, 0, 1),), 0, 0.0),  # its prompt and the token that it had sampled
        (1, (), 1, 4.0),
    ]


def test_a_request_that_outgrows_the_cache_is_an_error() -> None:
    with pytest.raises(InputError, match="a request of 130 tokens does not fit: the KV cache holds 100"):
        steps(ask(128, 2, 1), Limits(1000, 8, (), kv_tokens=100))


def naive(workload: Workload, limits: Limits) -> list[tuple[int, tuple[tuple[int, int], ...], int]]:
    """Token by token, nothing skipped: (tokens, chunks sorted, decodes) of every step. Without a limit of the cache."""
    flying: list[list[int]] = []  # computed, sampled
    sent, found = 0, []
    while flying or sent < workload.requests:
        while len(flying) < workload.concurrency[0] and sent < workload.requests:
            flying.append([0, 0])
            sent += 1
        budget, chunks, decodes = limits.batched, [], 0
        active = [r for r in flying if r[0]] + [r for r in flying if not r[0]]
        for request in active[: limits.seqs]:
            if not budget:
                break
            if request[0] >= workload.prompt:
                tokens, decodes = 1, decodes + 1
            else:
                tokens = min(workload.prompt - request[0], budget)
                chunks.append((tokens, request[0]))
            request[0], budget = request[0] + tokens, budget - tokens
            request[1] += request[0] >= workload.prompt
        flying = [r for r in flying if r[1] < workload.output]
        found.append((limits.batched - budget, tuple(sorted(chunks)), decodes))
    return found


sizes = st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(1, 9), st.integers(0, 12))
some_limits = st.builds(Limits, st.integers(3, 64), st.integers(1, 12), st.just((1, 2, 4, 8, 16)))


@settings(deadline=None)
@given(sizes, some_limits)
def test_the_steps_are_those_of_a_simulation_that_skips_nothing(size: tuple[int, ...], limits: Limits) -> None:
    prompt, output, concurrency, more = size
    workload = ask(prompt, output, concurrency, concurrency + more)
    found = [
        (step.tokens, tuple(sorted((c.tokens, c.before) for c in step.chunks for _ in range(c.count))), step.decodes)
        for step in steps(workload, limits)
        for _ in range(step.repeat)
    ]
    assert found == naive(workload, limits)


@settings(deadline=None)
@given(sizes, some_limits, st.integers(0, 200))
def test_tokens_are_conserved_and_limits_are_kept(size: tuple[int, ...], limits: Limits, room: int) -> None:
    """With a small KV cache prompts are computed again, but no output is sampled twice and the cache never overflows."""
    prompt, output, concurrency, more = size
    workload = ask(prompt, output, concurrency, concurrency + more)
    kv = -(-(prompt + output) // 4) * 4 + room
    free, tight = steps(workload, limits), steps(workload, Limits(limits.batched, limits.seqs, limits.capture, kv, 4))
    assert prefilled(free) == workload.requests * prompt
    assert decoded(free) == workload.requests * (output - 1)
    assert prefilled(tight) >= prefilled(free) and decoded(tight) <= decoded(free)
    again = decoded(free) - decoded(tight)  # a request that starts anew samples its next token with its prefill
    assert not again or prefilled(tight) > prefilled(free)
    for step in [*free, *tight]:
        assert 0 < step.tokens <= limits.batched and step.m >= step.tokens
        assert 0 < step.rows <= min(limits.seqs, concurrency)
    for step in tight:
        assert step.decodes * step.context + sum(c.count * (c.tokens + c.before) for c in step.chunks) <= kv


def prefilled(found: list[Step]) -> int:
    return sum(s.repeat * c.tokens * c.count for s in found for c in s.chunks)


def decoded(found: list[Step]) -> int:
    return sum(s.repeat * s.decodes for s in found)


def test_the_contexts_of_a_long_run_are_exact_on_average() -> None:
    found = steps(ask(128, 2048, 4), H200)
    attended = sum(s.repeat * s.decodes * s.context for s in found)
    assert attended == 4 * sum(128 + i for i in range(1, 2048))
    assert max(s.repeat for s in found) == 128


def test_the_named_workloads_take_as_many_steps_as_counted_by_hand() -> None:
    """serving: 32 prompts of 512 a step, so 4 steps with prefill, and the last of them decodes 127 times more."""
    found = {name: sum(s.repeat for s in steps(WORKLOADS[name], H200)) for name in ("serving", "prefill-heavy")}
    assert found["serving"] == 4 + 127
    assert sum(s.repeat for s in steps(WORKLOADS["decode-heavy"], H200)) == 3 + 2047


def test_the_cache_of_an_8b_model_on_an_h200() -> None:
    """0.92 · 141 GB, less 16.38 GB of weights, 2.01 GB of activations (gate and up of 16384 tokens) and 1.61 GB outside."""
    config = {
        "model_type": "qwen3", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "intermediate_size": 12288, "vocab_size": 151936, "num_hidden_layers": 36,
    }  # fmt: skip
    model = served(config)
    tokens = cache_tokens(model, GPUS["H200"], H200, model.bytes())
    assert tokens == pytest.approx((129.72e9 - 16.38e9 - 2.01e9 - 1.61e9) / 147_456, rel=1e-3)
    more = cache_tokens(model, GPUS["H200"], H200, model.bytes() / 2)
    assert more - tokens == pytest.approx(model.bytes() / 2 / 147_456, abs=2)
    assert cache_tokens(model, GPUS["L4"], H200, 40e9) == 0
