"""Decompress every quantized module of an artifact with compressed-tensors' own code; print sha256 digests as JSON.

usage: ct_decompress.py ARTIFACT ...        (whichever compressed-tensors is first on the path; one line for each)
The config is parsed by compressed-tensors' own QuantizationConfig; its own matching finds each module's group; each
module's tensors, as the safetensors library reads them, go to the decompressor of the group's format. A weight tensor that
is not on the compressor's own list of names is an error. Nothing of quantpub is imported.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import is_match
from safetensors import safe_open


def tensors_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Module → suffix → tensor, of modules that have a weight_scale."""
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as f:
            for name in f.keys():  # noqa: SIM118 - not a dict
                module, _, suffix = name.rpartition(".")
                modules.setdefault(module, {})[suffix] = f.get_tensor(name)
    return {module: tensors for module, tensors in modules.items() if "weight_scale" in tensors}


def scheme_of(module: str, config: QuantizationConfig) -> QuantizationScheme:
    """The one group that matches a linear of this name."""
    linear = torch.nn.Linear(1, 1, device="meta")
    groups = config.config_groups.values()
    (scheme,) = (group for group in groups if is_match(module, linear, group.targets, config.ignore))
    return scheme


def main(folder: Path) -> None:
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig(**stated)
    digests = {}
    for module, tensors in sorted(tensors_of(folder).items()):
        scheme = scheme_of(module, config)
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        weights = {suffix for suffix in tensors if suffix.startswith("weight")}
        unknown = weights - set(compressor.compression_param_names(scheme))
        assert not unknown, f"{module}: {scheme.format} has no {unknown}"
        weight = compressor.decompress(tensors, scheme)["weight"]
        data = weight.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
        digests[module] = hashlib.sha256(data).hexdigest()
    print(json.dumps({"version": importlib.metadata.version("compressed-tensors"), "digests": digests}))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        main(Path(argument))
