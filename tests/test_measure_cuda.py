"""Measuring on a CUDA device, without one: what is captured, what is checked after the timing, what the rows hold.

A graph is stood in for by one that makes its calls again when it is replayed, into the tensor that it has shown before, as a
graph does. The stopwatch reads what a replay is said to cost; rounds and medians are the real ones.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from test_experts import plain
from test_profile import given, int4, int8

from quantpub import whole_layer
from quantpub.attention import STANDS_IN
from quantpub.engines import symbols
from quantpub.errors import GateError
from quantpub.experts import ExpertWeights
from quantpub.kernels import cuda, dense, measure_cuda, measure_moe, torch_int4, torch_int8
from quantpub.kernels.base import Kernel, Operands, Weight
from quantpub.kernels.check import GEMM_TOLERANCE, PROBE_ROWS, Probe, make_probe, tolerance
from quantpub.kernels.measure import Budget
from quantpub.kernels.measure_cuda import CudaGemm, Taken
from quantpub.kernels.measure_moe import CudaExperts, MoeChoice, choose_moe, measure_experts
from quantpub.kernels.moe_base import MoeKernel
from quantpub.kernels.moe_check import traffic
from quantpub.kernels.moe_torch import LOOP
from quantpub.qtensor import QTensor
from quantpub.scheme import preset
from quantpub.served import served
from quantpub.timing import MINIMUM, NO_ROOM, Bench

CACHE = 1 << 16
W8A8 = preset("W8A8")
COSTS = {"bf16": 90.0, "torch-int4": 30.0, "torch-int8": 45.0, "quantize": 9.0, "gemm": 33.0, "half": 60.0}


@dataclass
class Device:
    """cost: µs of a call by the kernel's name, `quantize` and `gemm` of a split. stale: graphs that follow nothing."""

    cost: dict[str, float] = field(default_factory=lambda: dict(COSTS))
    stale: set[str] = field(default_factory=set)
    refuses: Callable[[str, int], bool] = lambda name, m: False
    now: float = 0.0  # µs
    captured: list[tuple[str, int]] = field(default_factory=list)
    last: float = 0.0

    def stopwatch(self, call: Callable[[], object]) -> float:
        self.last = 1.0
        call()
        self.now += self.last
        return self.last

    def bench(self) -> Bench:
        return Bench(self.stopwatch, clock=lambda: int(self.now * 1e3), waited=lambda: 0)

    def capture(self, run: Any, copies: list[Operands], stopwatch: Any) -> Any:
        name, m = naming(run)
        if self.refuses(name, m):
            raise RuntimeError(f"out of memory for {m} rows\nand a trace")
        self.captured.append((name, len(copies)))
        self.now += 1e3  # a millisecond
        return Graph(self, run, copies, name)


class Graph:
    """Three calls of it are one replay."""

    calls = 3

    def __init__(self, device: Device, run: Any, copies: list[Operands], name: str) -> None:
        self.device, self.run, self.copies, self.name = device, run, copies, name
        self.result = run(self.last)

    @property
    def took(self) -> float:
        return self.calls * self.device.cost[self.name]

    @property
    def last(self) -> Operands:
        return self.copies[(self.calls - 1) % len(self.copies)]

    def replay(self, _: int = 0) -> None:
        self.device.last = self.took
        if isinstance(self.result, torch.Tensor) and self.name not in self.device.stale:
            self.result.copy_(self.run(self.last))


def naming(run: Any) -> tuple[str, int]:
    """(a key of COSTS, M) of what is captured."""
    if not isinstance(run, partial):
        return "quantize", 0
    owner = next((name for name, kernel in KERNELS.items() if run.func is kernel.run), None)
    if owner:
        return owner, len(run.args[0])
    if isinstance(run.args[0], MoeKernel):
        return run.args[0].name, 0
    return "gemm", len(run.args[0][0])


def halved(x_MK: torch.Tensor, operands: Operands) -> torch.Tensor:
    return dense.BF16.run(x_MK, operands)


HALF = replace(dense.BF16, name="half", run=halved)
KERNELS = {"bf16": dense.BF16, "torch-int4": torch_int4.KERNEL, "torch-int8": torch_int8.KERNEL, "half": HALF}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are small: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    it = Device()
    for module in (measure_cuda, measure_moe):
        monkeypatch.setattr(module, "cache_bytes", lambda: CACHE)
        monkeypatch.setattr(module, "capture", it.capture)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 31))
    monkeypatch.setattr("quantpub.timing.MAXIMUM", 2 * MINIMUM)
    return it


def taken(*kernels: Kernel, q: QTensor | None = None) -> list[Taken]:
    return [Taken(kernel, given(int4() if q is None else q)) for kernel in kernels]


def gemm(device: Device, *kernels: Kernel, q: QTensor | None = None) -> CudaGemm:
    (base,) = taken(dense.BF16, q=q)
    return CudaGemm("mlp.down_proj", base, taken(*kernels, q=q), device.bench())


def ran(it: CudaGemm, batch: Sequence[int] = (1, 16), seconds: float = 9.0) -> Any:
    return measure_cuda.measure_cuda(it, batch, Budget(seconds, 1), lambda: None)


# one GEMM


def test_a_row_says_what_a_call_took_beside_the_baseline(device: Device) -> None:
    rows, missing = gemm(device, torch_int4.KERNEL).cell(16, 0.0, 9.0)
    assert missing == {}
    (row,) = rows
    assert row == {
        "gemm": "mlp.down_proj", "kernel": "torch-int4", "m": 16, "median_us": 30.0, "ci95_us": [30.0, 30.0],
        "baseline_us": 90.0, "speedup": 3.0, "speedup_ci95": [3.0, 3.0], "repeats": row["repeats"], "disturbed": 0,
        "cold": True,
    }  # fmt: skip
    assert row["repeats"] >= MINIMUM


def test_a_kernel_that_quantizes_activations_is_timed_whole_and_in_its_steps(device: Device) -> None:
    (row,), _ = gemm(device, torch_int8.KERNEL, q=int8(W8A8)).cell(16, 0.0, 9.0)
    assert (row["median_us"], row["quantize_us"], row["gemm_us"], row["speedup"]) == (45.0, 9.0, 33.0, 2.0)
    names = [name for name, _ in device.captured]
    assert names == ["bf16", "quantize", "gemm", "torch-int8"]
    copies = dict(device.captured)
    assert copies["quantize"] == 1 and copies["gemm"] == copies["torch-int8"] > 1


def test_all_kernels_of_an_m_take_turns_with_one_baseline(device: Device) -> None:
    result = ran(gemm(device, torch_int4.KERNEL, HALF), (1, 2, 64))
    assert [(row["kernel"], row["m"]) for row in result.rows] == [
        (kernel, m) for m in (1, 2, 64) for kernel in ("torch-int4", "half")
    ]
    assert {row["baseline_us"] for row in result.rows} == {90.0} and result.missing == []
    assert [name for name, _ in device.captured].count("bf16") == 3


def test_weights_come_from_memory_where_their_copies_outgrow_the_cache(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gemm(device, HALF).cell(1, 0.0, 9.0)[0][0]["cold"]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 1 << 31))  # no room for a second copy
    assert not gemm(device, HALF).cell(1, 0.0, 9.0)[0][0]["cold"]
    monkeypatch.setattr(Graph, "calls", 1)  # so long that it fills the cache by itself
    assert gemm(device, HALF).cell(1, 0.0, 9.0)[0][0]["cold"]


def test_numerics_are_the_largest_error_of_any_m(device: Device) -> None:
    it = gemm(device, torch_int8.KERNEL, q=int8(W8A8))
    before = {each["kernel"]: each["relative_error"] for each in it.numerics()}
    it.cell(5, 0.0, 9.0)
    base, own = it.numerics()
    assert (base["kernel"], own["kernel"], own["gemm"]) == ("bf16", "torch-int8", "mlp.down_proj")
    assert base["tolerance"] == GEMM_TOLERANCE and own["tolerance"] == tolerance(torch_int8.KERNEL) > GEMM_TOLERANCE
    assert 0 < before["bf16"] <= base["relative_error"] < base["tolerance"]
    assert 0 < before["torch-int8"] <= own["relative_error"] < own["tolerance"]
    it.kernels[0].error = 0.5
    it.kernels[0].check("g", 1)
    assert it.kernels[0].error == 0.5


# what is wrong


def wrong(x_MK: torch.Tensor, operands: Operands) -> torch.Tensor:
    return dense.BF16.run(x_MK, operands) * 1.1


@pytest.mark.parametrize(
    "run",
    [
        wrong,
        lambda x, w: wrong(x, w) if len(x) == 1 else halved(x, w),
        lambda x, w: wrong(x, w) if len(x) == PROBE_ROWS else halved(x, w),
    ],
)
def test_a_wrong_kernel_is_an_error_before_anything_is_captured(device: Device, run: Any) -> None:
    with pytest.raises(GateError, match="kernel half computes"):
        gemm(device, replace(HALF, run=run))
    assert device.captured == []


def test_a_kernel_that_is_wrong_at_one_m_is_an_error_there(device: Device) -> None:
    it = gemm(device, replace(HALF, run=lambda x, w: wrong(x, w) if len(x) == 7 else halved(x, w)))
    with pytest.raises(GateError, match="at M = 7: "):
        it.cell(7, 0.0, 9.0)
    assert [name for name, _ in device.captured] == ["bf16"]


def test_a_wrong_gemm_behind_coarse_activations_is_an_error(device: Device) -> None:
    """Two per cent are less than what int8 loses; the GEMM alone is checked without that."""
    split = torch_int8.KERNEL.split
    assert split is not None
    off = replace(split, gemm=lambda a, w: split.gemm(a, w) * 1.02)
    kernel = replace(torch_int8.KERNEL, split=off, run=lambda x, w: off.gemm(split.quantize(x), w))
    with pytest.raises(GateError, match="torch-int8 computes"):
        gemm(device, kernel, q=int8(W8A8))


@pytest.mark.parametrize("part", ["token", "group", "all"])
@pytest.mark.parametrize("m", [64, 200])
def test_what_rounded_activations_would_hide_is_found_at_every_m(device: Device, m: int, part: str) -> None:
    """Faults of another tile: the 61 rows of before are right. Of one token, of a group of one column, of all."""
    split = torch_int8.KERNEL.split
    assert split is not None

    def run(x_MK: torch.Tensor, operands: Operands) -> torch.Tensor:
        y_MN = torch_int8.KERNEL.run(x_MK, operands)
        if len(x_MK) != m:
            return y_MN
        if part == "token":
            y_MN[-1] *= 1.015
        elif part == "all":
            y_MN *= 1.012
        else:
            (codes, scale_M1), (w_NK, scale_1N) = split.quantize(x_MK), operands
            y_MN[:, 3] += (
                0.06 * (codes[:, :16].float() @ w_NK[3, :16].float()) * scale_1N[0, 3] * scale_M1[:, 0]
            ).bfloat16()
        return y_MN

    kernel = replace(torch_int8.KERNEL, run=run)
    it = gemm(device, kernel, q=int8(W8A8))
    with pytest.raises(GateError, match=rf"torch-int8 computes mlp.down_proj wrong at M = {m}: .* explain 0\.00781"):
        it.cell(m, 0.0, 9.0)


def test_a_graph_that_is_off_by_less_than_activations_lose_is_an_error(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replay(self: Graph, _: int = 0) -> None:
        self.device.last = self.took
        if self.name == "torch-int8":
            self.result.copy_(self.run(self.last) * 1.012)  # type: ignore[union-attr]
        elif isinstance(self.result, torch.Tensor):
            self.result.copy_(self.run(self.last))

    monkeypatch.setattr(Graph, "replay", replay)
    with pytest.raises(GateError, match=r"torch-int8 computes .* other activations: .* explain 0\.00781"):
        gemm(device, torch_int8.KERNEL, q=int8(W8A8)).cell(16, 0.0, 9.0)


@pytest.mark.parametrize("m", [1, 16, 200])
@pytest.mark.parametrize("name", ["bf16", "half", "torch-int4"])
def test_a_graph_that_keeps_the_activations_it_was_captured_with_is_an_error(device: Device, name: str, m: int) -> None:
    device.stale = {name}
    with pytest.raises(GateError, match=f"kernel {name} computes mlp.down_proj wrong at M = {m} ") as stopped:
        gemm(device, HALF, torch_int4.KERNEL).cell(m, 0.0, 9.0)
    assert stopped.value.where == f"{name} on mlp.down_proj" and "keeps something" in str(stopped.value.next)


def test_the_steps_apart_need_not_follow_other_activations(device: Device) -> None:
    device.stale = {"gemm", "quantize"}
    assert len(gemm(device, torch_int8.KERNEL, q=int8(W8A8)).cell(16, 0.0, 9.0)[0]) == 1


def test_graphs_are_checked_also_where_the_budget_is_spent(device: Device) -> None:
    device.stale = {"half"}
    with pytest.raises(GateError):
        gemm(device, HALF).cell(16, 0.0, 0.0)


# what is missing


@pytest.mark.parametrize("error", measure_cuda.OP_ERRORS)
def test_a_kernel_that_cannot_be_prepared_is_listed_at_every_m(device: Device, error: type[Exception]) -> None:
    def broken(weight: Weight) -> Operands:
        raise error("no such tile\nsecond line")

    it, steps = gemm(device, replace(HALF, prepare=broken), torch_int4.KERNEL), list[int]()
    result = measure_cuda.measure_cuda(it, (1, 4), Budget(9.0, 1), lambda: steps.append(1))
    assert result.missing == [("half", m, "the op failed: no such tile") for m in (1, 4)]
    assert [(row["kernel"], row["m"]) for row in result.rows] == [("torch-int4", 1), ("torch-int4", 4)]
    assert len(steps) == 4 and [each["kernel"] for each in it.numerics()] == ["bf16", "torch-int4"]


def test_a_call_that_fails_at_one_m_is_listed_there(device: Device) -> None:
    device.refuses = lambda name, m: (name, m) == ("half", 64)
    steps = list[int]()
    result = measure_cuda.measure_cuda(
        gemm(device, HALF, torch_int4.KERNEL), (1, 64), Budget(9.0, 1), lambda: steps.append(1)
    )
    assert result.missing == [("half", 64, "the op failed: out of memory for 64 rows")] and len(steps) == 4
    assert [(row["kernel"], row["m"]) for row in result.rows] == [("half", 1), ("torch-int4", 1), ("torch-int4", 64)]


def test_a_baseline_that_fails_leaves_nothing_to_compare_with(device: Device) -> None:
    device.refuses = lambda name, m: (name, m) == ("bf16", 64)
    steps = list[int]()
    result = measure_cuda.measure_cuda(
        gemm(device, HALF, torch_int4.KERNEL), (1, 64), Budget(9.0, 1), lambda: steps.append(1)
    )
    said = "the baseline has no time: the op failed: out of memory for 64 rows"
    assert result.missing == [("half", 64, said), ("torch-int4", 64, said)] and len(steps) == 4
    assert [(row["kernel"], row["m"]) for row in result.rows] == [("half", 1), ("torch-int4", 1)]


def test_what_did_not_fit_into_the_budget_is_listed(device: Device) -> None:
    """A capture takes a millisecond here: 7 of them leave no room for the rounds of the third M."""
    budget = Budget(0.0062, 1)
    result = measure_cuda.measure_cuda(gemm(device, HALF), (1, 2, 4, 8), budget, lambda: None)
    measured = [row["m"] for row in result.rows]
    assert measured[:1] == [1] and 8 not in measured
    assert result.missing == [("half", m, NO_ROOM) for m in (1, 2, 4, 8) if m not in measured]
    assert budget.series == 0 and budget.seconds < 0


def test_without_a_budget_all_is_listed_once(device: Device) -> None:
    device.refuses = lambda name, m: name == "torch-int4"
    result = ran(gemm(device, HALF, torch_int4.KERNEL), (4,), 0.0)
    assert sorted(result.missing) == [
        ("half", 4, NO_ROOM),
        ("torch-int4", 4, "the op failed: out of memory for 4 rows"),
    ] and result.rows == []  # fmt: skip


def test_a_kernel_too_slow_for_what_is_left_costs_the_others_nothing(device: Device) -> None:
    """Seven rounds of three calls: of `torch-int4` 21 s, of the other two 3.15 ms. It is still checked."""
    device.cost["torch-int4"] = 1e6
    it = gemm(device, HALF, torch_int4.KERNEL)
    rows, missing = it.cell(16, 0.0, 8e-3)
    assert [row["kernel"] for row in rows] == ["half"] and missing == {"torch-int4": NO_ROOM}
    assert device.now < 1e5
    assert [row["kernel"] for row in it.cell(16, 0.0, 30.0)[0]] == ["half", "torch-int4"]
    assert it.cell(16, 0.0, 3e-3) == ([], dict.fromkeys(("half", "torch-int4"), NO_ROOM))
    device.stale = {"torch-int4"}
    with pytest.raises(GateError):
        it.cell(16, 0.0, 8e-3)


def test_the_steps_of_a_kernel_count_with_it_and_the_slowest_go_first() -> None:
    it = Device({"bf16": 10.0, "a": 20.0, "quantize": 5.0, "gemm": 30.0, "b": 50.0})
    names = {"baseline": "bf16", "a/quantize": "quantize", "a/gemm": "gemm", "a": "a", "b": "b"}
    graphs: Any = {name: Graph(it, lambda w: w[0], [(torch.zeros(1),)], cost) for name, cost in names.items()}
    for graph in graphs.values():
        graph.calls = 1
    round_of = [(115, []), (114, ["a"]), (60, ["a"]), (59, ["a", "b"]), (0, ["a", "b"])]
    for took, left_out in round_of:
        assert measure_cuda.crowded(graphs, (MINIMUM + 1) * took * 1e-6 + 1e-9) == left_out
    assert list(measure_cuda.without(graphs, {"a": ""})) == ["baseline", "b"]


def full(*_: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand advice")


FULL = "the op failed: CUDA out of memory. Tried to allocate 2 GiB"


def test_no_memory_for_the_activations_of_an_m_leaves_the_other_ms(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    it, rows = gemm(device, HALF, torch_int4.KERNEL), Probe.rows
    monkeypatch.setattr(Probe, "rows", lambda self, m: full() if m == 64 else rows(self, m))
    result = ran(it, (1, 64))
    assert result.missing == [("half", 64, FULL), ("torch-int4", 64, FULL)]
    assert [(row["kernel"], row["m"]) for row in result.rows] == [("half", 1), ("torch-int4", 1)]


def test_no_memory_for_the_check_of_graphs_is_listed(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    it = gemm(device, HALF)
    monkeypatch.setattr(measure_cuda, "judge", full)
    assert ran(it, (1, 4)).missing == [("half", 1, FULL), ("half", 4, FULL)]


def test_no_memory_for_the_baseline_is_for_the_caller_to_say(device: Device) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        CudaGemm("g", taken(replace(dense.BF16, prepare=full))[0], taken(HALF), device.bench())
    steps, budget = list[int](), Budget(9.0, 2)
    found = measure_cuda.unprepared(["a", "b"], (1, 4), FULL, budget, lambda: steps.append(1))
    assert found.missing == [(name, m, FULL) for name in "ab" for m in (1, 4)] and found.rows == []
    assert len(steps) == 4 and budget == Budget(9.0, 1)


def test_the_time_that_is_left_is_shared_over_what_is_left(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[tuple[float, float]]()

    def cell(self: CudaGemm, m: int, share: float, limit: float) -> Any:
        asked.append((share, limit))
        device.now += 1e5  # 0.1 s
        return [], {}

    monkeypatch.setattr(CudaGemm, "cell", cell)
    budget = Budget(0.8, 2)
    measure_cuda.measure_cuda(gemm(device, HALF), (1, 2, 4, 8, 16, 32), budget, lambda: None)
    assert [limit for _, limit in asked] == pytest.approx([0.4, 0.3, 0.2, 0.1, 0, 0])
    assert [share for share, _ in asked] == pytest.approx([0.4 / 6, 0.3 / 5, 0.2 / 4, 0.1 / 3, 0, 0])
    assert budget.seconds == pytest.approx(0.2) and budget.series == 1
    asked.clear()
    measure_cuda.measure_cuda(gemm(device, HALF), (1,), Budget(9.0, 1), lambda: None)
    assert asked == [(measure_cuda.MOST, 9.0)]


def test_symbols_say_what_was_launched_and_what_was_not_seen(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[int]()

    def launched(call: Callable[[], torch.Tensor]) -> tuple[list[str], str | None]:
        calls.append(len(call()))
        return ["void ns::gemm<int>(int)", "void ns::gemm<float>(int)"], None

    monkeypatch.setattr(symbols, "device_kernels", launched)
    found = gemm(device, replace(HALF, symbol="gemm"), replace(torch_int4.KERNEL, symbol="tinygemm"))
    found = found.symbols(7, {"bf16", "half", "torch-int4"})
    assert calls == [7, 7, 7] and [each["kernel"] for each in found] == ["bf16", "half", "torch-int4"]
    assert found[1] == {"kernel": "half", "gemm": "mlp.down_proj", "m": 7, "seen": ["ns::gemm"], "unconfirmed": None}
    assert found[2]["unconfirmed"] and "should run a kernel like tinygemm" in found[2]["unconfirmed"]
    monkeypatch.setattr(symbols, "device_kernels", lambda call: ([], "no profiler"))
    assert {each["unconfirmed"] for each in gemm(device, HALF).symbols(1, {"half"})} == {"no profiler"}


def test_a_kernel_that_refuses_an_m_is_unconfirmed_there_and_ends_nothing(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(call: Callable[[], object]) -> tuple[list[str], str | None]:
        raise RuntimeError("M must be below 16\nat line 3")

    prepared = gemm(device, HALF)
    monkeypatch.setattr(symbols, "device_kernels", refused)
    (found,) = prepared.symbols(256, {"half"})
    assert found["seen"] == [] and found["unconfirmed"] == "the op failed: M must be below 16"


# copies and graphs


@pytest.mark.parametrize(
    ("nbytes", "cache", "free", "copies"),
    [
        (300, 1000, 1 << 30, 7),  # 2000 bytes and more
        (500, 1000, 1 << 30, 4),
        (5000, 1000, 1 << 30, 1),
        (1, 1000, 1 << 30, cuda.MOST_CALLS),
        (300, 1000, 4 * 900, 3),  # a quarter of the free memory holds three
        (300, 1000, 100, 1),
    ],
)
def test_copies_fill_the_cache_twice(
    nbytes: int, cache: int, free: int, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 1 << 40))
    operands = (torch.zeros(nbytes - 1, dtype=torch.uint8), torch.ones(1, dtype=torch.uint8))
    found = cuda.rotated(operands, cache)
    assert len(found) == copies and found[0] is operands
    assert len({each[0].data_ptr() for each in found if each[0].numel()}) in (copies, 0)
    assert all(torch.equal(each[1], operands[1]) for each in found)


def test_what_the_allocator_holds_unused_is_room_for_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (400, 1 << 40))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 5000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1800)
    assert cuda.unused() == 3200
    assert len(cuda.rotated((torch.zeros(300, dtype=torch.uint8),), 1000)) == 3  # a quarter of 3600


def test_memory_is_given_back_before_a_gemm_and_where_much_is_unused(
    device: Device, layer: ExpertWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed, unused = list[int](), [0]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(1))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: unused[0])
    its: list[Any] = [gemm(device, HALF), CudaExperts(layer, LOOP, [named("fast")], device.bench())]
    assert len(freed) == 2
    for it in its:
        freed.clear()
        for held, times in ((0, 0), (1 << 29, 0), ((1 << 29) + 1, 1)):  # a quarter of 2 GiB
            unused[0] = held
            it.cell(4, 0.0, 9.0)
            assert len(freed) == times


def test_copies_keep_their_strides_and_are_as_many_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 40))
    column_major = torch.arange(6.0).reshape(3, 2).t()
    found = cuda.rotated((column_major,), 1 << 20, most=3)
    assert [each[0].stride() for each in found] == [(1, 2)] * 3


def test_what_has_no_operands_is_rotated_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 40))
    assert cuda.rotated((), 10) == [()] * 20


class FakeGraph:
    made: list[FakeGraph] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.begun = self.ended = self.replays = 0
        FakeGraph.made.append(self)

    def capture_begin(self) -> None:
        self.begun += 1

    def capture_end(self) -> None:
        self.ended += 1

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeGraph]]:
    FakeGraph.made = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    yield FakeGraph.made
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("took", "copies", "calls"),
    [(10.0, 3, 20), (10.0, 50, 50), (0.5, 3, cuda.MOST_CALLS), (500.0, 3, 3), (501.0, 3, 1), (90.0, 1, 2)],
)
@pytest.mark.parametrize("replayed", [1.0, 1e9])
def test_a_graph_is_long_enough_and_goes_through_the_copies(
    replayed: float, took: float, copies: int, calls: int, graphs: list[FakeGraph]
) -> None:
    """What a replay takes is known from then on: less than its calls one by one, or it was the first one that took longer."""
    weights: list[Operands] = [(torch.tensor(float(i)),) for i in range(copies)]
    seen, collecting = list[int](), list[bool]()

    def run(operands: Operands) -> torch.Tensor:
        if graphs and graphs[0].begun:
            seen.append(int(operands[0]))
            collecting.append(gc.isenabled())
        return operands[0] + 1

    times = iter([took + 5, took, replayed])  # the faster of two counts

    def stopwatch(call: Callable[[], object]) -> float:
        call()
        return next(times)

    captured = cuda.capture(run, weights, stopwatch)
    assert captured.calls == calls and seen == [i % copies for i in range(calls)] and not any(collecting)
    assert isinstance(captured.result, torch.Tensor) and int(captured.result) == (calls - 1) % copies + 1
    (graph,) = graphs
    assert (graph.begun, graph.ended, graph.replays) == (1, 1, 1) and captured.run is run
    assert captured.took == min(replayed, calls * took)
    captured.replay()
    assert graph.replays == 2


def test_a_call_that_fails_while_captured_ends_the_capture(graphs: list[FakeGraph]) -> None:
    def run(operands: Operands) -> torch.Tensor:
        if graphs:
            raise RuntimeError("not permitted when stream is capturing")
        return operands[0]

    with pytest.raises(RuntimeError, match="capturing"):
        cuda.capture(run, [(torch.zeros(1),)], lambda call: 1.0)
    assert graphs[0].ended == 1


def test_a_call_that_fails_is_no_graph(graphs: list[FakeGraph]) -> None:
    """The last copy is tried, too: clones may be laid out otherwise."""

    def run(operands: Operands) -> torch.Tensor:
        if operands[0].item():
            raise RuntimeError("misaligned")
        return operands[0]

    with pytest.raises(RuntimeError, match="misaligned"):
        cuda.capture(run, [(torch.zeros(1),), (torch.ones(1),)], lambda call: 1.0)
    assert graphs == []


def test_times_of_graphs_are_those_of_one_call() -> None:
    it = Device({"a": 10.0, "b": 4.0})
    one, two = (Graph(it, lambda w: w[0], [(torch.zeros(1),)], name) for name in ("a", "b"))
    two.calls = 5
    rounds = cuda.together({"a": one, "b": two}, it.bench(), 0.0, 9.0)  # type: ignore[dict-item]
    assert set(rounds.times["a"]) == {10.0} and set(rounds.times["b"]) == {4.0} and rounds.reason is None
    assert len(rounds.times["a"]) == len(rounds.times["b"]) >= MINIMUM


def test_before_each_call_the_cache_is_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            said.append("record")

        def synchronize(self) -> None:
            said.append("wait")

        def elapsed_time(self, other: Event) -> float:
            return 0.25  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    took = cuda.events(lambda: said.append("flush"))(lambda: said.append("call"))
    assert took == 250.0 and said == ["flush", "record", "call", "record", "wait"]


def test_a_gpus_bench_overwrites_twice_the_cache_and_waits_for_no_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "cache_bytes", lambda: 1000)
    monkeypatch.setattr(cuda, "Flush", lambda nbytes: f"{nbytes} bytes")
    monkeypatch.setattr(cuda, "events", lambda flush: lambda call: flush)
    bench = cuda.gpu_bench()
    stopwatch: Any = bench.stopwatch
    assert stopwatch(None) == "2000 bytes" and bench.waited() == 0 and bench.waited() == 0


# experts


@pytest.fixture
def layer(device: Device, monkeypatch: pytest.MonkeyPatch) -> ExpertWeights:
    monkeypatch.setattr(measure_moe, "traffic", lambda layer, m, n, device: traffic(layer, m, n, torch.device("cpu")))
    device.cost |= {"bf16-loop": 80.0, "fast": 20.0, "slow": 160.0}
    return plain()


def named(name: str, **facts: Any) -> MoeKernel:
    return replace(LOOP, name=name, **facts)


def test_experts_are_timed_against_their_own_baseline(device: Device, layer: ExpertWeights) -> None:
    it = CudaExperts(layer, LOOP, [named("fast"), named("slow")], device.bench())
    rows, missing = it.cell(4, 0.0, 9.0)
    assert missing == {} and [(row["kernel"], row["speedup"]) for row in rows] == [("fast", 4.0), ("slow", 0.5)]
    assert {(row["gemm"], row["m"], row["baseline_us"]) for row in rows} == {("mlp.experts", 4, 80.0)}
    assert {copies for _, copies in device.captured} == {measure_moe.ROUTINGS}
    assert {row["cold"] for row in rows} == {False}
    met = sum(tensor.nbytes for tensor in it.operands["fast"])
    for it.cache, cold in ((met, False), (met - 1, True)):
        assert {row["cold"] for row in it.cell(4, 0.0, 9.0)[0]} == {cold}


def test_numerics_of_experts_name_the_kernels(device: Device, layer: ExpertWeights) -> None:
    it = CudaExperts(layer, LOOP, [named("fast")], device.bench())
    found = it.numerics()
    assert [one["kernel"] for one in found] == ["bf16-loop", "fast"]
    assert all(0 < one["relative_error"] < one["tolerance"] and one["gemm"] == "mlp.experts" for one in found)


def test_wrong_experts_are_an_error_and_broken_ones_are_listed(device: Device, layer: ExpertWeights) -> None:
    def lossy(*given: Any) -> torch.Tensor:
        return LOOP.run(*given) * 1.2

    def broken(weights: ExpertWeights) -> Operands:
        raise ValueError("no tiles for 16")

    with pytest.raises(GateError, match="kernel wrong computes"):
        CudaExperts(layer, LOOP, [named("wrong", run=lossy)], device.bench())
    it = CudaExperts(layer, LOOP, [named("fast"), named("slow", prepare=broken)], device.bench())
    assert it.failed == {"slow": "the op failed: no tiles for 16"} and [n["kernel"] for n in it.numerics()][1:] == [
        "fast"
    ]
    device.refuses = lambda name, m: name == "fast"
    assert it.cell(4, 0.0, 9.0) == ([], {"fast": "the op failed: out of memory for 0 rows"})
    device.refuses = lambda name, m: name == "bf16-loop"
    rows, missing = it.cell(4, 0.0, 9.0)
    assert rows == [] and missing == {
        "fast": "the baseline has no time: the op failed: out of memory for 0 rows"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["bf16-loop", "fast", "slow"])
def test_a_graph_of_experts_that_keeps_its_activations_is_an_error(
    device: Device, layer: ExpertWeights, name: str
) -> None:
    it = CudaExperts(layer, LOOP, [named("fast"), named("slow")], device.bench())
    device.stale = {name}
    with pytest.raises(GateError, match=f"kernel {name} computes"):
        it.cell(4, 0.0, 9.0)


def test_experts_too_slow_for_what_is_left_cost_the_others_nothing(device: Device, layer: ExpertWeights) -> None:
    device.cost["slow"] = 1e6
    it = CudaExperts(layer, LOOP, [named("fast"), named("slow")], device.bench())
    rows, missing = it.cell(4, 0.0, 9e-3)
    assert [row["kernel"] for row in rows] == ["fast"] and missing == {"slow": NO_ROOM}


def test_experts_that_find_no_memory_are_listed(
    device: Device, layer: ExpertWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their routings at one M; then the layer itself, or its baseline."""
    monkeypatch.setattr("quantpub.kernels.moe.baseline", lambda name: (LOOP, ""))
    routings = measure_moe.traffic
    monkeypatch.setattr(measure_moe, "traffic", lambda *a: full() if a[1] == 4 else routings(*a))
    choices = [MoeChoice(named("fast"), None, {}), MoeChoice(named("slow"), None, {})]
    found, _, steps = measured(layer, choices, device, Budget(9.0, 1), monkeypatch)
    assert [row["m"] for row in found.rows] == [1, 1] and steps == 4
    assert found.missing == [("fast", 4, FULL), ("slow", 4, FULL)]
    monkeypatch.setattr("quantpub.kernels.moe.baseline", lambda name: (replace(LOOP, prepare=full), ""))
    budget = Budget(9.0, 1)
    found, numerics, steps = measured(layer, choices, device, budget, monkeypatch)
    assert found.missing == [(name, m, FULL) for name in ("fast", "slow") for m in (1, 4)]
    assert (found.rows, numerics, steps, budget.series) == ([], [], 4, 0)


def test_experts_without_room_are_listed(device: Device, layer: ExpertWeights) -> None:
    it = CudaExperts(layer, LOOP, [named("fast"), named("slow")], device.bench())
    assert it.cell(4, 0.0, 0.0) == ([], dict.fromkeys(("fast", "slow"), NO_ROOM))


def measured(
    layer: ExpertWeights, choices: Sequence[MoeChoice], device: Device, budget: Budget, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, Any, int]:
    steps = list[int]()
    monkeypatch.setattr(measure_moe, "load", lambda decoder, layer_, device_: layer)
    found, numerics = measure_experts(
        None, layer.layer, choices, (1, 4), device.bench(), budget, lambda: steps.append(1)  # type: ignore[arg-type]
    )  # fmt: skip
    return found, numerics, len(steps)


def test_a_layer_is_measured_at_every_m_on_the_kernels_that_take_it(
    device: Device, layer: ExpertWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantpub.kernels.moe.baseline", lambda name: (LOOP, ""))

    def broken(weights: ExpertWeights) -> Operands:
        raise NotImplementedError

    choices = [
        MoeChoice(named("fast"), None, {}),
        MoeChoice(named("slow", prepare=broken), None, {}),
        MoeChoice(named("not here"), "no such GPU", {}),
        MoeChoice(named("not for it"), None, {"mlp.experts": "too narrow"}),
    ]
    budget = Budget(9.0, 1)
    found, numerics, steps = measured(layer, choices, device, budget, monkeypatch)
    assert [(row["kernel"], row["m"]) for row in found.rows] == [("fast", 1), ("fast", 4)] and steps == 4
    assert found.missing == [("slow", m, "the op failed: NotImplementedError") for m in (1, 4)]
    assert [one["kernel"] for one in numerics] == ["bf16-loop", "fast"]
    assert budget.series == 0 and 0 < budget.seconds < 9


def test_without_a_baseline_nothing_is_timed_and_the_reason_is_said(
    device: Device, layer: ExpertWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantpub.kernels.moe.baseline", lambda name: (None, f"nothing on {name}"))
    budget = Budget(9.0, 2)
    found, numerics, _ = measured(layer, [MoeChoice(named("fast"), None, {})], device, budget, monkeypatch)
    assert found.missing == [("fast", 1, "nothing on cuda"), ("fast", 4, "nothing on cuda")]
    assert (found.rows, numerics, device.captured, budget) == ([], [], [], Budget(9.0, 1))


def test_kernels_for_experts_are_chosen_where_there_are_some(layer: ExpertWeights) -> None:
    one = layer.layer
    assert choose_moe([], "cuda", None) == []
    every = {choice.kernel.name: choice for choice in choose_moe([one], "cuda", None)}
    assert "bf16-loop" not in every and "torch-grouped" not in every and "vllm-marlin-moe" in every
    assert all(choice.unavailable and "mlp.experts" in choice.refused for choice in every.values())
    (marlin,) = choose_moe([one], "cuda", ["vllm-marlin-moe", "marlin"])
    assert marlin.unavailable == marlin.refused["mlp.experts"]  # no layer runs on it: the reason is the first one's
    assert marlin.as_json()["experts"] is True and marlin.as_json()["unavailable"] == marlin.unavailable
    (away,) = choose_moe([one], "cpu", ["vllm-marlin-moe"])
    assert away.unavailable == "it runs on cuda; this was measured on cpu"


def test_a_layer_that_one_of_two_kinds_refuses_is_refused_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = named("fast", devices=("cuda",), reject=lambda s, e, k, i: "too wide" if i > 32 else None)
    monkeypatch.setattr(measure_moe, "find", lambda table, what, name: kernel)
    layers = [plain().layer, replace(plain().layer, name="wide", intermediate=64)]
    choice = choose_moe(layers, "cuda", ["vllm-marlin-moe"])[0]
    assert (choice.unavailable, choice.refused) == (None, {"wide": "too wide"})


# whole layers

LLAMA = served(
    {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 100}
    | {"num_hidden_layers": 2}
)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The batches that layers were made for. Every op is there, and all take the same time."""
    seen = list[Any]()

    def layer(model: Any, batch: Any, *given: Any) -> Callable[[], None]:
        seen.append(batch)
        return lambda: None

    monkeypatch.setattr(whole_layer, "has", lambda name: True)
    monkeypatch.setattr(whole_layer, "_layer", layer)
    monkeypatch.setattr(whole_layer, "_steady", lambda calls: 12.34)
    monkeypatch.setattr(whole_layer, "_captured", lambda model, batch, attention: float(batch.tokens))
    return seen


def attention(name: str = "FA3") -> Any:
    return type("Attention", (), {"name": name})()


def test_whole_layers_need_the_engines_kernels_and_no_experts(
    batches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert whole_layer.whole_layers(replace(LLAMA, experts=8), 16384, attention()) == {}
    assert whole_layer.whole_layers(LLAMA, 16384, attention(f"torch, {STANDS_IN}")) == {}
    monkeypatch.setattr(whole_layer, "has", lambda name: False)
    assert whole_layer.whole_layers(LLAMA, 16384, attention()) == {} and batches == []


def test_prompts_fill_a_step_and_decodes_are_of_several_sizes(batches: list[Any]) -> None:
    found = whole_layer.whole_layers(LLAMA, 9000, attention())
    assert found["prompts"] == [2048, 8192, 12.3] and [batch.tokens for batch in batches] == [8192] * whole_layer.LAYERS
    assert found["decodes"] == [[b, c, float(b)] for b, c in whole_layer.DECODES]
    assert whole_layer.whole_layers(LLAMA, 1024, attention())["prompts"][:2] == [2048, 2048]


def test_what_is_steady_is_the_second_half(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[int]()

    def passes(calls: Sequence[Any], count: int) -> list[float]:
        asked.append(count)
        return [9.0, 9.0, 0.5] if count == 3 else [1.0, 1.0, 1.0, 6.0, 9.0, 7.5]

    monkeypatch.setattr(whole_layer, "passes_ms", passes)
    assert whole_layer._steady([lambda: None] * 3) == 2500.0
    assert asked == [3, round(1500 / 0.5)]


def test_vllm_is_missing_here() -> None:
    assert whole_layer.whole_layers(LLAMA, 16384, attention()) == {}


def test_the_probe_is_not_changed_by_what_follows(device: Device) -> None:
    """The activations that graphs read are turned around after the timing: a copy of the probe's."""
    it = gemm(device, HALF)
    before = it.baseline.probe.x_PK.clone()
    for m in (1, PROBE_ROWS, 100):
        it.cell(m, 0.0, 9.0)
    assert torch.equal(it.baseline.probe.x_PK, before) and torch.equal(before, make_probe(int4()).x_PK)
