"""gptq-v2, ModelOpt's FP8 a row and a block, torchao-nvfp4, and what other tools alone write: against those tools' own tensors.

Each tool made the golden tensors, and read them itself (scripts/goldens/peer_layouts.py).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO_MODEL, make_artifact
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from test_layouts import check, random_q

from quantpub.layouts import KERNEL_LAYOUTS, LAYOUTS, PEER_LAYOUTS, torchao_nvfp4
from quantpub.layouts.base import Layout, Tensors
from quantpub.qtensor import QTensor, dequantize, same, same_bits
from quantpub.registry import load
from quantpub.scheme import PRESETS, WHOLE, ActFormat, Scheme, WeightFormat, preset
from quantpub.shards import NAMES

GOLDEN = Path(__file__).parent / "golden" / "peer_layouts.safetensors"
TOKEN8, TOKEN_FP8 = ActFormat("int8", "token", True), ActFormat("fp8_e4m3", "token", True)
FP8_ROW, FP8_TENSOR = (WeightFormat("fp8_e4m3", block, "float32") for block in ((1, WHOLE), (WHOLE, WHOLE)))
INT8_ROW = WeightFormat("int8", (1, WHOLE), "float32")


def integers(num: str, group: int, zeros: str = "none", scale: str = "model") -> Scheme:
    return Scheme(f"{num}-{zeros}", WeightFormat(num, (1, group), scale, zeros))


INT4, INT4_ZEROS, INT8, INT8_ZEROS = (integers(num, 32, zeros) for num in ("int4", "int8") for zeros in ("none", "int"))
# tool/case → the layout that reads it, the scheme, (n, k)
CASES: dict[str, tuple[str, Scheme, tuple[int, int]]] = {
    "torchao/nvfp4": ("torchao-nvfp4", PRESETS["NVFP4A16"], (144, 80)),
    "torchao/nvfp4-odd": ("torchao-nvfp4", PRESETS["NVFP4A16"], (32, 64)),
    "torchao/float8-row": ("torchao-float8", Scheme("w8", FP8_ROW), (12, 64)),
    "torchao/float8-tensor": ("torchao-float8", Scheme("w8", FP8_TENSOR), (12, 64)),
    "torchao/int8": ("torchao-int8", Scheme("w8", INT8_ROW), (12, 64)),
    "torchao/int8-dynamic": ("torchao-int8", Scheme("w8a8", INT8_ROW, TOKEN8), (12, 64)),
    "torchao/intx": ("torchao-intx", INT4, (12, 64)),
    "torchao/intx-zeros": ("torchao-intx", INT4_ZEROS, (12, 64)),
    "torchao/intx-bf16": ("torchao-intx", INT4, (12, 64)),
    "gptqmodel/v2-int4": ("gptq-v2", INT4, (32, 64)),
    "gptqmodel/v2-int4-zeros": ("gptq-v2", INT4_ZEROS, (32, 64)),
    "gptqmodel/v1-int4-zeros": ("gptq-zeros", INT4_ZEROS, (32, 64)),
    "gptqmodel/v2-int8": ("gptq-v2", INT8, (32, 64)),
    "gptqmodel/v2-int8-zeros": ("gptq-v2", INT8_ZEROS, (32, 64)),
    "gptqmodel/v1-int8-zeros": ("gptq-zeros", INT8_ZEROS, (32, 64)),
    "auto-round/auto-gptq-int4": ("auto-gptq", INT4, (32, 64)),
    "auto-round/auto-gptq-int4-zeros": ("auto-gptq", INT4_ZEROS, (32, 64)),
    "auto-round/auto-round-int4-zeros": ("auto-round", INT4_ZEROS, (32, 64)),
    "auto-round/auto-gptq-int8": ("auto-gptq", INT8, (32, 64)),
    "auto-round/auto-gptq-int8-zeros": ("auto-gptq", INT8_ZEROS, (32, 64)),
    "auto-round/auto-round-int8-zeros": ("auto-round", INT8_ZEROS, (32, 64)),
    "modelopt/fp8-channel": ("modelopt-fp8-channel", Scheme("w8a8", FP8_ROW, TOKEN_FP8), (16, 32)),
    "modelopt/fp8-block": ("modelopt-fp8-block", PRESETS["FP8_BLOCK"], (128, 256)),
    "modelopt/int4": ("modelopt-int4", integers("int4", 128, scale="float32"), (64, 128)),
}
ROWS = (0, 1, 31, 32, 33, 127, 128, 143)  # of a dequantized weight, as far as it has them


def layout_of(name: str) -> Layout:
    layout: Layout = load({**LAYOUTS, **PEER_LAYOUTS}, "layout", name)
    return layout


def ambiguous(name: str, tensors: Tensors, scheme: Scheme) -> str | None:
    """What the layout says against the tensors."""
    return layout_of(name).ambiguous(tensors, scheme, (0, 0))


@cache
def golden() -> tuple[Tensors, dict[str, str]]:
    with safe_open(GOLDEN, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def case(name: str) -> tuple[Tensors, torch.Tensor]:
    """A tool's tensors by suffix, and rows of the weight that it takes them for."""
    tensors, _ = golden()
    found = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
    return found, tensors[f"{name}=weight"]


def declared(key: str) -> Any:
    return json.loads(golden()[1][key])


# ---- the tools' own tensors


def test_the_cases_are_those_of_the_golden_file() -> None:
    told = {key.removesuffix("=weight") for key in golden()[0] if key.endswith("=weight")}
    assert told == set(CASES) | {"gptqmodel/v1-int4-borrowed", "gptqmodel/v1-int8-borrowed"}
    peers = {layout for layout, _, _ in CASES.values()}
    assert peers == set(PEER_LAYOUTS) | {"gptq-v2", "torchao-nvfp4", "modelopt-fp8-channel", "modelopt-fp8-block"}
    assert {"torchao", "gptqmodel", "auto-round", "modelopt", "made by"} <= set(golden()[1])


@pytest.mark.parametrize("name", CASES)
def test_a_tools_own_tensors_come_back_to_the_byte(name: str) -> None:
    layout, (theirs, _) = layout_of(CASES[name][0]), case(name)
    scheme, shape = CASES[name][1:]
    floats = {NAMES[t.dtype] for t in theirs.values() if t.dtype in (torch.float16, torch.bfloat16)}
    (stored,) = floats or {"F32" if name.startswith("torchao/intx") else "BF16"}
    assert layout.reject(scheme, *shape, stored) is None
    spec = layout.spec(scheme, *shape, stored)
    assert {suffix: (NAMES[t.dtype], tuple(t.shape)) for suffix, t in theirs.items()} == spec
    assert ambiguous(layout.name, theirs, scheme) is None
    ours = layout.pack(layout.unpack(theirs, scheme, shape))
    assert ours.keys() == theirs.keys()
    assert all(same_bits(ours[suffix], theirs[suffix]) for suffix in theirs)


def rounded(name: str, w_NK: torch.Tensor) -> torch.Tensor:
    """GPTQModel and auto-round multiply in fp16, the dtype of their scales."""
    return w_NK.half().float() if name.startswith(("gptqmodel", "auto-round")) else w_NK


@pytest.mark.parametrize("name", CASES)
def test_what_a_tool_takes_its_tensors_for(name: str) -> None:
    theirs, expected = case(name)
    layout, scheme, shape = CASES[name]
    w_NK = rounded(name, dequantize(layout_of(layout).unpack(theirs, scheme, shape)))
    found = w_NK[[row for row in ROWS if row < shape[0]]]
    match name:
        case (
            "torchao/nvfp4-odd"
        ):  # it multiplies the two scales first: one rounding more, at most two last places apart
            ulps = (found.view(torch.int32) - expected.view(torch.int32)).abs()
            assert int(ulps.max()) <= 2
        case "torchao/intx-bf16":  # it dequantizes to the dtype of the model
            assert torch.equal(found.bfloat16().float(), expected)
        case "modelopt/int4":  # its quantizer multiplies by 7 / amax, and divides by it again
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
            assert found.unique().numel() > 20
        case _:
            assert torch.equal(found, expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_borrowed_zero_is_told(bits: int) -> None:
    """GPTQModel's version 1 of zeros of 0: it reads its own words right, a reader of single zeros does not."""
    theirs, expected = case(f"gptqmodel/v1-int{bits}-borrowed")
    scheme = INT4_ZEROS if bits == 4 else INT8_ZEROS
    said = ambiguous("gptq-zeros", theirs, scheme)
    assert said is not None and f"stored as {(1 << bits) - 1}" in said
    read = layout_of("gptq-zeros").unpack(theirs, scheme, (32, 64))
    assert not torch.equal(dequantize(read)[[0, 1, 31]].half().float(), expected)
    words = theirs["qzeros"] + (0x11111111 if bits == 4 else 0x01010101)
    whole = layout_of("gptq-v2").unpack(theirs | {"qzeros": words}, scheme, (32, 64))
    assert torch.equal(dequantize(whole)[[0, 1, 31]].half().float(), expected)


def test_what_cannot_be_read_is_told() -> None:
    zeros, _ = case("gptqmodel/v1-int4-zeros")
    assert "symmetric" in str(ambiguous("gptq-zeros", zeros, INT4))
    turned = zeros | {"g_idx": zeros["g_idx"].flip(0)}
    assert "(g_idx)" in str(ambiguous("gptq-zeros", turned, INT4_ZEROS))
    symmetric, _ = case("auto-round/auto-gptq-int4")
    assert ambiguous("auto-gptq", symmetric, INT4) is None
    assert ambiguous("auto-gptq", symmetric, INT4_ZEROS) is None, "7 stands for the zero in the middle either way"
    intx, _ = case("torchao/intx-zeros")
    assert "not 0" in str(ambiguous("torchao-intx", intx, INT4))
    assert "codes are not all int4" in str(ambiguous("torchao-intx", case("torchao/int8")[0], INT4))
    int4, _ = case("modelopt/int4")
    smoothed = int4 | {"pre_quant_scale": torch.ones(128)}
    assert "pre_quant_scale" in str(ambiguous("modelopt-int4", smoothed, integers("int4", 128)))


# ---- what is declared


def test_torchaos_header_and_configuration() -> None:
    """As torchao and transformers write them; the names of a tensor's parts stand in no order."""
    modules = {"model.a": (PRESETS["NVFP4A16"], (144, 80))}
    ours, theirs = torchao_nvfp4.header(modules, ["model.norm.weight"]), declared("torchao/nvfp4=header")
    assert ours.keys() == theirs.keys()
    for key in ours:
        mine, other = json.loads(ours[key]), json.loads(theirs[key])
        for entry in (mine, other):
            if isinstance(entry, dict) and "_tensor_data_names" in entry:
                entry["_tensor_data_names"].sort()
        assert mine == other
    assert torchao_nvfp4.config(PRESETS["NVFP4A16"], ["lm_head"]) == declared("torchao/nvfp4=config")


@pytest.mark.parametrize(
    ("name", "layout", "scheme"),
    [("fp8-channel", "modelopt-fp8-channel", "FP8_DYNAMIC"), ("fp8-block", "modelopt-fp8-block", "FP8_BLOCK")],
)
def test_modelopts_configuration(name: str, layout: str, scheme: str) -> None:
    stated = declared(f"modelopt/{name}=config")
    config = layout_of(layout).config(preset(scheme), stated["ignore"])
    assert json.dumps(config) == json.dumps(stated)
    assert json.dumps(layout_of(layout).files(config)) == json.dumps(declared(f"modelopt/{name}=files"))
    cache = layout_of(layout).kv_cache
    assert cache is not None
    nested = layout_of(layout).files(cache.declare(config))["hf_quant_config.json"]["quantization"]
    assert nested["kv_cache_quant_algo"] == "FP8" and config["quant_algo"] == nested["quant_algo"]


@pytest.mark.parametrize(("scheme", "symmetric"), [("W4A16", True), ("W4A16_ASYM", False)])
def test_gptq_says_its_version_and_whether_it_has_zeros(scheme: str, symmetric: bool) -> None:
    config = layout_of("gptq-v2").config(preset(scheme), ["lm_head"])
    assert (config["checkpoint_format"], config["sym"], config["quant_method"]) == ("gptq_v2", symmetric, "gptq")
    assert config["dynamic"] == {"-:^lm_head$": {}}
    assert layout_of("gptq-v2").files(config) == {"quantize_config.json": config}


@pytest.mark.parametrize("name", PEER_LAYOUTS)
def test_a_peers_layout_is_no_target(name: str) -> None:
    layout = layout_of(name)
    assert (layout.name, layout.kind) == (name, "peer") and name not in {**LAYOUTS, **KERNEL_LAYOUTS}
    with pytest.raises(AssertionError, match="read only"):
        layout.config(preset("W4A16"), [])
    assert layout.tp_multiple(preset("W4A16")) is None


# ---- by hand


def hexadecimal(words: torch.Tensor) -> list[str]:
    return [hex(word & 0xFFFFFFFF) for word in words.flatten().tolist()]


def test_zeros_of_both_versions_by_hand() -> None:
    """Zeros 0 … 15 of sixteen columns as they are and less one, where 0 goes around; symmetric ones in the middle."""
    zero = torch.arange(16, dtype=torch.int8)[:, None] - 8
    codes, scale = torch.zeros(16, 8, dtype=torch.int8), torch.ones(16, 1, dtype=torch.float16)
    q = QTensor(integers("int4", WHOLE, "int"), codes, scale, zero)
    assert hexadecimal(layout_of("gptq-v2").pack(q)["qzeros"]) == ["0x76543210", "0xfedcba98"]
    assert hexadecimal(layout_of("gptq-zeros").pack(q)["qzeros"]) == ["0x6543210f", "0xedcba987"]
    plain = QTensor(integers("int4", WHOLE), codes, scale)
    assert hexadecimal(layout_of("gptq-v2").pack(plain)["qzeros"]) == ["0x88888888"] * 2
    assert hexadecimal(layout_of("auto-gptq").pack(plain)["qzeros"]) == ["0x77777777"] * 2
    wide = QTensor(integers("int8", WHOLE), codes, scale)
    assert set(hexadecimal(layout_of("gptq-v2").pack(wide)["qzeros"])) == {"0x80808080"}
    assert set(hexadecimal(layout_of("auto-round").pack(wide)["qzeros"])) == {"0x80808080"}
    assert set(hexadecimal(layout_of("auto-gptq").pack(wide)["qzeros"])) == {"0x7f7f7f7f"}


def test_tiles_of_scales_by_hand() -> None:
    """Row 32a + b, column c of a tile is at 16b + 4a + c; the next tile holds the columns from 4 on, then the next rows."""
    scale = torch.arange(130 * 5).remainder(126).add(1).to(torch.uint8).view(130, 5)
    tiles = torchao_nvfp4.pack_tiles(scale.view(torch.float8_e4m3fn)).view(torch.uint8)
    assert tiles.shape == (64, 32)
    flat = tiles.flatten()
    assert flat[16 * 3 + 4 * 2 + 1] == scale[32 * 2 + 3, 1]
    assert flat[512] == scale[0, 4] and flat[513] == 0
    assert flat[2 * 512 + 16 + 2] == scale[129, 2] and flat[2 * 512 + 32] == 0


def test_modelopts_nibbles_by_hand() -> None:
    """Rows −8, 7 | −1, 1 in one column: two's complement, the even row in the low half."""
    codes = torch.tensor([[-8], [7], [-1], [1]], dtype=torch.int8)
    q = QTensor(integers("int4", WHOLE, scale="float32"), codes, torch.ones(4, 1))
    assert layout_of("modelopt-int4").pack(q)["weight"].tolist() == [[0x78], [0x1F]]


# ---- lossless or rejected: test_layouts has the targets, these are read only


SCHEMES = [
    *PRESETS.values(),
    *(
        integers(num, 32, zeros, scale)
        for num in ("int4", "int8")
        for zeros in ("none", "int")
        for scale in ("model", "float32")
    ),
    *(Scheme("WEIGHTS", weight, act) for weight in (FP8_ROW, FP8_TENSOR) for act in (None, TOKEN_FP8)),
    *(Scheme("WEIGHTS", INT8_ROW, act) for act in (None, TOKEN8)),
    integers("int8", WHOLE, "int", "float32"),
]
HELD = {
    "gptq-zeros": {("int4", "none"), ("int4", "int"), ("int8", "none"), ("int8", "int")},
    "torchao-float8": {("fp8_e4m3", "none")},
    "torchao-int8": {("int8", "none"), ("int8", "int")},
    "modelopt-int4": {("int4", "none")},
}
HELD |= dict.fromkeys(("auto-gptq", "auto-round", "torchao-intx"), HELD["gptq-zeros"])


@pytest.mark.parametrize("name", PEER_LAYOUTS)
@settings(max_examples=150, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    n=st.sampled_from([1, 2, 7, 8, 32, 100, 144]),
    k=st.sampled_from([1, 8, 32, 60, 96, 128, 256]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 2**31),
)
def test_a_peers_layout_is_lossless_or_rejects(
    name: str, scheme: Scheme, n: int, k: int, dtype: torch.dtype, seed: int
) -> None:
    layout = layout_of(name)
    reason = layout.reject(scheme, n, k, NAMES[dtype])
    if reason is not None:
        assert scheme.name in reason or str(k) in reason or str(n) in reason or str(scheme.group_size) in reason
        return
    q = random_q(scheme, n, k, dtype, seed)
    check(layout, q, dtype)
    said = ambiguous(name, layout.pack(q), scheme)
    assert said is None or "is stored as" in said


@pytest.mark.parametrize("name", PEER_LAYOUTS)
def test_a_peers_layout_holds_what_its_tool_writes(name: str) -> None:
    held = [s for s in SCHEMES if layout_of(name).reject(s, 128, 256, "F16") is None]
    assert {(s.weight.num, s.weight.zero_domain) for s in held} == HELD[name]


@pytest.mark.parametrize("stored", ["model", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_modelopts_row_scale_keeps_its_dtype(stored: str, dtype: torch.dtype) -> None:
    """A scale of the model's dtype stays in it; ModelOpt's own is float32."""
    scheme = Scheme("ROWS", WeightFormat("fp8_e4m3", (1, WHOLE), stored), TOKEN_FP8)
    layout = layout_of("modelopt-fp8-channel")
    assert layout.reject(scheme, 24, 40, NAMES[dtype]) is None
    check(layout, random_q(scheme, 24, 40, dtype, 3), dtype)
    assert layout.config(scheme, [])["quant_algo"] == "FP8_PER_CHANNEL_PER_TOKEN"


@pytest.mark.parametrize(
    ("name", "scheme", "shape", "dtype", "words"),
    [
        ("gptq-v2", preset("W4A16_ASYM"), (64, 128), "BF16", None),
        ("gptq-v2", preset("W4A16_FLOAT_ZERO"), (64, 128), "BF16", "float ones"),
        ("gptq-v2", preset("W4A16", 256), (64, 256), "BF16", "groups of"),
        ("gptq-v2", preset("W4A16"), (60, 128), "BF16", "[60, 128]"),
        ("modelopt-fp8-channel", preset("FP8"), (64, 64), "BF16", "not FP8"),
        ("modelopt-fp8-channel", preset("FP8_DYNAMIC", 64), (64, 64), "BF16", "every 64 columns"),
        ("modelopt-fp8-block", preset("FP8_BLOCK"), (192, 128), "BF16", "out_features 192"),
        ("modelopt-fp8-block", preset("FP8_BLOCK"), (128, 192), "BF16", "in_features 192"),
        ("modelopt-fp8-block", preset("FP8_BLOCK"), (128, 128), "F16", None),
        ("torchao-nvfp4", preset("NVFP4"), (64, 64), "BF16", "not NVFP4"),
        ("torchao-nvfp4", preset("NVFP4A16"), (64, 64), "F16", "bf16 models only"),
        ("torchao-nvfp4", preset("NVFP4A16"), (8, 64), "BF16", "out_features 8"),
        ("torchao-nvfp4", preset("NVFP4A16"), (16, 80), "BF16", None),
    ],
)
def test_rejects_with_a_reason(
    name: str, scheme: Scheme, shape: tuple[int, int], dtype: str, words: str | None
) -> None:
    reason = layout_of(name).reject(scheme, *shape, dtype)
    assert reason is None if words is None else words in str(reason)


def test_what_is_the_same_in_two_layouts() -> None:
    """FORMATS' own conversions: the numbers of one layout are those of the other, and only their order or name is new."""
    pairs = [
        ("NVFP4A16", "modelopt-nvfp4", "torchao-nvfp4"),
        ("FP8_DYNAMIC", "ct-float", "modelopt-fp8-channel"),
        ("FP8_BLOCK", "hf-fp8", "modelopt-fp8-block"),
        ("W4A16_ASYM", "ct-pack", "gptq-v2"),
        ("W4A16", "gptq", "gptq-v2"),
    ]
    for name, one, other in pairs:
        q = random_q(preset(name), 256, 512, torch.bfloat16, 1)
        first = layout_of(one).unpack(layout_of(one).pack(q), q.scheme, q.shape)
        second = layout_of(other).unpack(layout_of(other).pack(first), q.scheme, q.shape)
        assert same(second, q), (one, other)
    packed = {
        name: layout_of(name).pack(random_q(preset("W4A16_ASYM"), 64, 256, torch.bfloat16, 2))
        for name in ("ct-pack", "gptq-v2")
    }
    assert torch.equal(packed["ct-pack"]["weight_zero_point"].T, packed["gptq-v2"]["qzeros"])


@pytest.mark.slow
def test_transformers_opens_torchao_nvfp4(tmp_path: Path) -> None:
    """As torchao's own tensors, each of which is our weight to the bit."""
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
    from transformers import AutoModelForCausalLM

    from quantpub.artifact import Artifact
    from quantpub.decode import Decoder

    folder = make_artifact(DEMO_MODEL, "nvfp4a16", tmp_path / "a", "torchao-nvfp4")
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    decoder = Decoder(Artifact.open(folder))
    assert len(decoder.modules()) == 28
    for module, shape in decoder.modules():
        weight = model.get_submodule(module).weight
        assert isinstance(weight, NVFP4Tensor) and tuple(weight.shape) == shape
        assert torch.equal(weight.dequantize(torch.float32), dequantize(decoder.qtensor(module))), module
