"""Golden parts of torchao's tile-packed int4: what its HQQ makes of a padded weight, and what it writes around tensors.

usage: python -P scripts/goldens/int4_torchao.py OUT_DIR [ARTIFACT...]   (torchao 0.18, transformers; a CPU is enough)

Writes torchao_parts.safetensors: torchao packs tiles on CUDA only (see `int4_cuda`), but quantizes, pairs scales with
zeros, and writes headers and configurations anywhere.
    weight          bf16 [N, K], the source
    codes           uint8 [N', K'], unsigned, of the weight padded with zeros as torchao pads it
    scale_and_zero  bf16 [K'/g, N', 2]
In the metadata, as JSON: `header`, the safetensors header of a model of two such modules and two plain tensors, by
flatten_tensor_state_dict; `config`, what transformers' TorchAoConfig writes for it.

With ARTIFACT, checkpoints in this layout: each is opened with transformers on the CPU, and what is not as it should be
ends the script.
"""

from __future__ import annotations

import json
import logging
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import Int4TilePackedTo4dTensor, Int4WeightOnlyConfig
from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq
from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm, Int4PackingFormat
from torchao.quantization.utils import pack_tinygemm_scales_and_zeros
from torchao.utils import find_multiple
from transformers import AutoModelForCausalLM, TorchAoConfig

N, K, GROUP, SEED = 5, 256, 64, 18


def quantized(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The steps of Int4TilePackedTo4dTensor.from_hp before the CUDA operator."""
    margin = (0, find_multiple(K, 1024) - K, 0, find_multiple(N, 8) - N)
    padded = torch.nn.functional.pad(weight, margin)
    codes, scale, zero, _ = _choose_qparams_and_quantize_affine_hqq(
        padded,
        nbits=4,
        group_size=GROUP,
        axis=1,
        compute_dtype=torch.bfloat16,
        device="cpu",
        verbose=False,
        raw_output=False,
    )
    rows = len(padded)
    pairs = pack_tinygemm_scales_and_zeros(scale.reshape(rows, -1), zero.reshape(rows, -1), torch.bfloat16)
    return {"weight": weight, "codes": codes.to(torch.uint8), "scale_and_zero": pairs}


def tensor(n: int, k: int) -> Int4TilePackedTo4dTensor:
    qdata = torch.zeros(find_multiple(n, 8) // 8, find_multiple(k, 1024) // 128, 32, 4, dtype=torch.int32)
    pairs = torch.zeros(find_multiple(k, 1024) // GROUP, find_multiple(n, 8), 2, dtype=torch.bfloat16)
    return Int4TilePackedTo4dTensor(qdata, pairs, [1, GROUP], torch.Size((n, k)))


def declared() -> dict[str, str]:
    plain = torch.zeros(2)
    state = {"model.a.weight": tensor(5, 256), "model.b.weight": tensor(64, 2048)} | {
        "model.a.bias": plain,
        "norm": plain,
    }
    tensors, header = flatten_tensor_state_dict(
        {name.replace("norm", "model.norm.weight"): t for name, t in state.items()}
    )
    scheme = Int4WeightOnlyConfig(
        group_size=GROUP,
        int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D,
        int4_choose_qparams_algorithm=Int4ChooseQParamsAlgorithm.HQQ,
    )
    config = TorchAoConfig(scheme, modules_to_not_convert=["lm_head"]).to_dict()
    return {"header": json.dumps(header), "tensors": json.dumps(sorted(tensors)), "config": json.dumps(config)}


def opened(folder: Path) -> str:
    """How many weights came back as tile-packed tensors, each with the bytes of the file."""
    stored = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    weights = {name: w for name, w in model.named_parameters() if isinstance(w, Int4TilePackedTo4dTensor)}
    modules = {name.removesuffix("._weight_qdata") for name in stored if name.endswith("._weight_qdata")}
    assert {f"{module}.weight" for module in modules} == set(weights), sorted(weights)
    for module in modules:
        weight, linear = weights[f"{module}.weight"], model.get_submodule(module)
        assert torch.equal(weight.qdata, stored[f"{module}._weight_qdata"])
        assert torch.equal(weight.scale_and_zero, stored[f"{module}._weight_scale_and_zero"])
        assert tuple(weight.shape) == (linear.out_features, linear.in_features)
    return f"{len(weights)} tile-packed weights"


def main(folder: Path, artifacts: list[Path]) -> None:
    if artifacts:
        logging.basicConfig(level=logging.WARNING)
        for artifact in artifacts:
            print(f"{artifact}: {opened(artifact)}")
        return
    torch.manual_seed(SEED)
    provenance = {"made by": "scripts/goldens/int4_torchao.py", "device": "cpu", "seed": str(SEED), "group": str(GROUP)}
    versions = {package: version(package) for package in ("torchao", "transformers", "torch")}
    path = folder / "torchao_parts.safetensors"
    save_file(quantized(torch.randn(N, K).bfloat16()), path, provenance | versions | declared())
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -P scripts/goldens/int4_torchao.py OUT_DIR [ARTIFACT...]")
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
