"""vLLM's kernel classes by the names that the kernel tables give them. Source: 0.25.1 and 0.33.0, kernels/linear, fused_moe."""

from __future__ import annotations

LINEARS = {
    "MacheteLinearKernel": "Machete",
    "MarlinLinearKernel": "Marlin",
    "AllSparkLinearKernel": "AllSpark",
    "ConchLinearKernel": "Conch",
    "ExllamaLinearKernel": "Exllama",
    "TritonW4A16LinearKernel": "Triton W4A16",
    "HummingLinearKernel": "Humming",
    "CutlassW4A8LinearKernel": "CUTLASS W4A8",
    "CPUWNA16LinearKernel": "CPU WNA16",
    "AutoAWQLinearMethod": "AWQ GEMM",
    "CutlassInt8ScaledMMLinearKernel": "CUTLASS INT8",
    "TritonInt8ScaledMMLinearKernel": "Triton INT8",
    "HummingInt8ScaledMMLinearKernel": "Humming INT8",
    "CPUInt8ScaledMMLinearKernel": "oneDNN INT8",
    "CutlassFP8ScaledMMLinearKernel": "CUTLASS FP8",
    "FlashInferFP8ScaledMMLinearKernel": "FlashInfer FP8",
    "MarlinFP8ScaledMMLinearKernel": "Marlin FP8 W8A16",
    "HummingFP8ScaledMMLinearKernel": "Humming FP8 W8A16",
    "TritonFP8ScaledMMLinearKernel": "Triton FP8",
    "PerTensorTorchFP8ScaledMMLinearKernel": "torch tensor-wise FP8",
    "ChannelWiseTorchFP8ScaledMMLinearKernel": "torch channel-wise FP8",
    "RowWiseTorchFP8ScaledMMLinearKernel": "torch row-wise FP8",
    "DeepGemmFp8BlockScaledMMKernel": "DeepGEMM",
    "FlashInferFp8DeepGEMMDynamicBlockScaledKernel": "FlashInfer or DeepGEMM FP8 blocks",
    "CutlassFp8BlockScaledMMKernel": "CUTLASS FP8 blocks",
    "TritonFp8BlockScaledMMKernel": "Triton FP8 blocks",
    "MarlinNvFp4LinearKernel": "Marlin NVFP4 W4A16",
    "HummingNvFp4LinearKernel": "Humming NVFP4 W4A16",
    "CutlassNvFp4LinearKernel": "CUTLASS NVFP4",
    "FlashInferCuteDslNvFp4LinearKernel": "FlashInfer CuTe-DSL NVFP4",
    "FlashInferCuteDslNvFp4W4A16LinearKernel": "FlashInfer CuTe-DSL NVFP4 W4A16",
    "FlashInferCutlassNvFp4LinearKernel": "FlashInfer CUTLASS NVFP4",
    "EmulationNvFp4LinearKernel": "NVFP4 emulation, very slow",
    "MarlinMxFp4LinearKernel": "Marlin MXFP4 W4A16",
    "HummingMxFp4LinearKernel": "Humming MXFP4 W4A16",
    "FlashInferMxFp4LinearKernel": "FlashInfer MXFP4 W4A4",
    "EmulationMxfp4LinearKernel": "MXFP4 emulation",
}
# Experts' classes serve several number formats: the row's name is of both, as in `Marlin NVFP4 MoE`
EXPERTS = {
    "MarlinExperts": "Marlin",
    "BatchedMarlinExperts": "Marlin",
    "TritonExperts": "Triton",
    "CompressedTensorsWNA16MoEMethod": "Triton",
    "MoeWNA16Method": "Triton",
    "TritonOrCutlassExperts": "CUTLASS",
    "CutlassExpertsFp4": "CUTLASS",
    "CutlassExpertsMxfp4": "CUTLASS",
    "TritonOrDeepGemmExperts": "DeepGEMM",
    "HummingGroupedExperts": "Humming",
    "HummingIndexedExperts": "Humming",
    "FlashInferExperts": "FlashInfer CUTLASS",
    "FlashInferCuteDSLExperts": "FlashInfer CuTe-DSL",
    "FlashInferCuteDSLBatchedExperts": "FlashInfer CuTe-DSL batched",
    "TrtLlmMxint4ExpertsMonolithic": "FlashInfer TensorRT-LLM",
    "AiterExperts": "AITER",
    "TrtLlmFp8ExpertsMonolithic": "FlashInfer TensorRT-LLM",
    "TrtLlmFp8ExpertsModular": "FlashInfer TensorRT-LLM",
    "TrtLlmNvFp4ExpertsMonolithic": "FlashInfer TensorRT-LLM",
    "TrtLlmNvFp4ExpertsModular": "FlashInfer TensorRT-LLM",
    "Nvfp4QuantizationEmulationTritonExperts": "emulated",
}


def row(class_name: str, experts_of: str | None = None) -> str:
    """The row's name; the class's own where the tables have none. experts_of: the number format of experts' weights.

    `` for int4 and int8 weights with 16-bit activations, whose rows name no format.
    """
    if experts_of is None:
        return LINEARS.get(class_name, class_name)
    if class_name not in EXPERTS:
        return class_name
    return " ".join(filter(None, (EXPERTS[class_name], experts_of, "MoE")))
