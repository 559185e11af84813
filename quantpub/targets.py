"""Serving engines, as data: which layouts each loads, since which version, and where that was read or seen.

Recipes name an engine and a layout; this table says whether the pair can work at all. `seen` cells were run here, `read`
ones come from the engine's source.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Loads:
    versions: str
    source: str


@dataclass(frozen=True)
class Target:
    """An engine: one line of description, and layout → the versions that load it."""

    summary: str
    loads: dict[str, Loads]


TARGETS = {
    "vllm": Target(
        "vLLM",
        {
            "ct-pack": Loads(
                "0.25.1 – 0.33.0", "read: the WNA16 scheme of compressed_tensors.py; 0.25.1 seen on an H200"
            ),
            "ct-float": Loads(
                "0.25.1 – 0.33.0", "read: the W8A8Fp8 scheme of compressed_tensors.py; 0.25.1 seen on an H200"
            ),
        },
    ),
    "sglang": Target(
        "SGLang",
        {
            "ct-pack": Loads("0.5.23", "read: compressed_tensors.py; Marlin only, group 32, 64, 128 or whole rows"),
            "ct-float": Loads("0.5.23", "read: compressed_tensors.py; CUTLASS FP8 from compute capability 8.9"),
        },
    ),
    "tensorrt-llm": Target(
        "TensorRT-LLM, PyTorch backend",
        {
            "ct-float": Loads("main, mid-2026", "read: models/quant_config_utils.py; Hopper only"),
        },
    ),
    "transformers": Target(
        "transformers with compressed-tensors",
        {
            "ct-pack": Loads("5.17 – 5.23", "seen: opened and decompressed; computes in the model's own dtype"),
            "ct-float": Loads("5.17 – 5.23", "seen: opened and decompressed; computes in the model's own dtype"),
        },
    ),
}
