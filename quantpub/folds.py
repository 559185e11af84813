"""Where channels may be scaled without changing what a model computes, family by family. Data and names, no torch.

A fold has one tensor that is divided by s and the linears that read what it makes, whose columns are multiplied by s:

    norm   y = f(x)·g                     g/s, and the bias of a LayerNorm; norms that store weight − 1: (1 + w)/s − 1
    up     h = act(gate(x)) · up(x)       rows of up_proj, and its bias: act may be anything, up reaches h as it is
    value  o = softmax(q·k) · v           rows of v_proj: attention mixes tokens, not channels. The query heads of a group
                                          share one value head, and with it one s; gates on o (Qwen3-Next) change nothing

What each family has (transformers' modeling files, which engines follow):

    norm before each block, up, value     llama mistral ministral ministral3 qwen2 qwen3 granite smollm3 ernie4_5 seed_oss phi3
                                          glm glm4 hunyuan_* mixtral minimax_m2 qwen2_moe qwen3_moe olmoe glm4_moe dots1
                                          ernie4_5_moe exaone_moe; with weight − 1: gemma; with biases: phimoe
    pre_feedforward_layernorm for the MLP gemma2 gemma3_text, weight − 1; what they call post_attention is after the block
    one norm for attention and MLP        cohere cohere2
    norms, value; no up: the MLP has no gate   arcee, starcoder2 (LayerNorm with biases)
    up, value; norms come after the block olmo2 olmo3 exaone4 flex_olmo
    up, value; norms have no weight       olmo
    latent attention                      deepseek_v2 deepseek_v3 glm4_moe_lite: also q_a_layernorm → q_b_proj; values are
                                          rows of kv_b_proj, head by head after the rows of the keys
    gated delta net                       qwen3_next qwen3_5_text qwen3_5_moe_text, weight − 1: also linear_attn.norm →
                                          out_proj, one s for the same channel of every head; that norm stores its weight

A model that clips q, k and v (`clip_qkv` of olmo and olmoe) has no value fold. Experts fold one by one; all of them, the
router and the shared experts read the same norm.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

NORM, UP, VALUE = "norm", "up", "value"
Shape = tuple[int, ...]

_LAYER = re.compile(r"(model\.layers\.\d+\.)(.+)")
_INTO_ATTENTION = (
    r"self_attn\.([qkv]_proj|qkv_proj|q_a_proj|kv_a_proj_with_mqa)|linear_attn\.in_proj_(qkvz|ba|qkv|z|a|b)"
)
_INTO_MLP = (
    r"mlp\.((experts\.\d+|shared_experts?|shared_mlp)\.)?(gate|up)_proj|mlp\.gate_up_proj|mlp\.c_fc|"
    r"mlp\.gate(\.wg)?|mlp\.shared_expert_gate|block_sparse_moe\.(gate|experts\.\d+\.w[13])"
)
_INNER = {"self_attn.q_a_layernorm": r"self_attn\.q_b_proj", "linear_attn.norm": r"linear_attn\.out_proj"}
_USUAL = {"input_layernorm": _INTO_ATTENTION, "post_attention_layernorm": _INTO_MLP} | _INNER
_GEMMA = {"input_layernorm": _INTO_ATTENTION, "pre_feedforward_layernorm": _INTO_MLP}
_PARALLEL = {"input_layernorm": rf"{_INTO_ATTENTION}|{_INTO_MLP}"}
# model_type → norm → pattern of the linears of its layer that read it, where not the usual
_NORMS: dict[str, dict[str, str]] = {
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "cohere": _PARALLEL,
    "cohere2": _PARALLEL,
    **{name: {} for name in ("olmo", "olmo2", "olmo3", "exaone4", "flex_olmo")},
}
_LESS_ONE = ("gemma", "gemma2", "gemma3_text", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
_NOT_LESS_ONE = "linear_attn.norm"
_UNGATED = ("arcee", "starcoder2")
_DOWN = {"up_proj": "down_proj", "gate_up_proj": "down_proj", "w3": "w2"}
_VALUES = ("v_proj", "qkv_proj", "kv_b_proj")


@dataclass(frozen=True)
class Fold:
    """source: the module that is divided. readers: the linears whose columns are multiplied. size: how many s there are.

    Entry f belongs to row `first + f // block * step + f % block` of the source, and to the columns k of every reader with
    `k // head // group * head + k % head == f`: the heads of a group share entries. less_one: it is stored less one.
    """

    kind: str
    source: str
    readers: tuple[str, ...]
    size: int
    first: int = 0
    block: int = 1
    step: int = 1
    head: int = 1
    group: int = 1
    less_one: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        """Every tensor that it changes; the source's bias where there is one."""
        return (f"{self.source}.weight", f"{self.source}.bias", *(f"{reader}.weight" for reader in self.readers))

    def rows(self) -> list[int]:
        """Entry → row of the source."""
        return [self.first + f // self.block * self.step + f % self.block for f in range(self.size)]

    def columns(self) -> list[int]:
        """Column of a reader → entry."""
        return [k // self.head // self.group * self.head + k % self.head for k in range(self.size * self.group)]


def folds(model_type: str, config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> tuple[Fold, ...]:
    """The folds of a checkpoint, layer by layer. shapes: of every tensor, experts one by one."""
    layers: dict[str, dict[str, Shape]] = {}
    for tensor, shape in shapes.items():
        if tensor.endswith(".weight") and (found := _LAYER.fullmatch(tensor.removesuffix(".weight"))):
            layers.setdefault(found[1], {})[found[2]] = shape
    made = (fold for at in sorted(layers, key=_number) for fold in _layer(model_type, config, at, layers[at]))
    return tuple(fold for fold in made if _fits(fold, shapes))


def useful(found: Collection[Fold], rounded: Collection[str], cached: bool) -> tuple[Fold, ...]:
    """The folds with a reader among `rounded`, the linears whose inputs are rounded.

    cached: values are stored rounded, under scales that were found for them as they are: they keep their channels.
    """
    kept = (fold for fold in found if not (cached and fold.kind == VALUE))
    return tuple(fold for fold in kept if any(reader in rounded for reader in fold.readers))


def _number(layer: str) -> int:
    return int(layer.split(".")[2])


def _layer(model_type: str, config: Mapping[str, Any], at: str, modules: Mapping[str, Shape]) -> Iterator[Fold]:
    for leaf, readers in _NORMS.get(model_type, _USUAL).items():
        yield from _norm(model_type, at, leaf, readers, modules)
    if config.get("clip_qkv") is None:
        yield from _values(config, at, modules)
    if model_type not in _UNGATED:
        yield from _ups(at, modules)


def _norm(model_type: str, at: str, leaf: str, readers: str, modules: Mapping[str, Shape]) -> Iterator[Fold]:
    reading = [module for module in modules if re.fullmatch(readers, module)]
    if leaf not in modules or not reading:
        return
    size = modules[leaf][0]
    shared = modules[reading[0]][1] // size  # heads that one norm is repeated over
    less_one = model_type in _LESS_ONE and leaf != _NOT_LESS_ONE
    names = tuple(at + module for module in reading)
    yield Fold(NORM, at + leaf, names, size, head=size, group=max(1, shared), less_one=less_one)


def _ups(at: str, modules: Mapping[str, Shape]) -> Iterator[Fold]:
    for module, shape in modules.items():
        prefix, _, leaf = module.rpartition(".")
        down = f"{prefix}.{_DOWN.get(leaf)}"
        if down in modules:
            size = modules[down][1]
            yield Fold(UP, at + module, (f"{at}{down}",), size, first=shape[0] - size)


def _values(config: Mapping[str, Any], at: str, modules: Mapping[str, Shape]) -> Iterator[Fold]:
    leaf = next((leaf for leaf in _VALUES if f"self_attn.{leaf}" in modules), None)
    heads = config.get("num_attention_heads")
    if leaf is None or "self_attn.o_proj" not in modules or not isinstance(heads, int) or heads < 1:
        return
    n, k = modules[f"self_attn.{leaf}"][0], modules["self_attn.o_proj"][1]
    head = k // heads
    if leaf == "kv_b_proj":
        step = n // heads
        where = (k, step - head, head, step, head, 1)
    else:
        size = n if leaf == "v_proj" else (n - k) // 2
        where = (size, n - size, 1, 1, head, k // size if size > 0 else 1)
    yield Fold(VALUE, f"{at}self_attn.{leaf}", (f"{at}self_attn.o_proj",), *where)


def _fits(fold: Fold, shapes: Mapping[str, Shape]) -> bool:
    """Whether the shapes are those of the architecture: what is not is left alone."""
    rows, whole = shapes[f"{fold.source}.weight"][0], fold.size > 0 and fold.head > 0 and fold.size % fold.head == 0
    columns = {shapes[f"{reader}.weight"][-1] for reader in fold.readers}
    inside = whole and fold.first >= 0 and fold.first + (fold.size - 1) // fold.block * fold.step < rows
    return inside and columns == {fold.size * fold.group}
