"""The rows of the kernel tables for SGLang, TensorRT-LLM and transformers, and of torchao's layouts wherever they load."""

from __future__ import annotations

from quantpub.hardware import GENERATIONS
from quantpub.kernel_rows import CUDA, FP4, INT4, NO_CPU, NO_ROCM, OLD_GPU, Row
from quantpub.targets import VERSIONS

_TILE = {
    "sm75": "tinygemm asks for compute capability 8.0",
    "rocm": "a file packed for CUDA reads as garbage",
    "cpu": NO_CPU,
}
_TILE_ROWS = tuple(
    Row(engine, VERSIONS[engine], ("torchao-tile",), ("W4A16_FLOAT_ZERO", *INT4), source, kernels, _TILE)
    for engine, source, kernels in (
        ("vllm", "read: vLLM torchao.py", {"sm80 sm89 sm90": "tinygemm"}),
        ("transformers", "read: quantizer_torchao.py", {"sm80 sm89 sm90": "tinygemm"}),
    )
)
_DEQUANTIZED = "the model's own dtype, dequantized in every forward"
_TORCHAO_ROWS = (
    Row(
        "vllm",
        VERSIONS["vllm"],
        ("torchao-nvfp4",),
        ("NVFP4A16",),
        "read: vLLM torchao.py; torchao nvfp4_tensor.py",
        {CUDA: _DEQUANTIZED},
        {},
    ),
    Row(
        "transformers",
        VERSIONS["transformers"],
        ("torchao-nvfp4",),
        ("NVFP4A16",),
        "read: quantizer_torchao.py; torchao nvfp4_tensor.py",
        {f"{CUDA} cpu": _DEQUANTIZED},
        {},
    ),
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
        (*INT4, "W8A16"),
        {_MODERN: "Marlin"},
        {"sm75": OLD_GPU, "rocm": NO_ROCM, "cpu": NO_CPU},
    ),
    _sglang(("gptq", "awq"), (*INT4, "W8A16"), {_MODERN: "Marlin"}, {}),
    _sglang(("gptq-v2",), ("W4A16", "W8A16"), {_MODERN: "Marlin"}, {"cpu": "its AMX kernels refuse gptq_v2"}),
    _sglang(
        ("ct-int",),
        ("W8A8",),
        {"sm80 sm89 sm90": "sgl int8_scaled_mm"},
        {"sm75": OLD_GPU, "sm100 sm120": "int8_scaled_mm is not implemented for Blackwell (pull request 28137)"},
    ),
    _sglang(
        ("ct-float",),
        ("FP8_DYNAMIC",),
        {"sm80": "Marlin FP8 W8A16", "sm89 sm90 sm100 sm120": "sgl fp8_scaled_mm"},
        {"sm75": OLD_GPU},
    ),
    _sglang(
        ("ct-float",),
        ("FP8",),
        {"sm80": "Marlin FP8 W8A16", "sm89 sm90": "FlashInfer or torch FP8"},
        {"sm75": OLD_GPU},
    ),
    _sglang(("modelopt-fp8",), ("FP8",), {"sm89 sm90": "FlashInfer or torch FP8"}, {"sm75 sm80": OLD_GPU}),
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
        FP4,
        ("NVFP4",),
        {
            "sm80 sm89 sm90": "Marlin NVFP4 W4A16",
            "sm100": "FlashInfer CuTe-DSL NVFP4",
            "sm120": "FlashInfer CUTLASS NVFP4",
        },
        {"sm75": OLD_GPU, "cpu": NO_CPU},
    ),
    _sglang(FP4, ("NVFP4A16",), {_MODERN: "Marlin NVFP4 W4A16"}, {"sm75": OLD_GPU, "cpu": NO_CPU}),
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
    _trt(
        ("ct-float", "modelopt-fp8-channel"),
        "FP8_DYNAMIC",
        {"sm90": "fp8_rowwise_gemm"},
        {"sm75 sm80 sm89 sm100 sm120": _MATRIX},
    ),
    _trt(
        ("ct-float", "hf-fp8", "modelopt-fp8-block"),
        "FP8_BLOCK",
        {"sm90 sm100": "DeepGEMM"},
        {"sm75 sm80 sm89": _MATRIX},
    ),
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
        (*INT4, "W8A16", "W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "NVFP4A16", "MXFP4A16"),
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
        ("gptq", "gptq-v2", "awq"),
        (*INT4, "W8A16"),
        "read: quantizer_gptq.py and quantizer_awq.py",
        {CUDA: "gptqmodel's choice"},
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
        (*INT4, "W8A16", "FP8", "FP8_DYNAMIC", "FP8_BLOCK"),
        "read: quantizer_compressed_tensors.py",
        {_EVERYWHERE: _DENSE},
        {},
        experts=True,
    ),
    _sglang(
        ("ct-pack",),
        INT4,
        {"sm80 sm89 sm90 sm120": "Marlin MoE", "sm100 rocm": "Triton MoE"},
        {"sm75": OLD_GPU},
        experts=True,
    ),
)
OTHER_ROWS = (*_TILE_ROWS, *_TORCHAO_ROWS, *_SGLANG_ROWS, *_TRT_ROWS, *_HF_ROWS, *_EXPERT_ROWS)
