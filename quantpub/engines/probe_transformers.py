"""Loads a checkpoint in transformers, generates, and writes the log-probabilities of every position; see `probing.py`.

    python -m quantpub.engines.probe_transformers < request.json > reply.json    (in the interpreter that has transformers)

On the GPU where there is one, unless the request names a device. What `from_pretrained` reports as missing was initialized
at random: it only warns of that. Read in transformers 5.17 and 5.23.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from quantpub.engines.probing import Heard, Request, serve

SCALES = ("scale", "packed", "qweight")
TOLD = {"missing": ("missing_keys", "mismatched_keys"), "unexpected": ("unexpected_keys",)}


def kernels(model: Any) -> dict[str, str]:
    """Quantized module → its class, and what its weight is stored as: a format's name, or the weight's own class."""
    found = {}
    for name, module in model.named_modules():
        own = {leaf for leaf, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))}
        weight, scheme = type(getattr(module, "weight", None)).__name__, getattr(module, "quantization_scheme", None)
        stored = any(word in leaf for leaf in own for word in SCALES)
        if weight not in ("Parameter", "Tensor", "NoneType"):
            found[name] = f"{type(module).__name__} of {weight}"
        elif scheme is not None:
            found[name] = f"{type(module).__name__} of {_format(scheme)}"
        elif stored:
            found[name] = type(module).__name__
    return found


def _format(scheme: Any) -> str:
    """Of compressed-tensors' scheme, whose format is an enumeration or none."""
    given = getattr(scheme, "format", None)
    return str(getattr(given, "value", given) or "compressed-tensors")


def quantizer(model: Any) -> str | None:
    """Its class. A model that was dequantized as it was loaded has none left, so then the method, if transformers knows it."""
    found = getattr(model, "hf_quantizer", None)
    if found is not None:
        return type(found).__name__
    stated, _ = import_module("transformers").PretrainedConfig.get_config_dict(model.config.name_or_path)
    given = stated.get("quantization_config") or {}
    if not given.get("quant_method"):
        return None
    known = import_module("transformers.quantizers.auto").AutoHfQuantizer.supports_quant_method(given)
    return f"{given['quant_method']}, dequantized" if known else None


class Transformers:
    def __init__(self, model: Any, info: dict[str, Any], tokenizer: Any) -> None:
        self._model, self._info, self._tokenizer = model.eval(), info, tokenizer

    def facts(self) -> dict[str, Any]:
        told = {
            name: sorted({_name(key) for kind in kinds for key in self._info.get(kind) or ()})
            for name, kinds in TOLD.items()
        }
        dtype = str(self._model.dtype).removeprefix("torch.")
        return {"kernels": kernels(self._model), "quantizer": quantizer(self._model), "dtype": dtype, **told}

    def _ids(self, ids: list[int]) -> Any:
        import torch

        return torch.tensor([ids], device=self._model.device)

    def generate(self, ids: list[int], count: int) -> tuple[list[int], str | None]:
        x_BT = self._ids(ids)
        mask = x_BT.new_ones(x_BT.shape)
        answer = self._model.generate(x_BT, attention_mask=mask, max_new_tokens=count, do_sample=False)
        tokens = [int(token) for token in answer[0, len(ids) :]]
        return tokens, None if self._tokenizer is None else str(self._tokenizer.decode(tokens))

    def score(self, ids: list[int]) -> dict[str, Any]:
        import torch

        with torch.inference_mode():
            logits_BTV = self._model(self._ids(ids), use_cache=False).logits
            return {"logprobs_TV": logits_BTV[0].float().log_softmax(-1).cpu()}

    def close(self) -> None:
        """The model ends with this process."""


def _name(key: Any) -> str:
    """Mismatched keys come with their shapes."""
    return str(key[0] if isinstance(key, tuple) else key)


def load(request: Request, heard: Heard) -> Transformers:
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers: Any = import_module("transformers")
    torch: Any = import_module("torch")
    heard.listen()
    gpu = torch.cuda.is_available()
    device = request.options.get("device") or ("cuda" if gpu else "cpu")
    heard.facts |= {
        "version": transformers.__version__,
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
    }
    model, info = _loaded(transformers, request, {} if device == "cpu" else {"device_map": {"": device}})
    tokenizer = transformers.AutoTokenizer.from_pretrained(request.folder) if request.tokenizer else None
    return Transformers(model, info, tokenizer)


def _loaded(transformers: Any, request: Request, where: dict[str, Any]) -> Any:
    """By the class for language models; by that for images and text where the configuration is of no language model."""
    options = {"dtype": request.options.get("dtype", "auto"), "output_loading_info": True, **where}
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(request.folder, **options)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
    return transformers.AutoModelForImageTextToText.from_pretrained(request.folder, **options)


if __name__ == "__main__":
    serve(load)
