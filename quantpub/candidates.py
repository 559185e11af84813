"""One recipe served in thought: its linears on the kernels that the engine is expected to run, its memory, its throughput.

The steps are those of vLLM, and the KV cache is what the weights leave of the memory. Refused is what cannot serve a single
request; a choice whose cache holds fewer requests than the workload sends at once is slower for it, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from quantpub.derived import CONFIDENCE, OTHER, SAME, Asked, Derived, derive, held_out, held_out_kernels
from quantpub.expected_runs import Engine, Refusal, Runs, in_bf16
from quantpub.gpus import BF16, GB, Gpu
from quantpub.predict import LINEAR, Model, Prediction, predict
from quantpub.recipe import Recipe
from quantpub.roofline import Machine, computes_in, machine
from quantpub.schedule import UTILIZATION, Limits, cache_tokens, vllm_limits
from quantpub.served import BF16_BYTES, Served
from quantpub.serving_costs import Rest
from quantpub.stored import KL_28M, Stored, stored
from quantpub.workloads import Workload

DIMENSIONS = {  # what of a model must be alike for a measured part of `Rest` to hold
    "decode": ("heads", "kv_heads", "head_dim", "window"),
    "prefill": ("heads", "kv_heads", "head_dim", "window"),
    "mixed": ("heads", "kv_heads", "head_dim", "window"),
    "head": ("hidden", "vocab"),
    "elementwise": ("hidden", "heads", "kv_heads", "head_dim", "intermediate", "qk_norm", "top_k"),
    "sustained": (),
    "steady": ("hidden", "heads", "kv_heads", "head_dim", "intermediate", "layers"),
    "prompts": ("hidden", "heads", "kv_heads", "head_dim", "window", "intermediate", "qk_norm"),
    "decodes": ("hidden", "heads", "kv_heads", "head_dim", "window", "intermediate", "qk_norm"),
}


@dataclass(frozen=True, eq=False)
class Choice:
    """recipe: `bf16` for none. error: of such derived times, as it was found on measured ones; None where unknown.

    unlike: the kernel that quantizes activations which the scheme leaves alone, "" for none: no KL is known of that.
    """

    recipe: str
    scheme: str
    layout: str | None
    kernel: str
    weight_bytes: float
    kv_tokens: int
    at_once: int
    wanted: int
    prediction: Prediction
    confidence: str
    error: float | None = None
    said: tuple[str, ...] = ()
    unlike: str = ""

    @property
    def speed(self) -> float:
        return self.prediction.total_per_s

    @property
    def fits(self) -> bool:
        """All requests of the workload at once."""
        return self.at_once >= self.wanted

    @property
    def kl(self) -> float | None:
        return 0.0 if self.recipe == BF16 else None if self.unlike else KL_28M.get(self.recipe)

    @property
    def doubt(self) -> int:
        """0 for measured times; more, the less sure they are."""
        return CONFIDENCE.index(self.confidence)

    def as_json(self, base: Choice | None) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "scheme": self.scheme,
            "layout": self.layout,
            "kernel": self.kernel,
            "speedup": round(self.speed / base.speed, 4) if base else None,
            "tokens_per_s": round(self.speed, 1),
            "output_tokens_per_s": round(self.prediction.output_per_s, 1),
            "weights_gb": gb(self.weight_bytes),
            "kv_tokens": self.kv_tokens,
            "fits": self.fits,
            "at_once": self.at_once,
            "wanted": self.wanted,
            "kl_28m": self.kl,
            "confidence": self.confidence,
            "error": None if self.error is None else round(self.error, 4),
            "reason": "; ".join([*self._against(base), *self._room(), *self.said]),
        }

    def as_bf16(self) -> dict[str, Any]:
        return {
            "tokens_per_s": round(self.speed, 1),
            "weights_gb": gb(self.weight_bytes),
            "kv_tokens": self.kv_tokens,
            "fits": self.fits,
        }

    def _against(self, base: Choice | None) -> list[str]:
        if base is None or base is self:
            return []
        share = base.prediction.share(LINEAR)
        faster = base.prediction.parts[LINEAR] / self.prediction.parts[LINEAR]
        return [f"linears, {100 * share:.0f} % of bf16's time, {faster:.2f}x as fast"]

    def _room(self) -> list[str]:
        return [] if self.fits else [f"the KV cache holds {self.at_once} of {self.wanted} requests to their end"]


@dataclass(frozen=True, eq=False)
class Case:
    """A model, a GPU with `memory` bytes to use, a workload and an engine."""

    served: Served
    gpu: Gpu
    memory: int
    workload: Workload
    engine: str
    _predicted: dict[Any, Prediction] = field(default_factory=dict)

    @cached_property
    def stored(self) -> Stored | None:
        return stored().get(self.gpu.name)

    @cached_property
    def machine(self) -> Machine:
        return self.stored.machine if self.stored else machine(self.gpu)

    @cached_property
    def rest(self) -> Rest:
        """What was measured beside the linears and holds for this model: where its dimensions are alike."""
        if self.stored is None:
            return Rest()
        rest, model = self.stored.rest, self.stored.model
        kept = {part: rest[part] for part in DIMENSIONS if part in rest and self._is_like(model, DIMENSIONS[part])}
        return Rest.from_json(kept)

    def _is_like(self, model: Mapping[str, Any], dimensions: Sequence[str]) -> bool:
        return all(name in model and model[name] == getattr(self.served, name) for name in dimensions)

    @cached_property
    def limits(self) -> Limits:
        return vllm_limits(self.gpu)

    @property
    def longest(self) -> int:
        """Tokens of the KV cache that a request takes at its end, in whole blocks."""
        block = self.limits.block
        return -(-(self.workload.prompt + self.workload.output) // block) * block

    @property
    def wanted(self) -> int:
        """Requests at once."""
        return min(max(self.workload.concurrency), self.limits.seqs)

    def bf16(self) -> Choice:
        """The baseline. Errors: Refusal when it does not fit."""
        return self._choice(BF16, BF16, None, [in_bf16(linear) for linear in self.served.linears], ())

    def choice(self, recipe: Recipe) -> Choice:
        """Errors: Refusal, and InputError for a recipe whose rules no layout holds."""
        layout, runs, said = Engine(self.engine, self.gpu.generation).runs(self.served, recipe)
        schemes = dict.fromkeys(run.scheme.name for run in runs if run.scheme)
        return self._choice(recipe.name, ", ".join(schemes), layout, runs, said)

    def _choice(
        self, recipe: str, scheme: str, layout: str | None, runs: Sequence[Runs], said: Sequence[str]
    ) -> Choice:
        nbytes = sum(run.bytes for run in runs) + self.served.other_weights * BF16_BYTES
        kv_tokens, parts = self._cache(nbytes), [self._derived(run) for run in runs]
        confidence = max((part.confidence for part in parts), key=CONFIDENCE.index)
        least_sure = next(run for run, part in zip(runs, parts, strict=True) if part.confidence == confidence)
        return Choice(
            recipe, scheme, layout, ", ".join(dict.fromkeys(run.kernel for run in runs)), nbytes, kv_tokens,
            min(self.wanted, kv_tokens // self.longest), self.wanted, self._predict(runs, kv_tokens, parts),
            confidence, self._error(confidence, least_sure.kernel),
            tuple(dict.fromkeys([*said, *(part.basis for part in parts if part.basis)])),
            ", ".join(dict.fromkeys(run.kernel for run in runs if _quantizes_more(run))),
        )  # fmt: skip

    def _derived(self, run: Runs) -> Derived:
        return derive(Asked(run.linear, run.multiplied, run.kernel, self.machine, self.served.top_k))

    def _predict(self, runs: Sequence[Runs], kv_tokens: int, parts: Sequence[Derived]) -> Prediction:
        """Recipes that differ in how codes are found run alike."""
        key = (tuple(runs), kv_tokens)
        if key not in self._predicted:
            most = max(runs, key=lambda run: run.linear.weights)
            model = Model(
                self.served, self.machine, _sum(parts), self.rest, num=computes_in(most.multiplied),
                baseline_us=_sum([self._derived(in_bf16(linear)) for linear in self.served.linears]),
            )  # fmt: skip
            self._predicted[key] = predict(self.workload, replace(self.limits, kv_tokens=kv_tokens), model)
        return self._predicted[key]

    def _cache(self, nbytes: float) -> int:
        """Tokens of the KV cache beside so many bytes of weights. Errors: Refusal when one request has no room."""
        kv_tokens = cache_tokens(self.served, replace(self.gpu, memory=self.memory), self.limits, nbytes)
        if kv_tokens >= self.longest:
            return kv_tokens
        needs = nbytes + self._reserved + self.longest * self.served.kv_bytes
        raise Refusal(
            f"it does not fit: {nbytes / GB:.3g} GB of weights, {self._reserved / GB:.3g} GB for the engine and "
            f"{self.longest * self.served.kv_bytes / GB:.3g} GB for the KV cache of one request are {needs / GB:.3g} GB; "
            f"{UTILIZATION * self.memory / GB:.3g} GB of {self.memory / GB:.3g} GB are there"
        )

    @cached_property
    def _reserved(self) -> float:
        """Bytes that are neither weights nor KV cache: what a roomy GPU would not give to the cache."""
        roomy = replace(self.gpu, memory=1 << 50)
        left = cache_tokens(self.served, roomy, self.limits, 0) * self.served.kv_bytes
        return UTILIZATION * roomy.memory - left

    def _error(self, confidence: str, row: str) -> float | None:
        if self.stored is None or confidence == SAME:
            return None
        found = held_out(self.stored, row) if confidence == OTHER else held_out_kernels(self.stored)
        return found.median if found else None


def _quantizes_more(run: Runs) -> bool:
    return run.scheme is not None and run.scheme.act is None and run.multiplied != run.scheme


def _sum(parts: Sequence[Derived]) -> Callable[[int], float]:
    return lambda m: sum(part.us(m) for part in parts)


def gb(nbytes: float) -> float:
    return round(nbytes / GB, 3)
