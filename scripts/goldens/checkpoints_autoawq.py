"""A checkpoint in the layout and with the keys of AutoAWQ, packed by AutoAWQ's own WQLinear_GEMM.

usage: python -P scripts/goldens/checkpoints_autoawq.py BASE_DENSE BASE_MOE OUT AUTOAWQ   (torch, transformers)

AUTOAWQ is the unpacked source of autoawq 0.2.9, the last release (`pip download autoawq==0.2.9 --no-deps`). The package imports
what transformers 5 no longer has, so four of its files are loaded without it: modules/linear/gemm.py, utils/packing_utils.py,
models/_config.py, and quantize/quantizer.py, of which `pseudo_quantize_tensor` alone is run. AutoAWQ converts the model to fp16
and so does this. No activation-aware scales are searched: scale and zero are each group's minimum and maximum.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parent))
import checkpoints as common

sys.path.pop()

NAME, VERSION, GROUP = "autoawq-w4-dense", "0.2.9", 128


def loaded(source: Path, name: str) -> types.ModuleType:
    """The module `name` of AutoAWQ from its file, with none of its packages' __init__ run."""
    path = source.joinpath(*name.split(".")).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def autoawq(source: Path) -> tuple[types.ModuleType, types.ModuleType]:
    """gemm and _config; awq.utils.utils imports accelerate, and from it gemm wants only the name of a device."""
    for package in ("awq", "awq.utils", "awq.modules", "awq.modules.linear", "awq.models"):
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = []
    device = types.ModuleType("awq.utils.utils")
    device.get_best_device = lambda: "cpu"
    sys.modules["awq.utils.utils"] = device
    loaded(source, "awq.utils.module")
    loaded(source, "awq.utils.packing_utils")
    return loaded(source, "awq.modules.linear.gemm"), loaded(source, "awq.models._config")


def quantizer(source: Path) -> object:
    """`AwqQuantizer.pseudo_quantize_tensor` alone, on an object that holds what it reads."""
    tree = ast.parse((source / "awq" / "quantize" / "quantizer.py").read_text())
    methods = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "pseudo_quantize_tensor"]
    scope: dict[str, object] = {"torch": torch}
    exec(compile(ast.Module(methods, []), "quantizer.py", "exec"), scope)
    held = types.SimpleNamespace(group_size=GROUP, w_bit=4, zero_point=True)
    return lambda weight: scope["pseudo_quantize_tensor"](held, weight)


def quantize(base: Path, folder: Path, source: Path) -> common.Tensors:
    gemm, config = autoawq(source)
    pseudo = quantizer(source)
    tensors = {name: t.half() for name, t in load_file(base / "model.safetensors").items()}
    weights = {}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        module, (n, k) = name.removesuffix(".weight"), tensors[name].shape
        linear = torch.nn.Linear(k, n, bias=False, dtype=torch.float16)
        linear.weight.data, scales, zeros = pseudo(tensors.pop(name))
        scales, zeros = scales.t().contiguous(), zeros.t().contiguous()
        packed = gemm.WQLinear_GEMM.from_linear(linear, 4, GROUP, scales=scales, zeros=zeros)
        tensors |= {f"{module}.{part}": t.contiguous() for part, t in packed.state_dict().items()}
        if module in common.MODULES["dense"]:
            parts = (packed.qweight, packed.qzeros, packed.scales)
            weights[module] = gemm.dequantize_gemm(*parts, 4, GROUP).t().contiguous()
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    stated = config.AwqConfig.from_dict({"zero_point": True, "q_group_size": GROUP, "w_bit": 4, "version": "GEMM"})
    written = json.loads((base / "config.json").read_text()) | {"dtype": "float16"}
    written["quantization_config"] = stated.to_transformers_dict()
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    return weights


def main(base: Path, out: Path, source: Path) -> None:
    weights = quantize(base, out / NAME, source)
    common.record(
        out,
        NAME,
        "autoawq",
        (),
        "AwqQuantizer.pseudo_quantize_tensor (w_bit=4, q_group_size=128, zero_point=True), WQLinear_GEMM.from_linear, "
        "AwqConfig.to_transformers_dict; config.json by this script",
        {"scheme": "W4A16_ASYM", "group_size": GROUP, "kv_cache": None},
        weights,
        "autoawq dequantize_gemm",
        versions={"autoawq": VERSION},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[3]), Path(sys.argv[4]))
