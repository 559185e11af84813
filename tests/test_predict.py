"""The prediction: shapes from config.json, floors by hand, interpolation, a step's parts, and measured throughputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantpub.curves import Curve, Surface
from quantpub.errors import InputError
from quantpub.gpus import BF16, GPUS
from quantpub.predict import (
    ATTENTION,
    ELEMENTWISE,
    HEAD,
    HOST,
    LINEAR,
    PARTS,
    QUANTIZE,
    Clock,
    Model,
    predict,
)
from quantpub.roofline import (
    decode_attention,
    elementwise,
    gemm,
    head,
    linears_us,
    machine,
    pairs,
    prefill_attention,
    weight_bits,
)
from quantpub.schedule import EAGER, FULL, Chunk, Limits, Step, cache_tokens, vllm_limits
from quantpub.scheme import preset
from quantpub.served import Linear, served
from quantpub.serving_costs import Rest
from quantpub.workloads import WORKLOADS, Workload

QWEN3_8B = {
    "model_type": "qwen3", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 12288, "vocab_size": 151936, "num_hidden_layers": 36, "tie_word_embeddings": False,
    "sliding_window": None, "use_sliding_window": False,
}  # fmt: skip
MODEL = served(QWEN3_8B)
H200 = GPUS["H200"]
ON = machine(H200)
LIMITS = vllm_limits(H200)
ROWS = json.loads((Path(__file__).parent.parent / "docs/evidence/h200-int4-kernels.json").read_text())["rows"]


# shapes


def test_the_shapes_of_qwen3_8b() -> None:
    assert [(g.name, g.n, g.k, g.count) for g in MODEL.linears] == [
        ("self_attn.qkv_proj", 6144, 4096, 36),
        ("self_attn.o_proj", 4096, 4096, 36),
        ("mlp.gate_up_proj", 24576, 4096, 36),
        ("mlp.down_proj", 4096, 12288, 36),
    ]
    assert MODEL.kv_bytes == 147_456
    assert MODEL.linear_weights + MODEL.other_weights == 8_190_735_360  # parameters of Qwen/Qwen3-8B
    assert MODEL.bytes() == 2 * 8_190_735_360


def test_experts_count_top_k_a_layer() -> None:
    """Qwen/Qwen3-30B-A3B: 30.53 billion parameters."""
    moe = served(
        QWEN3_8B
        | {"model_type": "qwen3_moe", "hidden_size": 2048, "num_key_value_heads": 4, "num_hidden_layers": 48}
        | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "intermediate_size": 6144}
    )
    up, down = moe.linears[2:]
    assert (up.name, up.n, up.k, up.count, up.layers, up.experts) == (
        "mlp.experts.gate_up_proj",
        1536,
        2048,
        384,
        48,
        128,
    )
    assert (down.n, down.k, down.count) == (2048, 768, 384)
    assert moe.linear_weights + moe.other_weights == 30_532_122_624


def test_mixtral_and_a_llama_without_head_dim() -> None:
    mixtral = served(
        {
            "model_type": "mixtral", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
            "intermediate_size": 14336, "vocab_size": 32000, "num_hidden_layers": 32, "num_local_experts": 8,
            "num_experts_per_tok": 2, "sliding_window": None,
        }
    )  # fmt: skip
    assert mixtral.linear_weights + mixtral.other_weights == 46_702_792_704
    assert mixtral.head_dim == 128 and mixtral.window is None


def test_a_window_counts_where_it_is_on() -> None:
    assert served(QWEN3_8B | {"sliding_window": 512}).window is None
    assert served(QWEN3_8B | {"sliding_window": 512, "use_sliding_window": True}).window == 512
    small = QWEN3_8B | {"model_type": "mistral", "sliding_window": 512}
    del small["use_sliding_window"]
    windowed = served(small)
    assert windowed.window == 512
    assert decode_attention(windowed, 2, 4000).bytes == decode_attention(windowed, 2, 512).bytes


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' cannot be predicted"),
        ({"model_type": "qwen33"}, "did you mean qwen3"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"model_type": "qwen3_moe"}, "num_experts is None"),
    ],
)
def test_what_cannot_be_predicted_is_an_error(change: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        served(QWEN3_8B | change)


# floors


def test_the_floor_of_a_gemm_by_hand() -> None:
    one = Linear("x", 1024, 512, 3, 3)
    work = gemm(one, 16)
    assert work.bytes == 3 * 2 * (1024 * 512 + 16 * (512 + 1024))
    assert work.ops == 3 * 2 * 16 * 1024 * 512
    assert work.us(ON) == pytest.approx(1e6 * work.bytes / 4.32e12)


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        ("W4A16", 4 + 16 / 128),
        ("W4A16_ASYM", 4 + 20 / 128),
        ("W4A16_FLOAT_ZERO", 4 + 32 / 128),
        ("W8A8", 8 + 16 / 4096),
        ("FP8_BLOCK", 8 + 32 / 128**2),
        ("NVFP4", 4 + 8 / 16),
    ],
)
def test_the_bits_of_a_weight(scheme: str, bits: float) -> None:
    assert weight_bits(preset(scheme), 4096, 4096) == bits


def test_quantized_activations_are_written_and_read_again_and_multiplied_at_their_own_rate() -> None:
    one, fp8 = Linear("x", 4096, 4096, 1, 1), preset("FP8_DYNAMIC")
    work = gemm(one, 8192, fp8)
    assert work.bytes == pytest.approx(4096 * 4096 * (8 + 16 / 4096) / 8 + 8192 * 4096 * (2 + 1 + 1 + 2))
    assert work.num == "fp8" and work.us(ON) == pytest.approx(1e6 * work.ops / (0.8 * 1978.9e12))


def test_few_tokens_touch_few_experts() -> None:
    """One token reads its top-k, many read all; operations are those of top-k in any case."""
    one = Linear("x", 100, 64, 8, 1, 128)
    assert gemm(one, 1, None, 8).bytes == pytest.approx(2 * 8 * (100 * 64 + 164))
    assert gemm(one, 10_000, None, 8).bytes == pytest.approx(2 * (128 * 6400 + 80_000 * 164))
    assert gemm(one, 7, None, 8).ops == 2 * 7 * 8 * 6400


def test_attention_head_and_elementwise_by_hand() -> None:
    assert decode_attention(MODEL, 10, 100).bytes == 1000 * 4096
    chunk = Chunk(4, 6, 2)  # queries that see 7, 8, 9 and 10 tokens, twice
    assert pairs(MODEL, chunk) == 2 * (7 + 8 + 9 + 10)
    assert prefill_attention(MODEL, chunk).ops == 4 * 68 * 32 * 128
    assert head(MODEL, 1).bytes == 2 * (151936 * 4096 + 4096 + 151936) + 10 * 151936
    assert elementwise(MODEL, 2).bytes == 2 * 2 * (8 * 4096 + 2 * 40 * 128 + 2 * 16 * 128 + 3 * 12288)


def test_measured_kernels_stand_above_their_floor() -> None:
    for row in ROWS:
        assert 36 * row["bf16_us"] > 0.99 * linears_us(MODEL, row["m"], ON)
        for kernel in ("tinygemm", "machete", "marlin"):
            assert 36 * row[f"{kernel}_us"] > 0.99 * linears_us(MODEL, row["m"], ON, preset("W4A16"))


# interpolation


def test_a_curve_between_below_and_beyond_its_points() -> None:
    curve = Curve({4: 8.0, 1: 2.0, 16: 8.0})
    assert (curve(1), curve(4), curve(16)) == (2, 8, 8)
    assert curve(2) == pytest.approx(4)  # log-log: halfway between 1 and 4, and between 2 and 8
    assert curve(0.5) == 2  # constant below
    assert curve(40) == pytest.approx(20)  # proportional beyond


@given(
    st.dictionaries(st.integers(1, 9000), st.floats(1, 1e5), min_size=1, max_size=9),
    st.floats(0.5, 20_000),
    st.floats(0, 0.5),
)
def test_a_curve_never_leaves_its_neighbours_and_keeps_their_order(
    points: dict[int, float], x: float, more: float
) -> None:
    curve = Curve(points)
    around = [
        points[max([p for p in points if p <= x], default=min(points))],
        points[min([p for p in points if p >= x], default=max(points))],
    ]
    if x <= max(points):
        assert min(around) * (1 - 1e-9) <= curve(x) <= max(around) * (1 + 1e-9)
    growing = Curve({m: max(us for at, us in points.items() if at <= m) for m in points})
    assert growing(x) <= growing(x + more) * (1 + 1e-9)


def test_a_surface_follows_both_directions() -> None:
    surface = Surface({(1, 100): 5.0, (1, 400): 5.0, (64, 100): 10.0, (64, 400): 40.0})
    assert surface(64, 200) == pytest.approx(20)
    assert surface(8, 100) == pytest.approx((5 * 10) ** 0.5)
    assert surface(128, 800) == pytest.approx(160)


def test_rest_comes_from_an_evidence_file() -> None:
    rest = Rest.from_json(
        {"decode": [[1, 128, 9.5]], "head": [[1, 300]], "sustained": 0.9, "mixed": 1.1, "steady": [8192, 150_000]}
    )
    assert rest == Rest({(1, 128): 9.5}, head={1: 300.0}, sustained=0.9, mixed=1.1, steady=(8192, 150_000.0))
    assert Rest.from_json({}) == Rest()


# a step


def model(linear_us: Callable[[int], float] = lambda m: 5000.0, rest: Rest | None = None) -> Model:
    return Model(MODEL, ON, linear_us, rest or MEASURED)


MEASURED = Rest(
    decode={(1, 100): 10.0}, prefill={100: 4.0}, head={1: 300.0}, elementwise={1: 12.0}, sustained=1.0, mixed=1.5
)


def test_the_parts_of_a_decode_by_hand() -> None:
    """2 sequences of context 200: 4 times the attention that was measured. The host needs 716 µs, and is hidden."""
    parts = Clock(model()).parts_us(Step(1, 2, 2, (), 2, 200.0, FULL))
    assert parts == pytest.approx(
        {LINEAR: 5000, QUANTIZE: 0, ATTENTION: 36 * 40, HEAD: 600, ELEMENTWISE: 36 * 24, HOST: 100}
    )


def test_the_parts_of_a_mixed_step_by_hand() -> None:
    """A piece of 50 after 50 has 50·(51+100)/2 of the 100·101/2 pairs that were measured; both in one kernel cost half more."""
    parts = Clock(model()).parts_us(Step(1, 51, 51, (Chunk(50, 50, 1),), 1, 100.0, EAGER))
    assert parts[ATTENTION] == pytest.approx(36 * 1.5 * (10 + 4 * 3775 / 5050))


PROMPTS = Clock(model(rest=replace(MEASURED, prefill={128: 1.3, 4096: 230.0})))


def attention_of(*chunks: Chunk, clock: Clock = PROMPTS) -> float:
    """µs of one layer."""
    tokens = sum(chunk.tokens * chunk.count for chunk in chunks)
    return clock.parts_us(Step(1, tokens, tokens, chunks, 0, 0.0, EAGER))[ATTENTION] / 36


@pytest.mark.parametrize(
    ("tokens", "us"),
    [
        (4096, 230.0),
        (8192, 230 * 8192 * 8193 / (4096 * 4097)),  # 920: four times the pairs
        (32768, 230 * 32768 * 32769 / (4096 * 4097)),
        (128, 1.3),
        (64, 0.65),
        (1, 1.3 / 128),
    ],
)
def test_prompts_beyond_those_that_were_measured(tokens: int, us: float) -> None:
    """Longer ones as fast a pair of tokens as the longest, shorter ones as fast a token as the shortest."""
    assert attention_of(Chunk(tokens, 0, 1)) == pytest.approx(us)
    assert attention_of(Chunk(tokens, 0, 3)) == pytest.approx(3 * us)


def test_pieces_of_a_long_prompt_take_together_what_the_whole_takes() -> None:
    whole = attention_of(Chunk(16384, 0, 1))
    assert attention_of(Chunk(8192, 0, 1), Chunk(8192, 8192, 1)) == pytest.approx(whole, rel=1e-3)
    assert attention_of(Chunk(8192, 8192, 1)) == pytest.approx(3 / 4 * whole, rel=1e-3)


def test_more_of_a_prompt_never_takes_less() -> None:
    took = [attention_of(Chunk(tokens, 0, 1)) for tokens in (1, 2, 64, 127, 128, 129, 4095, 4096, 4097, 9000)]
    assert took == sorted(took) and took[0] < took[4] / 100


def test_whole_layers_of_prompts_longer_than_those_of_attention() -> None:
    """Attention of 2048 tokens is that of 1024 by their pairs, not by their number."""
    rest = replace(MEASURED, prefill={1024: 2.0}, prompts=(2048, 2048, 100.0))
    one = replace(model(rest=rest), baseline_us=lambda m: 36 * 20.0)
    parts = 20 + 2 * 2048 * 2049 / (1024 * 1025) + 12 * 2048
    assert Clock(one).together(Step(1, 9, 9, (), 9, 9.0, EAGER)) == pytest.approx(100 / parts)


def test_a_window_counts_every_pair_and_bounds_what_was_measured_without_one() -> None:
    windowed = replace(MODEL, window=8)
    assert pairs(windowed, Chunk(4, 6, 2)) == 2 * (7 + 8 + 8 + 8)
    assert pairs(windowed, Chunk(10, 0, 1)) == sum(range(1, 9)) + 2 * 8
    assert pairs(windowed, Chunk(3, 100, 1)) == 24
    clock = Clock(replace(model(), served=windowed))  # 4 µs for the 5050 pairs of 100 tokens, 10 for a context of 100
    assert attention_of(Chunk(100, 0, 1), clock=clock) == pytest.approx(4 * (36 + 92 * 8) / 5050)
    narrow = replace(model(), served=replace(MODEL, window=200))
    assert Clock(narrow).parts_us(Step(1, 1, 1, (), 1, 5000.0, FULL))[ATTENTION] == pytest.approx(36 * 20)


def test_the_host_counts_only_where_the_gpu_waits_for_it() -> None:
    """700 µs a step, 8 a sequence, 100 a layer without graphs: 4308 against a GPU that takes 1 + 300 + 36·(10 + 12)."""
    fast = model(lambda m: 1.0)
    step = Step(1, 1, 1, (), 1, 100.0, EAGER)
    parts = Clock(fast).parts_us(step)
    assert parts[HOST] == pytest.approx(100 + 4308 - (1 + 300 + 36 * 22))
    serial = replace(fast, engine=replace(fast.engine, asynchronous=False))
    assert Clock(serial).parts_us(step)[HOST] == pytest.approx(100 + 4308)


def test_only_gemms_that_keep_the_gpu_busy_slow_down_in_the_long_run() -> None:
    rest = replace(MEASURED, sustained=0.8)
    ops = sum(2 * 8192 * g.n * g.k * g.count for g in MODEL.linears)
    busy = 1e6 * ops / ON.rate(BF16)
    assert Clock(model(lambda m: busy, rest)).linear(8192) == pytest.approx(busy / 0.8)
    assert Clock(model(lambda m: 50 * busy, rest)).linear(8192) == pytest.approx(50 * busy * (1 + 0.25 / 50))
    steady = replace(rest, steady=(8192, 2 * busy))
    own = replace(model(lambda m: busy, steady), baseline_us=lambda m: busy)
    assert Clock(own).linear(8192) == pytest.approx(2 * busy)


def test_what_was_not_measured_is_said() -> None:
    nothing = predict(Workload("w", 16, 2, (1,), 1, ""), LIMITS, model(rest=Rest()))
    assert nothing.stands_in == (
        "decode attention", "prefill attention", "head", "elementwise kernels", "sustained clock",
    )  # fmt: skip
    assert predict(Workload("w", 16, 2, (1,), 1, ""), LIMITS, model()).stands_in == ()


def test_what_other_kernels_were_timed_for_is_said() -> None:
    """Of what was measured: elementwise kernels were not at all."""
    rest = replace(MEASURED, stood_in=("decode", "prefill", "elementwise"), elementwise={})
    assert predict(Workload("w", 16, 2, (1,), 1, ""), LIMITS, model(rest=rest)).stands_in == (
        "decode attention (torch's own kernels stood in)", "prefill attention (torch's own kernels stood in)",
        "elementwise kernels",
    )  # fmt: skip
    assert Rest.from_json({"stood_in": ["decode"]}) == Rest(stood_in=("decode",))


# a workload


def test_a_workload_by_hand() -> None:
    """One prompt of 100 (padded to 104) and one decode at context 101, whose attention is 1.01 of what was measured."""
    found = predict(Workload("w", 100, 2, (1,), 1, ""), LIMITS, model())
    first = 5000 + 36 * 4 + 300 + 36 * 12 * 104 + 100
    second = 5000 + 36 * 10.1 + 300 + 36 * 12 + 100
    assert found.seconds == pytest.approx((first + second + 5000) / 1e6)
    assert (found.output_tokens, found.total_tokens) == (2, 102)
    assert [(row.m, row.steps, row.tokens) for row in found.by_m] == [(1, 1, 1), (104, 1, 100)]
    assert sum(found.parts.values()) == pytest.approx(found.seconds)
    assert sum(found.share(part) for part in PARTS) == pytest.approx(1)


def test_interactive_is_its_four_runs_one_after_another() -> None:
    whole = predict(WORKLOADS["interactive"], LIMITS, model())
    assert [run.workload.concurrency for run in whole.runs] == [(1,), (2,), (4,), (8,)]
    assert whole.seconds == pytest.approx(sum(run.seconds for run in whole.runs))
    assert whole.output_tokens == 4 * 8 * 128
    assert sum(row.tokens for row in whole.by_m) == 4 * 8 * (128 + 127)
    speeds = [run.output_per_s for run in whole.runs]
    assert speeds == sorted(speeds) and speeds[0] < whole.output_per_s < speeds[-1]
    assert json.loads(json.dumps(whole.as_json()))["runs"][3]["workload"] == "interactive@8"


def test_the_quantizing_of_activations_is_part_of_the_linears() -> None:
    apart = replace(model(), quantize_us=lambda m: 1000.0)
    work = Workload("w", 16, 4, (2,), 2, "")
    own, base = predict(work, LIMITS, apart), predict(work, LIMITS, model())
    assert own.seconds == pytest.approx(base.seconds)
    assert own.parts[QUANTIZE] == pytest.approx(4 * 1000 / 1e6)


@given(st.integers(1, 600), st.integers(1, 40), st.integers(1, 60), st.floats(1.0, 2.0))
def test_more_work_never_takes_less_time(prompt: int, output: int, requests: int, slower: float) -> None:
    curve = Curve({m: 36 * us for m, us in table("machete").items()})
    base = predict(Workload("w", prompt, output, (requests,), requests, ""), LIMITS, model(curve, Rest()))
    for more in ((prompt + 1, output, requests), (prompt, output + 1, requests), (prompt, output, requests + 1)):
        other = Workload("w", more[0], more[1], (more[2],), more[2], "")
        assert predict(other, LIMITS, model(curve, Rest())).seconds >= base.seconds * (1 - 1e-9)
    slow = predict(base.workload, LIMITS, model(lambda m: slower * curve(m), Rest()))
    assert base.seconds <= slow.seconds <= slower * base.seconds * (1 + 1e-9)


def table(kernel: str) -> dict[int, float]:
    """M → µs, with no dip: a measured one is not the prediction's."""
    rising, found = 0.0, {}
    for row in ROWS:
        found[row["m"]] = rising = max(rising, row[f"{kernel}_us"])
    return found


# Tokens/s of vLLM 0.25.1 on one H200: Qwen3-8B's shapes, random weights, greedy, prompts without a common prefix. The first is
# of output tokens, one request of 128:128; the others count prompts too. HOPPER was set on those that are starred.
SERVED = {
    ("bf16", 16.0): (186, 27_085, 34_417, 13_765),  # alone*, serving, prefill-heavy*, decode-heavy*
    ("machete", 4.125): (224, 26_707, 32_748, 13_347),
    ("tinygemm", 4.25): (250, 2_039, None, None),
}
ALONE = Workload("alone", 128, 128, (1,), 1, "")


@pytest.mark.parametrize(("kernel", "bits"), SERVED)
def test_the_prediction_is_within_ten_percent_of_what_was_served(kernel: str, bits: float) -> None:
    """With the roofline standing in for everything but the linears, which are those of the evidence."""
    curve = Curve({row["m"]: MODEL.layers * row[f"{kernel}_us"] for row in ROWS})
    limits = replace(LIMITS, kv_tokens=cache_tokens(MODEL, H200, LIMITS, MODEL.bytes(bits)))
    found = [
        predict(work, limits, Model(MODEL, ON, curve))
        for work in (ALONE, WORKLOADS["serving"], WORKLOADS["prefill-heavy"], WORKLOADS["decode-heavy"])
    ]
    speeds = [found[0].output_per_s, *(each.total_per_s for each in found[1:])]
    for speed, measured in zip(speeds, SERVED[kernel, bits], strict=True):
        if measured is not None:
            assert speed == pytest.approx(measured, rel=0.10)


def test_a_small_cache_makes_a_workload_slower() -> None:
    tight = Limits(LIMITS.batched, LIMITS.seqs, LIMITS.capture, 100_000)
    curve = Curve({row["m"]: 36 * row["bf16_us"] for row in ROWS})
    work = Workload("w", 128, 512, (256,), 256, "")
    assert (
        predict(work, tight, model(curve, Rest())).seconds > 1.1 * predict(work, LIMITS, model(curve, Rest())).seconds
    )
