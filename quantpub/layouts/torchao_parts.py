"""What torchao's checkpoints share: a JSON entry for every weight in the header of every shard, and one configuration.

The safetensors header of every shard names the class and the attributes of every weight of the whole model: loaders merge
the headers of all shards, and the list of names of the last one read stands for all.
Source: torchao's prototype/safetensors, transformers' TorchAoConfig.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantpub.layouts.base import Config

METHOD = "torchao"


def header(weights: Mapping[str, str], copied: Sequence[str]) -> dict[str, str]:
    """weights: module → the JSON entry of its weight. copied: the names of all other tensors."""
    entries = {f"{module}.weight": entry for module, entry in weights.items()}
    entries |= dict.fromkeys(copied, '{"_type": "Tensor"}')
    assert not any(c in name for name in entries for c in '"\\'), "names of tensors need no escapes in JSON"
    return entries | {"tensor_names": "[" + ", ".join(f'"{name}"' for name in entries) + "]"}


def config(kind: str, version: int, data: Config, ignore: Sequence[str]) -> Config:
    """What transformers' TorchAoConfig writes for a torchao config of class `kind` with the fields `data`."""
    return {
        "quant_method": METHOD,
        "quant_type": {"default": {"_type": kind, "_version": version, "_data": data}},
        "modules_to_not_convert": list(ignore),
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }
