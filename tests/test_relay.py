"""One weight from layout to layout by blocks of rows: the bytes of packing it whole, whatever the block, or an error."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch

from quantpub import relay
from quantpub.layouts import LAYOUTS
from quantpub.layouts.base import Layout
from quantpub.pairs import HOLDS
from quantpub.qtensor import CODE_DTYPES, QTensor, same_bits, scale_dtype
from quantpub.registry import load
from quantpub.scheme import Scheme, preset

CUT = ("ct-pack", "gptq", "gptq-v2", "awq", "torchao-tile", "ct-nvfp4", "modelopt-nvfp4")
PAIRS = [(a, b, scheme) for a, b in permutations(CUT, 2) for scheme in HOLDS[a] if scheme in HOLDS[b]]


def layout_of(name: str) -> Layout:
    layout: Layout = load(LAYOUTS, "layout", name)
    return layout


def random_q(scheme: Scheme, n: int, k: int) -> QTensor:
    weight = scheme.weight
    low, high = {"int4": (-8, 8), "fp4_e2m1": (0, 16)}.get(weight.num, (-128, 128))
    codes = torch.randint(low, high, (n, k)).to(CODE_DTYPES[weight.num])
    scale = (torch.rand(weight.scale_shape(n, k)) + 0.5).to(scale_dtype(scheme, torch.bfloat16))
    zero = torch.randint(-8, 8, scale.shape).to(torch.int8) if weight.zero_domain == "int" else None
    one = torch.tensor(2.0**-9)
    calibrated = scheme.act is not None and scheme.act.calibrated
    return QTensor(scheme, codes, scale, zero, one if weight.global_scale else None, one if calibrated else None)


@pytest.mark.parametrize(("before", "after", "name"), PAIRS)
def test_a_weight_comes_through_in_blocks_of_any_size(
    before: str, after: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One word of rows at a time, a few, and a last block that is shorter than the others."""
    torch.manual_seed(0)
    n, k = 40, 256
    scheme = preset(name)
    q, source, target = random_q(scheme, n, k), layout_of(before), layout_of(after)
    sides = relay.Side(source, scheme), relay.Side(target, scheme)
    due = target.pack(q)
    for block in (1, 8 * k, 3 * 8 * k - 1, 1 << 22):
        monkeypatch.setattr(relay, "BLOCK", block)
        made = relay.relay(source.pack(q), *sides, (n, k), target.spec(scheme, n, k, "BF16"), lambda part: part)
        assert made.keys() == due.keys()
        assert all(same_bits(made[suffix], due[suffix]) for suffix in due)


@pytest.mark.parametrize("after", ["gptq", "awq"])
def test_what_does_not_read_back_is_an_error(after: str) -> None:
    """A layout that packs its scales wrong, with words handed over and without."""
    scheme = preset("W4A16")
    source, target = layout_of("ct-pack"), layout_of(after)

    def faulty(q: QTensor) -> dict[str, torch.Tensor]:
        tensors = target.pack(q)
        return tensors | {"scales": tensors["scales"] * 2}

    side = relay.Side(replace(target, pack=faulty), scheme)
    found = source.pack(random_q(scheme, 16, 128))
    spec: Any = target.spec(scheme, 16, 128, "BF16")
    with pytest.raises(relay.Unlike):
        relay.relay(found, relay.Side(source, scheme), side, (16, 128), spec, lambda part: part)


def test_rows_that_are_no_whole_blocks_go_through_at_once() -> None:
    scheme, shape = preset("W4A16"), (20, 128)
    source, target = layout_of("ct-pack"), layout_of("torchao-tile")
    q, spec = random_q(scheme, *shape), target.spec(scheme, *shape, "BF16")
    sides = relay.Side(source, scheme), relay.Side(target, scheme)
    made = relay.relay(source.pack(q), *sides, shape, spec, lambda part: part)
    assert all(same_bits(made[suffix], tensor) for suffix, tensor in target.pack(q).items())
