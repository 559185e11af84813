"""Loads a checkpoint in vLLM, generates, and writes the log-probabilities of every position. Request and reply: `probing.py`.

    python -m quantpub.engines.probe_vllm < request.json > reply.json        (in the interpreter that has vLLM)

The engine runs in this process and eagerly, on one GPU. vLLM itself returns only the most likely tokens of a prompt: whole
rows are taken where its runner calls the model's `compute_logits`, and each row is held against the log-probability that
vLLM returns for the token that follows. Where they do not meet, or the model is out of reach, the most likely ones remain.
Read in vLLM 0.25.1 and 0.33.0; options and attributes are looked for, no version is compared.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import signature
from typing import Any

from quantpub.engines.probing import Heard, Request, serve, top
from quantpub.engines.vllm_loaded import kernels, never_loaded

TOP = 20  # most likely tokens asked for: vLLM's own limit unless told otherwise
MEET = 1e-3  # nats by which a captured row may miss the log-probability that vLLM returns of it
FREE, MOST = 0.05, 0.9  # part of the GPU's memory left alone, and the most that is asked for
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model lies in this process
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
# where the loaded model lies below an LLM
PLACES = (
    "llm_engine.model_executor.driver_worker.worker.model_runner.model",
    "llm_engine.model_executor.driver_worker.model_runner.model",
    "llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model",
    "llm_engine.engine_core.engine_core.model_executor.driver_worker.model_runner.model",
)


class Capture:
    """The log-probabilities of every row of logits that the model computes while it is on, in order."""

    def __init__(self, model: Any) -> None:
        self._compute, self._rows, self._on = model.compute_logits, list[Any](), False
        model.compute_logits = self._computed

    def _computed(self, *args: Any, **kwargs: Any) -> Any:
        logits = self._compute(*args, **kwargs)
        if self._on and logits is not None:
            self._rows.append(logits.detach().float().log_softmax(-1).cpu())  # at once: samplers write into logits
        return logits

    def __enter__(self) -> list[Any]:
        self._rows, self._on = [], True
        return self._rows

    def __exit__(self, *_: object) -> None:
        self._on = False


def ordered(captured: list[Any], ids: list[int], said: list[float]) -> Any | None:
    """Rows [T - 1, V] whose entries of the tokens that follow are those that vLLM returned; None where there are none.

    A runner computes the row that it samples from first or last and by itself, and the prompt's in one piece or several.
    """
    import torch

    following, want = torch.tensor(ids[1:]), torch.tensor(said, dtype=torch.float32)
    for pieces in ([rows for rows in captured if len(rows) > 1], captured, captured[1:]):
        if sum(map(len, pieces)) < len(following):
            continue
        rows_TV = torch.cat(pieces)[: len(following)]
        own_T = rows_TV.gather(-1, following[:, None])[:, 0]
        if torch.allclose(own_T, want, rtol=0, atol=MEET, equal_nan=True):
            return rows_TV
    return None


def watch_loading(facts: dict[str, Any]) -> None:
    """Notes in facts["missing"] what the default loader left as it was. vLLM checks only models without quantization."""
    cls = getattr(import_module("vllm.model_executor.model_loader.default_loader"), "DefaultModelLoader", None)
    original = getattr(cls, "load_weights", None)
    if cls is None or original is None:
        return

    def load_weights(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        inner = model.load_weights

        def noted(*inner_args: Any, **inner_kwargs: Any) -> Any:
            found = inner(*inner_args, **inner_kwargs)
            if found is not None:
                facts["missing"] = never_loaded(model, found)
            return found

        model.load_weights = noted
        try:
            return original(self, model, *args, **kwargs)
        finally:
            model.__dict__.pop("load_weights", None)

    cls.load_weights = load_weights


def loaded_model(llm: Any) -> Any | None:
    """The module itself, where it lies in this process."""
    try:
        (found,) = llm.apply_model(_itself)
        if hasattr(found, "compute_logits"):
            return found
    except Exception:  # not there, or in another process: any error
        pass
    for place in PLACES:
        found = llm
        for part in place.split("."):
            found = getattr(found, part, None)
        if hasattr(found, "compute_logits"):
            return found
    return None


def _itself(model: Any) -> Any:
    return model


class Vllm:
    def __init__(self, llm: Any, sampling: Callable[..., Any], heard: Heard, tokenizer: bool) -> None:
        self._llm, self._sampling, self._heard, self._tokenizer = llm, sampling, heard, tokenizer
        self.model = loaded_model(llm)
        self._capture = None if self.model is None else Capture(self.model)

    def facts(self) -> dict[str, Any]:
        classes, rows = ({}, {}) if self.model is None else kernels(self.model)
        dtype = getattr(getattr(self._llm.llm_engine, "model_config", None), "dtype", None)
        return {"kernels": classes, "kernel_rows": rows, "dtype": str(dtype).removeprefix("torch.")}

    def _ask(self, ids: list[int], **params: Any) -> Any:
        given = self._sampling(temperature=0, **params)
        (answer,) = self._llm.generate([{"prompt_token_ids": ids}], given, use_tqdm=False)
        return answer

    def generate(self, ids: list[int], count: int) -> tuple[list[int], str | None]:
        said = self._ask(ids, max_tokens=count, detokenize=self._tokenizer).outputs[0]
        return list(said.token_ids), said.text if self._tokenizer else None

    def score(self, ids: list[int]) -> dict[str, Any]:
        answer, captured = self._scored(ids)
        given = answer.prompt_logprobs[1:]
        own = [float(choices[token].logprob) for token, choices in zip(ids[1:], given, strict=True)]
        rows_TV = ordered(captured, ids, own)
        if rows_TV is not None:
            return {"logprobs_TV": rows_TV}
        self._heard.warn("quantpub: no whole rows of logits were captured; the most likely tokens are compared")
        return top(([(one.logprob, t) for t, one in choices.items() if one.rank <= TOP] for choices in given), own)

    def _scored(self, ids: list[int]) -> tuple[Any, list[Any]]:
        params = {"max_tokens": 1, "prompt_logprobs": TOP, "detokenize": False}
        if self._capture is None:
            return self._ask(ids, **params), []
        with self._capture as captured:
            return self._ask(ids, **params), captured

    def close(self) -> None:
        """The engine ends with this process."""


def settings(request: Request, known: set[str], share: float | None) -> dict[str, Any]:
    """What the engine is made with, of what it knows."""
    wanted = {
        "model": request.folder,
        "skip_tokenizer_init": not request.tokenizer,
        "dtype": request.options.get("dtype", "auto"),
        "enforce_eager": True,
        "enable_prefix_caching": False,  # a prompt that is cached is not computed, and has no logits
        "max_model_len": request.longest,
        "max_num_seqs": 4,
        "seed": 0,
        "disable_log_stats": True,
    }
    if share is not None:
        wanted["gpu_memory_utilization"] = share
    wanted |= request.options.get("engine", {})
    return {name: value for name, value in wanted.items() if name in known}


def _share(asked: float | None) -> float | None:
    """The part of the GPU's memory to ask for: what is free now, less a little. None without a GPU."""
    import torch

    if asked is not None or not torch.cuda.is_available():
        return asked
    free, total = torch.cuda.mem_get_info()
    return round(max(0.05, min(MOST, free / total - FREE)), 3)


def _known(vllm: Any) -> set[str]:
    """Names that an LLM can be given: its own, and those that it passes on."""
    fields: Mapping[str, Any] = getattr(import_module("vllm.engine.arg_utils").EngineArgs, "__dataclass_fields__", {})
    return set(signature(vllm.LLM.__init__).parameters) | set(fields)


def _device() -> str:
    platform = import_module("vllm.platforms").current_platform
    try:
        return str(platform.get_device_name())
    except Exception:  # a platform without devices raises what it likes
        return str(getattr(platform, "device_name", "unknown"))


def load(request: Request, heard: Heard) -> Vllm:
    os.environ.update(ENVIRONMENT)
    vllm: Any = import_module("vllm")
    heard.listen()
    heard.facts |= {"version": str(getattr(vllm, "__version__", "unknown")), "device": _device()}
    try:
        watch_loading(heard.facts)
    except ImportError:
        heard.warn("quantpub: the loader was not found, missing tensors are not told")
    given = settings(request, _known(vllm), _share(request.options.get("memory")))
    return Vllm(vllm.LLM(**given), vllm.SamplingParams, heard, request.tokenizer)


if __name__ == "__main__":
    serve(load)
