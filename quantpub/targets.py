"""Serving engines, as data: which layouts each loads, for which schemes, since which version, and where that is known from.

Recipes name an engine and a layout; these tables say whether the pair can work at all, and what refuses it where it
cannot. They were read in the engine's own source. What was loaded here, and which kernel then runs, is the matter of
`kernel_tables`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# The versions that were read for the tables: the oldest and the newest
VERSIONS = {
    "vllm": ("0.25.1", "0.33.0"),
    "sglang": ("0.5.23",),
    "tensorrt-llm": ("main, mid-2026",),
    "transformers": ("5.23.0",),
}


@dataclass(frozen=True)
class Loads:
    """versions that load the layout. schemes: those it loads so, None for all that the layout holds.

    experts: why the linears of experts cannot be in this layout, None where nothing is known against it. experts_in: the
    same of single schemes. kept: why experts cannot stay in high precision where other linears are in this layout.
    needs: packages that the engine does not bring along.
    """

    versions: str
    source: str
    schemes: tuple[str, ...] | None = None
    experts: str | None = None
    needs: tuple[str, ...] = ()
    experts_in: Mapping[str, str] = field(default_factory=dict)
    kept: str | None = None


@dataclass(frozen=True)
class Refuses:
    reason: str
    source: str


@dataclass(frozen=True)
class Target:
    """An engine: a line of description; layout → what loads it; layout → why it is refused. Together: every layout.

    mixed: why it cannot load a checkpoint of several schemes. merges: whether q/k/v become one weight, and gate/up.
    """

    summary: str
    loads: dict[str, Loads]
    refuses: dict[str, Refuses] = field(default_factory=dict)
    mixed: str | None = None
    merges: bool = True


_VLLM = "0.25.1 – 0.33.0"
_READ_VLLM = "read: 0.25.1 and 0.33.0"
_CT_SGLANG = "read: SGLang 0.5.23, compressed_tensors.py"
_GPTQ_SGLANG = "read: SGLang 0.5.23, gptq/gptq.py: symmetric only"
_CT_TRT = "read: TensorRT-LLM models/quant_config_utils.py"
_CT_HF = "read: quantizer_compressed_tensors.py; decompresses, and computes in the model's own dtype"
_HF = "5.17 – 5.23"
_TRT = "main, mid-2026"
_BOTH_FP4 = ("NVFP4", "NVFP4A16")
_SYMMETRIC = ("W4A16", "W8A16")
_TORCHAO_EXPERTS = "vLLM's torchao loader takes linear layers only, neither experts nor lm_head"
_NO_TORCHAO = Refuses(
    "torchao was removed from SGLang", "read: SGLang issue 34295 and pull request 34304; no torchao in 0.5.23"
)
_NO_MODELOPT = Refuses("transformers does not know ModelOpt's quant_method", "read: transformers quantizers/auto.py")
_SGLANG_MODELOPT = "read: SGLang 0.5.23, modelopt_quant.py: as quant_algo of a whole checkpoint FP8 and FP4 only"
_MODELOPT_EXPERTS = "vLLM's ModelOpt loader knows FP8 experts with a scale a tensor only"
_HF_TORCHAO_EXPERTS = "transformers leaves the experts of such a checkpoint uninitialised and only reports missing keys"
_NOT_READ = "its PyTorch backend does not know this quant_method"
_NO_METHOD = Refuses(_NOT_READ, "read: TensorRT-LLM _torch/model_config.py")
_NO_GPTQ = Refuses(_NOT_READ, "read: TensorRT-LLM pull request 19442, open in September 2026")
_VLLM_BNB = "vLLM's bitsandbytes loader refuses what is 8-bit on disk where the model has experts, quantized or not"
_SGLANG_BNB = "SGLang's bitsandbytes loader wants a table of merged linears, and its models with experts have none"
_SGLANG_GPTQ = "SGLang's GPTQ loader takes the experts of every such checkpoint for quantized"
_UNPACKED = "transformers fails to convert the experts where they are not quantized and the rest is packed"
_UNCONVERTED = "transformers fails to convert the experts of such a checkpoint when it loads it"

TARGETS = {
    "vllm": Target(
        "vLLM",
        {
            "ct-pack": Loads(
                _VLLM,
                _READ_VLLM + ", the WNA16 scheme",
                ("W4A16", "W4A16_ASYM", "W8A16"),
                experts_in={"W8A16": "vLLM's int8 experts want groups, and end in a TypeError at whole rows"},
            ),
            "ct-int": Loads(_VLLM, _READ_VLLM + ", the W8A8Int8 scheme", ("W8A8",)),
            "ct-float": Loads(
                _VLLM,
                _READ_VLLM + ", the W8A8Fp8 scheme",
                ("FP8", "FP8_DYNAMIC", "FP8_BLOCK"),
            ),
            "ct-nvfp4": Loads(_VLLM, _READ_VLLM + ", the W4A4Fp4 scheme", _BOTH_FP4),
            "ct-mxfp4": Loads(_VLLM, _READ_VLLM + ", the W4A4Mxfp4 scheme", ("MXFP4A16",)),
            "hf-fp8": Loads(_VLLM, _READ_VLLM + ", fp8.py"),
            "modelopt-fp8": Loads(_VLLM, "read: vLLM 0.25.1 and 0.33.0, modelopt.py", ("FP8",)),
            "modelopt-fp8-channel": Loads(
                _VLLM, _READ_VLLM + ", modelopt.py", ("FP8_DYNAMIC",), experts=_MODELOPT_EXPERTS
            ),
            "modelopt-fp8-block": Loads(
                _VLLM,
                _READ_VLLM + ", modelopt.py; 0.25.1 does not prepare the weights for DeepGEMM",
                ("FP8_BLOCK",),
                experts=_MODELOPT_EXPERTS,
            ),
            "modelopt-nvfp4": Loads(_VLLM, _READ_VLLM + ", modelopt.py", _BOTH_FP4),
            "gptq": Loads(_VLLM, _READ_VLLM + ", auto_gptq.py: symmetric only", _SYMMETRIC),
            "gptq-v2": Loads(_VLLM, _READ_VLLM + ", auto_gptq.py: symmetric only, and read as version 1", _SYMMETRIC),
            "awq": Loads(_VLLM, _READ_VLLM + ", auto_awq.py"),
            "torchao-tile": Loads(_VLLM, _READ_VLLM + ", torchao.py", experts=_TORCHAO_EXPERTS, needs=("torchao",)),
            "torchao-nvfp4": Loads(
                _VLLM,
                _READ_VLLM + ", torchao.py; merged weights are cut between tiles of 128 rows",
                ("NVFP4A16",),
                experts=_TORCHAO_EXPERTS,
                needs=("torchao",),
            ),
            "bnb-int8": Loads(
                "0.25.1 – 0.27; from 0.28 by vllm-bnb-plugin",
                "read: vLLM 0.25.1, bitsandbytes_loader.py; vLLM pull request 43529 moved it out in 0.28",
                experts=_VLLM_BNB,
                kept=_VLLM_BNB,
                needs=("bitsandbytes",),
            ),
        },
    ),
    "sglang": Target(
        "SGLang",
        {
            "ct-pack": Loads("0.5.23", _CT_SGLANG + ": Marlin only", ("W4A16", "W4A16_ASYM", "W8A16")),
            "ct-int": Loads(
                "0.5.23",
                _CT_SGLANG + ": not on Blackwell",
                ("W8A8",),
                experts="SGLang has INT8 experts in this format for NPUs only",
            ),
            "ct-float": Loads("0.5.23", _CT_SGLANG, ("FP8", "FP8_DYNAMIC", "FP8_BLOCK")),
            "ct-nvfp4": Loads("0.5.23", _CT_SGLANG, _BOTH_FP4),
            "hf-fp8": Loads("0.5.23", "read: SGLang 0.5.23, fp8.py"),
            "modelopt-fp8": Loads("0.5.23", "read: SGLang 0.5.23, modelopt_quant.py", ("FP8",)),
            "modelopt-nvfp4": Loads("0.5.23", "read: SGLang 0.5.23, modelopt_quant.py", _BOTH_FP4),
            "gptq": Loads("0.5.23", _GPTQ_SGLANG, _SYMMETRIC, kept=_SGLANG_GPTQ),
            "gptq-v2": Loads("0.5.23", _GPTQ_SGLANG + ", and read as version 1", _SYMMETRIC, kept=_SGLANG_GPTQ),
            "awq": Loads("0.5.23", "read: SGLang 0.5.23, awq/awq.py"),
            "bnb-int8": Loads(
                "0.5.23",
                "read: SGLang 0.5.23, model_loader/loader.py: one GPU only",
                needs=("bitsandbytes",),
                experts=_SGLANG_BNB,
                kept=_SGLANG_BNB,
            ),
        },
        {
            "ct-mxfp4": Refuses("no scheme for dense MXFP4 weights", _CT_SGLANG),
            "modelopt-fp8-channel": Refuses(
                "its ModelOpt loader knows FP8 with a scale a tensor only: take ct-float, the same numbers",
                _SGLANG_MODELOPT,
            ),
            "modelopt-fp8-block": Refuses(
                "its ModelOpt loader knows FP8 with a scale a tensor only: take hf-fp8, the same numbers",
                _SGLANG_MODELOPT,
            ),
            "torchao-tile": _NO_TORCHAO,
            "torchao-nvfp4": _NO_TORCHAO,
        },
    ),
    "tensorrt-llm": Target(
        "TensorRT-LLM, PyTorch backend",
        {
            "ct-float": Loads(_TRT, _CT_TRT + ": no scale of a whole tensor", ("FP8_DYNAMIC", "FP8_BLOCK")),
            "hf-fp8": Loads(_TRT, "read: TensorRT-LLM _torch/model_config.py", ("FP8_BLOCK",)),
            "modelopt-fp8": Loads(_TRT, "read: TensorRT-LLM _torch/modules/linear.py", ("FP8",)),
            "modelopt-fp8-channel": Loads(
                _TRT, "read: TensorRT-LLM _torch/modules/linear.py, FP8RowwiseLinearMethod", ("FP8_DYNAMIC",)
            ),
            "modelopt-fp8-block": Loads(
                _TRT,
                "read: TensorRT-LLM _torch/model_config.py, which takes fp8_pb_wo for FP8_BLOCK_SCALES",
                ("FP8_BLOCK",),
            ),
            "modelopt-nvfp4": Loads(
                _TRT,
                "read: TensorRT-LLM _torch/modules/linear.py; NVFP4A16 by pull requests 13476 and 16511",
                _BOTH_FP4,
            ),
        },
        {
            "ct-pack": Refuses("it reads the format of the activations, and weight-only int4 has none", _CT_TRT),
            "ct-int": Refuses("it has no INT8: the codes would be cast to FP8 in silence", _CT_TRT),
            "ct-nvfp4": Refuses(
                "the tensor names are known to single model classes only: take modelopt-nvfp4, the same bytes",
                "read: TensorRT-LLM pull requests 16447 and 17726, open in mid-2026",
            ),
            "ct-mxfp4": Refuses("it reads the format of the activations, and weight-only MXFP4 has none", _CT_TRT),
            "gptq": _NO_GPTQ,
            "gptq-v2": _NO_GPTQ,
            "awq": Refuses(
                _NOT_READ + "; of AWQ it reads ModelOpt's W4A16_AWQ", "read: TensorRT-LLM _torch/model_config.py"
            ),
            "torchao-tile": _NO_METHOD,
            "torchao-nvfp4": _NO_METHOD,
            "bnb-int8": _NO_METHOD,
        },
    ),
    "transformers": Target(
        "transformers",
        {
            "ct-pack": Loads(
                _HF,
                _CT_HF,
                needs=("compressed-tensors", "accelerate"),
                experts_in={"W4A16_ASYM": _UNCONVERTED},
                kept=_UNPACKED,
            ),
            "ct-int": Loads(
                _HF, _CT_HF, experts=_UNCONVERTED, needs=("compressed-tensors", "accelerate"), kept=_UNPACKED
            ),
            "ct-float": Loads(
                _HF,
                _CT_HF,
                needs=("compressed-tensors", "accelerate"),
            ),
            "ct-nvfp4": Loads(
                _HF,
                _CT_HF,
                experts="transformers leaves the global scales of NVFP4 experts out: their weights come out 2048 times too large",
                needs=("compressed-tensors", "accelerate"),
                kept=_UNPACKED,
            ),
            "ct-mxfp4": Loads(_HF, _CT_HF, needs=("compressed-tensors", "accelerate"), kept=_UNPACKED),
            "hf-fp8": Loads(
                _HF,
                "read: quantizer_finegrained_fp8.py; FP8 from compute capability 8.9 on, dequantized below",
                needs=("accelerate", "kernels"),
            ),
            "gptq": Loads(_HF, "read: quantizer_gptq.py", needs=("optimum", "gptqmodel")),
            "gptq-v2": Loads(
                _HF, "read: quantizer_gptq.py; gptqmodel knows the version", needs=("optimum", "gptqmodel")
            ),
            "awq": Loads(_HF, "read: quantizer_awq.py", needs=("gptqmodel", "accelerate")),
            "torchao-tile": Loads(
                _HF,
                "read: quantizer_torchao.py; opened as torchao's own tensors",
                needs=("torchao",),
                experts=_HF_TORCHAO_EXPERTS,
            ),
            "torchao-nvfp4": Loads(
                _HF,
                "read: quantizer_torchao.py; opened as torchao's own tensors",
                needs=("torchao",),
                experts=_HF_TORCHAO_EXPERTS,
            ),
            "bnb-int8": Loads(
                _HF,
                "read: quantizer_bnb_8bit.py",
                needs=("bitsandbytes", "accelerate"),
                experts="transformers replaces linear layers only, and its experts are one parameter",
            ),
        },
        {
            "modelopt-fp8": _NO_MODELOPT,
            "modelopt-fp8-channel": _NO_MODELOPT,
            "modelopt-fp8-block": _NO_MODELOPT,
            "modelopt-nvfp4": _NO_MODELOPT,
        },
        # seen with 5.23: integrations/compressed_tensors.py, get_dense_scheme
        mixed="it decompresses every dense layer by the first group of the config",
        merges=False,
    ),
}


def unloadable(
    engine: str, layout: str, scheme: str | None = None, experts: bool = False, kept: bool = False
) -> str | None:
    """Why the engine cannot load weights of the scheme in this layout, or None.

    experts: among them are experts'. kept: there are experts beside them that stay in high precision.
    """
    target = TARGETS[engine]
    if layout not in target.loads:
        refusal = target.refuses.get(layout)
        return refusal.reason if refusal else "not established"
    loads = target.loads[layout]
    if scheme is not None and loads.schemes is not None and scheme not in loads.schemes:
        return f"{target.summary} loads {layout} for {', '.join(loads.schemes)} only, not for {scheme}"
    reason = (loads.experts or loads.experts_in.get(scheme or "")) if experts else None
    return reason or (loads.kept if kept else None)
