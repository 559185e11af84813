"""The model without its weights: transformers' own modules on the meta device, of which one decoder layer at a time is real.

Legend: B rows of a batch, T tokens, H hidden features.

What a layer is called with (masks, rotary positions) is found by running the model's own forward with its layers replaced
by catchers: no architecture is described here a second time. Weights come from the checkpoint's files tensor by tensor.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from quantpub.checkpoint import Checkpoint, Slice, read_slice
from quantpub.errors import InputError
from quantpub.families import FAMILIES, Family
from quantpub.observe.names import Place, layers_of, places

CACHED = {"cpu": 64 << 20, "cuda": 4 << 30}  # bytes of masks and rotary positions kept for further batches
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
EMBEDDING = "model.embed_tokens.weight"
NEXT = "quantize it with a recipe that needs no calibration, or upgrade transformers"
Arguments = list[tuple[tuple[Any, ...], dict[str, Any]]]  # of every layer


class Catcher(torch.nn.Module):
    """Stands in for a layer: keeps what it is called with, and passes hidden states on."""

    def __init__(self, layer: torch.nn.Module, caught: Arguments) -> None:
        super().__init__()
        object.__setattr__(self, "stands_for", layer)
        object.__setattr__(self, "caught", caught)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "stands_for"), name)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.caught.append((args, kwargs))
        return hidden


class Skeleton:
    """layers: how many decoder layers. dtype: what it computes in. Use `embed`, then for each layer `load` and `run`."""

    def __init__(self, checkpoint: Checkpoint, folder: Path, device: str = "cpu") -> None:
        """folder: holds config.json. Errors: InputError when transformers does not build the model so."""
        self.checkpoint, self.device = checkpoint, device
        self.family: Family = FAMILIES[checkpoint.config["model_type"]]
        self._parts = layers_of(checkpoint, self.family)
        self.dtype = self._dtype()
        self._base = _build(folder, self.dtype)
        self._layers: list[torch.nn.Module] = list(self._base.layers)
        self.layers, self.hidden_size = len(self._layers), int(self._base.config.hidden_size)
        self._caught: Arguments = []
        self._base.layers = torch.nn.ModuleList([Catcher(layer, self._caught) for layer in self._layers])
        self._base.norm = torch.nn.Identity()
        self._cache: OrderedDict[tuple[int, ...], Arguments] = OrderedDict()
        _restore_buffers(self._base, self._layers, device)

    def _dtype(self) -> torch.dtype:
        """The dtype of the first layer's matrices; float32 where a CPU would have to compute in float16."""
        names = {part.info.dtype for part in self._parts.get(0, {}).values() if len(part.info.shape) == 2}
        found = DTYPES.get(min(names, default="F32"), torch.float32)
        return torch.float32 if found == torch.float16 and self.device == "cpu" else found

    def embed(self, rows: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """rows: token ids [B, T] each. What enters layer 0 for each, [B, T, H]; the embedding is in memory meanwhile."""
        embedding = self._base.get_input_embeddings()
        part = next(
            part
            for shard in self.checkpoint.shards
            for part in self.checkpoint.slices(shard, self.family)
            if part.name == EMBEDDING
        )
        _set(embedding, "weight", read_slice(self.checkpoint.source, part).to(self.device, self.dtype))
        for ids_BT in rows:  # through the model's own forward: Granite multiplies embeddings there, for one
            inputs_embeds = embedding(ids_BT.to(self.device))
            hidden_BTH = self._base(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state
            self._caught.clear()
            yield hidden_BTH
        _set(embedding, "weight", torch.empty_like(embedding.weight, device="meta"))

    def parts(self, layer: int) -> dict[str, tuple[Slice, Place]]:
        """name within the layer → where it lies in the checkpoint and in the module. Errors: InputError for a gap."""
        module, parts = self._layers[layer], self._parts.get(layer, {})
        shapes = {name: tuple(value.shape) for name, value in _tensors(module).items()}
        found = places(parts, shapes, self.family)
        if missing := set(shapes) - {place.parameter for place in found.values()}:
            raise InputError(
                f"transformers has a parameter {sorted(missing)[0]} in layer {layer} that the checkpoint does not name",
                where=self.checkpoint.source.label,
                next=NEXT,
            )
        return {name: (parts[name], place) for name, place in found.items()}

    def load(self, layer: int) -> None:
        """Give the layer its weights. Errors: InputError."""
        module, tensors = self._layers[layer], _tensors(self._layers[layer])
        for name, (part, place) in self.parts(layer).items():
            value = read_slice(self.checkpoint.source, part)
            old = tensors[place.parameter]
            dtype = torch.float32 if old.dtype == torch.float32 and self.dtype != torch.float32 else self.dtype
            if place.expert is None:
                _require_shape(name, value, old)
                tensors[place.parameter] = value.to(self.device, dtype)
                continue
            if old.device.type == "meta":
                tensors[place.parameter] = old = torch.zeros(old.shape, dtype=dtype, device=self.device)
            _require_room(name, value, old, place)
            old[place.expert, place.rows(part)] = value.to(self.device, dtype)
        for name, value in tensors.items():
            _set_nested(module, name, value)
        module.eval()

    def module(self, layer: int) -> torch.nn.Module:
        return self._layers[layer]

    def unload(self, layer: int) -> None:
        for name, value in _tensors(self._layers[layer]).items():
            _set_nested(self._layers[layer], name, torch.empty_like(value, device="meta"))

    def run(self, layer: int, hidden_BTH: torch.Tensor) -> torch.Tensor:
        """What a loaded layer makes of hidden states."""
        args, kwargs = self._arguments(hidden_BTH)[layer]
        out = self._layers[layer](hidden_BTH, *args, **kwargs)
        found: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return found

    def _arguments(self, hidden_BTH: torch.Tensor) -> Arguments:
        shape = tuple(hidden_BTH.shape[:2])
        if shape not in self._cache:
            self._caught.clear()
            self._base(inputs_embeds=hidden_BTH, use_cache=False)
            self._cache[shape] = list(self._caught)
            while len(self._cache) > 1 and sum(map(_nbytes, self._cache.values())) > CACHED[self.device]:
                self._cache.popitem(last=False)
        self._cache.move_to_end(shape)
        return self._cache[shape]


def _build(folder: Path, dtype: torch.dtype) -> Any:
    """transformers' base model on the meta device. Experts are computed one by one, each a `linear` of its own."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder))
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        with torch.device("meta"):
            model = model_class._from_config(config, dtype=dtype, experts_implementation="eager")
    except Exception as error:  # of every kind: what transformers makes of a config that it does not understand
        what = f"transformers does not build it ({' '.join(str(error).split()):.160})"
        raise InputError(what, where=str(folder), next=NEXT) from None
    return model.get_decoder() if hasattr(model, "get_decoder") else model.model


def _restore_buffers(base: Any, layers: list[torch.nn.Module], device: str) -> None:
    """Buffers that no file holds (rotary frequencies, scales of embeddings), as transformers itself computes them."""
    for module in (module for root in (base, *layers) for module in root.modules()):
        lost = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        for name in lost:
            old = module._buffers[name]
            assert old is not None
            module._buffers[name] = torch.zeros(old.shape, dtype=old.dtype, device=device)
        if lost:
            base._init_weights(module)


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers: what a checkpoint holds of a layer."""
    return {name: value.detach() for name, value in module.state_dict(keep_vars=True).items()}


def _require_shape(name: str, value: torch.Tensor, old: torch.Tensor) -> None:
    if value.shape != old.shape:
        what = f"its shape {list(value.shape)} is not the {list(old.shape)} that its config describes"
        raise InputError(what, where=name, next="take a checkpoint that its config fits")


def _require_room(name: str, value: torch.Tensor, stacked: torch.Tensor, place: Place) -> None:
    """stacked: experts, [E, rows, K]."""
    experts, rows, k = stacked.shape
    members = rows // max(1, value.shape[0])
    fits = value.shape[1] == k and value.shape[0] * members == rows and place.start + value.shape[0] <= rows
    if place.expert is None or place.expert >= experts or not fits:
        what = f"its shape {list(value.shape)} has no place in the {list(stacked.shape)} that its config describes"
        raise InputError(what, where=name, next="take a checkpoint that its config fits")


def _set_nested(module: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    *path, leaf = name.split(".")
    for part in path:
        module = getattr(module, part)
    _set(module, leaf, value)


def _set(module: torch.nn.Module, leaf: str, value: torch.Tensor) -> None:
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        module._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)


def _nbytes(arguments: Arguments) -> int:
    """Tensors are counted once: layers share them."""
    seen = {}
    for args, kwargs in arguments:
        for value in (*args, *kwargs.values()):
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, torch.Tensor):
                    seen[tensor.data_ptr()] = tensor.nbytes
    return sum(seen.values())
