"""Parse quantization configs with compressed-tensors' own classes; print how it understands them as JSON.

usage: ct_parse.py < {"NAME": quantization_config, …}        (whichever compressed-tensors is first on the path)
For each: the arguments of weights and activations of its groups after parsing, and those of the preset of that name, where
compressed-tensors has one. Nothing of quantpub is imported.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from typing import Any

from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import is_preset_scheme, preset_name_to_scheme

MEANING = (
    "num_bits",
    "type",
    "symmetric",
    "strategy",
    "group_size",
    "block_structure",
    "dynamic",
    "scale_dtype",
    "actorder",
)


def meaning(args: QuantizationArgs | None) -> dict[str, str] | None:
    return None if args is None else {name: str(getattr(args, name)) for name in MEANING}


def both(scheme: QuantizationScheme) -> dict[str, Any]:
    return {"weights": meaning(scheme.weights), "inputs": meaning(scheme.input_activations)}


def read(name: str, stated: dict[str, Any]) -> dict[str, Any]:
    config = QuantizationConfig(**stated)
    preset = both(preset_name_to_scheme(name, ["Linear"])) if is_preset_scheme(name) else None
    groups = [{"format": str(scheme.format), **both(scheme)} for scheme in config.config_groups.values()]
    return {"format": config.format, "groups": groups, "preset": preset, "ignore": config.ignore}


def read_all(configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found = {name: read(name, stated) for name, stated in configs.items()}
    return {"version": importlib.metadata.version("compressed-tensors"), "found": found}


if __name__ == "__main__":
    print(json.dumps(read_all(json.load(sys.stdin))))
