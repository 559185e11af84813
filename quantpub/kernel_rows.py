"""The rows of the kernel tables for vLLM: what its source says it runs, for a shape that fits, with bf16 activations.

A key is one or several GPU generations (`hardware.GENERATIONS`). What no row names is not established, and stays so: no
cell is filled in from its neighbours. Two rows may share a cell's key only where one of them leaves it open.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantpub.hardware import GENERATIONS


@dataclass(frozen=True)
class Row:
    """Cells that share an engine, versions, layouts and schemes. kernels: generations → kernel; refused: → reason."""

    engine: str
    versions: tuple[str, ...]
    layouts: tuple[str, ...]
    schemes: tuple[str, ...]
    source: str
    kernels: dict[str, str]
    refused: dict[str, str]
    experts: bool = False


_OLD, _NEW = (("0.25.1",), ("0.33.0",))
_BOTH = _OLD + _NEW
INT4 = ("W4A16", "W4A16_ASYM")
CUDA = "sm75 sm80 sm89 sm90 sm100 sm120"
_LINEAR = "read: vLLM kernels/linear/__init__.py"
_DIES = "no int8 kernel is compiled for Blackwell: the first forward dies (vLLM issue 54311)"
OLD_GPU = "the engine asks for a newer GPU"
NO_CPU = "no CPU kernel"
NO_ROCM = "no ROCm kernel"
_INT8_PACKED = ("ct-pack", "gptq", "gptq-v2")
_INT4_PACKED = (*_INT8_PACKED, "awq")
FP4 = ("ct-nvfp4", "modelopt-nvfp4")


def _vllm(
    versions: tuple[str, ...],
    layouts: tuple[str, ...],
    schemes: tuple[str, ...],
    kernels: dict[str, str],
    refused: dict[str, str] | None = None,
    source: str = _LINEAR,
) -> Row:
    return Row("vllm", versions, layouts, schemes, source, kernels, refused or {})


_VLLM_ROWS = (
    _vllm(
        _BOTH,
        _INT4_PACKED,
        INT4,
        {"sm75 sm80 sm89 sm100 sm120": "Marlin", "sm90": "Machete", "rocm": "Triton W4A16", "cpu": "CPU WNA16"},
    ),
    _vllm(
        _OLD,
        _INT8_PACKED,
        ("W8A16",),
        {"sm80 sm89": "AllSpark", "sm75 sm100 sm120": "Marlin", "sm90": "Machete"},
        {"cpu": NO_CPU},
    ),
    _vllm(
        _NEW,
        _INT8_PACKED,
        ("W8A16",),
        {"sm75 sm80 sm89 sm100 sm120": "Marlin", "sm90": "Machete"},
        {"cpu": NO_CPU},
    ),
    _vllm(
        _BOTH,
        ("ct-int",),
        ("W8A8",),
        {"sm75 sm80 sm89 sm90": "CUTLASS INT8", "rocm": "Triton INT8", "cpu": "oneDNN INT8"},
        {"sm100 sm120": _DIES},
    ),
    _vllm(
        _BOTH,
        ("ct-float",),
        ("FP8_DYNAMIC",),
        {
            "sm75 sm80": "Humming FP8 W8A16",
            "sm89 sm90 sm100 sm120": "CUTLASS FP8",
            "rocm": "AITER or torch row-wise FP8",
            "cpu": "torch channel-wise FP8",
        },
    ),
    _vllm(
        _BOTH,
        ("ct-float",),
        ("FP8",),
        {"sm75 sm80": "Humming FP8 W8A16", "sm89 sm90": "CUTLASS FP8", "sm100 sm120": "FlashInfer FP8"},
    ),
    _vllm(
        _OLD,
        ("modelopt-fp8",),
        ("FP8",),
        {"sm89 sm90": "CUTLASS FP8", "sm100 sm120": "FlashInfer FP8"},
        {"sm75 sm80": OLD_GPU},
    ),
    _vllm(
        _NEW,
        ("modelopt-fp8",),
        ("FP8",),
        {"sm89 sm90": "CUTLASS FP8", "sm100 sm120": "FlashInfer FP8"},
        {"sm75": OLD_GPU},
    ),
    _vllm(
        _OLD,
        ("modelopt-fp8-channel",),
        ("FP8_DYNAMIC",),
        {"sm89 sm90 sm100 sm120": "CUTLASS FP8"},
        {"sm75 sm80": OLD_GPU},
    ),
    _vllm(
        _NEW,
        ("modelopt-fp8-channel",),
        ("FP8_DYNAMIC",),
        {"sm89 sm90 sm100 sm120": "CUTLASS FP8"},
        {"sm75": OLD_GPU},
    ),
    _vllm(  # before DeepGEMM, which it would choose on sm90 and sm100, it does not prepare the weights
        _OLD,
        ("modelopt-fp8-block",),
        ("FP8_BLOCK",),
        {"sm89": "Triton FP8 blocks", "sm120": "CUTLASS FP8 blocks"},
        {"sm75 sm80": OLD_GPU},
    ),
    _vllm(
        _NEW,
        ("modelopt-fp8-block",),
        ("FP8_BLOCK",),
        {"sm80 sm89": "Marlin FP8 W8A16", "sm90 sm100": "DeepGEMM", "sm120": "CUTLASS FP8 blocks"},
        {"sm75": OLD_GPU},
    ),
    *(
        _vllm(
            versions,
            (layout,),
            ("FP8_BLOCK",),
            {
                "sm75 sm80": "Humming FP8 W8A16" if layout == "ct-float" else "Marlin FP8 W8A16",
                "sm89": ada,
                "sm90 sm100": "DeepGEMM",
                "sm120": "CUTLASS FP8 blocks",
                "rocm": "AITER or Triton FP8 blocks",
            },
        )
        for versions, ada in ((_OLD, "Triton FP8 blocks"), (_NEW, "Marlin FP8 W8A16"))
        for layout in ("ct-float", "hf-fp8")
    ),
    *(
        _vllm(
            versions,
            FP4,
            ("NVFP4",),
            {
                "sm75 sm80 sm89": "Marlin NVFP4 W4A16",
                "sm90": hopper,
                "sm100": "FlashInfer CuTe-DSL NVFP4",
                "sm120": "FlashInfer CUTLASS NVFP4",
                "rocm": "NVFP4 emulation, very slow",
            },
            {"cpu": NO_CPU},
        )
        for versions, hopper in ((_OLD, "Marlin NVFP4 W4A16"), (_NEW, "Humming NVFP4 W4A16"))
    ),
    _vllm(_OLD, FP4, ("NVFP4A16",), {CUDA: "Marlin NVFP4 W4A16"}, {"rocm": NO_ROCM, "cpu": NO_CPU}),
    _vllm(
        _NEW,
        FP4,
        ("NVFP4A16",),
        {
            "sm75 sm80 sm89 sm120": "Marlin NVFP4 W4A16",
            "sm90": "Humming NVFP4 W4A16",
            "sm100": "FlashInfer CuTe-DSL NVFP4 W4A16",
        },
        {"rocm": NO_ROCM, "cpu": NO_CPU},
    ),
    _vllm(
        _OLD,
        ("ct-mxfp4",),
        ("MXFP4A16",),
        {"sm80 sm89 sm90": "Marlin MXFP4 W4A16", "sm100 sm120": "FlashInfer MXFP4 W4A4"},
        {"sm75": OLD_GPU, "rocm": NO_ROCM, "cpu": NO_CPU},
    ),
    _vllm(
        _NEW,
        ("ct-mxfp4",),
        ("MXFP4A16",),
        {
            "sm80 sm89": "Marlin MXFP4 W4A16",
            "sm90": "Humming MXFP4 W4A16",
            "sm100 sm120": "FlashInfer MXFP4 W4A4",
            "rocm": "AITER or MXFP4 emulation",
        },
        {"sm75": OLD_GPU, "cpu": NO_CPU},
    ),
    _vllm(
        _OLD,
        ("bnb-int8",),
        ("LLM_INT8",),
        {"sm75 sm80 sm89 sm90": "bitsandbytes LLM.int8(), without CUDA graphs"},
        source="read: vLLM 0.25.1 bitsandbytes.py and config/model.py",
    ),
    _vllm(
        _NEW,
        ("bnb-int8",),
        ("LLM_INT8",),
        {},
        {" ".join(GENERATIONS): "bitsandbytes is a plugin since 0.28"},
        source="read: vLLM pull request 43529",
    ),
)
_EXPERT_ROWS = (
    Row(
        "vllm",
        _OLD,
        ("ct-pack",),
        INT4,  # W8A16: three starts failed beside other engines, none was made alone
        "read: vLLM fused_moe/oracle/int_wna16.py",
        {CUDA: "Marlin MoE"},
        {},
        experts=True,
    ),
    Row(
        "vllm",
        _NEW,
        ("ct-pack",),
        (*INT4, "W8A16"),
        "read: vLLM fused_moe/oracle/int_wna16.py",
        {"sm75 sm80 sm89 sm100 sm120": "Marlin MoE", "sm90": "Humming MoE"},
        {},
        experts=True,
    ),
)
VLLM_ROWS = (*_VLLM_ROWS, *_EXPERT_ROWS)
