"""The JSON files of an artifact that follow from its plan: index, config.json, and what layouts want beside it."""

from __future__ import annotations

from typing import Any

from quantpub.checkpoint import public_config
from quantpub.plan import Plan
from quantpub.shards import tensor_bytes
from quantpub.treatments import declared


def index_json(plan: Plan) -> dict[str, Any]:
    """model.safetensors.index.json of the artifact."""
    weight_map = {name: shard for shard in plan.shards for name in plan.outputs(shard)}
    total = sum(tensor_bytes(dtype, shape) for shard in plan.shards for dtype, shape in plan.outputs(shard).values())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def artifact_config(plan: Plan) -> dict[str, Any]:
    """The source's config.json with `quantization_config`, and without the local path transformers writes there."""
    return public_config(plan.checkpoint) | {"quantization_config": quantization_config(plan)}


def quantization_config(plan: Plan) -> dict[str, Any]:
    treated = {action.module: action.treatment for action in plan.actions if action.treatment is not None}
    return declared(plan.treatments, treated, plan.ignored, bool(plan.kv))


def config_files(plan: Plan) -> dict[str, dict[str, Any]]:
    """The JSON files that the layouts want beside config.json."""
    config = quantization_config(plan)
    return {name: value for t in plan.treatments for name, value in t.layout.files(config).items()}
