"""Asks vLLM itself which kernel it would run for each merged GEMM, and why it rejected those that it tried before.

    python -m quantpub.engines.vllm_choice < request.json > reply.json        (in the interpreter that has vLLM)

No engine is started and no weight is made: vLLM's own selectors are called as its layers call them, on the GPU at hand and
under the environment at hand. What a selector cannot be asked, or does not exist for, is answered by the kernel tables,
and the source says so. Request and reply: `engines/ask.py`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

from quantpub.engines.choice import ENGINE, Ask, Choice, by_table
from quantpub.engines.hearing import Hearing
from quantpub.engines.vllm_experts import ROUTES as EXPERTS
from quantpub.engines.vllm_linears import ROUTES as LINEARS
from quantpub.engines.vllm_linears import Refusal, bf16, candidates, capability, vllm
from quantpub.engines.vllm_rows import row
from quantpub.targets import unloadable

TILE = "torchao-tile"
TINYGEMM = "read: vLLM chooses nothing for torchao's own tensor, which calls aten._weight_int4pack_mm"
# What a user's environment changes of the choice; nothing else of it is reported
SWITCHES = (
    "VLLM_DISABLED_KERNELS", "VLLM_USE_DEEP_GEMM", "VLLM_MOE_USE_DEEP_GEMM", "VLLM_BATCH_INVARIANT",
    "VLLM_TEST_FORCE_FP8_MARLIN", "VLLM_MARLIN_INPUT_DTYPE", "VLLM_MARLIN_USE_ATOMIC_ADD", "VLLM_USE_FLASHINFER_MOE_FP8",
)  # fmt: skip


def choose(config: Mapping[str, Any], asks: Iterable[Ask]) -> list[Choice]:
    """One choice an ask, in order. config: the model's config.json, of which vLLM reads `model_type` for some kernels."""
    where = Where.here()
    with current_config(str(config.get("model_type", ""))):
        return [_choice(ask, where) for ask in asks]


@dataclass(frozen=True)
class Where:
    """version: vLLM's, without what follows a plus. generation: of `hardware.GENERATIONS`, or "". capability: 90 for 9.0."""

    version: str
    generation: str
    device: str
    capability: int | None

    @staticmethod
    def here() -> Where:
        version = str(vllm("version").__version__).partition("+")[0]
        platform, has = vllm("platforms").current_platform, capability()
        device = str(platform.get_device_name() if has is not None else platform.device_name)
        return Where(version, generation(platform, has), device, has)


def generation(platform: Any, has: int | None) -> str:
    if platform.is_rocm():
        return "rocm"
    if has is None:
        return "cpu"
    by_major = {7: "sm75", 8: "sm80", 9: "sm90", 10: "sm100", 12: "sm120"}
    return "sm89" if has == 89 else by_major.get(has // 10, "")


@contextmanager
def current_config(model_type: str) -> Iterator[None]:
    """vLLM's selectors read its current config. Of the model it holds only what they read: no model is loaded."""
    config = vllm("config")
    engine = config.VllmConfig()
    hf = SimpleNamespace(model_type=model_type)
    engine.model_config = SimpleNamespace(dtype=bf16(), hf_config=hf, hf_text_config=hf, quantization_config=None)
    with config.set_current_vllm_config(engine):
        yield


def _choice(ask: Ask, where: Where) -> Choice:
    if reason := unloadable(ENGINE, ask.layout, ask.scheme.name, ask.experts > 0):
        return Choice(ask.gemm, None, None, "table, read: the table of layouts", error=reason)
    if ask.layout == TILE:
        return _tile(ask, where)
    if ask.layout not in (EXPERTS if ask.experts else LINEARS):
        return by_table(ask, "vLLM has no selector for it", where.version, where.generation)
    with Hearing(where.capability) as hearing:
        try:
            hearing.listen(candidates())
            chosen = _route(ask, hearing)
        except Exception as error:  # an engine's internals raise anything
            return _unanswered(ask, where, hearing, error)
    return _answer(ask, where, hearing, chosen)


def _tile(ask: Ask, where: Where) -> Choice:
    if not find_spec("torchao"):
        return Choice(ask.gemm, None, None, TINYGEMM, error="torchao is not installed beside vLLM")
    return replace(by_table(ask, "", where.version, where.generation), source=TINYGEMM)


def _route(ask: Ask, hearing: Hearing) -> str:
    found = EXPERTS[ask.layout][0](ask, hearing) if ask.experts else LINEARS[ask.layout](ask, hearing)
    assert found is not None, "vLLM returned no class"
    return found if isinstance(found, str) else (found if isinstance(found, type) else type(found)).__name__


def _answer(ask: Ask, where: Where, hearing: Hearing, chosen: str, error: str | None = None) -> Choice:
    """A kernel that vLLM chooses and that is known to fail all the same is told with what is known."""
    rejected = _rejected(ask, _disabled() | hearing.rejected, chosen)
    known = by_table(ask, "", where.version, where.generation)
    error = error or (f"chosen, but {known.error}" if known.kernel is None and known.error else None)
    return Choice(ask.gemm, _row(ask, chosen), chosen, f"asked vllm {where.version}", rejected, error)


def _rejected(ask: Ask, reasons: Mapping[str, str], chosen: str = "") -> dict[str, str]:
    """By row; by class where two classes have one row and only one of them was rejected."""
    own = _row(ask, chosen)
    rows = ((name if _row(ask, name) == own else _row(ask, name), reason) for name, reason in reasons.items())
    return {name: reason for name, reason in rows if name != chosen}


def _row(ask: Ask, class_name: str) -> str:
    return row(class_name, EXPERTS[ask.layout][1] if ask.experts else None)


def _disabled() -> dict[str, str]:
    names = filter(None, os.environ.get("VLLM_DISABLED_KERNELS", "").split(","))
    return dict.fromkeys(names, "disabled by VLLM_DISABLED_KERNELS")


def _unanswered(ask: Ask, where: Where, hearing: Hearing, error: Exception) -> Choice:
    """It accepted a kernel and failed to make it; or rejected all that it tried; or could not be asked at all."""
    said = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
    if hearing.accepted:
        return _answer(ask, where, hearing, hearing.accepted, f"chosen, but vLLM could not set it up here: {said}")
    refused = isinstance(error, Refusal) or (hearing.rejected and isinstance(error, ValueError | NotImplementedError))
    if refused:
        rejected = _rejected(ask, hearing.rejected)
        return Choice(ask.gemm, None, None, f"asked vllm {where.version}", rejected, f"vLLM refuses the layer: {said}")
    return by_table(ask, f"vLLM {where.version} could not be asked: {said}", where.version, where.generation)


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """The reply to a request, as plain data."""
    asks = [Ask.from_json(value) for value in request["asks"]]
    where = Where.here()
    choices = choose(request.get("config") or {}, asks)
    return {
        "engine": ENGINE,
        "version": where.version,
        "device": where.device,
        "generation": where.generation,
        "environment": {name: os.environ[name] for name in SWITCHES if name in os.environ},
        "choices": [choice.as_json() for choice in choices],
    }


def main() -> None:
    """vLLM logs to stdout: it is given stderr instead, and the reply is alone on the real one."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        try:
            reply = answer(json.load(sys.stdin))
        except Exception as error:  # whatever it is, the reply is one JSON object
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split()):.300}"}
        out.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()
