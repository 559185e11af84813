"""What repacking writes, held against what others read and write: their weights, their readers, their own tensors."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from repacks import GOLDEN, again, made, weights, wide
from safetensors import safe_open
from safetensors.torch import load_file
from test_partners import NEWEST, decompressed, our_digests

from quantpub.artifact import Artifact
from quantpub.decode import Decoder
from quantpub.errors import InputError
from quantpub.opened import open_quantized
from quantpub.repacking import make_repack

pytestmark = pytest.mark.usefixtures("unsynced")

MANIFEST: dict[str, dict[str, Any]] = json.loads((GOLDEN / "manifest.json").read_text())
REFERENCES = load_file(GOLDEN / "references.safetensors")
# Checkpoints that no layout takes, and the words that say so
REFUSED = {
    "gptqmodel-gptq-desc-act-dense": "desc_act|g_idx|order",
    "modelopt-int4-awq-dense": "pre_quant_scale",
    "torchao-fp8-weight-dense": "no layout that is written holds it",
}
INT4, INT4_ZERO = ("ct-pack", "gptq", "gptq-v2", "awq"), ("ct-pack", "gptq-v2", "awq")
FP4 = ("ct-nvfp4", "modelopt-nvfp4", "torchao-nvfp4")
# scheme, as the manifest calls it → the layouts in which the peer's own weights must come back
HELD = {
    "W4A16": INT4,
    "W4A16_ASYM": INT4_ZERO,
    "W8A16": ("ct-pack", "gptq", "gptq-v2"),
    "W8A8": ("ct-int",),
    "FP8": ("ct-float", "modelopt-fp8"),
    "FP8_DYNAMIC": ("ct-float", "modelopt-fp8-channel"),
    "FP8_BLOCK": ("hf-fp8", "modelopt-fp8-block"),  # a side of one block, which compressed-tensors misreads
    "NVFP4": FP4,
    "NVFP4A16": FP4,
}
# ModelOpt multiplies scale and global scale first, in float32, and quantpub code and scale: products of three are not exact
# where the global scale is no power of two. compressed-tensors' divisor costs up to half a place more
ULPS = {"modelopt-nvfp4": 1.0}


def layouts_of(name: str) -> tuple[str, ...]:
    """torchao's tensors are of linears alone, and have no place for scales of a KV cache."""
    holds = MANIFEST[name]["holds"]
    return tuple(
        layout
        for layout in HELD[holds["scheme"]]
        if not (layout.startswith("torchao") and (name.endswith("moe") or holds["kv_cache"]))
    )


def ulps(found: torch.Tensor, due: torch.Tensor) -> float:
    """The largest distance in units of the last place of `due`."""
    kind = torch.finfo(due.dtype)
    place = 2.0 ** due.double().abs().clamp_min(kind.tiny).log2().floor() * kind.eps
    return float(((found.double() - due.double()).abs() / place).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(MANIFEST) - set(REFUSED)))
def test_what_a_peer_wrote_is_in_every_layout_what_the_peer_reads(tmp_path: Path, name: str) -> None:
    """Exact in the dtype in which the peer dequantizes; ModelOpt's NVFP4 to the last place of float32."""
    for layout in layouts_of(name):
        proof = again(GOLDEN / name, layout, tmp_path / layout)
        assert proof["modules"] == MANIFEST[name]["holds"]["quantized_modules"] or name == "torchao-int8-moe"
        assert proof["rounded"] < 2**-23 and (proof["rounded"] == 0) == (proof["equal"] == proof["modules"])
        found = weights(tmp_path / layout)
        cases = {module: rows for module in found if (rows := REFERENCES.get(f"{name}/{module}")) is not None}
        assert cases
        for module, rows in cases.items():
            limit = max((ulp for prefix, ulp in ULPS.items() if name.startswith(prefix)), default=0.0)
            assert ulps(found[module][::8].to(rows.dtype), rows) <= limit, (layout, module)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_no_layout_holds_is_refused_with_a_sentence(name: str) -> None:
    for layout in ("ct-pack", "ct-float", "gptq"):
        with pytest.raises(InputError, match=REFUSED[name]):
            make_repack(open_quantized(str(GOLDEN / name)), layout)


BACK = {
    "llmcompressor-w4a16-dense": ("gptq", "ct-pack"),
    "llmcompressor-w4a16-asym-dense": ("awq", "ct-pack"),
    "llmcompressor-w8a16-dense": ("gptq-v2", "ct-pack"),
    "llmcompressor-fp8-dynamic-moe": ("modelopt-fp8-channel", "ct-float"),
    "llmcompressor-fp8-static-dense": ("modelopt-fp8", "ct-float"),
    "llmcompressor-nvfp4-dense": ("modelopt-nvfp4", "ct-nvfp4"),
    "llmcompressor-nvfp4a16-dense": ("torchao-nvfp4", "ct-nvfp4"),
    "gptqmodel-gptq-dense": ("ct-pack", "gptq"),
    "gptqmodel-gptq-moe": ("awq", "gptq"),
    "gptqmodel-gptq-v2-dense": ("ct-pack", "gptq-v2"),
    "gptqmodel-awq-dense": ("gptq-v2", "awq"),
    "autoawq-w4-dense": ("ct-pack", "awq"),
    "modelopt-fp8-dense": ("ct-float", "modelopt-fp8"),
    "modelopt-fp8-per-channel-dense": ("ct-float", "modelopt-fp8-channel"),
    "modelopt-nvfp4-weight-dense": ("torchao-nvfp4", "modelopt-nvfp4"),
    "torchao-nvfp4-weight-dense": ("modelopt-nvfp4", "torchao-nvfp4"),
}


WIDENED = {"llmcompressor-fp8-static-dense"}  # its scales of tensors are bf16, and float32 is what FP8 has here


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BACK))
def test_a_peers_own_tensors_come_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    between, home = BACK[name]
    again(GOLDEN / name, between, tmp_path / "between")
    again(tmp_path / "between", home, tmp_path / "home")
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (GOLDEN / name, tmp_path / "home"))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        widened = tensor.float() if name in WIDENED and tensor.dim() == 1 and tensor.numel() == 1 else tensor
        assert ours[key].dtype == widened.dtype and ours[key].numel() == tensor.numel(), key
        assert torch.equal(bits(ours[key]), bits(widened)), key


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


# What repacking makes of one tool's checkpoint, beside what another tool made of the same model in that layout
SHAPED = [
    ("llmcompressor-fp8-static-dense", "modelopt-fp8", "modelopt-fp8-dense"),
    ("llmcompressor-fp8-dynamic-dense", "modelopt-fp8-channel", "modelopt-fp8-per-channel-dense"),
    ("llmcompressor-nvfp4-dense", "modelopt-nvfp4", "modelopt-nvfp4-dense"),
    ("llmcompressor-nvfp4a16-dense", "modelopt-nvfp4", "modelopt-nvfp4-weight-dense"),
    ("llmcompressor-nvfp4a16-dense", "torchao-nvfp4", "torchao-nvfp4-weight-dense"),
    ("modelopt-fp8-dense", "ct-float", "llmcompressor-fp8-static-dense"),
    ("modelopt-nvfp4-dense", "ct-nvfp4", "llmcompressor-nvfp4-dense"),
    ("modelopt-nvfp4-moe", "modelopt-nvfp4", "modelopt-nvfp4-moe"),
    ("gptqmodel-gptq-dense", "ct-pack", "llmcompressor-w4a16-dense"),
    ("llmcompressor-w4a16-dense", "gptq", "gptqmodel-gptq-dense"),
    ("autoround-w4a16-asym-dense", "awq", "autoawq-w4-dense"),
    ("llmcompressor-w4a16-asym-dense", "awq", "gptqmodel-awq-dense"),
]
# ModelOpt widens scales of rows to float32, and a bf16 one is stored as it is; llm-compressor narrows scales of tensors
OTHER_FLOATS = {"modelopt-fp8-per-channel-dense", "llmcompressor-fp8-static-dense"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout", "peer"), SHAPED)
def test_names_dtypes_and_shapes_are_those_of_the_tool_whose_layout_it_is(
    tmp_path: Path, name: str, layout: str, peer: str
) -> None:
    again(GOLDEN / name, layout, tmp_path / "out")
    ours, theirs = specs(tmp_path / "out"), specs(GOLDEN / peer)
    assert ours.keys() == theirs.keys()
    floats = {"F16", "BF16"} | ({"F32"} if peer in OTHER_FLOATS else set())
    for key, (dtype, shape) in theirs.items():
        assert squeezed(ours[key][1]) == squeezed(shape), key
        assert ours[key][0] == dtype or {ours[key][0], dtype} <= floats, key


def specs(folder: Path) -> dict[str, tuple[str, list[int]]]:
    with safe_open(folder / "model.safetensors", "pt") as f:
        slices = {key: f.get_slice(key) for key in f.keys()}  # noqa: SIM118 - not a dict
        return {key: (each.get_dtype(), each.get_shape()) for key, each in slices.items()}


def squeezed(shape: list[int]) -> list[int]:
    """compressed-tensors and ModelOpt write a single number as [1] or []; their readers take both."""
    return [side for side in shape if side != 1]


TO_CT = [
    ("gptq", "W4A16", "ct-pack"),
    ("awq", "W4A16_ASYM", "ct-pack"),
    ("gptq-v2", "W8A16", "ct-pack"),
    ("torchao-tile", "W4A16", "ct-pack"),
    ("hf-fp8", "FP8_BLOCK", "ct-float"),
    ("modelopt-fp8-channel", "FP8_DYNAMIC", "ct-float"),
    ("torchao-nvfp4", "NVFP4A16", "ct-nvfp4"),
]


@pytest.mark.slow
def test_compressed_tensors_decompresses_what_was_repacked(tmp_path: Path) -> None:
    """Both versions; the weights it finds are those of the layout before. It multiplies in the scale's own dtype: fp16."""
    model, folders = wide(tmp_path / "model"), []
    for layout, scheme, target in TO_CT:
        before = made(model, scheme, layout, tmp_path / layout)
        again(before, target, tmp_path / f"{layout}-ct")
        assert our_digests(before) == our_digests(tmp_path / f"{layout}-ct")
        folders.append(tmp_path / f"{layout}-ct")
    for name in ("gptqmodel-gptq-moe", "autoawq-w4-dense", "modelopt-fp8-dense", "modelopt-nvfp4-moe"):
        layout = {"gp": "ct-pack", "au": "ct-pack"}.get(name[:2], "ct-float" if "fp8" in name else "ct-nvfp4")
        again(GOLDEN / name, layout, tmp_path / name)
        folders.append(tmp_path / name)
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda site: decompressed(folders, site), (None, NEWEST)))
    for found in both:
        for folder, theirs in zip(folders, found, strict=True):
            fp16 = folder.name in ("gptqmodel-gptq-moe", "autoawq-w4-dense")
            assert theirs["digests"] == (digests_by_fp16(folder) if fp16 else our_digests(folder)), folder.name


def digests_by_fp16(folder: Path) -> dict[str, str]:
    rounded = {module: w.half().bfloat16().view(torch.uint8).numpy() for module, w in weights(folder).items()}
    return {module: hashlib.sha256(raw.tobytes()).hexdigest() for module, raw in rounded.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "layout", "target", "kind"),
    [
        ("W4A16", "gptq", "torchao-tile", "Int4TilePackedTo4dTensor"),
        ("NVFP4A16", "ct-nvfp4", "torchao-nvfp4", "NVFP4Tensor"),
    ],
)
def test_transformers_and_torchao_open_what_was_repacked(
    tmp_path: Path, scheme: str, layout: str, target: str, kind: str
) -> None:
    """Every linear becomes torchao's own tensor of our bytes; nothing is missing or left over."""
    from transformers import AutoModelForCausalLM

    again(made(wide(tmp_path / "model"), scheme, layout, tmp_path / "one"), target, tmp_path / "two")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "two", dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    decoder = Decoder(Artifact.open(tmp_path / "two"))
    assert len(decoder.modules()) == 7
    for module, shape in decoder.modules():
        weight, packed = model.get_submodule(module).weight, decoder.packed(module)
        assert type(weight.data).__name__ == kind and tuple(weight.shape) == shape
        assert torch.equal(weight.data.qdata, packed["_weight_qdata"])
        if kind == "NVFP4Tensor":
            assert torch.equal(weight.data.dequantize(torch.float32), weights(tmp_path / "one")[module])
