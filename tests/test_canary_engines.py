"""The probes of engines that need a GPU: what of them needs none, on objects of a few attributes."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantpub.engines import probe_sglang, probe_vllm
from quantpub.engines.probe_vllm import Capture, ordered
from quantpub.engines.probing import Request, top
from quantpub.engines.vllm_loaded import kernel_of, kernels, never_loaded

REQUEST = Request("folder", [[5, 6, 7, 8]], [5, 6], 8, "out")


def vllms(name: str, module: str = "vllm.model_executor.layers.quantization.x", **attributes: Any) -> Any:
    """An object of a class of that name in one of vLLM's modules."""
    return type(name, (), {"__module__": module})() if not attributes else _filled(vllms(name, module), attributes)


def _filled(thing: Any, attributes: dict[str, Any]) -> Any:
    vars(thing).update(attributes)
    return thing


def model(**modules: Any) -> Any:
    return SimpleNamespace(named_modules=lambda: modules.items())


DENSE = "vllm.model_executor.kernels.linear.mixed_precision.machete"


def test_kernels_are_found_at_the_scheme_the_method_and_below_experts() -> None:
    machete, cutlass = vllms("MacheteLinearKernel", DENSE), vllms("CutlassFP8ScaledMMLinearKernel", DENSE)
    wna16 = vllms("CompressedTensorsWNA16", kernel=machete, config=vllms("MPLinearLayerConfig", DENSE))
    experts = vllms("MarlinExperts", "vllm.model_executor.layers.fused_moe.experts.marlin_moe")
    moe_kernel = vllms("FusedMoEKernel", impl=vllms("FusedMoEKernelModularImpl", fused_experts=experts))
    own = vllms("NewFancyLinearKernel", DENSE)
    classes, rows = kernels(
        model(
            qkv=SimpleNamespace(quant_method=vllms("CompressedTensorsLinearMethod"), scheme=wna16),
            o=SimpleNamespace(quant_method=vllms("Fp8LinearMethod", fp8_linear=cutlass)),
            experts=SimpleNamespace(quant_method=vllms("CompressedTensorsW4A4Nvfp4MoEMethod", moe_kernel=moe_kernel)),
            other=SimpleNamespace(quant_method=vllms("SomeMethod", kernel=own)),
            lm_head=SimpleNamespace(quant_method=vllms("UnquantizedLinearMethod")),
            embed=SimpleNamespace(quant_method=vllms("UnquantizedEmbeddingMethod")),
            attn=SimpleNamespace(quant_method=vllms("Fp8KVCacheMethod"), kv_cache_dtype="auto"),
            attn8=SimpleNamespace(quant_method=vllms("Fp8KVCacheMethod"), kv_cache_dtype="fp8"),
            norm=SimpleNamespace(),
        )
    )
    assert classes == {
        "qkv": "MacheteLinearKernel",
        "o": "CutlassFP8ScaledMMLinearKernel",
        "experts": "MarlinExperts",
        "other": "NewFancyLinearKernel",
        "lm_head": "UnquantizedLinearMethod",
        "attn8": "Fp8KVCacheMethod",
    }
    assert rows == {"Machete": 1, "CUTLASS FP8": 1, "Marlin NVFP4 MoE": 1}


def test_a_kernel_class_counts_as_its_object_and_the_nearest_wins() -> None:
    deep = vllms("TritonExperts", "vllm.model_executor.layers.fused_moe.experts.triton_moe")
    outer = vllms("TritonOrDeepGemmExperts", "vllm.model_executor.layers.fused_moe.experts.x", inner=deep)
    assert kernel_of(vllms("Fp8MoEMethod", experts_cls=type(outer))) == "TritonOrDeepGemmExperts"
    assert kernel_of(vllms("Fp8MoEMethod", moe_kernel=outer)) == "TritonOrDeepGemmExperts"
    assert kernel_of(vllms("Fp8MoEMethod"), None) is None


def test_what_no_tensor_was_put_in_is_missing() -> None:
    names = [
        "q.weight_packed",
        "q.weight_scale",
        "q.weight_shape",
        "e.w13_g_idx_sort_indices",
        "attn.k_scale",
        "o.qzeros",
        "n.weight",
    ]
    methods = {"q": "CompressedTensorsLinearMethod", "attn": "CompressedTensorsKVCacheMethod"}
    there = SimpleNamespace(
        named_modules=lambda: [(name, SimpleNamespace(quant_method=vllms(method))) for name, method in methods.items()],
        named_parameters=lambda: [(name, torch.empty(0 if "qzeros" in name else 2)) for name in names],
    )
    assert never_loaded(there, {"q.weight_packed"}) == ["n.weight", "q.weight_scale"]


IDS = [3, 1, 2, 0]


def rows_of(seed: int = 0, count: int = 4) -> torch.Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)


def said(rows_TV: torch.Tensor) -> list[float]:
    return [rows_TV[t, token].item() for t, token in enumerate(IDS[1:])]


def test_rows_are_ordered_whichever_way_a_runner_computes_them() -> None:
    rows, sampled = rows_of(), rows_of()[3:]
    ways = {
        "the sampled row first, then the prompt's but its last": [sampled, rows[:3]],
        "the sampled row first, then all": [sampled, rows],
        "in two pieces": [rows[:2], rows[2:], sampled],
        "a piece of one row": [rows[:1], rows[1:3], sampled],
        "the sampled row before pieces of one": [sampled, rows[:1], rows[1:2], rows[2:3]],
        "a row of a step too many": [sampled, rows, rows_of(7, 1)],
    }
    for way, captured in ways.items():
        found = ordered(captured, IDS, said(rows))
        assert found is not None and torch.equal(found, rows[:3]), way


def test_rows_that_do_not_meet_what_vllm_returns_are_not_taken() -> None:
    rows = rows_of()
    assert ordered([rows[3:], rows[:3].flip(0)], IDS, said(rows)) is None
    assert ordered([rows[:2]], IDS, said(rows)) is None and ordered([], IDS, said(rows)) is None
    broken = torch.full((3, 5), math.nan)
    assert ordered([broken], IDS, [math.nan] * 3) is not None  # a broken model is found by its rows, not hidden


def test_a_capture_keeps_rows_before_a_sampler_writes_into_them() -> None:
    there = SimpleNamespace(compute_logits=lambda hidden: hidden * 1.0)
    capture, hidden = Capture(there), torch.ones(2, 5)
    there.compute_logits(hidden)
    with capture as captured:
        there.compute_logits(hidden).fill_(-1e9)
    there.compute_logits(hidden)
    assert len(captured) == 1 and torch.allclose(captured[0].exp(), torch.full((2, 5), 0.2))


def test_the_most_likely_tokens_are_sorted_and_equally_many() -> None:
    found = top([[(-2.0, 7), (-1.0, 3), (-9.0, 4)], [(-0.5, 1), (-0.7, 2)]], [-2.0, -0.7])
    assert found["top_ids_TK"].tolist() == [[3, 7], [1, 2]] and found["own_T"].tolist() == pytest.approx([-2.0, -0.7])


def test_engines_are_given_only_what_they_know() -> None:
    known = {"model", "max_model_len", "gpu_memory_utilization", "skip_tokenizer_init"}
    given = probe_vllm.settings(REQUEST, known, 0.5)
    assert given == {"model": "folder", "max_model_len": 11, "gpu_memory_utilization": 0.5, "skip_tokenizer_init": True}
    assert probe_sglang.settings(REQUEST, {"model_path"}) == {"model_path": "folder"}
    assert probe_sglang.settings(REQUEST, set())["context_length"] == 11


def test_sglang_answers_are_read() -> None:
    def generate(input_ids: list[int], sampling_params: dict[str, Any], **options: Any) -> dict[str, Any]:
        if not options:
            return {"output_ids": [9] * sampling_params["max_new_tokens"], "text": "", "meta_info": {}}
        assert options == {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": probe_sglang.TOP}
        own = [(None, 5, None), (-1.0, 6, None), (-2.0, 7, None), (-3.0, 8, None)]
        likely = [None, *([(-0.1 * t, t, None) for t in (1, 2)] for _ in range(3))]
        return {"output_ids": [1], "meta_info": {"input_token_logprobs": own, "input_top_logprobs": likely}}

    engine = probe_sglang.Sglang(SimpleNamespace(generate=generate))
    assert engine.generate([1], 3) == ([9, 9, 9], None)
    found = engine.score([5, 6, 7, 8])
    assert found["own_T"].tolist() == [-1, -2, -3] and found["top_ids_TK"].tolist() == [[1, 2]] * 3
    with pytest.raises(AssertionError, match="another prompt"):
        engine.score([5, 6, 7, 9])
