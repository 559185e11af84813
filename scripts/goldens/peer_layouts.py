"""Golden tensors of other tools' checkpoints: what each writes of a small weight, and what it reads its own tensors as.

usage: python -P scripts/goldens/peer_layouts.py TOOL FILE      (TOOL: torchao, gptqmodel, auto-round or modelopt, each in
an environment of its own; a CPU is enough)

Puts the cases of one tool into FILE, tests/golden/peer_layouts.safetensors, and leaves those of the others in it:
    TOOL/CASE.SUFFIX   a tensor as it stands in a checkpoint, by its suffix
    TOOL/CASE=weight   float32, by the tool's own dequantization, of the rows ROWS that the weight has
In the metadata, as JSON: TOOL, its versions, calls, seed and device; where a tool declares something,
TOOL/CASE=config, =header, =files.
Nothing of quantpub is used.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

SEED = 57
ROWS = (0, 1, 31, 32, 33, 127, 128, 143)
Tensors = dict[str, torch.Tensor]
Words = dict[str, Any]


def kept(w_NK: torch.Tensor) -> torch.Tensor:
    return w_NK.float()[[row for row in ROWS if row < len(w_NK)]]


def weight(n: int, k: int) -> torch.Tensor:
    """Normal weights in bf16, of which some groups lie to one side of 0."""
    generator = torch.Generator().manual_seed(SEED)
    w = torch.randn(n, k, generator=generator) * 0.04
    w[::3, : k // 2] += 0.05
    return w.bfloat16()


def torchao() -> tuple[Tensors, Words]:
    """quantize_ and flatten_tensor_state_dict, which is what transformers saves; Tensor.dequantize."""
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerGroup,
        quantize_,
    )
    from torchao.quantization.granularity import PerTensor
    from torchao.quantization.quantize_.workflows.float8.float8_tensor import Float8Tensor
    from transformers import TorchAoConfig

    tensors: Tensors = {}

    def take(case: str, quantized: torch.Tensor) -> None:
        flat, _ = flatten_tensor_state_dict({"m.weight": quantized})
        tensors.update({f"{case}.{name.removeprefix('m.')}": tensor for name, tensor in flat.items()})
        wide = quantized.dequantize() if case.startswith("intx") else quantized.dequantize(torch.float32)
        tensors[f"{case}=weight"] = kept(wide)

    def made(w_NK: torch.Tensor, scheme: Any) -> torch.Tensor:
        linear = torch.nn.Sequential(torch.nn.Linear(w_NK.shape[1], len(w_NK), bias=False, dtype=w_NK.dtype))
        linear[0].weight.data = w_NK
        quantize_(linear, scheme)
        return linear[0].weight.data

    power = weight(144, 80)
    power[5, 7] = 0.65625  # the largest: 2688 · 2^−12, so that the scale of the tensor is a power of two
    assert power.abs().max() == 0.65625
    take("nvfp4", made(power, NVFP4WeightOnlyConfig()))
    take("nvfp4-odd", made(weight(32, 64), NVFP4WeightOnlyConfig()))
    take("float8-row", made(weight(12, 64), Float8WeightOnlyConfig()))
    take("float8-tensor", Float8Tensor.from_hp(weight(12, 64), granularity=PerTensor()))
    take("int8", made(weight(12, 64), Int8WeightOnlyConfig(version=2)))
    take("int8-dynamic", made(weight(12, 64), Int8DynamicActivationInt8WeightConfig(version=2)))
    grouped = {"weight_dtype": torch.int4, "granularity": PerGroup(32)}
    wide = weight(12, 64).float()  # of a bf16 one torchao rounds what it dequantizes
    take("intx", made(wide, IntxWeightOnlyConfig(**grouped)))
    take("intx-zeros", made(wide, IntxWeightOnlyConfig(**grouped, mapping_type=MappingType.ASYMMETRIC)))
    take("intx-bf16", made(weight(12, 64), IntxWeightOnlyConfig(**grouped)))

    state = {"model.a.weight": made(power, NVFP4WeightOnlyConfig()), "model.norm.weight": torch.zeros(2)}
    _, header = flatten_tensor_state_dict(state)
    config = TorchAoConfig(NVFP4WeightOnlyConfig(), modules_to_not_convert=["lm_head"]).to_dict()
    return tensors, {"nvfp4=header": header, "nvfp4=config": config}


def gptqmodel() -> tuple[Tensors, Words]:
    """TorchLinear.pack_original, which makes version 2; convert_gptq_v2_to_v1_format_module; its own dequantization."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    n, k, tensors = 32, 64, dict[str, torch.Tensor]()
    generator = torch.Generator().manual_seed(SEED)

    def take(case: str, bits: int, group: int, symmetric: bool, one: bool, smallest: int) -> None:
        """smallest: of the zeros. one: version 1."""
        groups, top = k // group, (1 << bits) - 1
        scale_NG = torch.rand(n, groups, generator=generator).add_(0.1).half()
        drawn = torch.randint(smallest, top + 1, (n, groups), generator=generator)
        drawn[0] = smallest  # where it is 0, version 1 borrows from the next row's
        zero_NG = torch.full((n, groups), 1 << bits - 1) if symmetric else drawn
        codes_NK = torch.randint(0, top + 1, (n, k), generator=generator)
        wide = (codes_NK - zero_NG.repeat_interleave(group, 1)) * scale_NG.float().repeat_interleave(group, 1)
        linear = torch.nn.Linear(k, n, bias=False)
        linear.weight.data = wide
        module = TorchLinear(
            bits=bits,
            group_size=group,
            sym=symmetric,
            desc_act=False,
            in_features=k,
            out_features=n,
            register_buffers=True,
        )
        g_idx = (torch.arange(k) // group).to(torch.int32)
        module.pack_original(linear, scale_NG.float(), zero_NG, g_idx)
        module.eval()
        w_KN = TorchLinear._dequantize_weight_cached_248(module, num_itr=1)
        if one:
            convert_gptq_v2_to_v1_format_module(module, QuantizeConfig(bits=bits, group_size=group))
        tensors.update({f"{case}.{name}": getattr(module, name) for name in ("qweight", "qzeros", "scales", "g_idx")})
        tensors[f"{case}=weight"] = kept(w_KN.t())

    for bits in (4, 8):
        take(f"v2-int{bits}", bits, 32, True, False, 0)
        take(f"v2-int{bits}-zeros", bits, 32, False, False, 0)
        take(f"v1-int{bits}-zeros", bits, 32, False, True, 1)
        take(f"v1-int{bits}-borrowed", bits, 32, False, True, 0)
    return tensors, {}


def auto_round() -> tuple[Tensors, Words]:
    """quantize_weight_rtn, the writer of its model-free mode; what its QuantLinear makes of the identity."""
    from auto_round.utils.model_free_utils import quantize_weight_rtn
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    tensors: Tensors = {}

    def take(case: str, bits: int, symmetric: bool, packing: str) -> None:
        w_NK = weight(32, 64)
        qweight, qzeros, scales = quantize_weight_rtn(w_NK, bits, 32, symmetric, packing=packing)
        linear = (qlinear_torch if packing == "auto_round" else qlinear_torch_zp).QuantLinear(
            bits, 32, w_NK.shape[1], len(w_NK), False
        )
        linear.qweight, linear.qzeros, linear.scales = qweight, qzeros, scales
        linear.eval()
        w_KN = linear(torch.eye(w_NK.shape[1], dtype=torch.float16))
        tensors.update({f"{case}.qweight": qweight, f"{case}.qzeros": qzeros, f"{case}.scales": scales})
        tensors[f"{case}=weight"] = kept(w_KN.t())

    for bits in (4, 8):
        take(f"auto-gptq-int{bits}", bits, True, "auto_round:auto_gptq")
        take(f"auto-gptq-int{bits}-zeros", bits, False, "auto_round:auto_gptq")
        take(f"auto-round-int{bits}-zeros", bits, False, "auto_round")
    return tensors, {}


def modelopt() -> tuple[Tensors, Words]:
    """mtq.quantize and export_hf_checkpoint of a Llama of one layer with random weights; FP8QTensor.dequantize, of int4 what
    its weight_quantizer makes of the weight.
    """
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor import FP8QTensor
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    tensors, words = dict[str, torch.Tensor](), dict[str, Any]()

    def exported(hidden: int, preset: Words, module: str) -> tuple[Tensors, torch.Tensor, Words, Words]:
        torch.manual_seed(SEED)
        sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "head_dim": hidden // 2}
        config = LlamaConfig(
            vocab_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
            **sizes,
        )
        model, tokens = LlamaForCausalLM(config).bfloat16().float().eval(), torch.randint(0, 32, (2, 16))
        model = mtq.quantize(model, copy.deepcopy(preset), lambda m: m(tokens))
        linear = model.get_submodule(module)
        rounded = linear.weight_quantizer(linear.weight.detach().clone())
        with tempfile.TemporaryDirectory() as folder:
            export_hf_checkpoint(model, export_dir=folder)
            stated = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
            nested = json.loads((Path(folder) / "hf_quant_config.json").read_text())
            return load_file(Path(folder) / "model.safetensors"), rounded, stated, nested

    def take(case: str, hidden: int, preset: Words, module: str) -> None:
        found, rounded, stated, nested = exported(hidden, preset, module)
        own = {name.removeprefix(f"{module}."): t for name, t in found.items() if name.startswith(f"{module}.")}
        tensors.update({f"{case}.{suffix}": tensor for suffix, tensor in own.items()})
        tensors[f"{case}=weight"] = kept(fp8(own) if case.startswith("fp8") else rounded)
        words.update({f"{case}=config": stated, f"{case}=files": {"hf_quant_config.json": nested}})

    def fp8(own: Tensors) -> torch.Tensor:
        stored = FP8QTensor(own["weight"].shape, torch.float32, own["weight"])
        scale = own["weight_scale"]
        if scale.dim() == 1:
            return stored.dequantize(torch.float32, scale=scale[:, None])
        return stored.dequantize(torch.float32, scale=scale.reshape(scale.shape[::2]), block_sizes={-1: 128, -2: 128})

    attention, mlp = "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj"
    take("fp8-channel", 32, mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG, attention)
    take("fp8-block", 128, mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG, mlp)
    take("int4", 128, mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG, attention)
    return tensors, words


MAKERS: dict[str, tuple[Callable[[], tuple[Tensors, Words]], tuple[str, ...]]] = {
    "torchao": (torchao, ("torchao", "transformers", "torch")),
    "gptqmodel": (gptqmodel, ("gptqmodel", "torch")),
    "auto-round": (auto_round, ("auto-round", "torch")),
    "modelopt": (modelopt, ("nvidia-modelopt", "transformers", "torch")),
}


def main(tool: str, path: Path) -> None:
    make, packages = MAKERS[tool]
    tensors, metadata = dict[str, torch.Tensor](), {"made by": "scripts/goldens/peer_layouts.py"}
    if path.exists():
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
    made, words = make()
    calls = " ".join((make.__doc__ or "").split())
    told = {package: version(package) for package in packages} | {"calls": calls, "seed": SEED, "device": "cpu"}
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{tool}/")}
    metadata = {key: text for key, text in metadata.items() if key != tool and not key.startswith(f"{tool}/")}
    tensors |= {f"{tool}/{key}": tensor.detach().contiguous().clone() for key, tensor in made.items()}
    metadata |= {tool: json.dumps(told)} | {f"{tool}/{key}": json.dumps(value) for key, value in words.items()}
    save_file(tensors, path, metadata)
    print(f"{path.name}: {len(made)} tensors of {tool}, {path.stat().st_size} bytes in all")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in MAKERS:
        sys.exit(f"usage: python -P scripts/goldens/peer_layouts.py {'|'.join(MAKERS)} FILE")
    main(sys.argv[1], Path(sys.argv[2]))
