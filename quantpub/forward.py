"""An artifact as a float32 transformers model: what its bytes compute, whatever a loader of others makes of them.

Legend: M tokens, N out_features, K in_features.

Weights are decoded from the artifact (layout.unpack, then dequantize) and handed to `from_pretrained` as a state dict
under their checkpoint names, so that transformers' own conversion places them, fused experts included. Where the scheme
quantizes activations, the input of every quantized weight is rounded as the serving kernel rounds it, under the weight's own
calibrated scale where it has one; which parameters those are is found by sending a mask of small numbers, one for every way
of rounding, through the same conversion. Keys and values are rounded where the checkpoint has scales of an FP8 KV cache.
Rounding is in `activations.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from quantpub.activations import Rounding, rounding_of
from quantpub.cached import RoundedCache
from quantpub.decode import Decoder
from quantpub.errors import InputError
from quantpub.qtensor import dequantize
from quantpub.scheme import ActFormat

NOT, PARTLY = -1, -2  # beside places of ways of rounding
EXACT_BF16 = 256  # whole numbers up to here
Read = Callable[[], torch.Tensor]


class Deferred:
    """A tensor that is read when indexed: the loader indexes each with `...`, as it does a safetensors slice."""

    def __init__(self, read: Read) -> None:
        self._read = read

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self._read()


class RoundedActivations(TorchFunctionMode):
    """Within this context `linear` rounds its input wherever its weight is one of `weights`.

    weights: (address, elements) → parameter name and rounding. reached: the parameters that were multiplied with.
    """

    def __init__(self, weights: dict[tuple[int, int], tuple[str, Rounding]]) -> None:
        super().__init__()
        self.weights = weights
        self.reached: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear and len(args) >= 2:
            x, weight, *rest = args
            if found := self.weights.get((weight.data_ptr(), weight.numel())):
                name, rounding = found
                self.reached.add(name)
                args = (rounding(x), weight, *rest)
        return func(*args, **(kwargs or {}))


class ArtifactModel:
    """model: the float32 transformers model. forward: token ids → logits, with activations as the scheme has them.

    acts: the format of activations of each treatment, None where it has none or was not used.
    """

    def __init__(self, decoder: Decoder, device: str = "cpu") -> None:
        """Errors: InputError when a tensor is missing or the model has no place for one."""
        decoder.require_whole()
        self.acts = _acts(decoder)
        self._ways, places = _ways(decoder)
        self._masks = _quantized_slices(decoder, places) if self._ways else {}
        self.model = _load(_config(decoder), _weights(decoder), torch.float32, decoder.artifact.path).to(device)
        self._rounded = RoundedActivations(self._weights()) if self._masks else None
        self.kv_scales = decoder.kv_scales()
        self._cache = RoundedCache(self.model, self.kv_scales) if self.kv_scales else None

    def _weights(self) -> dict[tuple[int, int], tuple[str, Rounding]]:
        """Each 2-D weight whose whole input is rounded in one way that is known here."""
        parameters, weights = dict(self.model.named_parameters()), {}
        for name, marks in self._masks.items():
            for part, mark in zip(_slices(parameters[name]), marks, strict=True):
                if mark >= 0 and (rounding := self._ways[mark].rounding()):
                    weights[part.data_ptr(), part.numel()] = (name, rounding)
        return weights

    def forward(self, x_BT: torch.Tensor) -> torch.Tensor:
        with self._rounded or contextlib.nullcontext(), self._cache or contextlib.nullcontext():
            logits: torch.Tensor = self.model(x_BT, use_cache=False).logits
        return logits

    def not_emulated(self) -> list[str]:
        """Quantized parameters whose input was not rounded so far, all of it or in part, though the scheme says so.

        Attentions too, whose keys and values were not.
        """
        reached = self._rounded.reached if self._rounded else set()
        left = {name for name, marks in self._masks.items() if name not in reached or PARTLY in marks}
        return sorted(left | (self.kv_scales.keys() - (self._cache.reached if self._cache else set())))


def load_baseline(folder: Path, device: str = "cpu") -> Any:
    """The full-precision model in float32. Errors: InputError when its tensors and its config do not fit."""
    return _load(_auto("AutoConfig", folder), folder, torch.float32, folder).to(device)


def load_tokenizer(folder: Path) -> Any:
    """Errors: InputError when transformers finds none there."""
    return _auto("AutoTokenizer", folder)


def _auto(kind: str, folder: Path) -> Any:
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(str(folder))
    except Exception as error:  # of every kind: what transformers makes of files that it does not understand
        raise _refused(error, folder) from error


def _refused(error: Exception, where: Path) -> InputError:
    what = f"transformers does not load it ({' '.join(str(error).split()):.160})"
    return InputError(
        what, where=str(where), next="check its configuration and tokenizer files, or upgrade transformers"
    )


def _load(config: Any, weights: Path | dict[str, Any], dtype: torch.dtype, where: Path) -> Any:
    """`from_pretrained` of a folder or a state dict, refusing what it would only warn of.

    Experts are computed one by one ("eager"): each is then a `linear` of its own, whose input can be rounded.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    named, state = (None, weights) if isinstance(weights, dict) else (str(weights), None)
    options = {"dtype": dtype, "experts_implementation": "eager", "output_loading_info": True}
    try:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model, found = model_class.from_pretrained(named, config=config, state_dict=state, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _refused(error, where) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, found.get(kind) or ())):
            raise InputError(
                f"{kind.replace('_keys', '')} in the model that its config describes: {names[0]} ({len(names)} in all)",
                where=str(where),
                next="take a checkpoint that its config fits",
            )
    return model.eval()


def _config(decoder: Decoder) -> Any:
    """The artifact's config as that of a plain model: the weights arrive decoded."""
    config = _auto("AutoConfig", decoder.artifact.path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _weights(decoder: Decoder) -> dict[str, Any]:
    def weight(module: str) -> Read:
        return lambda: dequantize(decoder.qtensor(module))

    def copied(name: str) -> Read:
        return lambda: decoder.tensor(name)

    state = {f"{module}.weight": Deferred(weight(module)) for module, _ in decoder.modules()}
    return state | {name: Deferred(copied(name)) for name in decoder.copied()}


def _acts(decoder: Decoder) -> list[ActFormat | None]:
    """Of each treatment how it rounds activations, None where it does not or where no module had it."""
    used = {decoder.place(module) for module, _ in decoder.modules()}
    return [t.scheme.act if place in used else None for place, t in enumerate(decoder.treatments)]


@dataclass(frozen=True)
class Way:
    """How the input of a weight is rounded. scale: the calibrated one, as a number."""

    act: ActFormat
    scale: float | None

    def rounding(self) -> Rounding | None:
        return rounding_of(self.act, None if self.scale is None else torch.tensor(self.scale, dtype=torch.float32))


def _ways(decoder: Decoder) -> tuple[list[Way], dict[str, int]]:
    """Every way of rounding in the artifact, and module → place of its own among them; not there: none."""
    ways: dict[Way, int] = {}
    places = {}
    for module, _ in decoder.modules():
        act = decoder.treated(module).scheme.act
        if act is None:
            continue
        scale = decoder.input_scale(module) if act.calibrated else None
        way = Way(act, None if scale is None else float(scale))
        places[module] = ways.setdefault(way, len(ways))
    return list(ways), places


def _quantized_slices(decoder: Decoder, places: dict[str, int]) -> dict[str, list[int]]:
    """Model parameter → the way of each of its 2-D slices, for every parameter whose input is rounded somewhere.

    A slice is PARTLY rounded where a fused weight has members that are rounded in several ways, or not at all: its one
    input cannot be rounded for each.
    """
    dtype = torch.bfloat16 if len(set(places.values())) < EXACT_BF16 else torch.float32

    def mark(value: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor(value, dtype=dtype).expand(shape)

    state = {f"{module}.weight": mark(places.get(module, NOT) + 1, shape) for module, shape in decoder.modules()}
    state |= {name: mark(0, decoder.shape(name)) for name in decoder.copied()}
    parameters = _load(_config(decoder), state, dtype, decoder.artifact.path).named_parameters()
    found = {name: [_mark(mask) for mask in _slices(parameter)] for name, parameter in parameters}
    return {name: marks for name, marks in found.items() if set(marks) - {NOT}}


def _mark(mask: torch.Tensor) -> int:
    """The place of the one way of a whole slice, NOT, or PARTLY."""
    low, high = int(mask.amin()), int(mask.amax())
    return high - 1 if low == high else PARTLY


def _slices(parameter: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(parameter.detach()) if parameter.dim() == 3 else (parameter.detach(),)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Errors are ours to report: no warnings and no progress bars of transformers meanwhile, nor of what it imports."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    others = {logger: logger.level for logger in map(getLogger, ("torchao", "torch.utils._pytree"))}
    for logger in others:
        logger.setLevel(ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        for logger, before in others.items():
            logger.setLevel(before)
        if bars:
            logging.enable_progress_bar()
