"""The rows of the kernel tables: what each engine's source says it runs, for a shape that fits, with bf16 activations.

A key is one or several GPU generations (`hardware.GENERATIONS`). What no row names is not established, and stays so: no
cell is filled in from its neighbours. Two rows may share a cell's key only where one of them leaves it open.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantpub.hardware import GENERATIONS
from quantpub.targets import VERSIONS


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
_INT4 = ("W4A16", "W4A16_ASYM")
_CUDA = "sm75 sm80 sm89 sm90 sm100 sm120"
_LINEAR = "read: vLLM kernels/linear/__init__.py"
_DIES = "no int8 kernel is compiled for Blackwell: the first forward dies (vLLM issue 54311)"
_OLD_GPU = "the engine asks for a newer GPU"
_NO_CPU = "no CPU kernel"
_NO_ROCM = "no ROCm kernel"
_INT4_PACKED = ("ct-pack", "gptq", "awq")
_FP4 = ("ct-nvfp4", "modelopt-nvfp4")


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
        _INT4,
        {"sm75 sm80 sm89 sm100 sm120": "Marlin", "sm90": "Machete", "rocm": "Triton W4A16", "cpu": "CPU WNA16"},
    ),
    _vllm(
        _OLD,
        ("ct-pack", "gptq"),
        ("W8A16",),
        {"sm80 sm89": "AllSpark", "sm75 sm100 sm120": "Marlin", "sm90": "Machete"},
        {"cpu": _NO_CPU},
    ),
    _vllm(
        _NEW,
        ("ct-pack", "gptq"),
        ("W8A16",),
        {"sm75 sm80 sm89 sm100 sm120": "Marlin", "sm90": "Machete"},
        {"cpu": _NO_CPU},
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
        {"sm75 sm80": _OLD_GPU},
    ),
    _vllm(
        _NEW,
        ("modelopt-fp8",),
        ("FP8",),
        {"sm89 sm90": "CUTLASS FP8", "sm100 sm120": "FlashInfer FP8"},
        {"sm75": _OLD_GPU},
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
            _FP4,
            ("NVFP4",),
            {
                "sm75 sm80 sm89": "Marlin NVFP4 W4A16",
                "sm90": hopper,
                "sm100": "FlashInfer CuTe-DSL NVFP4",
                "sm120": "FlashInfer CUTLASS NVFP4",
                "rocm": "NVFP4 emulation, very slow",
            },
            {"cpu": _NO_CPU},
        )
        for versions, hopper in ((_OLD, "Marlin NVFP4 W4A16"), (_NEW, "Humming NVFP4 W4A16"))
    ),
    _vllm(_OLD, _FP4, ("NVFP4A16",), {_CUDA: "Marlin NVFP4 W4A16"}, {"rocm": _NO_ROCM, "cpu": _NO_CPU}),
    _vllm(
        _NEW,
        _FP4,
        ("NVFP4A16",),
        {
            "sm75 sm80 sm89 sm120": "Marlin NVFP4 W4A16",
            "sm90": "Humming NVFP4 W4A16",
            "sm100": "FlashInfer CuTe-DSL NVFP4 W4A16",
        },
        {"rocm": _NO_ROCM, "cpu": _NO_CPU},
    ),
    _vllm(
        _OLD,
        ("ct-mxfp4",),
        ("MXFP4A16",),
        {"sm80 sm89 sm90": "Marlin MXFP4 W4A16", "sm100 sm120": "FlashInfer MXFP4 W4A4"},
        {"sm75": _OLD_GPU, "rocm": _NO_ROCM, "cpu": _NO_CPU},
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
        {"sm75": _OLD_GPU, "cpu": _NO_CPU},
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
_TILE = {
    "sm75": "tinygemm asks for compute capability 8.0",
    "rocm": "a file packed for CUDA reads as garbage",
    "cpu": _NO_CPU,
}
_TILE_ROWS = tuple(
    Row(engine, VERSIONS[engine], ("torchao-tile",), ("W4A16_FLOAT_ZERO", *_INT4), source, kernels, _TILE)
    for engine, source, kernels in (
        ("vllm", "read: vLLM torchao.py", {"sm80 sm89 sm90": "tinygemm"}),
        ("transformers", "read: quantizer_torchao.py", {"sm80 sm89 sm90": "tinygemm"}),
    )
)


def _sglang(
    layouts: tuple[str, ...],
    schemes: tuple[str, ...],
    kernels: dict[str, str],
    refused: dict[str, str],
    experts: bool = False,
) -> Row:
    source = f"read: SGLang 0.5.23, {'fused_moe' if experts else 'layers/quantization'}"
    return Row("sglang", VERSIONS["sglang"], layouts, schemes, source, kernels, refused, experts)


_MODERN = "sm80 sm89 sm90 sm100 sm120"
_SGLANG_ROWS = (
    _sglang(
        ("ct-pack",),
        (*_INT4, "W8A16"),
        {_MODERN: "Marlin"},
        {"sm75": _OLD_GPU, "rocm": _NO_ROCM, "cpu": _NO_CPU},
    ),
    _sglang(("gptq", "awq"), (*_INT4, "W8A16"), {_MODERN: "Marlin"}, {}),
    _sglang(
        ("ct-int",),
        ("W8A8",),
        {"sm80 sm89 sm90": "sgl int8_scaled_mm"},
        {"sm75": _OLD_GPU, "sm100 sm120": "int8_scaled_mm is not implemented for Blackwell (pull request 28137)"},
    ),
    _sglang(
        ("ct-float",),
        ("FP8_DYNAMIC",),
        {"sm80": "Marlin FP8 W8A16", "sm89 sm90 sm100 sm120": "sgl fp8_scaled_mm"},
        {"sm75": _OLD_GPU},
    ),
    _sglang(
        ("ct-float",),
        ("FP8",),
        {"sm80": "Marlin FP8 W8A16", "sm89 sm90": "FlashInfer or torch FP8"},
        {"sm75": _OLD_GPU},
    ),
    _sglang(("modelopt-fp8",), ("FP8",), {"sm89 sm90": "FlashInfer or torch FP8"}, {"sm75 sm80": _OLD_GPU}),
    _sglang(
        ("ct-float", "hf-fp8"),
        ("FP8_BLOCK",),
        {
            "sm89": "Triton FP8 blocks",
            "sm90 sm100": "DeepGEMM",
            "sm120": "CUTLASS FP8 blocks",
            "rocm": "AITER FP8 blocks",
        },
        {},
    ),
    _sglang(
        _FP4,
        ("NVFP4",),
        {
            "sm80 sm89 sm90": "Marlin NVFP4 W4A16",
            "sm100": "FlashInfer CuTe-DSL NVFP4",
            "sm120": "FlashInfer CUTLASS NVFP4",
        },
        {"sm75": _OLD_GPU, "cpu": _NO_CPU},
    ),
    _sglang(_FP4, ("NVFP4A16",), {_MODERN: "Marlin NVFP4 W4A16"}, {"sm75": _OLD_GPU, "cpu": _NO_CPU}),
    _sglang(("bnb-int8",), ("LLM_INT8",), {"sm75 sm80 sm89 sm90": "bitsandbytes LLM.int8()"}, {}),
)
_MATRIX = "NVIDIA's support matrix does not name it"
_NVIDIA = {"rocm": "NVIDIA GPUs only", "cpu": "NVIDIA GPUs only"}


def _trt(
    layouts: tuple[str, ...], scheme: str, kernels: dict[str, str], refused: dict[str, str], source: str = ""
) -> Row:
    said = source or "read: TensorRT-LLM docs/source/features/quantization.md and _torch/modules/linear.py"
    return Row("tensorrt-llm", VERSIONS["tensorrt-llm"], layouts, (scheme,), said, kernels, refused | _NVIDIA)


_TRT_ROWS = (
    _trt(("ct-float",), "FP8_DYNAMIC", {"sm90": "fp8_rowwise_gemm"}, {"sm75 sm80 sm89 sm100 sm120": _MATRIX}),
    _trt(("ct-float", "hf-fp8"), "FP8_BLOCK", {"sm90 sm100": "DeepGEMM"}, {"sm75 sm80 sm89": _MATRIX}),
    _trt(("modelopt-fp8",), "FP8", {"sm89 sm90 sm100 sm120": "cuBLAS scaled_mm"}, {"sm75 sm80": _MATRIX}),
    _trt(("modelopt-nvfp4",), "NVFP4", {"sm100 sm120": "nvfp4_gemm"}, {"sm75 sm80 sm89": _MATRIX}),
    _trt(
        ("modelopt-nvfp4",),
        "NVFP4A16",
        {"sm90": "Marlin NVFP4 W4A16", "sm120": "CuTe-DSL or Marlin NVFP4 W4A16"},
        {"sm75 sm80 sm89": _MATRIX},
        "read: TensorRT-LLM pull requests 13476 and 16511",
    ),
)
_DENSE = "the model's own dtype, after decompression"
_EVERYWHERE = " ".join(GENERATIONS)
_HF_ROWS = (
    Row(
        "transformers",
        VERSIONS["transformers"],
        ("ct-pack", "ct-int", "ct-float", "ct-nvfp4", "ct-mxfp4"),
        (*_INT4, "W8A16", "W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "NVFP4A16", "MXFP4A16"),
        "read: quantizer_compressed_tensors.py",
        {_EVERYWHERE: _DENSE},
        {},
    ),
    Row(
        "transformers",
        VERSIONS["transformers"],
        ("hf-fp8",),
        ("FP8_BLOCK",),
        "read: quantizer_finegrained_fp8.py",
        {"sm89 sm90 sm100 sm120": "Triton or DeepGEMM, from the Hub's kernels", "sm75 sm80 cpu": _DENSE},
        {},
    ),
    Row(
        "transformers",
        VERSIONS["transformers"],
        ("gptq", "awq"),
        (*_INT4, "W8A16"),
        "read: quantizer_gptq.py and quantizer_awq.py",
        {_CUDA: "gptqmodel's choice"},
        {},
    ),
    Row(
        "transformers",
        VERSIONS["transformers"],
        ("bnb-int8",),
        ("LLM_INT8",),
        "read: quantizer_bnb_8bit.py",
        {"sm75 sm80 sm89 sm90": "bitsandbytes LLM.int8()"},
        {},
    ),
)
_EXPERT_ROWS = (
    Row(
        "transformers",
        VERSIONS["transformers"],
        ("ct-pack", "ct-float"),
        (*_INT4, "W8A16", "FP8", "FP8_DYNAMIC", "FP8_BLOCK"),
        "read: quantizer_compressed_tensors.py",
        {_EVERYWHERE: _DENSE},
        {},
        experts=True,
    ),
    Row(
        "vllm",
        _OLD,
        ("ct-pack",),
        (*_INT4, "W8A16"),
        "read: vLLM fused_moe/oracle/int_wna16.py",
        {_CUDA: "Marlin MoE"},
        {},
        experts=True,
    ),
    Row(
        "vllm",
        _NEW,
        ("ct-pack",),
        (*_INT4, "W8A16"),
        "read: vLLM fused_moe/oracle/int_wna16.py",
        {"sm75 sm80 sm89 sm100 sm120": "Marlin MoE", "sm90": "Humming MoE"},
        {},
        experts=True,
    ),
    _sglang(
        ("ct-pack",),
        _INT4,
        {"sm80 sm89 sm90 sm120": "Marlin MoE", "sm100 rocm": "Triton MoE"},
        {"sm75": _OLD_GPU},
        experts=True,
    ),
)
ROWS = (*_VLLM_ROWS, *_TILE_ROWS, *_SGLANG_ROWS, *_TRT_ROWS, *_HF_ROWS, *_EXPERT_ROWS)
