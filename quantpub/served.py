"""What a serving engine runs for one token of a model, from config.json alone: shapes, counts and bytes; no weights.

Linears are merged as engines merge them: q/k/v into one, gate/up into one. y[M, N] = x[M, K] · W[N, K]ᵀ.
Known are decoders of one kind of layer with grouped-query attention; others are an error rather than a guess.
Sources: transformers' configuration classes, vLLM 0.25.1 model_executor/models/{llama,qwen2,qwen3,qwen3_moe,mixtral}.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantpub.errors import InputError, closest

BF16_BYTES = 2
LARGEST, MOST = 1 << 20, 4096  # of a size, and of layers and experts: far beyond any model
EXPERTS = ("num_experts", "num_local_experts")  # transformers 5 writes the second for both families
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """qk_norm: q and k are normed a head. expert_width: config.json's name of an expert's width, "" for a dense model."""

    qk_norm: bool = False
    expert_width: str = ""


KINDS = {
    "llama": Kind(),
    "mistral": Kind(),
    "qwen2": Kind(),
    "qwen3": Kind(qk_norm=True),
    "qwen3_moe": Kind(True, "moe_intermediate_size"),
    "mixtral": Kind(False, "intermediate_size"),
}


@dataclass(frozen=True)
class Linear:
    """One merged shape. count: how many of them a token goes through in a forward pass, top-k a layer for experts.

    experts: how many a layer holds, 0 outside of MoE. layers: how many layers have it.
    """

    name: str
    n: int
    k: int
    count: int
    layers: int
    experts: int = 0

    @property
    def weights(self) -> int:
        """Elements that are stored for it in the whole model."""
        return self.n * self.k * self.layers * max(1, self.experts)


@dataclass(frozen=True)
class Served:
    """linears: all but the head. window: tokens that attention looks back at most, None: all. top_k: experts a token."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    qk_norm: bool
    linears: tuple[Linear, ...]
    head: Linear
    window: int | None = None
    experts: int = 0
    top_k: int = 0

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that one token leaves in the cache, bf16."""
        return 2 * self.layers * self.kv_heads * self.head_dim * BF16_BYTES

    @property
    def linear_weights(self) -> int:
        return sum(linear.weights for linear in self.linears)

    @property
    def other_weights(self) -> int:
        """Elements of embedding, head, norms and routers: what recipes leave in bf16."""
        norms = (2 * self.layers + 1) * self.hidden + (2 * self.layers * self.head_dim if self.qk_norm else 0)
        return (1 if self.tied else 2) * self.vocab * self.hidden + norms + self.layers * self.experts * self.hidden

    def bytes(self, bits: float = 16) -> float:
        """Memory of the weights when a linear's weight takes `bits`, scales included, and the rest is bf16."""
        return self.linear_weights * bits / 8 + self.other_weights * BF16_BYTES


def served(config: Config, where: str = "config.json") -> Served:
    """where: the file, for errors.

    Errors: InputError for an architecture that is not known, or a config that lacks what it needs or holds nonsense.
    """
    name = str(config.get("model_type", ""))[:60]
    if name not in KINDS:
        raise InputError(
            f"model_type {name!r} cannot be predicted: its layers are not known here",
            where=where, next=closest(name, KINDS),
        )  # fmt: skip
    kind, need = KINDS[name], _Need(config, where)
    hidden, heads = need("hidden_size"), need("num_attention_heads")
    kv_heads, head_dim = need("num_key_value_heads", default=heads), need.head_dim(hidden, heads)
    layers, vocab = need("num_hidden_layers", most=MOST), need("vocab_size")
    experts = need(*EXPERTS, most=MOST) if kind.expert_width else 0
    top_k = need("num_experts_per_tok", most=MOST) if experts else 0
    qkv = Linear("self_attn.qkv_proj", (heads + 2 * kv_heads) * head_dim, hidden, layers, layers)
    out = Linear("self_attn.o_proj", hidden, heads * head_dim, layers, layers)
    return Served(
        layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        intermediate=need(kind.expert_width) if experts else need("intermediate_size"),
        vocab=vocab, tied=need.flag("tie_word_embeddings", False), qk_norm=kind.qk_norm,
        linears=(qkv, out, *_mlp(kind, need, layers)), head=Linear("lm_head", vocab, hidden, 1, 1),
        window=_window(need), experts=experts, top_k=top_k,
    )  # fmt: skip


@dataclass(frozen=True)
class _Need:
    config: Config
    where: str

    def __call__(self, *keys: str, default: int | None = None, most: int = LARGEST) -> int:
        """The first of `keys` that is there, from 1 to `most`. None, which transformers writes, is as if it was not."""
        key = next((key for key in keys if self.config.get(key) is not None), keys[0])
        value = self.config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or -most < value < 1:
            raise self._wrong(f"{key} is {value!r:.40}")
        if not 1 <= value <= most:
            raise self._wrong(f"{key} is not from 1 to {most}")
        return value

    def head_dim(self, hidden: int, heads: int) -> int:
        if self.config.get("head_dim") is None and hidden < heads:
            raise self._wrong(f"hidden_size {hidden} is less than num_attention_heads {heads}")
        return self("head_dim", default=hidden // heads)

    def flag(self, key: str, default: bool) -> bool:
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(f"{key} is neither true nor false")
        return default if value is None else value

    def dense(self, layers: int) -> set[int]:
        """Layers of a model with experts that have none. A layer named beyond the last says nothing, as in engines."""
        named, step = self.config.get("mlp_only_layers"), self("decoder_sparse_step", default=1)
        if named is not None and not (isinstance(named, list | tuple) and all(map(_is_count, named))):
            raise self._wrong("mlp_only_layers is no list of layers")
        found = set(range(layers)) & {*(named or ()), *(layer for layer in range(layers) if (layer + 1) % step)}
        if len(found) == layers:
            raise self._wrong("by mlp_only_layers and decoder_sparse_step no layer has experts")
        return found

    def _wrong(self, what: str) -> InputError:
        return InputError(what, where=self.where, next="copy config.json from the source model")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _mlp(kind: Kind, need: _Need, layers: int) -> tuple[Linear, ...]:
    """Dense, or experts in every layer but those that config.json names as dense."""
    hidden = need("hidden_size")
    if not kind.expert_width:
        return _pair("mlp", need("intermediate_size"), hidden, layers, layers)
    dense = need.dense(layers)
    sparse, experts, top_k = layers - len(dense), need(*EXPERTS, most=MOST), need("num_experts_per_tok", most=MOST)
    found = _pair("mlp.experts", need(kind.expert_width), hidden, sparse, sparse * min(top_k, experts), experts)
    return found + (_pair("mlp", need("intermediate_size"), hidden, len(dense), len(dense)) if dense else ())


def _pair(name: str, width: int, hidden: int, layers: int, count: int, experts: int = 0) -> tuple[Linear, ...]:
    up = Linear(f"{name}.gate_up_proj", 2 * width, hidden, count, layers, experts)
    return up, Linear(f"{name}.down_proj", hidden, width, count, layers, experts)


def _window(need: _Need) -> int | None:
    """Qwen's configs carry a window that `use_sliding_window` turns off; Mistral's is on when it is there."""
    on = need.flag("use_sliding_window", need.config["model_type"] in ("mistral", "mixtral"))
    if need.config.get("sliding_window") is None:
        return None
    window = need("sliding_window")
    return window if on else None
