"""Faults planted in copies of sound checkpoints, one a function, and helpers that plant them.

A plant says which checkpoint is damaged, how, with which base beside it, and the one rule of `verify` that must see it.
`demo-<recipe>` is an artifact of the bundled model without its records, so that it is judged as a stranger's.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import DEMO_MODEL, make_artifact
from safetensors import safe_open
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent / "golden" / "checkpoints"
SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]
Edit = Callable[[Path], object]


@dataclass(frozen=True)
class Plant:
    """of: the checkpoint. source: whether its base stands beside it; base: what is done to a copy of that base first.

    rule: the one that must fail, None: the checkpoint is sound all the same.
    """

    of: str
    edit: Edit
    rule: str | None
    source: bool = True
    base: Edit | None = None
    tp: int | None = None


def weights(change: Callable[[Tensors], object]) -> Edit:
    """An edit of the tensors; the header's entries stay."""

    def edit(folder: Path) -> None:
        with safe_open(folder / SHARD, "pt") as held:
            metadata = held.metadata()
        tensors = load_file(folder / SHARD)
        change(tensors)
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / SHARD, metadata=metadata)

    return edit


def config(change: Callable[[dict[str, Any]], object], name: str = "config.json") -> Edit:
    def edit(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return edit


def quantization(change: Callable[[dict[str, Any]], object]) -> Edit:
    return config(lambda c: change(c["quantization_config"]))


def several(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in edits]


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return weights(lambda t: t.update({name: change(t[name])}))


def dropped(part: str) -> Edit:
    """Every tensor with `part` in its name."""
    return weights(lambda t: [t.pop(name) for name in list(t) if part in name])


def renamed(old: str, new: str) -> Edit:
    return weights(lambda t: [t.update({n.replace(old, new): t.pop(n)}) for n in list(t) if old in n])


def first_to(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """One element set."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.float().flatten()
        flat[0] = value
        return flat.view(tensor.shape).to(tensor.dtype)

    return change


class Stable:
    """Sound checkpoints by name, made once a session where they are not committed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, name: str) -> Path:
        if not name.startswith("demo-"):
            return GOLDEN / name
        made = self._folder / name
        if not made.exists():
            make_artifact(DEMO_MODEL, name.removeprefix("demo-"), made)
            shutil.rmtree(made / ".quantpub")
        return made

    def base(self, name: str) -> Path:
        return DEMO_MODEL if name.startswith("demo-") else GOLDEN / f"base-{name.rpartition('-')[2]}"


# ---- what is planted


LAYER, DEEP = "model.layers.0.", "model.layers.1."
DOWN, GATE, V, EXPERT = (
    f"{LAYER}mlp.down_proj",
    f"{LAYER}mlp.gate_proj",
    f"{LAYER}self_attn.v_proj",
    f"{LAYER}mlp.experts.0.gate_proj",
)
INT4, INT4_MOE, DEMO = "llmcompressor-w4a16-dense", "llmcompressor-w4a16-moe", "demo-w4a16-rtn"
NORM = f"{LAYER}input_layernorm.weight"
NVFP4, NVFP4_MOE, MODELOPT = "llmcompressor-nvfp4a16-dense", "llmcompressor-nvfp4a16-moe", "modelopt-nvfp4-dense"
FP8, STATIC, GPTQ = "llmcompressor-fp8-dynamic-dense", "llmcompressor-fp8-static-dense", "gptqmodel-gptq-dense"
EXPERTS = 4


def nothing(folder: Path) -> None:
    pass


def _base(name: str) -> Tensors:
    return load_file(GOLDEN / name / SHARD)


def _experts_of(t: Tensors) -> Tensors:
    for name in [name for name in t if ".experts." in name]:
        del t[name]
    return {name: w for name, w in _base("base-moe").items() if ".experts." in name}


def fuse_experts(t: Tensors) -> None:
    """The experts as transformers holds them: [E, 2N, K] and [E, N, K], in bf16."""
    base = _experts_of(t)
    w = {m: [base[f"{LAYER}mlp.experts.{i}.{m}_proj.weight"] for i in range(EXPERTS)] for m in ("gate", "up", "down")}
    t[f"{LAYER}mlp.experts.gate_up_proj"] = torch.cat([torch.stack(w["gate"]), torch.stack(w["up"])], 1)
    t[f"{LAYER}mlp.experts.down_proj"] = torch.stack(w["down"])


def to_fp8(t: Tensors) -> None:
    w = _base("base-dense")[f"{DOWN}.weight"].float()
    for name in [name for name in t if name.startswith(DOWN)]:
        del t[name]
    t[f"{DOWN}.weight_scale"] = w.abs().amax() / 448
    t[f"{DOWN}.weight"] = (w / t[f"{DOWN}.weight_scale"]).to(torch.float8_e4m3fn)


def own_global(suffix: str, factor: float) -> Edit:
    """v_proj with a global scale of its own, and the same weights: half of each FP8 scale is exact here."""

    def change(t: Tensors) -> None:
        t[f"{V}.{suffix}"] = t[f"{V}.{suffix}"] * factor
        t[f"{V}.weight_scale"] = (t[f"{V}.weight_scale"].float() / 2).to(torch.float8_e4m3fn)

    return weights(change)


def halved(scale: torch.Tensor) -> torch.Tensor:
    return scale[:, : scale.shape[1] // 2]


def meaningless(scale: torch.Tensor) -> torch.Tensor:
    """The same scales, over other groups."""
    return scale.view(torch.uint8).flatten(1).roll(1, 0).view(scale.dtype).view(scale.shape)


def swapped_nibbles(words: torch.Tensor) -> torch.Tensor:
    half = words.view(torch.uint8)
    return ((half >> 4) | (half << 4)).view(words.dtype)


def written_twice(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    save_file(tensors, folder / "model-00002-of-00002.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, SHARD)}))


def stray_shard(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    save_file({"model.extra.weight": torch.ones(2)}, folder / "model-00002-of-00002.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, SHARD)}))


def cut_short(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-10])


def another_layer(t: Tensors) -> None:
    """As a layer that predicts further tokens stands behind the others."""
    t |= {name.replace("layers.0", "layers.1"): w.clone() for name, w in t.items() if "layers.0" in name}


def moved(to: str, rows: int) -> Callable[[Tensors], object]:
    """The first rows of the quantized o_proj in place of another weight."""

    def change(t: Tensors) -> None:
        del t[f"{to}.weight"]
        for suffix in ("weight_packed", "weight_scale"):
            t[f"{to}.{suffix}"] = t[f"{LAYER}self_attn.o_proj.{suffix}"][:rows].clone()
        t[f"{to}.weight_shape"] = torch.tensor([rows, 128])

    return change


def unknown_architecture(c: dict[str, Any]) -> None:
    c["model_type"] = "unknown_vl"


def weight_arguments(q: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = q["config_groups"]["group_0"]["weights"]
    return found


def inputs(q: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = q["config_groups"]["group_0"]["input_activations"]
    return found


def packed_down(t: Tensors) -> None:
    """One linear as int4 words where the config says FP8."""
    for name in [name for name in t if name.startswith(DOWN)]:
        del t[name]
    t |= {name: w for name, w in _base(INT4).items() if name.startswith(DOWN)}


def nested(folder: Path) -> None:
    """The same model as the language model of one that reads images too, in the older spelling of names."""
    weights(lambda t: t.update({f"language_model.{name}": t.pop(name) for name in list(t)}))(folder)
    kept = ("quantization_config", "architectures", "dtype")

    def nest(c: dict[str, Any]) -> None:
        c["text_config"] = {key: c.pop(key) for key in list(c) if key not in kept}
        c["model_type"] = "llava"

    config(nest)(folder)


within_another = several(nested, quantization(lambda q: q.update(ignore=["language_model.lm_head"])))
AUTOFP8 = {
    "quant_method": "fp8",
    "activation_scheme": "static",
    "kv_cache_scheme": "static",
    "ignored_layers": ["lm_head"],
}


def autofp8(folder: Path) -> None:
    config(lambda c: c.update(quantization_config=AUTOFP8))(folder)
    weights(lambda t: t.update({f"{LAYER}self_attn.kv_scale": torch.tensor(0.02)}))(folder)


def in_order(suffix: str, of: str) -> Edit:
    """Groups by index, which lie side by side."""
    names = (of, suffix)

    def change(t: Tensors) -> None:
        for shape in [name for name in t if name.endswith(".weight_shape")]:
            t[shape.replace(*names)] = (torch.arange(int(t[shape][1])) // 128).int()

    return weights(change)


def one_scale(t: Tensors) -> None:
    """As AutoFP8 stores the scales of a cache: one for keys and values."""
    for name in [name for name in t if name.endswith((".k_scale", ".v_scale"))]:
        t[f"{name.rpartition('.')[0]}.kv_scale"] = t.pop(name)


def each(ending: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return weights(lambda t: t.update({name: change(w) for name, w in t.items() if name.endswith(ending)}))


def gptq_config(**values: Any) -> Edit:
    """In both files that say it."""
    return several(quantization(lambda q: q.update(values)), config(lambda q: q.update(values), "quantize_config.json"))


def headless(folder: Path) -> None:
    save_file(load_file(folder / SHARD), folder / SHARD, metadata={"format": "pt"})


def unquantize(t: Tensors, part: str, base: str = "base-moe") -> None:
    for name in [name for name in t if name.startswith(part)]:
        del t[name]
    t |= {name: w for name, w in _base(base).items() if name.startswith(part)}


def louder(norm: torch.Tensor) -> torch.Tensor:
    """One channel of it by a third."""
    return torch.cat([norm[:1] * 4 / 3, norm[1:]])


def refold(t: Tensors) -> None:
    """The codes of the plain checkpoint, whose norms have no factors in them."""
    plain = load_file(GOLDEN / "autoround-awq-dense" / SHARD)
    t |= {name: plain[name] for name in t if ".mlp." in name or ".self_attn." in name}


def exchange_experts(t: Tensors) -> None:
    for name in [name for name in t if ".experts.0." in name]:
        other = name.replace(".experts.0.", ".experts.1.")
        t[name], t[other] = t[other], t[name]


CACHE = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
NAN, ZERO = first_to(math.nan), first_to(0.0)

# row of quantpub/failures.py → what shows it
ROWS: dict[int, dict[str, Plant]] = {
    4: {
        "experts in one bf16 parameter": Plant(INT4_MOE, weights(fuse_experts), "bits"),
        "without the source": Plant(INT4_MOE, weights(fuse_experts), "bits", source=False),
    },
    5: {
        "a scale that is not a number": Plant(INT4_MOE, changed(f"{EXPERT}.weight_scale", NAN), "scales"),
        "scales of zero": Plant(INT4_MOE, changed(f"{EXPERT}.weight_scale", torch.zeros_like), "scales"),
        "one FP8 scale of zero": Plant(NVFP4_MOE, changed(f"{EXPERT}.weight_scale", ZERO), "scales", source=False),
    },
    6: {
        "a divisor of its own": Plant(NVFP4, own_global("weight_global_scale", 0.5), "merged"),
        "a multiplier of its own": Plant(MODELOPT, own_global("weight_scale_2", 2), "merged", source=False),
    },
    7: {
        "FP8 in compressed-tensors' NVFP4": Plant(NVFP4, weights(to_fp8), "bits"),
        "FP8 in ModelOpt's NVFP4": Plant("modelopt-nvfp4-weight-dense", weights(to_fp8), "bits", source=False),
    },
    8: {
        "half of the scales": Plant(NVFP4, changed(f"{DOWN}.weight_scale", halved), "tensors"),
        "scales of other groups": Plant(NVFP4, changed(f"{DOWN}.weight_scale", meaningless), "values"),
    },
    9: {
        "every tensor in a second shard": Plant(INT4, written_twice, "index"),
        "a shard that the index does not name": Plant(INT4, stray_shard, "index"),
    },
    11: {
        "experts under another name": Plant(INT4_MOE, renamed(".experts.", ".expert."), "complete"),
        "without the source": Plant(INT4_MOE, renamed(".experts.", ".expert."), "complete", source=False),
    },
    12: {
        "a scale missing": Plant(INT4, dropped("down_proj.weight_scale"), "tensors"),
        "a scale renamed": Plant(GPTQ, renamed("down_proj.scales", "down_proj.scale"), "tensors"),
        "codes renamed": Plant(INT4, renamed("down_proj.weight_packed", "down_proj.packed"), "tensors"),
        "a scale of activations missing": Plant(STATIC, dropped("down_proj.input_scale"), "tensors"),
        "a scale of activations missing from ModelOpt's": Plant(MODELOPT, dropped("down_proj.input_scale"), "tensors"),
    },
    13: {
        "the head dropped": Plant(INT4, dropped("lm_head"), "complete"),
        "the head tied to another embedding": Plant(
            INT4, config(lambda c: c.update(tie_word_embeddings=True)), "complete", source=False
        ),
        "a further layer dropped": Plant(INT4, nothing, "coverage", base=weights(another_layer)),
        "a vision tower dropped": Plant(
            INT4,
            config(unknown_architecture),
            "coverage",
            base=several(
                config(unknown_architecture),
                weights(lambda t: t.update({"visual.blocks.0.attn.qkv.weight": torch.ones(4, 4)})),
            ),
        ),
        "the embedding touched": Plant(INT4, changed("model.embed_tokens.weight", ZERO), "copies"),
    },
    14: {"two groups on four GPUs": Plant(INT4, nothing, "tensor-parallel", tp=4)},
    16: {
        "a pattern without an end": Plant(INT4, quantization(lambda q: q["ignore"].append("re:.*v_proj")), "names"),
        "a router's pattern that reaches experts": Plant(
            INT4_MOE, quantization(lambda q: q["ignore"].append("re:.*mlp.*gate")), "names"
        ),
        "the end of a name, which SGLang takes for the name": Plant(
            INT4, quantization(lambda q: q["ignore"].append("o_proj")), "names"
        ),
    },
    17: {"declared, and no scales": Plant(INT4, quantization(lambda q: q.update(kv_cache_scheme=CACHE)), "kv-cache")},
    24: {"a key of a newer library": Plant(INT4, quantization(lambda q: weight_arguments(q).update(zap=1)), "parses")},
    25: {
        "a pickle beside the weights": Plant(
            INT4, lambda folder: (folder / "extra.bin").write_bytes(b""), "safe-files"
        ),
        "code beside the weights": Plant(INT4, lambda folder: (folder / "modeling_x.py").write_text(""), "safe-files"),
        "a class of its own": Plant(INT4, config(lambda c: c.update(auto_map={"AutoModel": "x.Model"})), "remote-code"),
    },
    26: {
        "no experts": Plant(INT4_MOE, dropped(".experts."), "complete"),
        "no experts, without the source": Plant(INT4_MOE, dropped(".experts."), "complete", source=False),
        "one expert missing": Plant(INT4_MOE, dropped(".experts.2."), "complete", source=False),
        "one linear of one expert missing": Plant(INT4_MOE, dropped("experts.2.up_proj"), "complete", source=False),
    },
    27: {
        "torchao's own": Plant("torchao-int8-moe", nothing, "bits"),
        "without the source": Plant("torchao-int8-moe", nothing, "bits", source=False),
        "bf16 experts in compressed-tensors": Plant(INT4_MOE, weights(lambda t: t.update(_experts_of(t))), "bits"),
    },
}

# Faults of no row: what else would pass in silence
FURTHER: dict[str, Plant] = {
    "weight_shape turned": Plant(INT4, changed(f"{GATE}.weight_shape", lambda s: s.flip(0)), "values", source=False),
    "columns out of order": Plant(GPTQ, changed(f"{DOWN}.g_idx", lambda g: g.flip(0)), "values", source=False),
    "block scales turned": Plant(
        "llmcompressor-fp8-block-dense", changed(f"{GATE}.weight_scale", lambda s: s.t()), "tensors"
    ),
    "codes turned, of a square": Plant(
        FP8,
        changed(f"{LAYER}self_attn.o_proj.weight", lambda w: w.view(torch.uint8).t().contiguous().view(w.dtype)),
        "values",
    ),
    "nibbles swapped": Plant(INT4, changed(f"{DOWN}.weight_packed", swapped_nibbles), "values"),
    "nibbles in the natural order": Plant("autoawq-w4-dense", changed(f"{DOWN}.qweight", swapped_nibbles), "values"),
    "v1 zeros called v2": Plant(GPTQ, gptq_config(checkpoint_format="gptq_v2"), "values", source=False),
    "v1 zeros that matter called v2": Plant(
        "gptqmodel-gptq-asym-dense", gptq_config(checkpoint_format="gptq_v2"), "values"
    ),
    "two configs that differ": Plant(GPTQ, config(lambda q: q.update(group_size=64), "quantize_config.json"), "parses"),
    "another group size": Plant(INT4, quantization(lambda q: weight_arguments(q).update(group_size=64)), "tensors"),
    "other bits": Plant(INT4, quantization(lambda q: weight_arguments(q).update(num_bits=8)), "tensors"),
    "zeros that are not declared": Plant(
        "llmcompressor-w4a16-asym-dense", quantization(lambda q: weight_arguments(q).update(symmetric=True)), "tensors"
    ),
    "modules that no group names": Plant(
        INT4, quantization(lambda q: q["config_groups"]["group_0"].update(targets=["re:.*self_attn.*"])), "bits"
    ),
    "biases promised": Plant(INT4, config(lambda c: c.update(attention_bias=True)), "complete", source=False),
    "biases of the MLP promised": Plant(INT4, config(lambda c: c.update(mlp_bias=True)), "complete", source=False),
    "an architecture with biases": Plant(
        INT4, config(lambda c: c.update(model_type="qwen2")), "complete", source=False
    ),
    "a bias in three of four layers": Plant(
        DEMO,
        weights(lambda t: t.update({f"model.layers.{i}.self_attn.q_proj.bias": torch.zeros(128) for i in range(3)})),
        "complete",
        source=False,
    ),
    "another base of the rotations": Plant(
        INT4, config(lambda c: (c.pop("rope_theta"), c["rope_parameters"].update(rope_theta=5e5))), "config"
    ),
    "another number of experts a token": Plant(INT4_MOE, config(lambda c: c.update(num_experts_per_tok=1)), "config"),
    "a head tied that the source has apart": Plant(
        INT4, config(lambda c: c.update(tie_word_embeddings=True)), "config"
    ),
    "a token beyond the vocabulary": Plant(INT4, config(lambda c: c.update(eos_token_id=32)), "config", source=False),
    "norms of every layer lost": Plant(INT4, dropped("input_layernorm"), "complete", source=False),
    "the last norm lost": Plant(INT4, dropped("model.norm"), "complete", source=False),
    "norms lost within another model": Plant(
        INT4, several(within_another, dropped("post_attention_layernorm")), "complete", source=False
    ),
    "a cache without scales within another model": Plant(
        INT4,
        several(within_another, quantization(lambda q: q.update(kv_cache_scheme=CACHE))),
        "kv-cache",
        source=False,
    ),
    "static activations of int8, and no scales": Plant(
        "llmcompressor-int8-dense",
        quantization(lambda q: inputs(q).update(strategy="tensor", dynamic=False)),
        "tensors",
    ),
    "the codes of another format": Plant(FP8, weights(packed_down), "tensors"),
    "nothing quantized at all": Plant(FP8, weights(lambda t: (t.clear(), t.update(_base("base-dense")))), "tensors"),
    "a head that transformers takes for quantized": Plant(INT4, quantization(lambda q: q.update(ignore=[])), "names"),
    "another hidden size": Plant(INT4, config(lambda c: c.update(hidden_size=256)), "complete", source=False),
    "another vocabulary": Plant(INT4, config(lambda c: c.update(vocab_size=64)), "complete", source=False),
    "another intermediate size": Plant(
        INT4, config(lambda c: c.update(intermediate_size=512)), "complete", source=False
    ),
    "other key and value heads": Plant(
        INT4, config(lambda c: c.update(num_key_value_heads=1)), "complete", source=False
    ),
    "more experts than stated": Plant(INT4_MOE, config(lambda c: c.update(num_experts=2)), "complete", source=False),
    "fewer experts than stated": Plant(INT4_MOE, config(lambda c: c.update(num_experts=8)), "complete", source=False),
    "more layers than stated": Plant(DEMO, config(lambda c: c.update(num_hidden_layers=2)), "complete", source=False),
    "fewer layers than stated": Plant(DEMO, config(lambda c: c.update(num_hidden_layers=9)), "complete", source=False),
    "a linear of one layer missing": Plant(DEMO, dropped("layers.2.mlp.down_proj."), "complete", source=False),
    "a linear of every layer missing": Plant(INT4, dropped("down_proj."), "complete", source=False),
    "no embedding": Plant(INT4, dropped("embed_tokens"), "complete"),
    "no head, and nothing said of it": Plant(
        INT4, several(config(lambda c: c.pop("tie_word_embeddings")), dropped("lm_head")), "complete"
    ),
    "a norm that is not a number": Plant(INT4, changed("model.norm.weight", NAN), "copies", source=False),
    "a weight that is not a number": Plant(FP8, changed(f"{DOWN}.weight", NAN), "values", source=False),
    "an E8M0 scale that is not a number": Plant(
        "demo-mxfp4",
        changed(f"{DEEP}mlp.down_proj.weight_scale", lambda s: s.index_fill(0, torch.tensor(0), 255)),
        "scales",
    ),
    "scales of activations never calibrated": Plant(STATIC, each("input_scale", torch.ones_like), "scales"),
    "a multiplier of activations for a divisor": Plant(
        "llmcompressor-nvfp4-dense", each("input_global_scale", torch.reciprocal), "scales"
    ),
    "a divisor of activations for a multiplier": Plant(MODELOPT, each("input_scale", torch.reciprocal), "scales"),
    "a multiplier for a divisor": Plant(NVFP4, each("weight_global_scale", torch.reciprocal), "scales", source=False),
    "a divisor for a multiplier": Plant(MODELOPT, each("weight_scale_2", torch.reciprocal), "scales", source=False),
    "a router quantized": Plant(INT4_MOE, weights(moved(f"{LAYER}mlp.gate", EXPERTS)), "names", source=False),
    "an embedding quantized": Plant(INT4, weights(moved("model.embed_tokens", 32)), "names", source=False),
    "ModelOpt's two files that differ": Plant(
        MODELOPT, config(lambda c: c["quantization"].update(quant_algo="FP8"), "hf_quant_config.json"), "parses"
    ),
    "a header without its entries": Plant("torchao-intx4-dense", headless, "tensors"),
    "a bf16 weight beside its codes": Plant(
        INT4, weights(lambda t: t.update({f"{DOWN}.weight": _base("base-dense")[f"{DOWN}.weight"]})), "tensors"
    ),
    "one expert left in bf16": Plant(INT4_MOE, weights(lambda t: unquantize(t, f"{LAYER}mlp.experts.2.")), "bits"),
    "one linear left in bf16": Plant(INT4, weights(lambda t: unquantize(t, V, "base-dense")), "names"),
    "a norm changed as if a factor had been folded": Plant(INT4, changed(NORM, louder), "copies"),
    "a norm changed beside factors that were folded": Plant("gptqmodel-awq-dense", changed(NORM, louder), "copies"),
    "factors folded into the norms alone": Plant("gptqmodel-awq-dense", weights(refold), "copies"),
    "a negative FP8 scale": Plant(NVFP4, changed(f"{DOWN}.weight_scale", first_to(-1.0)), "scales", source=False),
    "a cast that float16 does not hold": Plant(
        INT4,
        changed("model.embed_tokens.weight", lambda w: first_to(1e5)(w).half()),
        "copies",
        base=changed("model.embed_tokens.weight", first_to(1e5)),
    ),
    "experts exchanged": Plant(INT4_MOE, weights(exchange_experts), "values"),
    "a shard cut short": Plant(INT4, cut_short, "index"),
    "a local path": Plant(INT4, config(lambda c: c.update(_name_or_path="/home/me/model")), "private"),
}

# What looks odd and is right
SOUND: dict[str, Plant] = {
    "buffers that are computed anew": Plant(
        INT4, nothing, None, base=weights(lambda t: t.update({f"{LAYER}self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    ),
    "a head that the architecture ties": Plant(
        INT4,
        several(config(lambda c: (c.pop("tie_word_embeddings"), c.update(model_type="gemma"))), dropped("lm_head")),
        None,
        base=config(lambda c: (c.pop("tie_word_embeddings"), c.update(model_type="gemma"))),
    ),
    "a tied head that was written all the same": Plant(
        INT4,
        several(
            config(lambda c: c.update(tie_word_embeddings=True)),
            weights(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})),
        ),
        None,
        base=several(config(lambda c: c.update(tie_word_embeddings=True)), dropped("lm_head")),
    ),
    "3-D experts that the config leaves out": Plant(
        INT4_MOE,
        several(weights(fuse_experts), quantization(lambda q: q["ignore"].append("re:.*mlp\\.experts.*"))),
        None,
    ),
    "a row of zeros under a scale of zero": Plant(
        FP8,
        weights(lambda t: (t[f"{DOWN}.weight"][0].zero_(), t[f"{DOWN}.weight_scale"][0].zero_())),
        None,
        base=weights(lambda t: t[f"{DOWN}.weight"][0].zero_()),
    ),
    "rotations as an older transformers spells them": Plant(INT4, config(lambda c: c.pop("rope_parameters")), None),
    "rotations as a newer one does": Plant(INT4, config(lambda c: c.pop("rope_theta")), None),
    "an order of columns that is their own": Plant(INT4, in_order("weight_g_idx", "weight_shape"), None),
    "GPTQ's word for an order, and none": Plant(GPTQ, gptq_config(desc_act=True), None),
    "one scale of keys and values": Plant(
        "llmcompressor-fp8-dynamic-kv-dense",
        several(weights(one_scale), quantization(lambda q: q.update(kv_cache_scheme=CACHE))),
        None,
    ),
    "a cache in the words of AutoFP8": Plant(STATIC, autofp8, None),
    "a language model within another": Plant(INT4, within_another, None, base=nested),
    "one scale a row in a list": Plant(FP8, each("weight_scale", lambda s: s.flatten()), None),
}
