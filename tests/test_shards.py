"""Shards as bytes: the writer equals the safetensors library, the reader finds every kind of damage."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from quantpub.errors import InputError, UnavailableError
from quantpub.shards import DTYPES, NAMES, ShardWriter, build_header, raw_bytes, read_header

tensors = st.dictionaries(
    st.text("abcdefg._0123456789", min_size=1, max_size=12),
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3)),
    min_size=1,
    max_size=8,
)


def fill(dtype: str, shape: list[int], seed: int) -> torch.Tensor:
    count = torch.Size(shape).numel() * DTYPES[dtype].itemsize
    raw = torch.randint(
        0, 2 if dtype == "BOOL" else 256, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    return raw.view(DTYPES[dtype]).view(shape)


@settings(max_examples=60, deadline=None)
@given(specs=tensors, seed=st.integers(0, 1000))
def test_files_equal_the_librarys(
    tmp_path_factory: pytest.TempPathFactory, specs: dict[str, tuple[str, list[int]]], seed: int
) -> None:
    path = tmp_path_factory.mktemp("shard") / "model.safetensors"
    made = {name: fill(dtype, shape, seed + i) for i, (name, (dtype, shape)) in enumerate(specs.items())}
    writer = ShardWriter(path, {n: (NAMES[t.dtype], tuple(t.shape)) for n, t in made.items()}, {"format": "pt"})
    for name, tensor in made.items():
        writer.write(name, raw_bytes(tensor))
    writer.commit()
    assert path.read_bytes() == save(made, {"format": "pt"})


def test_pieces_land_in_their_places(tmp_path: Path) -> None:
    x = torch.arange(100, dtype=torch.float32)
    writer = ShardWriter(tmp_path / "a.safetensors", {"x": ("F32", (100,))}, {})
    data = raw_bytes(x)
    writer.write("x", data[200:], 200)
    writer.write("x", data[:200], 0)
    writer._open.clear()  # the last piece came first
    writer.commit()
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], x)


def test_an_unwritten_tensor_is_never_committed(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a.safetensors", {"x": ("F32", (4,)), "y": ("F32", (4,))}, {})
    writer.write("x", raw_bytes(torch.zeros(4)))
    with pytest.raises(AssertionError, match="y"):
        writer.commit()
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def damaged(path: Path, change: str) -> bytes:
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    return {
        "truncated": whole[:-10],
        "longer": whole + b"\0" * 10,
        "header cut": whole[: 8 + length // 2],
        "empty": b"",
        "not json": whole[:8] + b"{" + b"x" * (length - 1) + whole[8 + length :],
        "huge header": (2**60).to_bytes(8, "little") + whole[8:],
        "wrong offsets": whole.replace(b"[0,", b"[4,"),
    }[change]


@pytest.mark.parametrize(
    "change", ["truncated", "longer", "header cut", "empty", "not json", "huge header", "wrong offsets"]
)
def test_damage_is_one_clear_error(tmp_path: Path, change: str) -> None:
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    good.write_bytes(save({"x": torch.ones(64), "y": torch.ones(3)}))
    assert set(read_header(good)[0]) == {"x", "y"}
    bad.write_bytes(damaged(good, change))
    with pytest.raises(InputError) as caught:
        read_header(bad)
    assert "bad.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(InputError, match="F4"):
        read_header(tmp_path / "a.safetensors")


def test_no_room_is_found_before_the_first_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UnavailableError, match="no space left"):
        ShardWriter(tmp_path / "a.safetensors", {"x": ("F32", (4,))}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", ["sha256_file", "os.fsync"])
def test_a_disk_that_fails_at_the_end_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """Of the two that run side by side either may fail."""

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    writer = ShardWriter(tmp_path / "a.safetensors", {"x": ("F32", (4,))}, {})
    writer.write("x", raw_bytes(torch.zeros(4)))
    monkeypatch.setattr(f"quantpub.shards.{failing}", broken)
    with pytest.raises(UnavailableError, match=r"a\.safetensors"):
        writer.commit()
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_headers_are_deterministic_in_any_order() -> None:
    specs = {"b": ("F32", (2,)), "a": ("I64", (1,)), "c": ("BF16", (4,))}
    assert build_header(specs, {"format": "pt"})[0] == build_header(dict(reversed(specs.items())), {"format": "pt"})[0]
