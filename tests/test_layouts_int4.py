"""gptq, awq, torchao-tile, marlin, machete: lossless or rejected, by hand, and against the bytes of those who read them."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load as read
from safetensors.torch import save as write

from quantpub.layouts import KERNEL_LAYOUTS, LAYOUTS, awq, gptq, machete, marlin, torchao_tile
from quantpub.layouts.base import Layout, Tensors
from quantpub.qtensor import QTensor, dequantize, same
from quantpub.registry import load
from quantpub.scheme import WHOLE, Scheme, WeightFormat, preset
from quantpub.shards import DTYPES

GOLDEN = Path(__file__).parent / "golden"
ALL = {"gptq": gptq, "awq": awq, "torchao-tile": torchao_tile, "marlin": marlin, "machete": machete}
SCHEMES = ("W4A16", "W4A16_ASYM", "W4A16_FLOAT_ZERO", "W8A16")
OWN = {
    "gptq": {"W4A16", "W8A16"},
    "awq": {"W4A16", "W4A16_ASYM"},
    "torchao-tile": {"W4A16", "W4A16_FLOAT_ZERO"},
    "marlin": {"W4A16", "W4A16_ASYM", "W8A16"},
    "machete": {"W4A16", "W4A16_ASYM", "W8A16"},
}


def script(name: str) -> ModuleType:
    """A script of scripts/goldens, for the formulas of its codes, scales and zeros."""
    spec = importlib.util.spec_from_file_location(name, GOLDEN.parents[1] / "scripts" / "goldens" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MADE = script("int4_cuda")


def golden(name: str) -> tuple[Tensors, dict[str, str]]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as f:
        return {key: f.get_tensor(key) for key in f.keys()}, f.metadata()  # noqa: SIM118


def cases(name: str, suffix: str) -> list[tuple[str, torch.Tensor]]:
    found = [(key.removesuffix(suffix), tensor) for key, tensor in golden(name)[0].items() if key.endswith(suffix)]
    assert found
    return found


def numbers(case: str) -> dict[str, int]:
    """`b4_n64_k128_g-1` → b, n, k, g."""
    return {name: int(value) for name, value in re.findall(r"(?:^|_)([bnkg])(-?\d+)", case)}


def made(n: int, k: int, bits: int, g: int, zeros: str = "none", dtype: torch.dtype = torch.bfloat16) -> QTensor:
    """The QTensor of the codes, scales and zeros that the scripts packed."""
    groups, half = (1 if g == WHOLE else k // g), 1 << bits - 1
    scheme = Scheme("made", WeightFormat(f"int{bits}", (1, g), zero_domain=zeros))
    zero = {
        "none": None,
        "int": (MADE.codes(groups, n, 4, 3) - 8).to(torch.int8).T.contiguous(),
        "float": MADE.float_zeros(groups, n, dtype).T.contiguous(),
    }[zeros]
    codes = (MADE.codes(n, k, bits) - half).to(torch.int8)
    return QTensor(scheme, codes, MADE.scales(groups, n, dtype).T.contiguous(), zero)


def hexadecimal(words: torch.Tensor) -> list[str]:
    return [hex(word & 0xFFFFFFFF) for word in words.flatten().tolist()]


def counted(n: int, k: int, scheme: str = "W4A16", group: int = 32) -> QTensor:
    """Codes −8, −7, … along each row, from another start in each."""
    codes = ((torch.arange(n)[:, None] + torch.arange(k)) % 16 - 8).to(torch.int8)
    zero = (torch.arange(n * (k // group)).view(n, -1) % 16 - 8).to(torch.int8) if scheme == "W4A16_ASYM" else None
    return QTensor(preset(scheme, group), codes, torch.ones(n, k // group, dtype=torch.bfloat16), zero)


# ---- lossless or rejected


def random_q(scheme: Scheme, n: int, k: int, dtype: torch.dtype, seed: int) -> QTensor:
    """Any codes, any scales, negative ones and zero too, any zeros."""
    generator = torch.Generator().manual_seed(seed)
    bits, shape = scheme.weight.number.bits, scheme.weight.scale_shape(n, k)
    half = 1 << bits - 1
    codes = torch.randint(-half, half, (n, k), generator=generator, dtype=torch.int8)
    scale = torch.randn(shape, generator=generator).to(dtype)
    scale[0, 0] = 0
    zero = {
        "none": None,
        "int": torch.randint(-half, half, shape, generator=generator, dtype=torch.int8),
        "float": torch.randn(shape, generator=generator).to(dtype),
    }[scheme.weight.zero_domain]
    return QTensor(scheme, codes, scale, zero)


sides = st.one_of(st.integers(1, 300), st.sampled_from([64, 128, 192, 256, 384]))


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=80, deadline=None)
@given(
    scheme_name=st.sampled_from(SCHEMES),
    n=sides,
    k=sides,
    group=st.sampled_from([WHOLE, 16, 32, 64, 128, 256]),
    stored=st.sampled_from(["BF16", "F16", "F32"]),
    seed=st.integers(0, 2**31),
)
@example(scheme_name="W4A16", n=8, k=8, group=WHOLE, stored="F16", seed=5)
@example(scheme_name="W4A16_ASYM", n=8, k=1, group=WHOLE, stored="F16", seed=6)
@example(scheme_name="W8A16", n=4, k=4, group=WHOLE, stored="BF16", seed=7)
@example(scheme_name="W4A16", n=128, k=128, group=64, stored="BF16", seed=0)
@example(scheme_name="W4A16_ASYM", n=128, k=192, group=64, stored="F16", seed=1)
@example(scheme_name="W4A16_FLOAT_ZERO", n=12, k=1280, group=256, stored="BF16", seed=2)
@example(scheme_name="W8A16", n=128, k=64, group=WHOLE, stored="F16", seed=3)
@example(scheme_name="W8A16", n=128, k=64, group=64, stored="BF16", seed=4)
def test_lossless_or_rejected(name: str, scheme_name: str, n: int, k: int, group: int, stored: str, seed: int) -> None:
    layout: Layout = ALL[name].LAYOUT
    scheme = preset(scheme_name, group)
    reason = layout.reject(scheme, n, k, stored)
    if reason is not None:
        assert str(k) in reason or scheme.name in reason
        return
    q = random_q(scheme, n, k, DTYPES[stored], seed)
    tensors = layout.pack(q)
    assert same(layout.unpack(read(write(tensors)), scheme, (n, k)), q)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    spec = layout.spec(scheme, n, k, stored)
    assert {s: (DTYPES[d], shape) for s, (d, shape) in spec.items()} == {
        s: (t.dtype, tuple(t.shape)) for s, t in tensors.items()
    }


@pytest.mark.parametrize("name", ALL)
def test_each_holds_its_own_schemes(name: str) -> None:
    layout: Layout = ALL[name].LAYOUT
    assert {s for s in SCHEMES if layout.reject(preset(s), 256, 1024, "BF16") is None} == OWN[name]
    assert load(LAYOUTS | KERNEL_LAYOUTS, "layout", name) is layout
    assert layout.kind == ("kernel" if name in KERNEL_LAYOUTS else "checkpoint")


@pytest.mark.parametrize(
    ("name", "scheme", "shape", "dtype", "reason"),
    [
        ("gptq", preset("W4A16_ASYM"), (64, 128), "BF16", "cannot store every zero"),
        ("gptq", preset("W4A16", 256), (64, 512), "BF16", "groups of"),
        ("gptq", preset("W4A16"), (60, 128), "BF16", "[60, 128]"),
        ("gptq", preset("W8A16"), (60, 100), "F16", None),
        ("gptq", preset("W4A16"), (64, 128), "F32", "not F32"),
        ("gptq", preset("W4A16"), (64, 192), "BF16", "group size 128"),
        ("awq", preset("W4A16_FLOAT_ZERO"), (64, 128), "F16", "float ones"),
        ("awq", preset("W4A16_ASYM", WHOLE), (8, 99), "F16", None),
        ("awq", preset("W4A16_ASYM"), (12, 128), "F16", "out_features of [12, 128]"),
        ("torchao-tile", preset("W4A16_FLOAT_ZERO"), (12, 128), "BF16", None),
        ("torchao-tile", preset("W4A16_FLOAT_ZERO"), (12, 128), "F16", "bf16 only"),
        ("torchao-tile", preset("W4A16_ASYM"), (16, 1024), "BF16", "would round"),
        ("torchao-tile", preset("W4A16", WHOLE), (16, 1024), "BF16", "groups of"),
        ("marlin", preset("W4A16"), (64, 128), "F16", None),
        ("marlin", preset("W4A16", 64), (128, 64), "F16", None),
        ("marlin", preset("W4A16", 64), (64, 64), "F16", "tiles"),
        ("marlin", preset("W4A16", 256), (128, 256), "F16", "groups of"),
        ("machete", preset("W4A16", 32), (128, 128), "F16", "groups of"),
        ("machete", preset("W4A16"), (64, 128), "F16", "blocks of 128×64"),
        ("machete", preset("W8A8"), (128, 128), "F16", "W8A8"),
    ],
)
def test_rejects_with_a_reason(
    name: str, scheme: Scheme, shape: tuple[int, int], dtype: str, reason: str | None
) -> None:
    found = ALL[name].reject(scheme, *shape, dtype)
    assert found is None if reason is None else reason in str(found)


# ---- by hand


def test_gptq_by_hand() -> None:
    """A column's codes 0 … 15 are two words; the zero in the middle is stored less one; no act order."""
    tensors = gptq.pack(counted(8, 64))
    assert hexadecimal(tensors["qweight"][:2, 0]) == ["0x76543210", "0xfedcba98"]
    assert hexadecimal(tensors["qweight"][:1, 1]) == ["0x87654321"]
    assert hexadecimal(tensors["qzeros"]) == ["0x77777777"] * 2
    assert tensors["g_idx"].tolist() == [0] * 32 + [1] * 32
    eight = QTensor(preset("W8A16"), torch.tensor([[-128, -1, 0, 127]] * 4, dtype=torch.int8), torch.ones(4, 1))
    assert hexadecimal(gptq.pack(eight)["qweight"]) == ["0xff807f00"] * 4
    assert hexadecimal(gptq.pack(eight)["qzeros"]) == ["0x7f7f7f7f"]


def test_awq_by_hand() -> None:
    """Codes 0 … 7 of eight columns; symmetric weights have the zero 8 everywhere, and none again when they come back."""
    q = counted(8, 32)
    tensors = awq.pack(q)
    assert hexadecimal(tensors["qweight"][:2]) == ["0x75316420", "0x86427531"]
    assert hexadecimal(tensors["qzeros"]) == ["0x88888888"]
    assert awq.unpack(tensors, q.scheme, q.shape).zero is None
    assert hexadecimal(awq.pack(counted(8, 32, "W4A16_ASYM"))["qzeros"]) == ["0x75316420"]


def test_tiles_by_hand() -> None:
    """Lane 5 of a tile holds row 1; its word 2 begins at column 32·2 + 2·1."""
    word = torchao_tile.pack_tiles(counted(8, 128).codes_NK)[0, 0, 5, 2]
    columns = [66, 74, 82, 90, 67, 75, 83, 91]
    assert word & 0xFFFFFFFF == sum((1 + column) % 16 << 4 * i for i, column in enumerate(columns))


def literal_tiles(codes_NK: torch.Tensor) -> torch.Tensor:
    """tinygemm's packing, one word after the other: each thread takes four pairs of two 16-column tiles."""
    n, k = codes_NK.shape
    words = torch.zeros(n // 8, k // 128, 32, 4, dtype=torch.int64)
    for i, j, lane, m in torch.cartesian_prod(*map(torch.arange, words.shape)).tolist():
        row, first = codes_NK[8 * i + lane // 4].tolist(), 128 * j + 32 * m + 2 * (lane % 4)
        for half in range(2):
            for step in range(4):
                words[i, j, lane, m] |= (row[first + 8 * step + half] + 8) << 4 * (4 * half + step)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


@pytest.mark.parametrize(("n", "k"), [(8, 128), (16, 256), (24, 128)])
def test_tiles_equal_the_literal_loop(n: int, k: int) -> None:
    codes = (MADE.codes(n, k, 4, n) - 8).to(torch.int8)
    assert torch.equal(torchao_tile.pack_tiles(codes), literal_tiles(codes))


def test_machete_zeros_by_hand() -> None:
    """A zero is stored as −scale · (zero + 8), one rounding: 1.0078125 · 15 is 15.117…, in bf16 15.125."""
    zero, scale = torch.full((128, 1), 7, dtype=torch.int8), torch.full((128, 1), 1.0078125, dtype=torch.bfloat16)
    q = QTensor(preset("W4A16_ASYM", 64), torch.zeros(128, 64, dtype=torch.int8), scale, zero)
    assert machete.pack(q)["b_group_zeros"].float().unique().tolist() == [-15.125]


# ---- against the operators that read them, on an H200


@pytest.mark.parametrize(("case", "packed"), cases("torchao_cuda", ".packed"))
def test_tiles_equal_the_cuda_operator(case: str, packed: torch.Tensor) -> None:
    size = numbers(case)
    codes = (MADE.codes(size["n"], size["k"], 4) - 8).to(torch.int8)
    assert torch.equal(torchao_tile.pack_tiles(codes), packed)
    assert torch.equal(torchao_tile.unpack_tiles(packed), codes)


@pytest.mark.parametrize(("case", "qweight"), cases("marlin_cuda", ".qweight"))
def test_marlin_weights_equal_the_repack(case: str, qweight: torch.Tensor) -> None:
    size = numbers(case)
    assert torch.equal(marlin.pack(made(size["n"], size["k"], size["b"], WHOLE))["qweight"], qweight)


@pytest.mark.parametrize("tensor", ["scales", "qzeros"])
def test_marlin_scales_and_zeros_equal_the_helpers(tensor: str) -> None:
    for case, expected in cases("marlin_cuda", f".{tensor}"):
        size = numbers(case)
        packed = marlin.pack(made(size["n"], size["k"], 4, size["g"], "int"))
        assert torch.equal(packed[tensor], expected), case


@pytest.mark.parametrize(("case", "prepacked"), cases("machete_cuda", ".prepacked"))
def test_machete_weights_equal_the_prepack(case: str, prepacked: torch.Tensor) -> None:
    size, bits = numbers(case), 8 if "uint8" in case else 4
    assert torch.equal(machete.pack(made(size["n"], size["k"], bits, WHOLE))["b_q"].flatten(), prepacked)


def kernel_case(case: str, file: str) -> tuple[int, str, torch.dtype]:
    """Bits, zero domain and dtype of one weight that a kernel made of the identity."""
    zeros = {"torchao_cuda": "float", "awq_cuda": "int"}.get(file, "int" if "uint4_" in case else "none")
    return 8 if "uint8" in case else 4, zeros, torch.float16 if file in ("gptq_cuda", "awq_cuda") else torch.bfloat16


@pytest.mark.parametrize("file", ["torchao_cuda", "marlin_cuda", "machete_cuda", "gptq_cuda", "awq_cuda"])
def test_kernels_see_the_dequantized_weight(file: str) -> None:
    """Law 1 on the real kernels, scales of both signs: their weight is ours, rounded to their dtype.

    Machete adds a zero that was rounded before, so there the two roundings are done here as well.
    """
    for case, weight in cases(file, ".weight"):
        size, (bits, zeros, dtype) = numbers(case), kernel_case(case, file)
        q = made(size["n"], size["k"], bits, size["g"], zeros, dtype)
        expected = dequantize(q)
        if file == "machete_cuda" and zeros == "int":
            operands = machete.pack(q)
            products = (q.codes_NK.float() + 8) * operands["b_group_scales"].T.float()
            expected = products + operands["b_group_zeros"].T.float()
        assert torch.equal(weight, expected.to(dtype)[: len(weight)]), case


# ---- against GPTQModel and torchao


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_bytes_and_weights_equal_gptqmodels(name: str) -> None:
    """Its packers' words, and its dequantization of them in the dtype of the scales."""
    tensors, _ = golden(f"{name}_gptqmodel")
    for case in sorted({key.split(".")[0] for key in tensors}):
        size, theirs = numbers(case), {key.split(".")[1]: t for key, t in tensors.items() if key.startswith(f"{case}.")}
        weight, dtype = theirs.pop("weight"), theirs["scales"].dtype
        q = made(size["n"], size["k"], size["b"], size["g"], "int" if name == "awq" else "none", dtype)
        ours = ALL[name].pack(q)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), case
        assert same(ALL[name].unpack(theirs, q.scheme, q.shape), q), case
        assert torch.equal(dequantize(q).to(dtype)[: len(weight)], weight), case


def test_padding_and_pairs_equal_torchaos() -> None:
    """torchao's HQQ of a padded weight: its scales and zeros are ours to the byte, and its codes, padding included."""
    tensors, metadata = golden("torchao_parts")
    (n, k), g = tensors["weight"].shape, int(metadata["group"])
    scale, zero = tensors["scale_and_zero"].transpose(0, 1)[:n, : k // g].unbind(-1)
    codes = (tensors["codes"].int() - 8).to(torch.int8)
    q = QTensor(preset("W4A16_FLOAT_ZERO", g), codes[:n, :k].contiguous(), scale.contiguous(), zero.contiguous())
    packed = torchao_tile.pack(q)
    assert torch.equal(packed["_weight_scale_and_zero"], tensors["scale_and_zero"])
    assert torch.equal(torchao_tile.unpack_tiles(packed["_weight_qdata"]), codes)
    assert (dequantize(q) - tensors["weight"].float()).abs().max() < scale.max()


def test_padding_stands_for_zero() -> None:
    q = random_q(preset("W4A16_FLOAT_ZERO"), 5, 256, torch.bfloat16, 0)
    tensors = torchao_tile.pack(q)
    whole = torchao_tile.unpack(tensors, q.scheme, (8, 1024))
    weight = dequantize(whole)
    assert torch.equal(weight[:5, :256], dequantize(q))
    assert weight[5:].abs().max() == weight[:, 256:].abs().max() == 0


def test_header_and_config_equal_torchaos() -> None:
    _, metadata = golden("torchao_parts")
    scheme = preset("W4A16_FLOAT_ZERO", int(metadata["group"]))
    modules = {"model.a": (scheme, (5, 256)), "model.b": (scheme, (64, 2048))}
    assert torchao_tile.header(modules, ["model.a.bias", "model.norm.weight"]) == json.loads(metadata["header"])
    assert torchao_tile.config(scheme, ["lm_head"]) == json.loads(metadata["config"])
    named = [f"{module}.{suffix}" for module in modules for suffix in torchao_tile.spec(scheme, 8, 1024, "BF16")]
    assert sorted([*named, "model.a.bias", "model.norm.weight"]) == json.loads(metadata["tensors"])


# ---- declarations


def test_gptq_declares_what_stays_in_high_precision() -> None:
    """Patterns are matched from the start of a name, by GPTQModel and by vLLM: a router is not a gate_proj."""
    config = gptq.config(preset("W4A16"), ["lm_head", "model.layers.0.mlp.gate"])
    assert list(config["dynamic"]) == ["-:^lm_head$", r"-:^model\.layers\.0\.mlp\.gate$"]
    pattern = list(config["dynamic"])[1].removeprefix("-:")
    assert re.match(pattern, "model.layers.0.mlp.gate")
    assert not re.match(pattern, "model.layers.0.mlp.gate_proj") and not re.match(pattern, "modelxlayers.0.mlp.gate")
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (4, 128, True, False)
    assert gptq.config(preset("W8A16"), [])["group_size"] == WHOLE
    assert gptq.LAYOUT.files(config) == {"quantize_config.json": config}


def test_awq_declares_its_version() -> None:
    assert awq.config(preset("W4A16"), ["lm_head"]) == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }


@pytest.mark.parametrize("name", KERNEL_LAYOUTS)
def test_kernel_layouts_declare_nothing(name: str) -> None:
    layout: Layout = load(KERNEL_LAYOUTS, "layout", name)
    with pytest.raises(AssertionError, match="no engine loads it"):
        layout.config(preset("W4A16"), [])


@pytest.mark.parametrize("name", ALL)
def test_shards_of_a_tensor_parallel_split_are_packed_as_they_are(name: str) -> None:
    """`tp_multiple`: a cut at such a multiple is not refused."""
    layout, scheme = ALL[name].LAYOUT, preset("W4A16")
    n, k = layout.tp_multiple(scheme)
    assert layout.reject(scheme, n * 2, k * 2, "BF16") is None
