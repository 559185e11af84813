"""Known failures: what went wrong with published quantized checkpoints, where that was reported, and what catches it here.

Data only. A failure is caught by a stage and what decides there: a rule of `verify`, a gate, a refusal. Most of them were
silent: the tool ended well, and the checkpoint was slow, wrong or half quantized. Threads are `owner/repo#number` on GitHub.
tests: where it is planted, `file::test`; those of the rules of `verify` are planted in test_firewall.
"""

from __future__ import annotations

from typing import NamedTuple

AO, CT, MO = "pytorch/ao", "vllm-project/llm-compressor", "NVIDIA/Model-Optimizer"
VLLM, AR, HUB, MLX = "vllm-project/vllm", "intel/auto-round", "huggingface/huggingface_hub", "ml-explore/mlx-lm"
TRANSFORMERS, DATASETS = "huggingface/transformers", "huggingface/datasets"


def _threads(repo: str, *numbers: int) -> tuple[str, ...]:
    return tuple(f"{repo}#{number}" for number in numbers)


class Failure(NamedTuple):
    """caught: (stage, what decides there), first the one that decides. unseen: what no program sees of it, or nothing."""

    what: str
    threads: tuple[str, ...]
    caught: tuple[tuple[str, str], ...]
    next: str
    tests: tuple[str, ...] = ()
    unseen: str = ""


GATE = ("profile", "gate")
PUBLISHED = "test_publish::test_a_failed_gate_is_not_published"

FAILURES: dict[int, Failure] = {
    1: Failure(
        "an int4 checkpoint whose card says 1.2x faster serves 7.9x slower than bf16",
        _threads(AO, 3496),
        (GATE, ("publish", "gate")),
        "repack it into the layout that the profile names",
        ("test_verdict::test_a_repack_that_passes_is_the_cure", PUBLISHED),
    ),
    2: Failure(
        "weight-only int4 is slower than 16 bits on large batches, and nothing said from how many tokens on",
        (*_threads(VLLM, 44529), *_threads(CT, 2793, 2879, 2549, 2025)),
        (GATE, ("card", "check")),
        "state the workload in the recipe's gate, and quantize activations too where prompts dominate",
        (
            "test_verdict::test_a_slower_one_fails_without_a_cure",
            "test_card::test_a_crossover_does_not_hide_what_is_slower_below_it",
        ),
    ),
    3: Failure(
        "an FP8 checkpoint is 18 to 40 % slower than bf16: the engine took a fallback kernel",
        _threads(VLLM, 48035),
        (GATE,),
        "read in the profile which kernel the engine takes and why it refuses faster ones, and choose a layout by it",
        (
            "test_verdict::test_it_is_the_end_to_end_figure_that_counts",
            "test_verdict::test_a_faster_kernel_of_the_same_layout_is_told_with_the_engines_reason",
        ),
    ),
    4: Failure(
        "experts that are one 3-D parameter were passed over: 91 % of the weights stayed in bf16",
        _threads(MO, 1173, 2011, 1340),
        (("verify", "bits"),),
        "quantize them as 2-D linears, one an expert",
        ("test_plan::test_packed_experts_become_linears",),
    ),
    5: Failure(
        "experts that no calibration sample reached have zeros or NaN for scales",
        _threads(MO, 1421),
        (("verify", "scales"), ("calibration", "min_expert_tokens")),
        "calibrate with more data; set calibration.min_expert_tokens in the recipe",
        ("test_observe::test_too_little_for_experts_is_one_line",),
    ),
    6: Failure(
        "q, k and v, or gate and up, have NVFP4 global scales of their own, and engines keep one: wrong text, no error",
        (*_threads(VLLM, 54150, 41045), *_threads(AR, 2379)),
        (("verify", "merged"),),
        "quantize again with one global scale for what engines merge",
    ),
    7: Failure(
        "a checkpoint that is called NVFP4 holds FP8 weights, 6.12 bits a parameter",
        _threads(MO, 868),
        (("verify", "bits"),),
        "quantize again, or let the config say which layers are FP8",
    ),
    8: Failure(
        "an export in little memory wrote scales of half the size, without meaning",
        _threads(MO, 2038),
        (("verify", "tensors"), ("verify", "values")),
        "export again; give verify the --source, without which numbers of the right shape cannot be judged",
    ),
    9: Failure(
        "a resumed run wrote every module twice: 47 GB instead of 18",
        _threads(AR, 2350),
        (("verify", "index"),),
        "delete the shards that the index does not need, or make the checkpoint again",
        ("test_resume::test_finished_shards_are_not_made_again",),
    ),
    10: Failure(
        "after 15 hours of work memory ran out while the checkpoint was saved, with 1.5 TB of it",
        _threads(CT, 1718, 1183, 1293, 1753),
        (("plan", "memory"), ("quantize", "shards")),
        "look at the memory that the plan states; shards are written as they are made, and a rerun goes on behind them",
        (
            "test_cli::test_the_plans_figures_are_those_of_the_run",
            "test_resume::test_killed_at_every_write_point",
        ),
        unseen="a finished checkpoint does not tell what making it took",
    ),
    11: Failure(
        "a packed MoE checkpoint loads with random numbers for experts, and without an error",
        _threads(TRANSFORMERS, 47407, 47410),
        (("verify", "complete"), ("verify --engine", "canary")),
        "load it in the engine with `verify --engine`, beside its base",
        ("test_canary::test_experts_of_other_names_are_left_at_random_and_that_is_a_failure",),
    ),
    12: Failure(
        "a scale is missing or has another name, and the engine does not check quantized checkpoints for completeness",
        (),
        (("verify", "tensors"),),
        "make the checkpoint again",
    ),
    13: Failure(
        "the head, the layers that predict further tokens, or a vision tower were lost or broken",
        (*_threads(VLLM, 45543, 41994), *_threads(CT, 3118), *_threads(MO, 2427), *_threads(AR, 1526)),
        (("verify", "complete"), ("verify", "coverage"), ("verify", "copies")),
        "copy what is not quantized byte for byte; give verify the --source",
    ),
    14: Failure(
        "a group or block does not divide a GPU's share of the weights, found out when it is served",
        (*_threads(VLLM, 46230, 49949, 57792), *_threads(MLX, 1734)),
        (("verify", "tensor-parallel"), ("plan", "tensor parallel")),
        "ask with `verify --tp`; choose smaller groups, or fewer GPUs",
        ("test_plan::test_tensor_parallel_by_hand",),
    ),
    15: Failure(
        "quantizing a quantized checkpoint ends in an error that nobody understands",
        _threads(CT, 2907),
        (("quantize", "source"),),
        "start from the full-precision model, or `quantpub repack` the weights into another layout",
        ("test_firewall::test_a_quantized_source_is_one_line_that_offers_repack",),
    ),
    16: Failure(
        "an ignore list resolves differently in vLLM and SGLang; `re:.*v_proj` reaches qkv_proj",
        _threads(VLLM, 31623),
        (("verify", "names"),),
        "anchor patterns, or name modules in full",
    ),
    17: Failure(
        "a declared FP8 KV cache without calibrated scales: keys and values are clipped by default",
        _threads(VLLM, 11906, 54705, 54623),
        (("verify", "kv-cache"),),
        "calibrate the cache, or take kv_cache_scheme out",
    ),
    18: Failure(
        "NVFP4 halves a maths score, from 61 to 30 %",
        _threads(CT, 2936),
        (("eval", "gate"), ("publish", "gate")),
        "set the gate's max_kl, and quantize less or with more bits",
        ("test_evaluate::test_the_gate_of_the_recipe", PUBLISHED),
        unseen="the gate is of the distance to the base on a text, not of a task's score",
    ),
    19: Failure(
        "INT8 weights and activations die on Blackwell at the first forward",
        _threads(VLLM, 54311),
        (("plan", "engines"),),
        "choose FP8 for Blackwell",
        ("test_targets::test_int8_is_refused_on_blackwell",),
    ),
    20: Failure(
        "nobody could tell time, memory and size before a run was started",
        _threads(AR, 1591, 1592, 1958),
        (("plan", "sizes"),),
        "run `quantpub plan`: its figures are checked against the run",
        ("test_plan::test_sizes_are_exact_to_the_byte", "test_cli::test_the_plans_figures_are_those_of_the_run"),
    ),
    21: Failure(
        "an upload left a README without weights; it failed although its commit had landed",
        (*_threads(HUB, 3747, 2083), *_threads(DATASETS, 7708)),
        (("publish", "one commit"), ("publish", "read-back")),
        "run `quantpub publish` again: it looks at what landed before it sends anything",
        (
            "test_publish::test_everything_lands_in_one_commit_and_nothing_else",
            "test_publish::test_a_lost_commit_reply_is_found_and_not_repeated",
            "test_publish::test_a_shard_that_reads_differently_is_seen",
        ),
    ),
    22: Failure(
        "cards state activations that are not quantized, a licence that is not the base's, or `to be filled`",
        (),
        (("card", "check"),),
        "render the card from the evidence: `quantpub card`",
        (
            "test_card::test_activations_are_described_from_the_scheme",
            "test_card::test_a_licence_is_never_invented",
            "test_card::test_every_edit_is_caught",
        ),
        unseen="cards of other tools' checkpoints are not read",
    ),
    23: Failure(
        "reasoning models write longer answers once they are quantized",
        _threads(MO, 2254),
        (),
        "compare the lengths of whole answers with the base's in the engine; a small KL makes it unlikely",
        unseen="the length of answers takes thousands of tokens a question in an engine: it is not measured",
    ),
    24: Failure(
        "an upgrade of the engine no longer loads what was published",
        _threads(VLLM, 52947, 39610, 48148),
        (("verify", "parses"), ("verify --engine", "canary")),
        "run `verify REPO_ID --engine` with the new version before you upgrade",
        ("test_canary::test_the_whole_way_in_a_process_of_its_own",),
    ),
    25: Failure(
        "remote code is run by default, and weights are pickles",
        (),
        (("verify", "safe-files"), ("verify", "remote-code")),
        "convert pickles to safetensors; take auto_map out",
    ),
    26: Failure(
        "a MoE was saved without any expert, and the tool ended well (hqq 0.2.8 on transformers 5, seen here)",
        (),
        (("verify", "complete"),),
        "quantize again with a tool that knows fused experts",
    ),
    27: Failure(
        "every expert of a MoE was left in bf16, 121 of 122 MB (torchao 0.18 through transformers, seen here)",
        (),
        (("verify", "bits"),),
        "quantize again with a tool that knows fused experts",
    ),
}


def caught_by(failure: Failure) -> str:
    """Stages and what decides there, in words."""
    return ", ".join(f"{stage} {rule}" for stage, rule in failure.caught) or f"not caught: {failure.unseen}"
