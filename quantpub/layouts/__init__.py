"""Layouts: how a canonical QTensor becomes named tensors on disk, and back, bit for bit or not at all."""

from __future__ import annotations

from quantpub.registry import Entry

# What engines load from disk
LAYOUTS = {
    "ct-pack": Entry(
        "quantpub.layouts.ct_pack:LAYOUT", "compressed-tensors pack-quantized: int4 or int8 in int32 words"
    ),
    "ct-int": Entry("quantpub.layouts.ct_int:LAYOUT", "compressed-tensors int-quantized: int8, a scale a row"),
    "ct-float": Entry("quantpub.layouts.ct_float:LAYOUT", "compressed-tensors float-quantized: FP8 E4M3"),
    "ct-nvfp4": Entry("quantpub.layouts.ct_nvfp4:LAYOUT", "compressed-tensors nvfp4-pack-quantized: NVFP4 in bytes"),
    "ct-mxfp4": Entry("quantpub.layouts.ct_mxfp4:LAYOUT", "compressed-tensors mxfp4-pack-quantized: MXFP4 in bytes"),
    "hf-fp8": Entry("quantpub.layouts.hf_fp8:LAYOUT", "transformers' own FP8: E4M3 in blocks of 128×128"),
    "modelopt-fp8": Entry("quantpub.layouts.modelopt:FP8", "ModelOpt FP8: E4M3, a scale a tensor"),
    "modelopt-fp8-channel": Entry(
        "quantpub.layouts.modelopt:CHANNEL", "ModelOpt FP8_PER_CHANNEL_PER_TOKEN: E4M3, a scale a row"
    ),
    "modelopt-fp8-block": Entry("quantpub.layouts.modelopt:BLOCK", "ModelOpt FP8_PB_WO: E4M3 in blocks of 128×128"),
    "modelopt-nvfp4": Entry("quantpub.layouts.modelopt:NVFP4", "ModelOpt NVFP4 and W4A16_NVFP4"),
    "gptq": Entry("quantpub.layouts.gptq:LAYOUT", "GPTQ v1: int4 or int8 in int32 words along K"),
    "gptq-v2": Entry("quantpub.layouts.gptq:V2", "GPTQ v2: int4 or int8 with true zeros in int32 words along K"),
    "awq": Entry("quantpub.layouts.awq:LAYOUT", "AWQ gemm: int4 in interleaved int32 words along N"),
    "torchao-tile": Entry(
        "quantpub.layouts.torchao_tile:LAYOUT", "torchao tile-packed: int4 as tinygemm multiplies it"
    ),
    "torchao-nvfp4": Entry(
        "quantpub.layouts.torchao_nvfp4:LAYOUT", "torchao NVFP4Tensor, weights only: NVFP4 with scales in tiles"
    ),
    "bnb-int8": Entry("quantpub.layouts.bnb_int8:LAYOUT", "bitsandbytes LLM.int8()"),
}
# What a kernel eats: engines make these from the ones above when they load; no engine reads them from disk
KERNEL_LAYOUTS = {
    "marlin": Entry("quantpub.layouts.marlin:LAYOUT", "Marlin's operands, made of ct-pack, gptq or awq"),
    "machete": Entry("quantpub.layouts.machete:LAYOUT", "Machete's operands, made of ct-pack, gptq or awq"),
}
# What other tools write, and quantpub reads.
PEER_LAYOUTS = {
    "gptq-zeros": Entry("quantpub.layouts.gptq_zeros:LAYOUT", "GPTQ v1 with integer zeros, stored less one"),
    "auto-gptq": Entry("quantpub.layouts.gptq_zeros:AUTO", "auto-round's auto_gptq: GPTQ v1 without g_idx"),
    "auto-round": Entry("quantpub.layouts.auto_round:LAYOUT", "auto-round's own: GPTQ v2 without g_idx"),
    "torchao-float8": Entry(
        "quantpub.layouts.torchao_float8:LAYOUT", "torchao Float8Tensor: E4M3, a scale a row or tensor"
    ),
    "torchao-int8": Entry("quantpub.layouts.torchao_int:INT8", "torchao Int8Tensor: int8, a scale a row"),
    "torchao-intx": Entry(
        "quantpub.layouts.torchao_int:INTX", "torchao IntxUnpackedToInt8Tensor: int4 or int8, a code a byte"
    ),
    "modelopt-int4": Entry("quantpub.layouts.modelopt_int4:LAYOUT", "ModelOpt W4A16_AWQ without a pre_quant_scale"),
}
