"""GPU generations as the kernel tables name them, and the shapes that each kernel takes without help.

N = out_features and K = in_features of the merged GEMM, g = columns that share a scale, -1 for a whole row.
Tiles are those of one GPU: tensor parallelism divides N or K first.
"""

from __future__ import annotations

from dataclasses import dataclass

GENERATIONS = {
    "sm75": "Turing, 7.5",
    "sm80": "Ampere, 8.0 and 8.6",
    "sm89": "Ada, 8.9",
    "sm90": "Hopper, 9.0",
    "sm100": "Blackwell for data centres, 10.0 and 10.3",
    "sm120": "Blackwell for workstations, 12.0 and 12.1",
    "rocm": "AMD",
    "cpu": "CPU",
}


@dataclass(frozen=True)
class Tiles:
    """sides: (n, k) multiples of which one pair must divide the shape. groups: scale groups it has code for, None: any."""

    sides: tuple[tuple[int, int], ...]
    source: str
    groups: tuple[int, ...] | None = None


_MARLIN = ((64, 128), (128, 64))
_PAD = "read: vLLM marlin_utils.py, marlin_padded_nk"
_FP4 = "read: vLLM nvfp4_utils.py"
TILES = {
    "Marlin": Tiles(_MARLIN, _PAD, (32, 64, 128, -1)),
    "Machete": Tiles(((128, 64),), "read: vLLM machete_utils.py", (64, 128, -1)),
    "AllSpark": Tiles(((16, 16),), "read: vLLM 0.25.1 allspark_utils.py", (-1,)),
    "CUTLASS INT8": Tiles(((16, 16),), "read: vLLM _custom_ops.py, cutlass_scaled_mm"),
    "CUTLASS FP8": Tiles(((16, 16),), "read: vLLM kernels/linear/scaled_mm/cutlass.py"),
    "DeepGEMM": Tiles(((64, 128),), "read: vLLM should_use_deepgemm_for_fp8_linear"),
    "Marlin FP8 W8A16": Tiles(_MARLIN, _PAD),
    "Marlin NVFP4 W4A16": Tiles(_MARLIN, _PAD),
    "Marlin MXFP4 W4A16": Tiles(_MARLIN, _PAD),
    "FlashInfer CuTe-DSL NVFP4": Tiles(((32, 32),), _FP4),
    "FlashInfer CUTLASS NVFP4": Tiles(((32, 32),), _FP4),
    "tinygemm": Tiles(((8, 1024),), "read: torchao int4_tile_packed_to_4d_tensor.py", (32, 64, 128, 256)),
}
# (engine, version or "" for all, kernel) → what becomes of a GEMM that does not fit; of a kernel's name, that it runs
NEXT = {
    ("vllm", "0.25.1", "Machete"): "Marlin",
    ("vllm", "0.33.0", "Machete"): "Humming",
    ("vllm", "0.25.1", "AllSpark"): "Marlin",
    ("vllm", "", "DeepGEMM"): "CUTLASS FP8 blocks",
    ("vllm", "", "CUTLASS INT8"): "Triton INT8",
}
_VLLM_PADS = "vLLM pads activations or outputs in every forward"
EFFECTS = {
    ("vllm", "Marlin"): _VLLM_PADS,
    ("vllm", "Marlin FP8 W8A16"): _VLLM_PADS,
    ("vllm", "Marlin NVFP4 W4A16"): _VLLM_PADS,
    ("vllm", "Marlin MXFP4 W4A16"): _VLLM_PADS,
    ("vllm", "CUTLASS FP8"): _VLLM_PADS,
    ("vllm", "FlashInfer CuTe-DSL NVFP4"): _VLLM_PADS,
    ("vllm", "FlashInfer CUTLASS NVFP4"): _VLLM_PADS,
    ("vllm", "tinygemm"): "K is padded on disk, and vLLM cuts such a weight wrongly over several GPUs",
    ("sglang", "Marlin"): "SGLang does not pad: it loads the shape as it is",
    ("transformers", "tinygemm"): "K is padded on disk and in every forward",
}
NO_GROUP = {"Marlin": "Triton or Exllama runs it", "tinygemm": "the layer cannot be written so"}
UNSAID = "what the engine does then is not established"


@dataclass(frozen=True)
class Misfit:
    reason: str
    effect: str


def misfit(kernel: str, n: int, k: int, group: int, engine: str, version: str) -> Misfit | None:
    """Why the kernel does not take a [n, k] weight as it is, and what happens then; None when it does, or has no tiles."""
    tiles = TILES.get(kernel)
    if tiles is None:
        return None
    if tiles.groups is not None and group not in tiles.groups:
        reason = f"{kernel} has no code for groups of {group}" if group > 0 else f"{kernel} has no code for whole rows"
        return Misfit(reason, _next(kernel, n, k, group, engine, version) or NO_GROUP.get(kernel, UNSAID))
    if any(n % side_n == 0 and k % side_k == 0 for side_n, side_k in tiles.sides):
        return None
    wants = " or ".join(f"N % {side_n} = 0 and K % {side_k} = 0" for side_n, side_k in tiles.sides)
    effect = _next(kernel, n, k, group, engine, version) or EFFECTS.get((engine, kernel), UNSAID)
    return Misfit(f"{kernel} wants {wants}, this is {n}×{k}", effect)


def following(kernel: str, engine: str, version: str) -> str | None:
    """What runs a GEMM that the kernel does not take; None where no other is known."""
    return NEXT.get((engine, version, kernel)) or NEXT.get((engine, "", kernel))


def _next(kernel: str, n: int, k: int, group: int, engine: str, version: str) -> str | None:
    other = following(kernel, engine, version)
    if other is None:
        return None
    again = misfit(other, n, k, group, engine, version)
    return f"{other} runs it" + (f"; {again.effect}" if again else "")
