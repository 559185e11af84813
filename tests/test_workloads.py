"""Workloads and GPUs: names, the written form, and errors that say what to write instead."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantpub.errors import UsageError
from quantpub.gpus import BF16, GPUS, find, of_device
from quantpub.hardware import GENERATIONS
from quantpub.workloads import WORKLOADS, Workload, parse


def test_the_four_workloads_are_those_that_the_gate_is_told() -> None:
    found = {name: (w.prompt, w.output, w.concurrency) for name, w in WORKLOADS.items()}
    assert found == {
        "interactive": (128, 128, (1, 2, 4, 8)),
        "serving": (512, 128, (100,)),
        "prefill-heavy": (2048, 128, (256,)),
        "decode-heavy": (128, 2048, (256,)),
    }
    assert WORKLOADS["serving"].tokens == 64_000


def test_a_custom_workload_sends_as_many_requests_as_fly_or_as_many_as_it_says() -> None:
    assert parse("1024:256@64") == Workload("1024:256@64", 1024, 256, (64,), 64, "as written on the command line")
    assert parse(" 8:4@2,1x10 ").requests == 10
    assert parse("serving") is WORKLOADS["serving"]


def test_several_levels_are_several_runs_of_the_same_requests() -> None:
    runs = WORKLOADS["interactive"].runs()
    assert [run.concurrency for run in runs] == [(1,), (2,), (4,), (8,)]
    assert {run.requests for run in runs} == {8}
    assert runs[2].name == "interactive@4"


@given(st.integers(1, 4096), st.integers(1, 4096), st.lists(st.integers(1, 99), min_size=1, max_size=4, unique=True))
def test_what_is_written_is_read_back(prompt: int, output: int, levels: list[int]) -> None:
    for requests in (max(levels), max(levels) + 7):
        made = Workload("", prompt, output, tuple(levels), requests, "")
        again = parse(made.written())
        assert (again.prompt, again.output, again.concurrency, again.requests) == (prompt, output, (*levels,), requests)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("servign", "did you mean serving"),
        ("nothing like it", "known: decode-heavy"),
        ("512:128", "PROMPT:OUTPUT@CONCURRENCY"),
        ("512@100", "PROMPT:OUTPUT@CONCURRENCY"),
        ("0:128@4", "at least 1"),
        ("12:12@8x4", "8 cannot be in flight when only 4 are sent"),
        ("12:12@8,8", "twice"),
        ("9999999:1@1", "too large"),
        ("1000000:1@1000000", "too large"),
    ],
)
def test_a_bad_workload_is_one_line_that_says_what_to_write(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gpu_is_found_however_it_is_spelled() -> None:
    assert find("h200").name == find("NVIDIA H200").name == "H200"
    assert find("rtx 4090") is find("RTX-4090") is find("rtx_4090")
    assert of_device("NVIDIA A100-SXM4-80GB") is GPUS["A100-80"]
    assert of_device("NVIDIA A100-PCIE-40GB") is GPUS["A100-40"]
    assert of_device("NVIDIA H20") is GPUS["H20"]
    assert of_device("NVIDIA L40S") is GPUS["L40S"]
    assert of_device("NVIDIA RTX PRO 6000 Blackwell Server Edition") is GPUS["RTX-PRO-6000"]
    assert of_device("Some Other Device") is None


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "H200"), ("NVIDIA H200 NVL", "H200-NVL"), ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIE"), ("NVIDIA H100 NVL", "H100-NVL"), ("NVIDIA A100 80GB PCIe", "A100-80"),
        ("A100-SXM4-40GB", "A100-40"), ("NVIDIA A10", "A10"), ("NVIDIA L4", "L4"), ("NVIDIA RTX A6000", "RTX-A6000"),
        ("NVIDIA GeForce RTX 3090", "RTX-3090"), ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX-PRO-6000"), ("NVIDIA B200", "B200"),
    ],
)  # fmt: skip
def test_a_driver_names_boards_in_full(device: str, name: str) -> None:
    assert of_device(device) is GPUS[name]


@pytest.mark.parametrize(
    "device",
    [
        "NVIDIA GH200 480GB", "NVIDIA GB200", "NVIDIA H200 MIG 1g.18gb", "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H100XM-80C", "NVIDIA A10-24Q", "NVIDIA A100X",
        "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 5090 Laptop GPU", "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti", "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
    ],
)  # fmt: skip
def test_a_part_of_a_gpu_and_a_board_that_is_like_another_are_not_guessed(device: str) -> None:
    assert of_device(device) is None and of_device(device, 80 << 30) is None


def test_the_devices_own_memory_counts_where_it_is_known() -> None:
    found = of_device("NVIDIA H100 NVL", 99_900_000_000)
    assert found is not None and (found.name, found.memory) == ("H100-NVL", 99_900_000_000)
    assert found.bandwidth == GPUS["H100-NVL"].bandwidth == 3.9e12 and GPUS["H100-NVL"].memory == 94 * 10**9
    assert of_device("NVIDIA H200", None) is GPUS["H200"] and of_device("Some Other Device", 1) is None


@pytest.mark.parametrize(("name", "says"), [("H20O", "H200"), ("A100", "A100-40 or A100-80"), ("abacus", "known: A10")])
def test_an_unknown_gpu_is_told_the_nearest(name: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        find(name)
    assert says in str(caught.value)


def test_the_table_of_gpus_is_consistent() -> None:
    for name, gpu in GPUS.items():
        assert gpu.name == name and gpu.generation in GENERATIONS and gpu.source
        assert 0.1e12 < gpu.bandwidth < 10e12 and gpu.memory >= 24e9
        assert all(gpu.rate(num) >= gpu.rate(BF16) for num in gpu.peak), "a narrower format is never slower"
        assert of_device(f"NVIDIA {name.replace('A100-40', 'A100-PCIE-40GB').replace('-', ' ')}") in (
            gpu,
            GPUS["A100-40"],
        )
