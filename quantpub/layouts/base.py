"""What a layout is, and the compressed-tensors configuration that several of them share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantpub.qtensor import QTensor
from quantpub.scheme import WHOLE, Scheme

Spec = dict[str, tuple[str, tuple[int, ...]]]  # suffix → (safetensors dtype, shape)
Tensors = dict[str, torch.Tensor]  # suffix → tensor

CT = "compressed-tensors"
Config = dict[str, Any]
Modules = Mapping[str, tuple[Scheme, tuple[int, int]]]  # module → its scheme and (n, k)


def no_metadata(modules: Modules, copied: Sequence[str]) -> dict[str, str]:
    return {}


def no_files(config: Config) -> dict[str, Config]:
    return {}


def whole(scheme: Scheme) -> None:
    return None


def itself(q: QTensor) -> QTensor:
    return q


def clear(tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> None:
    return None


def as_stored(words: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    return words


def turned(words: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    return words.T


@dataclass(frozen=True)
class KvCache:
    """How a layout says that keys and values are kept in FP8, with one multiplier of each for an attention.

    name(attention, letter) → the tensor of k or v, float32 of `shape`. declare(quantization_config) → the same, with it.
    """

    name: Callable[[str, str], str]
    shape: tuple[int, ...]
    declare: Callable[[Config], Config]


@dataclass(frozen=True)
class InputScale:
    """Where a layout keeps the calibrated scale of activations: read(the tensor of this suffix) → multiplier, float32 ()."""

    suffix: str
    read: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Cut:
    """How a weight's tensors are cut into blocks of rows, each packed and unpacked by itself.

    rows: a block has a multiple of so many. parts: suffix → (the axis that N runs along, rows an element there); what is not
    named is the same in every block.
    """

    rows: int
    parts: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class RowWords:
    """Where a layout keeps int4 codes, and how that stands to words along the rows: int32 [N, K/8], column c of a word in bits
    4c … 4c+3 as code + 8. Two layouts that both know this can hand codes over without taking words apart.

    take(the tensor of `suffix`, (n, k)) → words; give(words, (n, k)) → the tensor. Either may be a view.
    """

    suffix: str
    take: Callable[[torch.Tensor, tuple[int, int]], torch.Tensor]
    give: Callable[[torch.Tensor, tuple[int, int]], torch.Tensor]


Ambiguous = Callable[[Mapping[str, torch.Tensor], Scheme, tuple[int, int]], str | None]


@dataclass(frozen=True)
class Layout:
    """name; kind: `checkpoint` (an engine loads it), `kernel` (a kernel eats it) or `peer` (another tool's: read, never
    written). method: `quant_method` of the config.

    reject(scheme, n, k, dtype) → why this weight cannot be written so, or None: reject or exact, never neither. dtype: the
    weight's own in the source, in safetensors' words.
    spec(scheme, n, k, dtype) → what `pack` makes of a weight of that dtype, known before any weight is read.
    pack(q) → tensors by suffix; unpack(tensors, scheme, (n, k)) → the same QTensor, bit for bit.
    config(scheme, ignore) → `quantization_config` of config.json.
    tp_multiple(scheme) → (n, k): a tensor-parallel shard's sides must be multiples of these. None: it cannot be cut.
    group(scheme) → one entry of `config_groups`, where a checkpoint may mix this layout with others of its method.
    metadata(quantized modules, other tensors) → entries of every shard's safetensors header.
    files(quantization_config) → other JSON files that this layout wants beside config.json.
    input_scale: of schemes with calibrated activations. kv_cache: None where the layout has no place for its scales.
    nearest(q) → the nearest weight that `pack` is exact for. Itself for what quantpub makes: other tools choose numbers that
    a layout may not be able to write to the last bit.
    ambiguous(tensors, scheme, (n, k)) → why tensors of another tool's do not say what the weight is, or None: of what `unpack`
    does not read, and of codes that have no one meaning.
    cut(scheme) → how a weight may be worked on by blocks of rows; None: as a whole only. words: of int4 codes.
    """

    name: str
    kind: str
    method: str
    reject: Callable[[Scheme, int, int, str], str | None]
    spec: Callable[[Scheme, int, int, str], Spec]
    pack: Callable[[QTensor], Tensors]
    unpack: Callable[[Mapping[str, torch.Tensor], Scheme, tuple[int, int]], QTensor]
    config: Callable[[Scheme, Sequence[str]], Config]
    tp_multiple: Callable[[Scheme], tuple[int, int] | None]
    group: Callable[[Scheme], Config] | None = None
    metadata: Callable[[Modules, Sequence[str]], dict[str, str]] = no_metadata
    files: Callable[[Config], dict[str, Config]] = no_files
    input_scale: InputScale | None = None
    kv_cache: KvCache | None = None
    nearest: Callable[[QTensor], QTensor] = itself
    ambiguous: Ambiguous = clear
    cut: Callable[[Scheme], Cut | None] = whole
    words: RowWords | None = None


def peer(
    name: str,
    method: str,
    reject: Callable[[Scheme, int, int, str], str | None],
    spec: Callable[[Scheme, int, int, str], Spec],
    pack: Callable[[QTensor], Tensors],
    unpack: Callable[[Mapping[str, torch.Tensor], Scheme, tuple[int, int]], QTensor],
    ambiguous: Ambiguous = clear,
) -> Layout:
    """A layout in which other tools keep weights: it is read and never written, so that it has no configuration."""

    def config(scheme: Scheme, ignore: Sequence[str]) -> Config:
        raise AssertionError(f"{name} is what other tools write: it is read only, so nothing declares it")

    def tp_multiple(scheme: Scheme) -> None:
        return None

    return Layout(name, "peer", method, reject, spec, pack, unpack, config, tp_multiple, ambiguous=ambiguous)


def reject_integers(
    holder: str,
    scheme: Scheme,
    dtype: str,
    kinds: Collection[tuple[str, str]],
    dtypes: Sequence[str] = (),
    groups: Sequence[int] = (),
) -> str | None:
    """What holders of integer weights with 16-bit activations refuse alike. kinds: the numbers and zero domains held.

    dtypes: of scales, which are those of the weight; groups: sizes. Empty: any.
    """
    weight, nums = scheme.weight, sorted({num for num, _ in kinds})
    if weight.num not in nums or weight.block[0] != 1 or scheme.act is not None:
        return f"{holder} holds {' and '.join(nums)} weights with 16-bit activations, not {scheme.name}"
    if (weight.num, weight.zero_domain) not in kinds:
        odd = {"none": "none", "int": "integer ones", "float": "float ones"}[weight.zero_domain]
        held = " or ".join(sorted(zero for num, zero in kinds if num == weight.num))
        return f"{holder} stores zeros of {weight.num} as {held}, {scheme.name} has {odd}"
    if weight.scale_dtype != "model" or weight.global_scale:
        return (
            f"{holder} holds one scale a group in the weight's dtype, not {weight.scale_dtype} as {scheme.name} wants"
        )
    if dtypes and dtype not in dtypes:
        return f"{holder} is {' or '.join(dtypes).lower()} only, not {dtype} as the weight of {scheme.name}"
    if groups and scheme.group_size not in groups:
        return f"{holder} has groups of {groups}, not {scheme.group_size} as {scheme.name} wants"
    return None


def reject_rest(k: int, group: int) -> str | None:
    if group != WHOLE and k % group:
        return f"in_features {k} is not a multiple of the group size {group}"
    return None


def ct_arguments(
    num_bits: int,
    kind: str,
    strategy: str,
    dynamic: bool | str,
    group_size: int = WHOLE,
    symmetric: bool = True,
    block: tuple[int, int] | None = None,
    scale_dtype: str | None = None,
) -> Config:
    """QuantizationArgs with the keys that compressed-tensors 0.17 parses; one more would refuse the checkpoint."""
    arguments: Config = {"num_bits": num_bits, "type": kind, "symmetric": symmetric, "strategy": strategy}
    if group_size != WHOLE:
        arguments["group_size"] = group_size
    if block is not None:
        arguments["block_structure"] = list(block)
    if scale_dtype is not None:
        arguments["scale_dtype"] = scale_dtype
    return arguments | {"dynamic": dynamic}


def ct_group(form: str, weights: Config, inputs: Config | None) -> Config:
    """One entry of `config_groups`, for every Linear."""
    return {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": form,
    }


def _ct_kv_name(attention: str, letter: str) -> str:
    return f"{attention}.{letter}_scale"


def _ct_kv_cache(config: Config) -> Config:
    """Engines keep the cache in FP8 by default when they find this, and take 1.0 for a scale that is missing."""
    return config | {"kv_cache_scheme": ct_arguments(8, "float", "tensor", False)}


CT_KV_CACHE = KvCache(_ct_kv_name, (1,), _ct_kv_cache)


def ct_config(groups: Sequence[Config], ignore: Sequence[str]) -> Config:
    """`ignore` names each unquantized Linear in full: SGLang refuses one that nothing names."""
    forms = {group["format"] for group in groups}
    return {
        "quant_method": CT,
        "format": forms.pop() if len(forms) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
