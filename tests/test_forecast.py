"""From a profile's rows to workloads, by hand: points, what stays in bf16, a workload's seconds, costs beside the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from test_verdict import BASE, CONFIG, SHAPES, made, row, scaled

from quantpub.costs import crossovers, dense_path, floor_us, fp4, moe_backend, roofline
from quantpub.curves import Level
from quantpub.forecast import APART, Forecast, linears
from quantpub.gpus import GPUS
from quantpub.predict import ATTENTION, ELEMENTWISE, HEAD, HOST, LINEAR, QUANTIZE, Clock, Model
from quantpub.roofline import decode_attention, gemm, head, machine
from quantpub.schedule import EAGER, FULL, PIECES, Chunk, Step, cache_tokens, vllm_limits
from quantpub.scheme import preset
from quantpub.served import Linear, served
from quantpub.serving_costs import HOPPER, VLLM, Rest
from quantpub.workloads import WORKLOADS, parse

OWN = dict.fromkeys(SHAPES, "own")
MODEL = served(CONFIG)
ON = machine(GPUS["H200"], 4e12, {"bf16": 7e14})
MOE = CONFIG | {
    "model_type": "qwen3_moe", "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 256,
    "num_hidden_layers": 3,
}  # fmt: skip
GROUPED = {"name": "mlp.experts", "experts": 16, "top_k": 4, "hidden": 512, "intermediate": 256, "n": 512, "k": 512}


def forecast(evidence: Mapping[str, Any], config: Mapping[str, Any] = CONFIG) -> Forecast:
    return Forecast(evidence, config)


def experts(*more: Mapping[str, Any]) -> dict[str, Any]:
    """A profile of the MoE model: attention's linears and grouped experts."""
    evidence = made({"own": scaled(2)})
    attention = [each | {"count": 3} for each in evidence["gemms"] if "attn" in each["name"]]
    shared = {"count": 3, "scheme": "W4A16", "group": None, "layout": "ct-pack"}
    grouped = [{**shared, **GROUPED, **one} for one in more]
    return evidence | {"gemms": attention + grouped}


# points


def test_points_are_sums_over_the_gemms_by_their_counts() -> None:
    evidence = made({"own": {1: 100.0, 4: 200.0}})
    evidence["gemms"][0]["count"] = 5
    assert forecast(evidence).points(OWN) == {1: (5 + 2 + 2 + 2) * 100, 4: 11 * 200}
    assert forecast(evidence).points(None) == {1: 11 * BASE[1], 4: 11 * BASE[4]}


def test_an_m_that_one_gemm_lacks_is_no_point() -> None:
    evidence = made({"own": {4: 200.0, 1: 100.0}})
    evidence["rows"] = [each for each in evidence["rows"] if (each["gemm"], each["m"]) != ("mlp.down_proj", 4)]
    assert forecast(evidence).points(OWN) == {1: 800} and list(forecast(evidence).points(None)) == [1]


def test_each_gemm_has_the_kernel_that_is_named_for_it() -> None:
    evidence = made({"own": {1: 100.0}, "other": {1: 30.0}})
    assert forecast(evidence).points(OWN | {"mlp.down_proj": "other"}) == {1: 2 * (3 * 100 + 30)}
    assert forecast(evidence).points(OWN | {"mlp.down_proj": "none"}) == {}


def test_the_quantizing_apart_counts_nothing_where_a_row_has_none() -> None:
    evidence = made({"own": {1: 100.0, 4: 200.0}}, quantize={1: 7.0, 4: 9.0})
    del evidence["rows"][0]["quantize_us"]
    assert forecast(evidence).points(OWN, APART) == {1: 2 * 3 * 7, 4: 2 * 4 * 9}


# what stays in bf16


def test_nothing_is_left_of_a_model_that_is_quantized_whole() -> None:
    assert forecast(made({"own": scaled(2)})).left() == ()


def test_a_linear_that_is_not_quantized_is_left_and_one_that_is_in_part() -> None:
    evidence = made({"own": scaled(2)})
    evidence["gemms"][0]["count"] = 1
    evidence["gemms"] = [each for each in evidence["gemms"] if each["name"] != "mlp.down_proj"]
    assert forecast(evidence).left() == (
        Linear("self_attn.qkv_proj", 512, 512, 2, 2),  # half of the rows, in each of two layers
        Linear("mlp.down_proj", 512, 1024, 2, 2),
    )


def test_a_shape_under_a_longer_name_is_the_same_linear() -> None:
    evidence = made({"own": scaled(2)})
    evidence["gemms"][3]["name"] = "mlp.down_proj 512×1024"
    assert forecast(evidence).left() == ()


def test_grouped_experts_are_one_entry_for_both_of_their_gemms() -> None:
    assert forecast(experts(GROUPED), MOE).left() == ()
    left = forecast(experts(), MOE).left()
    assert [(one.name, one.count, one.layers, one.experts) for one in left] == [
        ("mlp.experts.gate_up_proj", 12, 3, 16),
        ("mlp.experts.down_proj", 12, 3, 16),
    ]


def test_what_is_left_takes_its_floor_on_both_sides() -> None:
    evidence = made({"own": scaled(2)})
    evidence["gemms"] = evidence["gemms"][:3]
    evidence["rows"] = [each for each in evidence["rows"] if each["gemm"] != "mlp.down_proj"]
    it = forecast(evidence)
    floor = gemm(Linear("mlp.down_proj", 512, 1024, 2, 2), 16, None).us(ON)
    assert floor > 0.5 and it.linear_us(it.points(OWN))(16) == pytest.approx(6 * BASE[16] / 2 + floor)


# the machine


def test_the_measured_rates_and_where_there_are_none_the_expected() -> None:
    evidence = made({"own": scaled(2)})
    assert forecast(evidence).machine.bandwidth == 4e12 and forecast(evidence).machine.rate("bf16") == 7e14
    assert forecast(evidence).machine.rate("fp8") == machine(GPUS["H200"]).rate("fp8")
    for around in (None, {"not_measured": "no room"}):
        it = forecast(evidence | {"around": around})
        assert it.machine == machine(GPUS["H200"]) and it.rest == Rest()
    assert forecast(made({"own": scaled(2)}, gpu="NVIDIA T4")).gpu is None
    evidence["made_by"]["device"]["gpu"] = None
    assert forecast(evidence).gpu is None


def test_the_cache_is_what_the_weights_leave() -> None:
    it = forecast(made({"own": scaled(2)}))
    plain = vllm_limits(GPUS["H200"])
    few, many = it.limits(1e9).kv_tokens, it.limits(1e8).kv_tokens
    assert few == cache_tokens(MODEL, GPUS["H200"], plain, 1e9) and few is not None and many is not None
    assert many - few == pytest.approx(9e8 / MODEL.kv_bytes, abs=16)
    assert it.limits(1e9) == replace(plain, kv_tokens=few)


def test_what_is_left_in_bf16_weighs_as_much_in_memory() -> None:
    evidence = made({"own": scaled(2)})
    it = forecast(evidence | {"gemms": evidence["gemms"][:3]})
    down = 2 * 512 * 1024
    packed = (MODEL.linear_weights - down) * 4.125 / 8
    assert it.weight_bytes == packed + 2 * (down + MODEL.other_weights)
    assert it.copy_bytes == 2 * (MODEL.linear_weights - down)


def test_the_format_of_most_weights_is_that_of_all() -> None:
    """Of FP8 a kernel that quantizes no activations multiplies in bf16: qkv and gate_up, 3 of the 4.5 million weights."""
    evidence = made({"own": scaled(2), "sixteen": scaled(2)}, scheme=("FP8_DYNAMIC", "fp8", 8.0))
    for each in evidence["rows"]:
        if each["kernel"] == "own":
            each["quantize_us"] = 1.0
    it, some = forecast(evidence), {"self_attn.qkv_proj": "sixteen", "mlp.gate_up_proj": "sixteen"}
    assert (it.num(OWN), it.num(OWN | some), it.num(dict.fromkeys(SHAPES, "sixteen"))) == ("fp8", "bf16", "bf16")
    assert it.num(OWN | {"mlp.gate_up_proj": "sixteen"}) == "fp8"
    evidence["gemms"][2]["count"] = 5  # five times as many of the largest
    assert forecast(evidence).num(OWN | {"mlp.gate_up_proj": "sixteen"}) == "bf16"


@pytest.mark.parametrize(("acts", "num"), [(["bf16", "bf16"], "bf16"), (["fp8_e4m3", "bf16"], "fp8"), (None, "fp8")])
def test_kernels_for_experts_say_what_they_round_activations_to(acts: list[str] | None, num: str) -> None:
    it = experts(GROUPED | {"scheme": "FP8_DYNAMIC"})
    it["gemms"] = it["gemms"][-1:]
    it["kernels"] = [{"name": "another", "acts": ["int8"]}, {"name": "own"} | ({"acts": acts} if acts else {})]
    assert forecast(it, MOE).num({"mlp.experts": "own"}) == num


# a workload by hand

REST = {
    "decode": [[1, 9, 2.0]],
    "prefill": [[8, 3.0]],
    "head": [[1, 5.0]],
    "elementwise": [[1, 1.0], [8, 4.0]],
    "sustained": 1.0,
}


def small(**facts: Any) -> dict[str, Any]:
    """8 tokens in, 2 out: a prefill of M = 8 and a decode of M = 1, in two layers."""
    return made({"own": {1: 100.0, 8: 300.0}}, base={1: 250.0, 8: 500.0}, rest=REST, **facts)


def test_the_seconds_of_a_workload_are_those_of_its_steps() -> None:
    found = forecast(small()).workload(parse("8:2@1"), OWN)
    beside = (2 * 3 + 5 + 2 * 4) + (2 * 2 + 5 + 2 * 1) + 2 * VLLM.gap_us + VLLM.start_us
    base, own = (8 * (250 + 500) + beside) / 1e6, (8 * (100 + 300) + beside) / 1e6
    assert (found["baseline_seconds"], found["seconds"]) == (round(base, 4), round(own, 4))
    assert found["speedup"] == pytest.approx(base / own, abs=1e-4) and found["linear_speedup"] == 1.875
    assert found["tokens_per_s"] == pytest.approx(10 / own, abs=0.1)
    assert found["output_tokens_per_s"] == pytest.approx(2 / own, abs=0.1)
    assert found["baseline_tokens_per_s"] == pytest.approx(10 / base, abs=0.1)
    assert found["written"] == "8:2@1" and found["estimated"] == []
    assert [tuple(each[:3]) for each in found["by_m"]] == [(1, 1, 1), (8, 1, 8)]
    shares = found["shares"]
    assert shares[LINEAR] == pytest.approx(8 * 400e-6 / own, abs=1e-4)
    assert shares[ATTENTION] == pytest.approx(10e-6 / own, abs=1e-4) and shares[QUANTIZE] == 0
    assert found["baseline_shares"][LINEAR] == pytest.approx(8 * 750e-6 / base, abs=1e-4)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)


def test_what_was_not_measured_beside_is_said() -> None:
    estimated = forecast(made({"own": scaled(2)})).workload(parse("8:2@1"), OWN)["estimated"]
    assert "decode attention" in estimated and "sustained clock" in estimated


def test_the_quantizing_of_activations_is_a_part_of_the_kernels_time() -> None:
    plain, apart = (forecast(small(**facts)) for facts in ({}, {"quantize": {1: 10.0, 8: 30.0}}))
    one, other = (it.artifact(parse("8:2@1"), OWN) for it in (plain, apart))
    assert other.parts[QUANTIZE] == pytest.approx(8 * 40e-6) and one.parts[QUANTIZE] == 0
    assert other.parts[LINEAR] == pytest.approx(8 * 360e-6)
    assert linears(other) == pytest.approx(linears(one)) and other.seconds == pytest.approx(one.seconds)
    assert apart.baseline(parse("8:2@1")).parts[QUANTIZE] == 0


def test_the_number_format_decides_how_long_a_rate_lasts() -> None:
    """FP8's tensor cores do the same work in half the time: the same kernel time keeps them half as busy."""
    rest = REST | {"sustained": 0.5}
    took = {}
    for num in ("bf16", "fp8"):
        scheme, quantize = ("W4A16", None) if num == "bf16" else ("FP8_DYNAMIC", {1: 1e-9, 8: 1e-9})
        own = {1: 2.0, 8: 2.0}
        evidence = made({"own": own}, base={1: 9.0, 8: 9.0}, rest=rest, scheme=(scheme, num, 8.0), quantize=quantize)
        evidence["around"]["machine"]["compute"] = {"bf16": 1e12, "fp8": 2e12}
        took[num] = forecast(evidence).artifact(parse("8:2@1"), OWN).parts[LINEAR]
    ops = 2 * 2 * sum(n * k for n, k in SHAPES.values())  # of a token in both layers
    both = [sum(16 + min(16, 1e6 * m * ops / rate) for m in (1, 8)) / 1e6 for rate in (1e12, 2e12)]
    assert [took["bf16"], took["fp8"]] == pytest.approx(both)


# a step's parts


def model(rest: Rest, **facts: Any) -> Model:
    return Model(MODEL, ON, lambda m: 1000.0, rest, baseline_us=lambda m: 1000.0 * m, **facts)


def step(graph: str = FULL, decodes: int = 4, chunks: tuple[Chunk, ...] = (), m: int = 4) -> Step:
    return Step(1, m, m, chunks, decodes, 100.0, graph)


MEASURED = Rest(decode={(4, 100): 10.0}, prefill={64: 30.0}, elementwise={4: 5.0}, head={4: 7.0}, sustained=1.0)


def test_a_layer_among_others_takes_longer_than_its_parts_alone() -> None:
    """Of the decodes: 4 sequences, 2000 µs of linears in a layer, 10 of attention, 5 elementwise."""
    rest = replace(MEASURED, decodes={(4, 100): 2 * 2015.0})
    alone, among = (Clock(model(each)).parts_us(step()) for each in (MEASURED, rest))
    for part in (LINEAR, ATTENTION, ELEMENTWISE):
        assert among[part] == pytest.approx(2 * alone[part]) and alone[part] > 0
    assert among[HEAD] == alone[HEAD] == 7 and among[HOST] == pytest.approx(VLLM.gap_us)
    assert Clock(model(rest)).together(step(PIECES, decodes=400)) == pytest.approx(2)  # constant beyond
    assert Clock(model(rest)).together(step(EAGER)) == 1


def test_prompts_that_fill_a_step_take_longer_too() -> None:
    """Two prompts of 64 in M = 128: 64000 µs of linears in a layer, 2 · 30 of attention, 160 elementwise."""
    rest = replace(MEASURED, prompts=(64, 128, 1.25 * (64000 + 60 + 160)))
    clock = Clock(model(rest))
    assert clock.together(step(EAGER)) == pytest.approx(1.25) and clock.together(step(FULL)) == 1
    chunks = (Chunk(64, 0, 2),)
    assert clock.parts_us(step(EAGER, 0, chunks, 128))[ATTENTION] == pytest.approx(1.25 * 2 * 60)


@pytest.mark.parametrize("without", ["decode", "elementwise", "prefill"])
def test_without_the_parts_nothing_is_known_of_the_whole(without: str) -> None:
    lacking: Any = {without: {}}
    rest = replace(MEASURED, prompts=(64, 128, 9e9), decodes={(4, 100): 9e9}, **lacking)
    clock = Clock(model(rest))
    assert (clock.together(step()) == 1) == (without != "prefill")
    assert (clock.together(step(EAGER)) == 1) == (without != "decode")
    bare = Clock(replace(model(replace(rest, decode={(1, 1): 1.0})), baseline_us=None))
    assert bare.together(step()) == bare.together(step(EAGER)) == 1


def test_decodes_beside_prompts_share_a_kernel() -> None:
    rest, chunks = replace(MEASURED, mixed=0.8), (Chunk(64, 0, 1),)
    both = step(PIECES, chunks=chunks, m=72)
    assert Clock(model(MEASURED)).parts_us(both)[ATTENTION] == pytest.approx(2 * 40)
    assert Clock(model(rest)).parts_us(both)[ATTENTION] == pytest.approx(2 * 40 * 0.8)
    assert Clock(model(rest)).parts_us(step())[ATTENTION] == pytest.approx(2 * 10)
    assert Clock(model(rest)).parts_us(step(PIECES, 0, chunks, 64))[ATTENTION] == pytest.approx(2 * 30)


def test_what_lasts_is_taken_from_the_steady_run_where_there_is_one() -> None:
    rest = replace(MEASURED, sustained=0.9, steady=(8, 10000.0))
    assert Clock(model(rest)).sustained == pytest.approx(0.8)  # 8000 µs in a burst
    assert Clock(model(replace(rest, steady=(8, 5000.0)))).sustained == 1  # the burst was timed at a lower clock
    assert Clock(replace(model(rest), baseline_us=None)).sustained == 0.9


def test_what_was_not_measured_is_as_far_from_its_floor_as_such_kernels_are() -> None:
    """Attention starts with 9 µs; 4 sequences of 2 heads are 8/132 of a wave over the multiprocessors."""
    stand_ins = replace(HOPPER, attention_us=9.0, tile_us=33.0, decode=0.5, streams=0.25)
    parts = Clock(replace(model(Rest(sustained=1.0)), stand_ins=stand_ins)).parts_us(step())
    attention = 9 + 33 * 4 * 2 / 132 + decode_attention(MODEL, 4, 100.0).us(ON) / 0.5
    assert parts[ATTENTION] == pytest.approx(2 * attention) and parts[HEAD] == pytest.approx(
        head(MODEL, 4).us(ON) / 0.25
    )


def test_a_curve_needs_points_that_have_a_logarithm() -> None:
    broken: list[dict[int, float]] = [{}, {0: 1.0}, {1: 0.0}, {1: 1.0, 2: -1.0}]
    for points in broken:
        with pytest.raises(AssertionError):
            Level(points)


def test_rest_is_read_as_evidence_holds_it() -> None:
    found = Rest.from_json(
        REST | {"mixed": 0.9, "steady": [8192, 50.0], "prompts": [2048, 16384, 9.0], "decodes": [[1, 192, 4.0]]}
    )
    assert found == Rest(
        {(1, 9): 2.0}, {8: 3.0}, {1: 5.0}, {1: 1.0, 8: 4.0}, 1.0, 0.9, (8192, 50.0), (2048, 16384, 9.0), {(1, 192): 4.0}
    )
    assert Rest.from_json({}) == Rest()


def test_a_level_stays_beyond_its_last_point() -> None:
    level = Level({2: 1.0, 8: 4.0})
    assert [level(x) for x in (1, 2, 4, 8, 99)] == pytest.approx([1, 1, 2, 4, 4])


# beside the verdict


def test_crossovers_of_each_gemm_and_of_all() -> None:
    """2 times as fast at M = 1 and half as fast at M = 4: both logarithms halve in the middle of the speedup's way."""
    evidence = made({"own": {1: 200.0, 4: 800.0}})
    for each in evidence["rows"]:
        if each["gemm"] == "mlp.down_proj":
            each["speedup"] = 3.0
        if each["gemm"] == "self_attn.o_proj":
            each["speedup"] = 0.5
    found = crossovers(evidence, forecast(evidence), OWN)
    assert list(found) == ["all", *SHAPES]
    assert found["all"] == found["self_attn.qkv_proj"] == 2.5  # 4 ** (2/3)
    assert (found["mlp.down_proj"], found["self_attn.o_proj"]) == (None, 0.0)


def test_the_floor_of_a_row_by_hand() -> None:
    """One qkv_proj at M = 1: 1024 · 512 weights of 4.125 bits, and 512 + 1024 values of bf16, over 4 TB/s."""
    evidence = made({"own": {1: 10.0, 16384: 100.0}, "other": {1: 5.0}}, base={1: 20.0, 16384: 200.0})
    first = roofline(forecast(evidence), OWN)[0]
    floor = (1024 * 512 * 4.125 / 8 + 2 * 1536) / 4e6
    bf16 = (1024 * 512 * 2 + 2 * 1536) / 4e6
    assert first == {
        "gemm": "self_attn.qkv_proj", "kernel": "own", "m": 1, "floor_us": round(floor, 3),
        "part": round(floor / 10, 4), "baseline_part": round(bf16 / 20, 4),
    }  # fmt: skip
    large = roofline(forecast(evidence), OWN)[1]
    assert large["floor_us"] == pytest.approx(2 * 16384 * 1024 * 512 / 7e8, abs=1e-3)
    assert [(one["gemm"], one["m"]) for one in roofline(forecast(evidence), OWN)] == [
        (name, m) for name in SHAPES for m in (1, 16384)
    ]


def test_the_floor_of_grouped_experts_is_that_of_both_gemms() -> None:
    """At M = 1 a token meets 4 experts: 3 · 512 · 256 weights each."""
    it = forecast(experts(GROUPED), MOE)
    weights = 4 * 3 * 512 * 256 * 4.125 / 8
    moved = weights + 2 * 4 * ((512 + 512) + (256 + 512))
    assert floor_us(it, GROUPED, 1, preset("W4A16")) == pytest.approx(moved / 4e6)
    rows = 4 * 16384  # the first GEMM has many operations a byte, the second few
    down = (16 * 512 * 256 * 2 + rows * (256 + 512) * 2) / 4e6
    assert floor_us(it, GROUPED, 16384) == pytest.approx(2 * rows * 512 * 512 / 7e8 + down)


def test_a_dense_copy_is_used_where_it_is_faster() -> None:
    """Half as fast as bf16 from M = 16 on; the copy makes up for it, and costs two bytes a weight."""
    evidence = made({"own": scaled(2, 4) | scaled(0.5, since=16)})
    it, one = forecast(evidence), parse("64:16@4")
    found = dense_path(it, OWN, {one.name: one})["dense_path"]
    weights = 2 * sum(n * k for n, k in SHAPES.values())
    assert found["copy_bytes"] == 2 * weights == 2 * MODEL.linear_weights
    assert found["packed_bytes"] == round(weights * 4.125 / 8 + 2 * MODEL.other_weights)
    assert found["from_m"] == it_crosses(it) and found["gpu_memory_utilization"] == 0.92
    assert found["budget_bytes"] == int(0.92 * 141e9)
    assert found["kv_tokens"] == it.limits(found["packed_bytes"]).kv_tokens
    assert found["kv_tokens"] - found["kv_tokens_beside_the_copy"] == pytest.approx(
        found["copy_bytes"] / MODEL.kv_bytes, abs=17
    )
    base, alone, both = it.baseline(one), it.artifact(one, OWN), it.artifact(one, OWN, dense_path=True)
    assert both.seconds < min(base.seconds, alone.seconds)
    assert found["workloads"] == {one.name: round(base.seconds / both.seconds, 4)}
    by_m = {each.m: each.seconds / each.steps for each in both.by_m}
    assert by_m[4] == pytest.approx({each.m: each.seconds / each.steps for each in alone.by_m}[4])
    assert by_m[256] == pytest.approx({each.m: each.seconds / each.steps for each in base.by_m}[256])


def test_the_copy_takes_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    it, weights = forecast(made({"own": scaled(2)})), list[float]()
    limits = Forecast.limits

    def noted(self: Forecast, weight_bytes: float) -> Any:
        weights.append(weight_bytes)
        return limits(self, weight_bytes)

    monkeypatch.setattr(Forecast, "limits", noted)
    it.baseline(parse("8:2@1"))
    it.artifact(parse("8:2@1"), OWN)
    it.artifact(parse("8:2@1"), OWN, dense_path=True)
    packed = MODEL.bytes(4.125)
    assert weights == [MODEL.bytes(), packed, packed + 2 * MODEL.linear_weights] and packed < MODEL.bytes()


def it_crosses(it: Forecast) -> float:
    """From 2 at M = 4 to 0.5 at M = 16, two thirds of the way: 4 · 4 ** (2/3)."""
    assert it.points(OWN)[4] < it.points(None)[4] and it.points(OWN)[16] > it.points(None)[16]
    return 10.1


@pytest.mark.parametrize(("scheme", "num"), [("FP8_DYNAMIC", "fp8"), ("W8A8", "int8"), ("NVFP4", "fp4")])
def test_only_where_activations_stay_as_they_are_is_there_a_dense_path(scheme: str, num: str) -> None:
    """It is the kernel that decides: NVFP4 runs on 16-bit activations where there is no FP4 arithmetic."""
    own = scaled(2)
    quantized = made({"own": own}, scheme=(scheme, num, 8.0), quantize=dict.fromkeys(own, 0.1))
    assert forecast(quantized).num(OWN) == num and dense_path(forecast(quantized), OWN, WORKLOADS) == {}
    as_they_are = made({"own": own}, scheme=(scheme, num, 8.0))
    assert forecast(as_they_are).num(OWN) == "bf16" and dense_path(forecast(as_they_are), OWN, WORKLOADS)
    assert fp4(forecast(as_they_are), {}) == {}


def test_the_share_of_quantizing_for_fp4() -> None:
    evidence = made({"own": {1: 100.0, 4: 200.0}}, scheme=("NVFP4", "fp4", 4.5), quantize={1: 25.0, 4: 10.0})
    assert fp4(forecast(evidence), {}) == {"fp4": {"quantize_share": {"1": 0.25, "4": 0.05}}}
    assert fp4(forecast(small(quantize={1: 25.0, 8: 10.0})), {}) == {}


@pytest.mark.parametrize(("m", "tokens", "favours"), [(252, 63.0, "latency"), (256, 64.0, "throughput")])
def test_what_experts_meet_decides_on_their_backend(m: int, tokens: float, favours: str) -> None:
    """4 of 16 experts a token: a quarter of M each. Steps count by the time that they take."""
    it = forecast(experts(GROUPED), MOE)
    workload = {"by_m": [[m - 100, 1, 0, 3.0], [m + 300, 50, 0, 1.0]]}
    assert moe_backend(it, workload) == {"tokens_an_expert": tokens, "favours": favours}
    it.evidence["kernels"].append({"name": "own", "acts": ["fp4_e2m1", "fp4_e2m1"]})
    for entry in it.evidence["gemms"]:
        entry |= {"scheme": "NVFP4", "group": 16}
    it.evidence["rows"][:] = [row(g["name"], "own", 1, 2.0, 1.0, 0.5) for g in it.evidence["gemms"]]
    it.evidence["engine"]["runs"].update({"mlp.experts": "own"})
    found = fp4(it, {"a": workload})["fp4"]
    assert found == {"quantize_share": {"1": 0.5}, "moe_backend": {"a": moe_backend(it, workload)}}
