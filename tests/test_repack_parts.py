"""The parts of a repack by themselves: blocks, proofs, bytes that are copied, and numbers that a layout has no place for."""

from __future__ import annotations

import errno
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from quantpub import relay, shards
from quantpub.errors import InputError
from quantpub.layouts import LAYOUTS, gptq_zeros
from quantpub.layouts.base import Cut
from quantpub.layouts.words import pack_bytes, pack_words
from quantpub.pairs import CONVERSIONS
from quantpub.qtensor import QTensor, same_bits
from quantpub.registry import load
from quantpub.repack_proof import Tally
from quantpub.repacking import Route
from quantpub.scheme import Scheme, preset

# ---- blocks


def test_a_block_is_whole_in_both_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 rows and of 6: 12, or no block where 12 do not divide the whole."""
    four, six = Cut(4, {}), Cut(6, {})
    assert relay._rows((24, 8), four, six) == 24 * (relay.BLOCK // (8 * 24))
    monkeypatch.setattr(relay, "BLOCK", 1)
    assert relay._rows((24, 8), four, six) == 12 and relay._rows((24, 8), four, four) == 4
    assert relay._rows((20, 8), four, six) is None and relay._rows((24, 8), four, None) is None
    monkeypatch.setattr(relay, "BLOCK", 8 * 25)
    assert relay._rows((48, 8), four, six) == 24


def test_the_last_block_is_what_is_left() -> None:
    assert list(relay._blocks(40, 16)) == [(0, 16), (16, 32), (32, 40)]


def test_equal_numbers_of_another_dtype_are_other_bits() -> None:
    zeros = torch.zeros(16, dtype=torch.int8)
    assert same_bits(zeros, zeros.clone()) and not same_bits(zeros, zeros.view(torch.uint8))
    assert not same_bits(torch.zeros(2, dtype=torch.float16), torch.zeros(2, dtype=torch.bfloat16))
    assert not same_bits(torch.zeros(1), torch.tensor([-0.0])) and not same_bits(zeros, zeros.view(4, 4))
    assert same_bits(None, None) and not same_bits(None, zeros)


# ---- proofs


def fp4(glob: float) -> QTensor:
    codes, scale = torch.zeros(2, 16, dtype=torch.uint8), torch.ones(2, 1).to(torch.float8_e4m3fn)
    return QTensor(preset("NVFP4A16"), codes, scale, global_scale=torch.tensor(glob))


def moving(*factors: float) -> Tally:
    """A layout that moves the global scale of one block after another by these."""
    left = list(factors)

    def nearest(q: QTensor) -> QTensor:
        assert q.global_scale is not None
        factor = left.pop(0)
        return q if factor == 1 else replace(q, global_scale=(q.global_scale.double() * factor).float())

    layout = replace(load(LAYOUTS, "layout", "ct-nvfp4"), nearest=nearest)
    return Tally("m", Route(layout, preset("NVFP4A16"), None))


@pytest.mark.parametrize("factors", [(1 + 2**-23, 1), (1, 1 + 2**-23)])
def test_what_was_rounded_in_any_block_is_in_the_proof(factors: tuple[float, float]) -> None:
    tally = moving(*factors)
    for _ in factors:
        tally.through(fp4(1.0))
    assert tally.proof().rounded == 2**-23 and not tally.proof().equal and tally.proof().lost == 0
    still = moving(1, 1)
    assert still.through(fp4(1.0)).global_scale == 1 and still.proof().equal and still.proof().rounded == 0


def test_a_number_that_moves_by_more_than_its_last_place_is_refused() -> None:
    moving(1 + 2**-22).through(fp4(1.0))
    with pytest.raises(InputError, match=r"m: ct-nvfp4 cannot hold its global scales: .* 3\.6e-07 of them away"):
        moving(1 + 3 * 2**-23).through(fp4(1.0))


def test_a_loss_is_that_of_all_blocks() -> None:
    """Of two blocks of one weight the second alone moves."""
    each = next(c for c in CONVERSIONS if c.name == "bf16-scale")
    route = Route(load(LAYOUTS, "layout", "gptq"), preset("W4A16", 32), each, "BF16")
    tally, codes = Tally("m", route), torch.ones(1, 32, dtype=torch.int8)
    near = 1 + 2**-10  # of fp16; bf16 has 1
    for scale in (4.0, 3.0 * near):
        tally.through(QTensor(preset("W4A16", 32), codes, torch.tensor([[scale]], dtype=torch.float16)))
    second = float(torch.tensor(3.0 * near, dtype=torch.float16))
    moved = abs(float(torch.tensor(second).bfloat16()) - second)
    proof = tally.proof()
    assert moved > 0 and not proof.equal
    assert proof.lost == pytest.approx(moved / math.hypot(4, second))


# ---- bytes


def copied(folder: Path, held: bytes, nbytes: int) -> bytes:
    source, target = folder / "source", folder / "a.safetensors"
    source.write_bytes(b"head" + held)
    writer = shards.ShardWriter(target, {"x": ("U8", (nbytes,))}, {})
    try:
        with source.open("rb") as f:
            half = nbytes // 2
            writer.copy("x", f.fileno(), 4, half)
            writer.copy("x", f.fileno(), 4 + half, nbytes - half, half)
        writer.commit()
    finally:
        writer.abandon()
    return bytes(load_file(target)["x"].numpy().tobytes())


KINDS = ["by the kernel", "in pieces", *(errno.errorcode[n] for n in (errno.EXDEV, errno.EINVAL, errno.ENOSYS))]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_copied_also_where_the_kernel_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    data, real = os.urandom(10_007), os.copy_file_range

    def another(source: int, target: int, count: int, *rest: Any) -> int:
        if kind == "in pieces":
            return real(source, target, min(count, 999), *rest)
        raise OSError(getattr(errno, kind), "not between these")

    if kind != KINDS[0]:
        monkeypatch.setattr(os, "copy_file_range", another)
    monkeypatch.setattr(shards, "COPIED", 1000)
    assert copied(tmp_path, data, len(data)) == data
    with pytest.raises(InputError, match="became shorter while it was read"):
        copied(tmp_path, data[:-1], len(data))
    assert not list(tmp_path.glob(".tmp-*"))


def test_another_error_of_copying_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(Exception, match="no space left on device"):
        copied(tmp_path, b"1234", 4)


# ---- numbers


def test_the_nearest_reciprocal_is_found_among_many() -> None:
    """By numpy, among the 17 float32 divisors about 1/x."""
    torch.manual_seed(0)
    layout = load(LAYOUTS, "layout", "ct-nvfp4")
    for x in (torch.rand(300) * 3 + 0.001).tolist():
        found = layout.nearest(fp4(x)).global_scale.item()
        near = np.float32(1) / np.float32(x)
        divisors = np.arange(-8, 9, dtype=np.int32) + near.view(np.int32)
        reached = np.float32(1) / divisors.view(np.float32)
        assert abs(found - np.float32(x)) == np.abs(reached.astype(float) - np.float32(x)).min()
        assert layout.nearest(fp4(found)).global_scale.item() == found


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_of_gptqs_first_version_that_say_nothing_certain(bits: int) -> None:
    """Stored as zero - 1: the middle less one of symmetric weights, and the last of all, which may be a borrow."""
    pack, last = (pack_words, 7) if bits == 4 else (pack_bytes, 127)
    scheme: Scheme = preset("W4A16" if bits == 4 else "W8A16", 32)
    zeros = preset("W4A16_ASYM", 32)
    middle = torch.full((2, 8), -1, dtype=torch.int8)
    assert gptq_zeros.LAYOUT.ambiguous({"qzeros": pack(middle)}, scheme, (8, 64)) is None
    for place in ((0, 0), (1, 7)):
        odd = middle.clone()
        odd[place] = 0
        assert "not those of symmetric" in str(gptq_zeros.LAYOUT.ambiguous({"qzeros": pack(odd)}, scheme, (8, 64)))
        if bits == 4:
            assert gptq_zeros.LAYOUT.ambiguous({"qzeros": pack(odd)}, zeros, (8, 64)) is None
            odd[place] = last
            assert "stored as 15" in str(gptq_zeros.LAYOUT.ambiguous({"qzeros": pack(odd)}, zeros, (8, 64)))
            odd[place] = last - 1
            assert gptq_zeros.LAYOUT.ambiguous({"qzeros": pack(odd)}, zeros, (8, 64)) is None
    order = {"qzeros": pack(middle), "scales": torch.ones(2, 8), "g_idx": torch.arange(64) // 32}
    assert gptq_zeros.LAYOUT.ambiguous(order, scheme, (8, 64)) is None
    order["g_idx"] = order["g_idx"].flip(0)
    assert "(g_idx)" in str(gptq_zeros.LAYOUT.ambiguous(order, scheme, (8, 64)))
