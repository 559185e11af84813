"""Model families: what every tensor of a checkpoint is, by name. One entry a family; data, no torch.

A role decides what may happen to a tensor: `linear` is quantized, everything else is copied. The reasons:
  embedding, head   the head's error goes straight into the logits, and engines hold it in a class of its own; heads that
                    predict further tokens are small and are drafts only
  norm, bias, buffer   small, and one-dimensional or convolutions of a few taps
  router            a few kilobytes that choose the experts: an error there changes which weights are read at all
Of the linears some stay in high precision by default: `keep` says which and why; a rule of the recipe that names such a
module quantizes it all the same. First and last layers are no exception: nothing that was measured here asks for it.
A tensor that no pattern of its family matches is an error, never a silent copy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache

LINEAR, EMBEDDING, HEAD, NORM, BIAS, ROUTER, BUFFER = "linear", "embedding", "head", "norm", "bias", "router", "buffer"
Patterns = tuple[tuple[str, str], ...]

_LAYER = r"model\.layers\.\d+\."


def _norms(names: str, suffix: str = "weight") -> tuple[str, str]:
    return (_LAYER + rf"({names})\.({suffix})", NORM)


_BASE = (
    (r"model\.embed_tokens\.weight", EMBEDDING),
    (r"lm_head\.weight", HEAD),
    (r"model\.norm\.weight", NORM),
    _norms(r"input_layernorm|(pre|post)_(attention|feedforward)_layernorm|self_attn\.[qk]_norm"),
    (_LAYER + r"self_attn\.rotary_emb\.inv_freq", BUFFER),
)
_SPLIT_ATTENTION = (
    (_LAYER + r"self_attn\.[qkvo]_proj\.weight", LINEAR),
    (_LAYER + r"self_attn\.[qkvo]_proj\.bias", BIAS),
)
_MLA = (
    (_LAYER + r"self_attn\.(q_proj|q_[ab]_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)\.weight", LINEAR),
    (_LAYER + r"self_attn\.(q_a_proj|kv_a_proj_with_mqa|o_proj)\.bias", BIAS),
    _norms(r"self_attn\.(q|kv)_a_layernorm"),
)
_DENSE_MLP = (
    (_LAYER + r"mlp\.(gate|up|down)_proj\.weight", LINEAR),
    (_LAYER + r"mlp\.(gate|up|down)_proj\.bias", BIAS),
)
_EXPERTS = (
    (_LAYER + r"mlp\.experts\.\d+\.(gate|up|down)_proj\.weight", LINEAR),
    (_LAYER + r"mlp\.gate\.weight", ROUTER),
    (_LAYER + r"mlp\.(gate\.|moe_statics\.)?e_score_correction_bias", BUFFER),
)
_SHARED_EXPERTS = ((_LAYER + r"mlp\.shared_experts\.(gate|up|down)_proj\.weight", LINEAR),)
_QWEN_MOE = (
    *_EXPERTS,
    (_LAYER + r"mlp\.shared_expert\.(gate|up|down)_proj\.weight", LINEAR),
    (_LAYER + r"mlp\.shared_expert_gate\.weight", ROUTER),
)
_SPARSE_BLOCK = (
    (_LAYER + r"block_sparse_moe\.experts\.\d+\.w[123]\.weight", LINEAR),
    (_LAYER + r"block_sparse_moe\.gate\.weight", ROUTER),
    (_LAYER + r"block_sparse_moe\.e_score_correction_bias", BUFFER),
)
_DELTA_NET = (
    (_LAYER + r"linear_attn\.(in_proj_(qkvz|ba|qkv|z|a|b)|out_proj)\.weight", LINEAR),
    (_LAYER + r"linear_attn\.(A_log|dt_bias|conv1d\.weight)", BUFFER),
    _norms(r"linear_attn\.norm"),
)
# One more layer of the same kind, and what joins it to the model: names as vLLM's deepseek_mtp.py and glm4_moe_mtp.py load them
_MTP_LAYER = (
    _norms(r"enorm|hnorm|shared_head\.norm"),
    (_LAYER + r"(eh_proj|shared_head\.head)\.weight", HEAD),
    (_LAYER + r"embed_tokens\.weight", EMBEDDING),
)
# A head of its own with layers of its own, copied whole: names as vLLM's qwen3_next_mtp.py and qwen3_5_mtp.py load them
_MTP_HEAD = (
    (r"mtp\.(norm|pre_fc_norm_embedding|pre_fc_norm_hidden)\.weight", NORM),
    (r"mtp\.layers\.\d+\.(input_layernorm|post_attention_layernorm|self_attn\.[qk]_norm)\.weight", NORM),
    (r"mtp\.(fc|layers\.\d+\.(self_attn|mlp)\..*(_proj|gate))\.weight", HEAD),
)
_QKV: dict[str, tuple[str, ...]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
_FUSED: dict[str, tuple[str, ...]] = _QKV | {"gate_up_proj": ("gate_proj", "up_proj")}
_PACKED: dict[str, tuple[str, ...]] = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_ABSORBED = (
    (
        r".*\.self_attn\.kv_b_proj",
        "engines split it into two bf16 matrices when they load it (MLA): fewer bits save nothing and cost quality",
    ),
)
_FORGET_GATES = (
    (
        r".*\.linear_attn\.in_proj_(ba|a|b)",
        "two numbers a head set how fast the state forgets: under a thousandth of the weights, and too few rows for a tile",
    ),
)


@dataclass(frozen=True)
class Family:
    """patterns: (regex of the whole tensor name, role), first match wins. fused: engine module → members it merges.

    packed_experts: suffix of a 3-D expert parameter [E, members*N, K] → the 2-D linears it holds, in row order.
    keep: (regex of the whole module name, why that linear stays in high precision unless a rule names it).
    row_parallel, replicated: regexes of the whole module name of linears whose K tensor parallelism cuts, and of those
    that every GPU holds whole; it cuts the N of the others. As vLLM 0.25.1 has them.
    """

    name: str
    patterns: Patterns
    fused: dict[str, tuple[str, ...]] = field(default_factory=lambda: dict(_FUSED))
    packed_experts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    keep: Patterns = ()
    row_parallel: str = r".*\.(o_proj|down_proj|w2)"
    replicated: str = ""

    def role(self, tensor: str) -> str | None:
        """The role of a tensor, or None when this family does not know it."""
        return next((role for pattern, role in self.patterns if _compiled(pattern).fullmatch(tensor)), None)

    def kept(self, module: str) -> str | None:
        """Why the linear stays in high precision by default, or None."""
        return next((reason for pattern, reason in self.keep if _compiled(pattern).fullmatch(module)), None)

    def cut(self, module: str) -> str | None:
        """Which features of the linear tensor parallelism shares out, `in` (K) or `out` (N), or None: it cuts neither."""
        if _compiled(self.replicated).fullmatch(module):
            return None
        return "in" if _compiled(self.row_parallel).fullmatch(module) else "out"

    def expert_members(self, tensor: str) -> tuple[str, ...]:
        """The linears inside a 3-D expert parameter; empty for every other tensor."""
        return self.packed_experts.get(tensor.rpartition(".experts.")[2], ()) if ".experts." in tensor else ()


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


_ATTENTION = _BASE + _SPLIT_ATTENTION
_NORM_BIAS = ((r"model\.norm\.bias", NORM), _norms("input_layernorm|post_attention_layernorm", "bias"))
_LLAMA = Family("llama", _ATTENTION + _DENSE_MLP)
_MOE = Family("qwen-moe", _ATTENTION + _QWEN_MOE + _DENSE_MLP, packed_experts=_PACKED)
_SHARED_MOE = Family(
    "shared-moe", _ATTENTION + _EXPERTS + _SHARED_EXPERTS + _DENSE_MLP + _MTP_LAYER, packed_experts=_PACKED
)
_MIXTRAL = Family("mixtral", _ATTENTION + _SPARSE_BLOCK + _NORM_BIAS, fused=_QKV | {"w13": ("w1", "w3")})
_PHI = Family(
    "phi3",
    (
        *_BASE,
        (_LAYER + r"self_attn\.(qkv|o)_proj\.weight", LINEAR),
        (_LAYER + r"mlp\.(gate_up|down)_proj\.weight", LINEAR),
    ),
    fused={},
)
_GLM = Family(
    "glm",
    (
        *_ATTENTION,
        (_LAYER + r"mlp\.(gate_up|down)_proj\.weight", LINEAR),
        _norms("post_self_attn_layernorm|post_mlp_layernorm"),
    ),
    fused=_QKV,
)
_STARCODER = Family(
    "starcoder2",
    (
        *_ATTENTION,
        *_NORM_BIAS,
        (_LAYER + r"mlp\.c_(fc|proj)\.weight", LINEAR),
        (_LAYER + r"mlp\.c_(fc|proj)\.bias", BIAS),
    ),
    fused=_QKV,
    row_parallel=r".*\.(o_proj|c_proj)",
)
_HUNYUAN = Family(
    "hunyuan",
    (
        *_ATTENTION,
        *_DENSE_MLP,
        *_EXPERTS,
        _norms(r"self_attn\.(query|key)_layernorm"),
        (_LAYER + r"mlp\.shared_mlp\.(gate|up|down)_proj\.weight", LINEAR),
        (_LAYER + r"mlp\.gate\.wg\.weight", ROUTER),
    ),
    packed_experts=_PACKED,
)
_DEEPSEEK = Family(
    "deepseek",
    _BASE + _MLA + _EXPERTS + _SHARED_EXPERTS + _DENSE_MLP + _MTP_LAYER,
    fused={"gate_up_proj": _FUSED["gate_up_proj"], "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa")},
    packed_experts=_PACKED,
    keep=_ABSORBED,
    replicated=r".*\.self_attn\.(q_a_proj|kv_a_proj_with_mqa)",
)
_QWEN_NEXT = Family(
    "qwen-next",
    _ATTENTION + _QWEN_MOE + _DENSE_MLP + _DELTA_NET + _MTP_HEAD,
    fused=_FUSED | {"in_proj_qkvz": ("in_proj_qkv", "in_proj_z"), "in_proj_ba": ("in_proj_b", "in_proj_a")},
    packed_experts=_PACKED,
    keep=_FORGET_GATES,
    row_parallel=r".*\.(o_proj|out_proj|down_proj)",
)

# model_type of config.json → family
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral": _LLAMA,
    "ministral3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "granite": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "olmo3": _LLAMA,
    "smollm3": _LLAMA,
    "arcee": _LLAMA,
    "cohere": _LLAMA,
    "cohere2": _LLAMA,
    "ernie4_5": _LLAMA,
    "exaone4": _LLAMA,
    "seed_oss": _LLAMA,
    "hunyuan_v1_dense": _HUNYUAN,
    "starcoder2": _STARCODER,
    "phi3": _PHI,
    "glm": _GLM,
    "glm4": _GLM,
    "qwen2_moe": _MOE,
    "qwen3_moe": _MOE,
    "olmoe": _MOE,
    "flex_olmo": _MOE,
    "mixtral": _MIXTRAL,
    "phimoe": _MIXTRAL,
    "minimax_m2": _MIXTRAL,
    "hunyuan_v1_moe": _HUNYUAN,
    "glm4_moe": _SHARED_MOE,
    "dots1": _SHARED_MOE,
    "ernie4_5_moe": _SHARED_MOE,
    "exaone_moe": _SHARED_MOE,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe_lite": _DEEPSEEK,
    "qwen3_next": _QWEN_NEXT,
    "qwen3_5_text": _QWEN_NEXT,
    "qwen3_5_moe_text": _QWEN_NEXT,
}
# model_type → why quantpub refuses it: the architecture is known, and that it does not fit
REFUSED: dict[str, str] = {
    "gpt_oss": "its experts are [E, K, 2N] with gate and up interleaved and with biases, and no engine was found that loads "
    "them quantized in another format than the MXFP4 they are released in",
    "llama4": "its experts are stored as [E, K, 2N], turned against every other family; engines' names for them, "
    "quantized, were not established",
    "granitemoe": "its experts are 3-D parameters that engines split by themselves; their names for them, quantized, were "
    "not established",
}
# For architectures that are not known by name, of checkpoints that other tools quantized: what is quantized is a linear, the
# rest is told by its ending. Nothing is quantized anew by it, and engines merge the same linears in almost every decoder
GENERIC = Family(
    "generic",
    (
        (r".*\.(embed_tokens|wte|word_embeddings|embed_positions|position_embedding|patch_embed.*)\.weight", EMBEDDING),
        (r"(.*\.)?(lm_head|output_layer)\.weight", HEAD),
        (r".*norm\w*(\.\d+)?\.(weight|bias)", NORM),
        (r".*\.(gate|router|shared_expert_gate|wg)\.weight", ROUTER),
        (r".*bias", BIAS),
        (r".*\.weight", LINEAR),
        (r".*", BUFFER),
    ),
    fused=_FUSED | {"w13": ("w1", "w3"), "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa")},
    row_parallel=r".*\.(o_proj|out_proj|down_proj|w2|c_proj|dense_4h_to_h)",
)
