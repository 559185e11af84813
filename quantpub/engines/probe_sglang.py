"""Loads a checkpoint in SGLang, generates, and writes the most likely tokens of every position. Request and reply: `probing.py`.

    python -m quantpub.engines.probe_sglang < request.json > reply.json      (in the interpreter that has SGLang)

Read in SGLang 0.5.23, not run. The model lies in a process of SGLang's own: its modules are out of reach, no kernels are
told, and of a prompt it returns only the TOP most likely tokens.
"""

from __future__ import annotations

import os
from importlib import import_module
from inspect import signature
from typing import Any

from quantpub.engines.probing import Heard, Request, serve, top

TOP = 128


class Sglang:
    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def facts(self) -> dict[str, Any]:
        return {"kernels": {}}

    def _ask(self, ids: list[int], count: int, **options: Any) -> Any:
        sampling = {"temperature": 0, "max_new_tokens": count}
        answer = self._engine.generate(input_ids=ids, sampling_params=sampling, **options)
        return answer[0] if isinstance(answer, list) else answer

    def generate(self, ids: list[int], count: int) -> tuple[list[int], str | None]:
        answer = self._ask(ids, count)
        return [int(token) for token in answer["output_ids"]], answer.get("text") or None

    def score(self, ids: list[int]) -> dict[str, Any]:
        """The first position has no log-probability: nothing comes before it."""
        said = self._ask(ids, 1, return_logprob=True, logprob_start_len=0, top_logprobs_num=TOP)["meta_info"]
        own, likely = said["input_token_logprobs"][1:], said["input_top_logprobs"][1:]
        assert [int(one[1]) for one in own] == ids[1:], "SGLang returned another prompt's log-probabilities"
        return top(([(float(one[0]), int(one[1])) for one in row] for row in likely), [float(one[0]) for one in own])

    def close(self) -> None:
        self._engine.shutdown()


def settings(request: Request, known: set[str]) -> dict[str, Any]:
    """What the engine is made with, of what it knows."""
    wanted = {
        "model_path": request.folder,
        "skip_tokenizer_init": not request.tokenizer,
        "dtype": request.options.get("dtype", "auto"),
        "context_length": request.longest,
        "disable_radix_cache": True,  # a prompt that is cached is not computed, and has no logits
        "disable_cuda_graph": True,
        "random_seed": 0,
        "log_level": "info",
    }
    if request.options.get("memory"):
        wanted["mem_fraction_static"] = request.options["memory"]
    wanted |= request.options.get("engine", {})
    return {name: value for name, value in wanted.items() if name in known or not known}


def _known(engine: Any) -> set[str]:
    """Names that an engine can be given; none where its arguments do not tell."""
    try:
        names = set(signature(engine.server_args_class).parameters)
    except (AttributeError, TypeError, ValueError):
        return set()
    return names if "model_path" in names else set()


def load(request: Request, heard: Heard) -> Sglang:
    os.environ["HF_HUB_OFFLINE"] = "1"
    sglang: Any = import_module("sglang")
    torch: Any = import_module("torch")
    heard.listen()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    heard.facts |= {"version": str(getattr(sglang, "__version__", "unknown")), "device": device}
    return Sglang(sglang.Engine(**settings(request, _known(sglang.Engine))))


if __name__ == "__main__":
    serve(load)
