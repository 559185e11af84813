"""What is worked on in blocks: the same bytes whatever the blocks and threads, and no more memory than the plan says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import OFFLINE, ROOT, needed

from quantpub.algorithms import ALGORITHMS, base
from quantpub.layouts import torchao_tile, words
from quantpub.qtensor import QTensor, same
from quantpub.registry import load
from quantpub.scheme import PRESETS, Scheme
from quantpub.stats import Stats

PAIRS = [
    (name, scheme)
    for name in ALGORITHMS
    for scheme in PRESETS
    if load(ALGORITHMS, "algorithm", name).reject(PRESETS[scheme]) is None
]
PACKERS: list[tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor], int, int]] = [
    (words.pack_words, words.unpack_words, -8, 8),
    (words.pack_nibbles, words.unpack_nibbles, 0, 16),
    (torchao_tile.pack_tiles, torchao_tile.unpack_tiles, -8, 8),
]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def quantized(name: str, scheme: Scheme, w: torch.Tensor) -> QTensor:
    algorithm = load(ALGORITHMS, "algorithm", name)
    done: QTensor = algorithm.quantize(w, needed(algorithm, scheme, w), scheme, algorithm.params())
    return done


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scheme"), PAIRS)
@pytest.mark.parametrize("shape", [(1, 40960), (33, 4096)])
def test_bytes_do_not_hang_on_threads(
    name: str, scheme: str, shape: tuple[int, int], threads: Callable[[int], None]
) -> None:
    """One long row too: torch splits a sum with a single output over its threads."""
    if name == "gptq":
        shape = (shape[0], min(shape[1], 1024))  # its Hessian is as wide as that, squared
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul_(0.02)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(quantized(name, PRESETS[scheme], w))
    assert same(found[0], found[1]) and same(found[0], found[2])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scheme"), [p for p in PAIRS if PRESETS[p[1]].weight.block[0] == 1])
def test_bytes_do_not_hang_on_the_size_of_blocks(name: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(37, 2048, generator=torch.Generator().manual_seed(2)).mul_(0.02)
    whole = quantized(name, PRESETS[scheme], w)
    for elements in (1 << 12, 1 << 14):  # blocks of 2 and 8 rows, a single one at the end
        monkeypatch.setattr(base, "BLOCK_ELEMENTS", elements)
        assert same(quantized(name, PRESETS[scheme], w), whole)


@pytest.mark.parametrize(("pack", "unpack", "low", "high"), PACKERS, ids=lambda value: getattr(value, "__name__", ""))
def test_packing_in_blocks_equals_packing_at_once(
    pack: Callable[[torch.Tensor], torch.Tensor],
    unpack: Callable[[torch.Tensor], torch.Tensor],
    low: int,
    high: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codes = torch.randint(low, high, (200, 1024), generator=torch.Generator().manual_seed(3))
    codes = codes.to(torch.uint8 if low == 0 else torch.int8)
    whole = pack(codes)
    monkeypatch.setattr(words, "BLOCK_ELEMENTS", 1 << 14)
    assert torch.equal(pack(codes), whole) and torch.equal(unpack(whole), codes)


@pytest.mark.parametrize("name", ["search", "hqq"])
@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W4A16_FLOAT_ZERO"])
def test_a_group_of_channels_that_are_always_zero(name: str, scheme: str) -> None:
    algorithm, moment = load(ALGORITHMS, "algorithm", name), torch.ones(512)
    if algorithm.reject(PRESETS[scheme]):
        return
    moment[128:384] = 0
    w = torch.randn(8, 512, generator=torch.Generator().manual_seed(4)).bfloat16()
    q = algorithm.quantize(w, Stats(moment), PRESETS[scheme], algorithm.params())
    assert all(bool(torch.isfinite(t.float()).all()) for t in (q.scale, q.zero) if t is not None)


MEASURE = """
import sys, threading
from pathlib import Path
from quantpub.checkpoint import open_checkpoint
from quantpub.plan import make_plan
from quantpub.plan_facts import peak_memory
from quantpub.quantize import quantize
from quantpub.recipe import load_recipe
recipe = load_recipe(sys.argv[2])
layout = recipe.layouts([], [])[0]
plan = make_plan(open_checkpoint(sys.argv[1]), recipe, layout)
quantize([plan], Path(sys.argv[3]))
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak << 10, peak_memory(plan))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four linears of 28 Mi weights, 56 MiB each in bf16."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("wide")
    rows = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    tall, flat = rows.repeat(112, 1), rows.repeat(64, 1).view(4096, 4096).repeat(1, 2)[:, :7168].contiguous()
    at = "model.layers.{}.mlp."
    tensors = {at.format(0) + f"{name}_proj.weight": tall.clone() for name in ("gate", "up")}
    tensors |= {at.format(0) + "down_proj.weight": flat.clone()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w4a16-rtn", "w4a16-asym", "int4-hqq-tile", "mxfp4", "nvfp4a16", "fp8-dynamic"])
def test_the_plans_peak_memory_holds(recipe: str, wide: Path, tmp_path: Path) -> None:
    env = {**os.environ, **OFFLINE, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURE, wide, recipe, tmp_path / "out"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    measured, planned = map(int, done.stdout.split())
    assert measured < planned * 1.05, f"{measured >> 20} MiB, {planned >> 20} planned"
    assert measured > planned * 0.45, "an estimate twice too high helps nobody"
