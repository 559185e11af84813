"""tests/golden/peer_configs.json: the quantization configs that other tools write, of checkpoints made with them.

    python scripts/goldens/peer_configs.py CHECKPOINTS > tests/golden/peer_configs.json

CHECKPOINTS holds <model>/<tool>-<recipe>/ with config.json and safetensors; the prefix says the tool. Written down: the config
as it stands, less temporary paths; the tool; which linears the file holds quantized; and of a model its layers and experts.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

TOOLS = {
    "ct": "llmcompressor 0.14.0.1, compressed-tensors 0.19.0, transformers 5.17.0",
    "ao": "torchao 0.18.0, transformers 5.23.0",
    "mo": "nvidia-modelopt 0.47.0, transformers 5.23.0",
    "gq": "GPTQModel 7.6.0, transformers 5.23.0",
    "ar": "auto-round 0.16.1, transformers 5.23.0",
    "mlx": "mlx-lm 0.32.2, transformers 5.23.0",
}
PACKED = re.compile(r"(.*)\.(qweight|weight_packed|_weight_qdata|weight)")
HELD = {"I8", "U8", "I32", "U32", "F8_E4M3"}


def header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))


def row(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    tensors = {name: info for path in folder.glob("*.safetensors") for name, info in header(path).items()}
    held = {m[1] for name, info in tensors.items() if (m := PACKED.fullmatch(name)) and info["dtype"] in HELD}
    quantization = config["quantization_config"]
    for key in [key for key in quantization.get("meta", {}) if "path" in key]:
        del quantization["meta"][key]
    found = {
        "tool": TOOLS[folder.name.split("-")[0]],
        "quantized": sorted({re.sub(r"\d+", "#", module) for module in held}),
        "quantization_config": quantization,
    }
    legacy = folder / "hf_quant_config.json"
    return found | ({"hf_quant_config": json.loads(legacy.read_text())} if legacy.is_file() else {})


def main() -> None:
    models: dict[str, Any] = {}
    rows: dict[str, Any] = {}
    for path in sorted(Path(sys.argv[1]).glob("*/*/config.json")):
        config, folder = json.loads(path.read_text()), path.parent
        if config.get("quantization_config") and any(folder.glob("*.safetensors")):
            experts = config.get("num_local_experts", config.get("num_experts", 0))
            shape = {"layers": config["num_hidden_layers"], "experts": experts or 0}
            models[folder.parent.name] = {"model_type": config["model_type"]} | shape
            rows[f"{folder.parent.name}/{folder.name}"] = row(folder, config)
    print(
        '{"models": '
        + json.dumps(models)
        + ",\n"
        + '"configs": {\n'
        + ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in rows.items())
        + "}}"
    )


if __name__ == "__main__":
    main()
