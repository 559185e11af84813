"""The compressed-tensors layouts against compressed-tensors itself: its bytes, its weights, its reading of our configs.

The goldens were made by two of its versions (scripts/goldens/ct.py); configs are parsed by both.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization.lifecycle.forward import dequantize as ct_dequantize
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from partners import ct_decompress
from partners.ct_parse import read_all
from safetensors import safe_open
from safetensors.torch import save_file
from test_layouts import layout_of, random_q

from quantpub.layouts import LAYOUTS, words
from quantpub.layouts.base import ct_config
from quantpub.layouts.ct_pack import pack_words, unpack_words
from quantpub.qtensor import QTensor, code_values, dequantize, same
from quantpub.scheme import PRESETS, WHOLE, ActFormat, Scheme, WeightFormat, preset
from quantpub.shards import NAMES

GOLDEN = ROOT / "tests" / "golden"
NEWEST = Path(sys.prefix) / "ct-newest"
VERSIONS = ["0.17.0", "0.20.0"]  # what vLLM 0.25.1 – 0.33.0 pins, and the newest
CT = [name for name in LAYOUTS if name.startswith("ct-")]
HELD = {
    "ct-pack": ["W4A16", "W4A16_ASYM", "W8A16"],
    "ct-int": ["W8A8"],
    "ct-float": ["FP8", "FP8_DYNAMIC", "FP8_BLOCK"],
    "ct-nvfp4": ["NVFP4A16", "NVFP4"],
    "ct-mxfp4": ["MXFP4A16"],
}
PAIRS = [(layout, scheme) for layout, schemes in HELD.items() for scheme in schemes]
# golden case → layout, scheme, dtype that compressed-tensors computes in
CASES: dict[str, tuple[str, Scheme, torch.dtype]] = {
    "W4A16": ("ct-pack", preset("W4A16", 16), torch.bfloat16),
    "W4A16_CHANNEL": ("ct-pack", preset("W4A16", WHOLE), torch.bfloat16),
    "W4A16_ASYM_12": ("ct-pack", preset("W4A16_ASYM", 16), torch.bfloat16),
    "W4A16_ASYM_64": ("ct-pack", preset("W4A16_ASYM", 16), torch.bfloat16),
    "W8A16": ("ct-pack", preset("W8A16"), torch.bfloat16),
    "W8A16_GROUP": ("ct-pack", preset("W8A16", 16), torch.bfloat16),
    "W8A8": ("ct-int", preset("W8A8"), torch.bfloat16),
    "FP8_DYNAMIC": ("ct-float", preset("FP8_DYNAMIC"), torch.bfloat16),
    "FP8": ("ct-float", preset("FP8"), torch.float32),
    "FP8_BLOCK": ("ct-float", preset("FP8_BLOCK"), torch.float32),
    "NVFP4A16": ("ct-nvfp4", preset("NVFP4A16"), torch.bfloat16),
    "NVFP4": ("ct-nvfp4", preset("NVFP4"), torch.bfloat16),
    "MXFP4A16": ("ct-mxfp4", preset("MXFP4A16"), torch.bfloat16),
}


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def golden(version: str, case: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors of one case, and the digests of those that are too large to keep."""
    with safe_open(GOLDEN / f"ct_{version}.safetensors", "pt") as f:
        header = f.metadata()
        assert header["version"] == version
        tensors = {name: f.get_tensor(name) for name in f.keys() if name.startswith(f"{case}.")}  # noqa: SIM118
    cut = len(case) + 1
    digests = {name[cut:]: value for name, value in header.items() if name.startswith(f"{case}.")}
    return {name[cut:]: value for name, value in tensors.items()}, digests


def canonical(scheme: Scheme, drawn: dict[str, torch.Tensor]) -> QTensor:
    """The QTensor of a golden case. Codes too large to keep follow the script's rule."""
    scale = drawn["in.scale"]
    if scheme.weight.scale_dtype == "e8m0":
        scale = scale.to(torch.float8_e8m0fnu)
    codes = drawn.get("in.codes")
    if codes is None:
        index = torch.arange(256 * 384).view(256, 384)
        codes = (index * 37 % 126 + 1 + index // 5 % 2 * 128).to(torch.uint8).view(torch.float8_e4m3fn)
    extras = (drawn.get(f"in.{name}") for name in ("zero", "global_scale", "input_scale"))
    return QTensor(scheme, codes, scale, *extras)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", CASES)
def test_packs_to_the_bytes_of_compressed_tensors(case: str, version: str) -> None:
    """Names, dtypes, shapes and bytes of a module's whole state: nothing is missing and nothing is too much."""
    layout_name, scheme, _ = CASES[case]
    drawn, digests = golden(version, case)
    ours = layout_of(layout_name).pack(canonical(scheme, drawn))
    theirs = {name[4:]: value for name, value in drawn.items() if name.startswith("out.")}
    large = {name[4:]: value for name, value in digests.items() if name.startswith("out.")}
    assert set(ours) == set(theirs) | set(large)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape, name
        assert sha256(ours[name]) == sha256(tensor), name
    assert all(sha256(ours[name]) == digest for name, digest in large.items())


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", CASES)
def test_decompresses_to_the_weights_of_compressed_tensors(case: str, version: str) -> None:
    """Our reading of its bytes, rounded once to the dtype it computes in, is its own reading."""
    layout_name, scheme, dtype = CASES[case]
    drawn, digests = golden(version, case)
    q = canonical(scheme, drawn)
    packed = {name[4:]: value for name, value in drawn.items() if name.startswith("out.")}
    packed |= {"weight": q.codes_NK} if "out.weight" in digests else {}
    weight = dequantize(layout_of(layout_name).unpack(packed, scheme, q.shape)).to(dtype)
    if "weight" in digests:
        assert sha256(weight) == digests["weight"]
    else:
        assert drawn["weight"].dtype == dtype and torch.equal(weight, drawn["weight"])


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 20), k=st.integers(1, 20), bits=st.sampled_from([4, 8]), seed=st.integers(0, 2**31))
def test_words_equal_the_reference_packer(n: int, k: int, bits: int, seed: int) -> None:
    half, width = 1 << (bits - 1), k * (32 // bits)
    pack, unpack = {4: (pack_words, unpack_words), 8: (words.pack_bytes, words.unpack_bytes)}[bits]
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-half, half, (n, width), generator=g, dtype=torch.int8)
    reference = pack_to_int32(codes, bits)
    assert torch.equal(pack(codes), reference)
    assert torch.equal(unpack(reference), codes)
    assert torch.equal(unpack(reference), unpack_from_int32(reference, bits, torch.Size(codes.shape)))
    assert torch.equal(pack(codes.T.contiguous().T), reference), "strides are no part of a tensor's value"


def test_words_by_hand() -> None:
    def hexadecimal(packed: torch.Tensor) -> list[str]:
        return [hex(word & 0xFFFFFFFF) for word in packed[0].tolist()]

    assert hexadecimal(pack_words(torch.arange(-8, 8, dtype=torch.int8).view(1, 16))) == ["0x76543210", "0xfedcba98"]
    assert hexadecimal(words.pack_bytes(torch.tensor([[-128, -1, 0, 127]], dtype=torch.int8))) == ["0xff807f00"]


def test_nibbles_equal_the_reference_packer() -> None:
    """All 256 pairs of codes, minus zero included."""
    pairs = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8).view(16, 32)
    reference = pack_fp4_to_uint8(code_values(pairs, "fp4_e2m1"))
    assert torch.equal(words.pack_nibbles(pairs), reference)
    assert torch.equal(words.unpack_nibbles(reference), pairs)
    assert words.pack_nibbles(torch.tensor([[1, 15]], dtype=torch.uint8)).tolist() == [[0xF1]]


def test_shape_tensor_is_n_then_k() -> None:
    packed = layout_of("ct-pack").pack(random_q(preset("W4A16"), 64, 128, torch.bfloat16, 0))
    assert packed["weight_shape"].tolist() == [64, 128]
    assert packed["weight_shape"].dtype == torch.int64


def test_zeros_are_packed_down_the_rows_by_hand() -> None:
    """Rows 0 … 7 fill the first word from its low end; the three missing of the second are zero bits."""
    zero = torch.tensor([-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 7], dtype=torch.int8)[:, None]
    q = random_q(preset("W4A16_ASYM", WHOLE), 13, 8, torch.bfloat16, 0)
    packed = layout_of("ct-pack").pack(QTensor(q.scheme, q.codes_NK, q.scale, zero))
    assert [hex(row & 0xFFFFFFFF) for row in packed["weight_zero_point"][:, 0].tolist()] == ["0x76543210", "0xfba98"]


def test_global_scales_are_divisors_on_disk() -> None:
    q = random_q(preset("NVFP4"), 4, 32, torch.bfloat16, 0)
    q = QTensor(q.scheme, q.codes_NK, q.scale, None, torch.tensor(2.0**-9), torch.tensor(0.125))
    packed = layout_of("ct-nvfp4").pack(q)
    assert packed["weight_global_scale"].tolist() == [512.0]
    assert packed["input_global_scale"].tolist() == [8.0]


def test_a_global_scale_that_is_no_reciprocal_is_an_error_and_the_nearest_is_not() -> None:
    """3 is a reciprocal; 1 − 2^-24 is none of any float32."""
    q, layout = random_q(preset("NVFP4A16"), 4, 32, torch.bfloat16, 0), layout_of("ct-nvfp4")
    fine = QTensor(q.scheme, q.codes_NK, q.scale, None, torch.tensor(3.0))
    assert same(layout.unpack(layout.pack(fine), q.scheme, (4, 32)), fine)
    odd = QTensor(q.scheme, q.codes_NK, q.scale, None, torch.tensor(1 - 2.0**-24))
    with pytest.raises(AssertionError, match="no float32 has the reciprocal"):
        layout.pack(odd)
    near = layout.nearest(odd)
    assert same(layout.unpack(layout.pack(near), q.scheme, (4, 32)), near)
    assert near.global_scale is not None and abs(float(near.global_scale) / float(odd.global_scale) - 1) <= 2.0**-23


@pytest.mark.parametrize(("layout_name", "scheme_name"), [("ct-float", "FP8"), ("ct-nvfp4", "NVFP4")])
def test_packing_before_activations_are_calibrated_is_an_error(layout_name: str, scheme_name: str) -> None:
    q = random_q(preset(scheme_name), 4, 32, torch.bfloat16, 0)
    with pytest.raises(AssertionError, match="calibrated"):
        layout_of(layout_name).pack(QTensor(q.scheme, q.codes_NK, q.scale, global_scale=q.global_scale))


def test_scales_of_mxfp4_are_bytes_on_disk() -> None:
    q = random_q(preset("MXFP4A16"), 1, 64, torch.bfloat16, 0)
    scale = torch.tensor([[0.5, 2.0**-127]]).to(torch.float8_e8m0fnu)
    packed = layout_of("ct-mxfp4").pack(QTensor(q.scheme, q.codes_NK, scale))
    assert packed["weight_scale"].dtype == torch.uint8 and packed["weight_scale"].tolist() == [[126, 0]]


@pytest.mark.parametrize(("layout_name", "scheme_name"), PAIRS)
def test_a_tensor_parallel_shard_of_the_packed_weight_is_the_packed_shard(layout_name: str, scheme_name: str) -> None:
    """Engines cut packed tensors: halves along either side, at `tp_multiple`, are what packing the half gives."""
    layout, scheme = layout_of(layout_name), preset(scheme_name)
    rows, columns = (6 * side for side in layout.tp_multiple(scheme))
    q = random_q(scheme, rows, columns, torch.bfloat16, 0)
    for axis in (0, 1):
        for half in (0, 1):
            shard = QTensor(
                scheme, *(cut(t, axis, half) for t in (q.codes_NK, q.scale, q.zero)), q.global_scale, q.input_scale
            )
            for name, tensor in layout.pack(shard).items():
                if name != "weight_shape":
                    assert torch.equal(bits(tensor), bits(cut(layout.pack(q)[name], axis, half))), (name, axis, half)


def cut(tensor: torch.Tensor | None, axis: int, half: int) -> Any:
    """Half of a tensor along an axis; one scale that a whole side shares stays whole."""
    if tensor is None or tensor.ndim < 2 or tensor.shape[axis] == 1:
        return tensor
    return tensor.contiguous().view(torch.int8).chunk(2, axis)[half].contiguous().view(tensor.dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("layout_name", CT)
def test_a_layout_holds_its_own_schemes_and_no_other(layout_name: str) -> None:
    layout = layout_of(layout_name)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        held = [name for name, scheme in PRESETS.items() if layout.reject(scheme, 256, 512, NAMES[dtype]) is None]
        own = [] if (layout_name, dtype) == ("ct-mxfp4", torch.float16) else HELD[layout_name]
        assert sorted(held) == sorted(own)


@pytest.mark.parametrize(
    ("layout_name", "scheme", "n", "k", "reason"),
    [
        ("ct-pack", preset("W4A16"), 64, 100, "multiple of 8"),
        ("ct-pack", preset("W4A16"), 64, 136, "group size 128"),
        ("ct-pack", preset("W4A16"), 64, 128, None),
        ("ct-pack", preset("W4A16", WHOLE), 3, 8, None),
        ("ct-pack", preset("W4A16_ASYM"), 13, 128, None),
        ("ct-pack", preset("W8A16"), 3, 4, None),
        ("ct-pack", preset("W8A16"), 3, 6, "multiple of 4"),
        ("ct-pack", preset("W4A16_FLOAT_ZERO"), 64, 128, "float"),
        ("ct-pack", Scheme("MINE", WeightFormat("int4", (1, 128), "float32")), 64, 128, "float32"),
        ("ct-int", preset("W8A16"), 64, 128, "W8A16"),
        ("ct-int", preset("LLM_INT8"), 64, 128, "LLM_INT8"),
        ("ct-int", preset("W8A8"), 1, 1, None),
        ("ct-int", Scheme("MINE", WeightFormat("int8", (1, WHOLE)), ActFormat("int8", "tensor", False)), 8, 8, "MINE"),
        ("ct-float", preset("FP8_BLOCK"), 128, 256, None),
        ("ct-float", preset("FP8_BLOCK"), 192, 256, "out_features 192"),
        ("ct-float", preset("FP8_BLOCK"), 128, 192, "in_features 192"),
        ("ct-float", preset("FP8_BLOCK"), 256, 128, "in_features 128"),
        ("ct-float", preset("FP8_BLOCK"), 128, 128, None),
        ("ct-float", Scheme("MINE", WeightFormat("fp8_e4m3", (1, WHOLE))), 8, 8, "MINE"),
        ("ct-nvfp4", preset("NVFP4"), 8, 24, "in_features 24"),
        ("ct-nvfp4", preset("NVFP4", 32), 8, 32, "NVFP4"),
        ("ct-mxfp4", preset("MXFP4A16"), 8, 48, "in_features 48"),
    ],
)
def test_rejects_with_a_reason(layout_name: str, scheme: Scheme, n: int, k: int, reason: str | None) -> None:
    found = layout_of(layout_name).reject(scheme, n, k, "BF16")
    assert found is None if reason is None else reason in str(found)


def test_compressed_tensors_017_misreads_what_is_rejected_of_blocks() -> None:
    """Why parts of blocks are rejected. A version that reads them right makes this fail, and the rejection can go."""
    q = random_q(preset("FP8_BLOCK"), 192, 256, torch.bfloat16, 0)
    assert not torch.equal(ct_dequantize(q.codes_NK, q.scale), dequantize(q))
    q = random_q(preset("FP8_BLOCK"), 256, 128, torch.bfloat16, 0)
    with pytest.raises(RuntimeError, match="must match the size"):
        ct_dequantize(q.codes_NK, q.scale)
    q = random_q(preset("FP8_BLOCK"), 128, 256, torch.bfloat16, 0)
    assert torch.equal(ct_dequantize(q.codes_NK, q.scale), dequantize(q))


def configs() -> dict[str, dict[str, Any]]:
    ignore = ["lm_head", "model.layers.0.mlp.gate"]
    found = {scheme: layout_of(layout).config(preset(scheme), ignore) for layout, scheme in PAIRS}
    for name, group_size in (("W4A16", WHOLE), ("W4A16_ASYM", WHOLE), ("W4A16", 32), ("W8A16", 128)):
        found[f"{name}@{group_size}"] = layout_of("ct-pack").config(preset(name, group_size), ignore)
    groups = [layout_of(layout).group(preset(scheme)) for layout, scheme in PAIRS]  # type: ignore[misc]
    targets = [[f"re:.*layers\\.{i}\\..*"] for i in range(len(groups))]
    found["mixed"] = ct_config([{**g, "targets": t} for g, t in zip(groups, targets, strict=True)], ignore)
    return found


def in_newest(script: str, given: str, *args: Path) -> Any:
    """What a script of tests/partners prints where the newest compressed-tensors is first on the path."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests/partners" / script, *args],
        input=given,
        env={**os.environ, "PYTHONPATH": str(NEWEST)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=["0.17.0", pytest.param("0.20.0", marks=pytest.mark.slow)])
def parsed(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What one version of compressed-tensors makes of all our configs: the pinned one here, the newest by itself."""
    value = read_all(configs()) if request.param == "0.17.0" else in_newest("ct_parse.py", json.dumps(configs()))
    assert value["version"] == request.param, "`make venv` installs both versions"
    found: dict[str, Any] = value["found"]
    return found


def test_compressed_tensors_parses_every_config(parsed: dict[str, Any]) -> None:
    for name, config in configs().items():
        stated = [group["format"] for group in config["config_groups"].values()]
        assert [group["format"] for group in parsed[name]["groups"]] == stated
        assert parsed[name]["format"] == config["format"]
        assert parsed[name]["ignore"] == config["ignore"]
    assert parsed["mixed"]["format"] == "mixed-precision"


def test_our_configs_mean_what_the_presets_of_compressed_tensors_mean(parsed: dict[str, Any]) -> None:
    """Presets carry its names. W8A16 alone differs on purpose: ours scales whole rows, its own groups of 128."""
    for _, name in PAIRS:
        (group,) = parsed[name]["groups"]
        ours = {side: group[side] for side in ("weights", "inputs")}
        assert parsed[name]["preset"] is not None
        if name != "W8A16":
            assert ours == parsed[name]["preset"], name
    (group,) = parsed["W8A16@128"]["groups"]
    assert group["weights"] == parsed["W8A16"]["preset"]["weights"]
    (group,) = parsed["W8A16"]["groups"]
    assert (group["weights"]["strategy"], group["weights"]["group_size"]) == ("channel", "None")


@pytest.mark.parametrize("version", ["0.17.0", pytest.param("0.20.0", marks=pytest.mark.slow)])
def test_a_checkpoint_of_every_format_decompresses_to_our_weights(
    version: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One module a format, as a mixed-precision checkpoint: compressed-tensors finds each group and reads each weight."""
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": configs()["mixed"]}))
    tensors, ours = {}, {}
    for i, (layout, scheme) in enumerate(PAIRS):
        q = random_q(preset(scheme), 256, 384, torch.bfloat16, i)
        name = f"model.layers.{i}.mlp.up_proj"
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in layout_of(layout).pack(q).items()}
        ours[name] = sha256(dequantize(q).bfloat16())
    save_file(tensors, tmp_path / "model.safetensors")
    if version == "0.17.0":
        ct_decompress.main(tmp_path)
        theirs = json.loads(capsys.readouterr().out)
    else:
        theirs = in_newest("ct_decompress.py", "", tmp_path)
    assert theirs == {"version": version, "digests": ours}


def test_w4a16_config_by_hand() -> None:
    """Every key, as engines have loaded it: one more would refuse the checkpoint."""
    assert layout_of("ct-pack").config(preset("W4A16"), ["lm_head"]) == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 128,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 17), groups=st.integers(1, 3), num=st.sampled_from(["int4", "int8"]), seed=st.integers(0, 2**31)
)
def test_zeros_down_the_rows_equal_the_reference_packer(n: int, groups: int, num: str, seed: int) -> None:
    """Any number of rows, parts of a word too; int8 with zeros has no preset, and is held all the same."""
    scheme, layout = Scheme("MINE", WeightFormat(num, (1, 8), zero_domain="int")), layout_of("ct-pack")
    q = random_q(scheme, n, 8 * groups, torch.float16, seed)
    packed = layout.pack(q)
    assert q.zero is not None and packed["weight_zero_point"].is_contiguous()
    assert torch.equal(packed["weight_zero_point"], pack_to_int32(q.zero, scheme.weight.number.bits, packed_dim=0))
    assert same(layout.unpack(packed, scheme, q.shape), q)


@pytest.mark.parametrize(
    ("layout_name", "scheme", "reason"),
    [
        ("ct-nvfp4", preset("NVFP4A16", 32), "ct-nvfp4 holds NVFP4 weights in groups of 16 columns, not of 32"),
        ("ct-nvfp4", preset("NVFP4", WHOLE), "ct-nvfp4 holds NVFP4 weights in groups of 16 columns, not of whole rows"),
        ("ct-mxfp4", preset("MXFP4A16", 16), "ct-mxfp4 holds MXFP4 weights in groups of 32 columns, not of 16"),
        (
            "ct-mxfp4",
            preset("MXFP4A16", WHOLE),
            "ct-mxfp4 holds MXFP4 weights in groups of 32 columns, not of whole rows",
        ),
        ("ct-int", preset("W8A8", 64), "ct-int holds int8 weights with a scale a row, not one for every 64 columns"),
        (
            "ct-nvfp4",
            preset("MXFP4A16", 16),
            "ct-nvfp4 holds NVFP4 weights with NVFP4 or 16-bit activations, not MXFP4A16",
        ),
        ("ct-int", preset("W4A16"), "ct-int holds symmetric int8 weights with a scale a row, not W4A16"),
    ],
)
def test_a_group_that_does_not_fit_is_named_and_not_the_scheme(layout_name: str, scheme: Scheme, reason: str) -> None:
    assert layout_of(layout_name).reject(scheme, 64, 128, "BF16") == reason
