"""hf-fp8, modelopt-fp8, modelopt-nvfp4 and bnb-int8 against the projects whose formats they are.

ModelOpt and bitsandbytes made the golden bytes (scripts/goldens/modelopt.py, bnb.py); transformers opens what is written here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO_MODEL, make_artifact
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize, replace_with_fp8_linear
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from quantpub.artifact import Artifact
from quantpub.decode import Decoder
from quantpub.layouts import LAYOUTS
from quantpub.layouts.base import Layout
from quantpub.layouts.bnb_int8 import absmax_of, scale_of
from quantpub.qtensor import CODE_DTYPES, QTensor, dequantize, same, same_bits
from quantpub.registry import load
from quantpub.scheme import PRESETS, Scheme, preset
from quantpub.shards import DTYPES

GOLDEN = Path(__file__).parent / "golden"
OWN = {
    "hf-fp8": ("FP8_BLOCK",),
    "modelopt-fp8": ("FP8",),
    "modelopt-nvfp4": ("NVFP4A16", "NVFP4"),
    "bnb-int8": ("LLM_INT8",),
}
HELD = [(name, scheme) for name, schemes in OWN.items() for scheme in schemes]
Tensors = dict[str, torch.Tensor]


def layout_of(name: str) -> Layout:
    layout: Layout = load(LAYOUTS, "layout", name)
    return layout


def golden(name: str) -> tuple[Tensors, dict[str, str]]:
    path = GOLDEN / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


def below(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def random_q(scheme: Scheme, n: int, k: int, seed: int = 0) -> QTensor:
    """Any codes but NaN; scales as the scheme stores them."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (n, k), generator=generator).to(torch.uint8)
    if scheme.weight.num == "fp4_e2m1":
        codes = raw & 15
    elif scheme.weight.num == "fp8_e4m3":
        codes = torch.where(raw & 0x7F == 0x7F, 0, raw).view(torch.float8_e4m3fn)
    else:
        codes = raw.view(torch.int8)
    scale = torch.randn(scheme.weight.scale_shape(n, k), generator=generator).exp_()
    if scheme.weight.scale_dtype == "fp8_e4m3":
        scale = scale.to(torch.float8_e4m3fn)
    if scheme.weight.scale_dtype == "absmax127":
        scale = scale_of(scale)
    calibrated = scheme.act is not None and (scheme.act.global_scale or not scheme.act.dynamic)
    return QTensor(
        scheme,
        codes,
        scale,
        global_scale=torch.tensor(2.0**-9) if scheme.weight.global_scale else None,
        input_scale=torch.tensor(0.37) if calibrated else None,
    )


# All four: exact or refused


@pytest.mark.parametrize(("layout_name", "scheme_name"), HELD)
@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 400), k=st.integers(1, 40), unit=st.sampled_from([1, 16, 128]), seed=st.integers(0, 2**31))
def test_exact_or_refused(layout_name: str, scheme_name: str, n: int, k: int, unit: int, seed: int) -> None:
    layout, scheme, k = layout_of(layout_name), preset(scheme_name), min(k * unit, 512)
    reason = layout.reject(scheme, n, k, "BF16")
    if reason is not None:
        assert str(k) in reason
        return
    q = random_q(scheme, n, k, seed)
    tensors = layout.pack(q)
    assert same(layout.unpack(tensors, scheme, (n, k)), q)
    spec = {suffix: (DTYPES[dtype], shape) for suffix, (dtype, shape) in layout.spec(scheme, n, k, "BF16").items()}
    assert spec == {suffix: (t.dtype, tuple(t.shape)) for suffix, t in tensors.items()}


@pytest.mark.parametrize("layout_name", OWN)
@pytest.mark.parametrize("scheme_name", PRESETS)
def test_holds_its_own_schemes_only(layout_name: str, scheme_name: str) -> None:
    layout = layout_of(layout_name)
    reason = layout.reject(preset(scheme_name), 256, 512, "BF16")
    assert (reason is None) == (scheme_name in OWN[layout_name])
    assert reason is None or scheme_name in reason
    assert layout.reject(preset(scheme_name, 64), 256, 512, "BF16") is not None


@pytest.mark.parametrize(
    ("layout_name", "scheme_name", "n", "k", "reason"),
    [
        ("hf-fp8", "FP8_BLOCK", 64, 128, None),
        ("hf-fp8", "FP8_BLOCK", 576, 7168, None),  # DeepSeek's kv_a_proj_with_mqa
        ("hf-fp8", "FP8_BLOCK", 128, 192, "192 is not a multiple of 128"),
        ("hf-fp8", "FP8_BLOCK", 128, 64, "64 is not a multiple of 128"),
        ("hf-fp8", "FP8_BLOCK", 192, 128, "2 blocks of 96 rows"),
        ("modelopt-nvfp4", "NVFP4A16", 5, 40, "40 is not a multiple of the group size 16"),
        ("modelopt-nvfp4", "NVFP4", 5, 48, None),
        ("modelopt-fp8", "FP8", 3, 5, None),
        ("bnb-int8", "LLM_INT8", 3, 5, None),
    ],
)
def test_shapes(layout_name: str, scheme_name: str, n: int, k: int, reason: str | None) -> None:
    found = layout_of(layout_name).reject(preset(scheme_name), n, k, "BF16")
    assert found is None if reason is None else reason in str(found)


# ModelOpt


def test_modelopt_fp8_bytes_and_values() -> None:
    case = below(golden("modelopt_cases")[0], "FP8.")
    q = QTensor(preset("FP8"), case["in.codes"], case["in.scale"].view(1, 1), input_scale=torch.tensor(1.0))
    packed = layout_of("modelopt-fp8").pack(q)
    assert same_bits(packed["weight"], case["weight"])
    assert same_bits(packed["weight_scale"], case["in.scale"])
    assert torch.equal(dequantize(q), case["dequantized"])


def test_modelopt_nvfp4_bytes_and_values() -> None:
    case = below(golden("modelopt_cases")[0], "NVFP4.")
    q = QTensor(preset("NVFP4A16"), case["in.codes"], case["in.scale"], global_scale=case["in.global_scale"])
    packed = layout_of("modelopt-nvfp4").pack(q)
    assert set(packed) == {"weight", "weight_scale", "weight_scale_2"}
    assert same_bits(packed["weight"], case["weight"])
    assert torch.equal(dequantize(q), case["dequantized"])


def test_modelopt_reads_every_byte_and_every_scale_as_we_do() -> None:
    case = below(golden("modelopt_cases")[0], "every.")
    assert len(case["weight"].unique()) == 256
    tensors = {
        "weight": case["weight"],
        "weight_scale": case["in.scale"],
        "weight_scale_2": case["in.global_scale"],
    }
    q = layout_of("modelopt-nvfp4").unpack(tensors, preset("NVFP4A16"), (64, 32))
    assert torch.equal(dequantize(q), case["dequantized"])


def test_nvfp4_bytes_by_hand() -> None:
    """1, −6 | 0.5, 3: the even column in the low half; a sign is bit 3."""
    codes = torch.tensor([[2, 15, 1, 5] + [0] * 12], dtype=torch.uint8)
    scale = torch.ones(1, 1).to(torch.float8_e4m3fn)
    packed = layout_of("modelopt-nvfp4").pack(QTensor(preset("NVFP4A16"), codes, scale, global_scale=torch.tensor(1.0)))
    assert packed["weight"].tolist() == [[0xF2, 0x51] + [0] * 6]


@pytest.mark.parametrize(
    ("algorithm", "layout_name", "scheme_name"),
    [
        ("FP8", "modelopt-fp8", "FP8"),
        ("NVFP4", "modelopt-nvfp4", "NVFP4"),
        ("W4A16_NVFP4", "modelopt-nvfp4", "NVFP4A16"),
    ],
)
def test_modelopt_export(algorithm: str, layout_name: str, scheme_name: str) -> None:
    """Names, dtypes, shapes, bytes and both configurations of a checkpoint that ModelOpt exported."""
    tensors, header = golden("modelopt_export")
    layout, scheme = layout_of(layout_name), preset(scheme_name)
    listing = json.loads(header[f"{algorithm}.listing"])
    linears = [name for name in listing if name.endswith("_proj.weight")]
    assert len(linears) == 7
    per_byte = 2 if scheme.weight.number.bits == 4 else 1
    expected = {name: described for name, described in listing.items() if "_proj." not in name}
    for name in linears:
        n, k = listing[name][1][0], listing[name][1][1] * per_byte
        for suffix, (dtype, shape) in layout.spec(scheme, n, k, "BF16").items():
            expected[name.removesuffix("weight") + suffix] = [str(DTYPES[dtype]).removeprefix("torch."), list(shape)]
    assert expected == listing
    for module in ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj"):
        theirs = below(tensors, f"{algorithm}.{module}.")
        n, k = len(theirs["weight"]), theirs["weight"].shape[1] * per_byte
        ours = layout.pack(layout.unpack(theirs, scheme, (n, k)))
        assert set(ours) == set(theirs)
        assert all(same_bits(ours[name], theirs[name]) for name in theirs)
    stated = json.loads(header[f"{algorithm}.quantization_config"])
    config = layout.config(scheme, stated["ignore"])
    assert json.dumps(config) == json.dumps(stated)
    assert json.dumps(layout.files(config)) == json.dumps(
        {"hf_quant_config.json": json.loads(header[f"{algorithm}.hf_quant_config.json"])}
    )


@pytest.mark.parametrize(("layout_name", "scheme_name"), [("modelopt-fp8", "FP8"), ("modelopt-nvfp4", "NVFP4")])
def test_no_kv_cache_scheme_is_stated(layout_name: str, scheme_name: str) -> None:
    layout = layout_of(layout_name)
    config = layout.config(preset(scheme_name), ["lm_head"])
    assert "kv_cache_scheme" not in config
    assert layout.files(config)["hf_quant_config.json"]["quantization"]["kv_cache_quant_algo"] is None


# bitsandbytes


@pytest.mark.parametrize("module", ["model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj"])
def test_bitsandbytes_bytes_and_values(module: str) -> None:
    theirs, layout, scheme = below(golden("bnb_int8")[0], f"{module}."), layout_of("bnb-int8"), preset("LLM_INT8")
    multiplied, dequantized = theirs.pop("multiplied"), theirs.pop("dequantized")
    n, k = theirs["weight"].shape
    q = layout.unpack(theirs, scheme, (n, k))
    ours = layout.pack(q)
    assert set(ours) == set(theirs)
    assert all(same_bits(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(dequantize(q), multiplied)
    ulps = (dequantize(q).view(torch.int32) - dequantized.view(torch.int32)).abs()
    assert 1 <= int(ulps.max()) <= 2, "(code · absmax) · 1/127 rounds once more"


def test_bitsandbytes_checkpoint() -> None:
    """Names, dtypes, shapes and configuration of a checkpoint that transformers saved."""
    _, header = golden("bnb_int8")
    layout, scheme = layout_of("bnb-int8"), preset("LLM_INT8")
    listing = json.loads(header["listing"])
    linears = [name for name in listing if name.endswith("_proj.weight")]
    assert len(linears) == 7
    expected = {name: described for name, described in listing.items() if "_proj." not in name}
    for name in linears:
        n, k = listing[name][1]
        for suffix, (dtype, shape) in layout.spec(scheme, n, k, "BF16").items():
            expected[name.removesuffix("weight") + suffix] = [str(DTYPES[dtype]).removeprefix("torch."), list(shape)]
    assert expected == listing
    config = layout.config(scheme, ["lm_head"])
    assert config == json.loads(header["quantization_config"])
    assert config == BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"]).to_dict()
    assert BitsAndBytesConfig(**config).quantization_method() == "llm_int8"


def test_every_mantissa_of_an_absmax() -> None:
    scale = scale_of(torch.arange(1 << 23, dtype=torch.int32).add_(127 << 23).view(torch.float32))
    assert torch.equal(scale_of(absmax_of(scale)), scale)


@settings(max_examples=200, deadline=None)
@given(absmax=st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_every_absmax(absmax: float) -> None:
    scale = scale_of(torch.tensor([absmax], dtype=torch.float32))
    assert same_bits(scale_of(absmax_of(scale)), scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_absmax_of_16_bits_comes_back_as_it_was(dtype: torch.dtype) -> None:
    """All that are normal in float32: below, a 127th of one has lost digits."""
    every = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[every.isfinite() & (every > 2.0**-118)]
    assert torch.equal(absmax_of(scale_of(every)), every)


def test_a_scale_that_is_no_absmax_over_127_is_refused() -> None:
    """One in 128: float32 values times 1/127 lie a little further apart than float32 values."""
    scales = torch.arange(1024, dtype=torch.int32).add_((120 << 23) + (1 << 22)).view(torch.float32)
    unreachable = [scale for scale in scales.split(1) if not reached(scale)]
    assert len(unreachable) == 8
    with pytest.raises(AssertionError, match="1/127"):
        absmax_of(unreachable[0])


def reached(scale: torch.Tensor) -> bool:
    """By trying every float32 near 127 times the scale."""
    near = (scale * 127).view(torch.int32) + torch.arange(-8, 9, dtype=torch.int32)
    return bool((scale_of(near.view(torch.float32)) == scale).any())


# transformers' FP8


def fp8_quantizer(config: dict[str, Any]) -> FineGrainedFP8HfQuantizer:
    return FineGrainedFP8HfQuantizer(FineGrainedFP8Config(**config))


def test_transformers_own_fp8_bytes() -> None:
    """What Fp8Quantize makes is read back to the bit, and stands for what Fp8Dequantize says."""
    layout, scheme = layout_of("hf-fp8"), preset("FP8_BLOCK")
    quantizer = fp8_quantizer(layout.config(scheme, ["lm_head"]))
    w = torch.randn(256, 384, generator=torch.Generator().manual_seed(1))
    made = Fp8Quantize(quantizer).convert({"weight": w})
    assert set(made) == {"weight", "weight_scale_inv"}
    q = layout.unpack(made, scheme, (256, 384))
    assert all(same_bits(tensor, made[name]) for name, tensor in layout.pack(q).items())
    assert torch.equal(dequantize(q), Fp8Dequantize(quantizer).convert(made)["weight"])


def test_why_192_rows_are_refused() -> None:
    """transformers takes 192 rows with two scales for blocks of 96, and says nothing."""
    layout, scheme = layout_of("hf-fp8"), preset("FP8_BLOCK")
    assert layout.reject(scheme, 192, 128, "BF16") is not None
    q = random_q(scheme, 192, 128)
    read = Fp8Dequantize(fp8_quantizer(layout.config(scheme, []))).convert(layout.pack(q))["weight"]
    assert torch.equal(read[:96], dequantize(q)[:96])
    assert not torch.equal(read[96:128], dequantize(q)[96:128])


def written(model: PreTrainedModel, folder: Path, left: tuple[str, ...] = ("lm_head",)) -> dict[str, QTensor]:
    """`model` in layout hf-fp8 with random codes and scales for all its linears but `left`; what each one holds."""
    layout, scheme = layout_of("hf-fp8"), preset("FP8_BLOCK")
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    held: dict[str, QTensor] = {}
    for name in [name for name, tensor in tensors.items() if tensor.ndim == 2 and "embed" not in name]:
        module = name.removesuffix(".weight")
        if module in left:
            continue
        n, k = tensors.pop(name).shape
        assert layout.reject(scheme, n, k, "F32") is None, name
        held[module] = random_q(scheme, n, k, len(held))
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in layout.pack(held[module]).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = layout.config(scheme, left)
    (folder / "config.json").write_text(json.dumps(config))
    return held


def tiny_llama() -> PreTrainedModel:
    torch.manual_seed(2)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=256,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=64,
            tie_word_embeddings=False,
        )
    )


def test_transformers_opens_hf_fp8(tmp_path: Path) -> None:
    """Every weight is bit for bit what `dequantize` says; k_proj has 64 rows, half a block."""
    made = tiny_llama()
    held = written(made, tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert len(held) == 14
    for module, q in held.items():
        assert torch.equal(opened.get_submodule(module).weight, dequantize(q)), module
    assert torch.equal(opened.lm_head.weight, made.lm_head.weight)


def test_transformers_opens_what_quantpub_wrote(tmp_path: Path) -> None:
    """The demo model through the whole pipeline, in float32 and in its own dtype."""
    artifact = make_artifact(DEMO_MODEL, "fp8-block", tmp_path / "artifact", "hf-fp8")
    decoder = Decoder(Artifact(artifact))
    for dtype in (torch.float32, torch.bfloat16):
        opened = AutoModelForCausalLM.from_pretrained(artifact, dtype=dtype)
        for module, _ in decoder.modules():
            assert torch.equal(opened.get_submodule(module).weight, dequantize(decoder.qtensor(module)).to(dtype))
    assert len(decoder.modules()) == 28


def test_transformers_opens_hf_fp8_experts(tmp_path: Path) -> None:
    """Experts under their own names on disk; transformers merges them into 3-D parameters."""
    torch.manual_seed(3)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        num_experts=2,
        num_experts_per_tok=1,
        tie_word_embeddings=False,
    )
    router = "model.layers.0.mlp.gate"
    made = Qwen3MoeForCausalLM(config)
    held = written(made, tmp_path, ("lm_head", router))
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    mlp, at = opened.model.layers[0].mlp, "model.layers.0.mlp.experts"
    for e in range(2):
        gate, up, down = (dequantize(held[f"{at}.{e}.{name}_proj"]) for name in ("gate", "up", "down"))
        assert torch.equal(mlp.experts.gate_up_proj[e], torch.cat([gate, up]))
        assert torch.equal(mlp.experts.down_proj[e], down)
    assert torch.equal(mlp.gate.weight, made.model.layers[0].mlp.gate.weight)


def test_modules_of_transformers_have_our_names_and_shapes() -> None:
    """The modules that a GPU would run, on the meta device: FP8Linear for every linear that is not left out."""
    layout, scheme = layout_of("hf-fp8"), preset("FP8_BLOCK")
    left = ["lm_head", "model.layers.1.mlp.down_proj"]
    model = tiny_llama()
    linears = {name: m.weight.shape for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    config = FineGrainedFP8Config(**layout.config(scheme, left))
    replace_with_fp8_linear(model, config.modules_to_not_convert, config, pre_quantized=True)
    state = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    for name, (n, k) in linears.items():
        parts = below({key: torch.empty(0) for key in state}, f"{name}.")
        spec = {"weight": ("F32", (n, k))} if name in left else layout.spec(scheme, n, k, "BF16")
        assert {part: state[f"{name}.{part}"] for part in parts} == {
            suffix: (DTYPES[dtype], shape) for suffix, (dtype, shape) in spec.items()
        }


@pytest.mark.parametrize(
    ("module", "converted"),
    [
        ("model.layers.1.mlp.gate", False),
        ("model.layers.1.mlp.gate_proj", True),
        ("model.layers.11.mlp.gate", True),
        ("lm_head", False),
        ("model.layers.1.self_attn.q_proj", True),
    ],
)
def test_a_router_left_out_leaves_out_no_gate_proj(module: str, converted: bool) -> None:
    config = layout_of("hf-fp8").config(preset("FP8_BLOCK"), ["lm_head", "model.layers.1.mlp.gate"])
    assert should_convert_module(module, config["modules_to_not_convert"]) == converted


def test_fp8_config_is_read_as_meant() -> None:
    read = FineGrainedFP8Config(**layout_of("hf-fp8").config(preset("FP8_BLOCK"), ["lm_head"]))
    assert (read.activation_scheme, list(read.weight_block_size or ())) == ("dynamic", [128, 128])
    assert read.modules_to_not_convert == ["lm_head"]
    assert CODE_DTYPES["fp8_e4m3"] == torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("layout_name", "scheme_name", "group_size", "reason"),
    [
        ("modelopt-nvfp4", "NVFP4A16", 32, "modelopt-nvfp4 holds FP4 weights in groups of 16 columns, not of 32"),
        ("modelopt-nvfp4", "NVFP4", -1, "modelopt-nvfp4 holds FP4 weights in groups of 16 columns, not of whole rows"),
        (
            "modelopt-fp8",
            "FP8",
            64,
            "modelopt-fp8 holds FP8 weights with a scale a tensor, not one for every 64 columns",
        ),
        (
            "bnb-int8",
            "LLM_INT8",
            64,
            "bnb-int8 holds int8 weights with the absmax of a row, not one for every 64 columns",
        ),
        ("modelopt-nvfp4", "MXFP4A16", 16, "in groups of 16 with a global scale, not MXFP4A16"),
        ("modelopt-fp8", "FP8_DYNAMIC", 64, "with a scale a tensor each, not FP8_DYNAMIC"),
        ("bnb-int8", "W8A8", 64, "as LLM.int8() has them, not W8A8"),
    ],
)
def test_a_group_that_does_not_fit_is_named_and_not_the_scheme(
    layout_name: str, scheme_name: str, group_size: int, reason: str
) -> None:
    found = layout_of(layout_name).reject(preset(scheme_name, group_size), 256, 512, "BF16")
    assert found is not None and found.endswith(reason)
