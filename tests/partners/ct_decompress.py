"""Decompress every quantized module of an artifact with compressed-tensors' own code; print sha256 digests as JSON.

usage: ct_decompress.py ARTIFACT        (whichever compressed-tensors is first on the path)
The config is parsed by compressed-tensors' own QuantizationConfig; each module's tensors, as the safetensors library reads
them, go to the decompressor of the config's format. Nothing of quantpub is imported.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors import safe_open


def main(folder: Path) -> None:
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig(**stated)
    (scheme,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(config.format)
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as f:
            for name in f.keys():  # noqa: SIM118 - not a dict
                if re.search(r"_proj\.weight(_packed|_scale|_shape)?$", name):
                    module, _, suffix = name.rpartition(".")
                    modules.setdefault(module, {})[suffix] = f.get_tensor(name)
    digests = {}
    for module, tensors in sorted(modules.items()):
        weight = compressor.decompress(tensors, scheme)["weight"]
        data = weight.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
        digests[module] = hashlib.sha256(data).hexdigest()
    print(json.dumps({"version": importlib.metadata.version("compressed-tensors"), "digests": digests}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
