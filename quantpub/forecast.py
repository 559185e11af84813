"""From a profile's measured rows to workloads: what the linears gain, and what of that a served model shows.

Everything comes from the evidence of one profile (`profile.json`) and the model's config.json, so a stored profile answers
for workloads that nobody thought of when it was measured. Legend: M tokens of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from quantpub.curves import Curve
from quantpub.gpus import BF16, Gpu, of_device
from quantpub.predict import LINEAR, QUANTIZE, Model, Prediction, predict
from quantpub.roofline import Machine, computes_in, gemm, machine
from quantpub.schedule import Limits, cache_tokens, vllm_limits
from quantpub.scheme import Scheme, preset
from quantpub.served import BF16_BYTES, Linear, Served, served
from quantpub.serving_costs import Rest
from quantpub.workloads import Workload

BASE, OWN, APART = "baseline_us", "median_us", "quantize_us"
MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
Evidence = Mapping[str, Any]
Runs = Mapping[str, str]  # GEMM → kernel


@dataclass(frozen=True)
class Forecast:
    """evidence: a profile on a CUDA device. config: the model's. Errors: InputError for an unknown architecture."""

    evidence: Evidence
    config: Mapping[str, Any]

    @cached_property
    def served(self) -> Served:
        return served(self.config)

    @cached_property
    def gpu(self) -> Gpu | None:
        """With the memory that the device itself states. None: a GPU that the table does not know."""
        device = self.evidence["made_by"]["device"].get("gpu")
        return of_device(device["name"], device.get("memory")) if device else None

    @cached_property
    def machine(self) -> Machine:
        assert self.gpu is not None
        rates = (self.evidence.get("around") or {}).get("machine", {})
        return machine(self.gpu, rates.get("bandwidth"), rates.get("compute"))

    @cached_property
    def rest(self) -> Rest:
        return Rest.from_json((self.evidence.get("around") or {}).get("rest", {}))

    @cached_property
    def entries(self) -> dict[str, Mapping[str, Any]]:
        return {entry["name"]: entry for entry in self.evidence["gemms"]}

    @cached_property
    def _rows(self) -> dict[tuple[str, str], dict[int, Mapping[str, Any]]]:
        found: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
        for row in self.evidence["rows"]:
            found.setdefault((row["gemm"], row["kernel"]), {})[row["m"]] = row
        return found

    def measured(self, gemm: str, kernel: str) -> Mapping[int, Mapping[str, Any]]:
        """M → the row of one kernel on one GEMM."""
        return self._rows.get((gemm, kernel), {})

    def points(self, kernels: Runs | None, side: str = OWN) -> dict[int, float]:
        """M → µs of all quantized GEMMs of a forward pass. kernels: GEMM → kernel; None: the baseline.

        Only the M at which every GEMM was measured. side: which of a row's figures; one that a row lacks counts nothing.
        """
        return self._sum(kernels, lambda row: row.get(BASE if kernels is None else side, 0.0))

    def fastest(self, kernels: Runs) -> dict[int, float]:
        """As `points`, of the kernel or bf16, whichever is faster for a GEMM."""
        return self._sum(kernels, lambda row: min(row[OWN], row[BASE]))

    def _sum(self, kernels: Runs | None, figure: Callable[[Mapping[str, Any]], float]) -> dict[int, float]:
        cells: dict[int, dict[str, float]] = {}
        for (name, kernel), rows in self._rows.items():
            if kernels is None or kernels.get(name) == kernel:
                for m, row in rows.items():
                    cells.setdefault(m, {})[name] = self.entries[name]["count"] * figure(row)
        return {m: sum(cell.values()) for m, cell in sorted(cells.items()) if len(cell) == len(self.entries)}

    def left(self) -> tuple[Linear, ...]:
        """Linears of the model that the artifact holds in high precision, or the rows of them: the same on both sides."""
        found = ((linear, round(linear.n * (1 - self._covered(linear)))) for linear in self.served.linears)
        return tuple(replace(linear, n=rows) for linear, rows in found if rows > 0)

    def _covered(self, linear: Linear) -> float:
        """The part of a merged linear's rows, over all layers, that the profile's GEMMs are; members may stand apart."""
        if linear.experts:  # one entry a kind of layer for both GEMMs of its experts, whatever the family calls them
            layers = sum(int(entry["count"]) for entry in self.entries.values() if entry.get("experts"))
            return layers / linear.layers
        prefix, _, leaf = linear.name.rpartition(".")
        names = {linear.name, *(f"{prefix}.{member}" for member in MERGED.get(leaf, ()))}
        rows = sum(int(e["n"] * e["count"]) for name, e in self.entries.items() if name.split(" ")[0] in names)
        return min(1.0, rows / (linear.n * linear.count))

    def linear_us(self, points: Mapping[int, float]) -> Callable[[int], float]:
        """Measured, and for what stays in bf16 the roofline."""
        curve, left = Curve(points), self.left()
        return lambda m: curve(m) + sum(gemm(one, m, None, self.served.top_k).us(self.machine) for one in left)

    def scheme(self, name: str, kernel: str) -> Scheme:
        """What a kernel multiplies of a GEMM: without activations' format where it takes them as they come."""
        entry, rows = self.entries[name], self.measured(name, kernel).values()
        scheme = preset(entry["scheme"], entry["group"])
        quantizes = any(APART in row for row in rows) if not entry.get("experts") else self._acts(kernel)
        return scheme if quantizes else replace(scheme, act=None)

    def _acts(self, kernel: str) -> bool:
        """Whether a kernel for experts rounds activations; where the evidence does not say, those of its scheme."""
        found = (one.get("acts") for one in self.evidence["kernels"] if one["name"] == kernel)
        return any(act != BF16 for act in next(found, None) or ["as its scheme"])

    def num(self, kernels: Runs) -> str:
        """The number format that most weights are multiplied in by these kernels."""
        sizes: dict[str, float] = {}
        for name, entry in self.entries.items():
            num = computes_in(self.scheme(name, kernels[name]))
            size = entry["n"] * entry["k"] * entry["count"] * max(1, entry.get("top_k", 0))
            sizes[num] = sizes.get(num, 0.0) + size
        return max(sizes, key=lambda num: sizes[num])

    @property
    def weight_bytes(self) -> float:
        """Of the artifact in memory: what is left in high precision counts as that."""
        bits = self.evidence["weights"]["bits"]
        return float(self.served.bytes(bits) + sum(one.weights for one in self.left()) * (16 - bits) / 8)

    @property
    def copy_bytes(self) -> int:
        """Of a bf16 copy of the quantized weights."""
        return BF16_BYTES * (self.served.linear_weights - sum(one.weights for one in self.left()))

    def limits(self, weight_bytes: float) -> Limits:
        assert self.gpu is not None
        limits = vllm_limits(self.gpu)
        return replace(limits, kv_tokens=cache_tokens(self.served, self.gpu, limits, weight_bytes))

    def baseline(self, workload: Workload) -> Prediction:
        """Errors: InputError when a request does not fit beside bf16 weights."""
        base = self.linear_us(self.points(None))
        model = Model(self.served, self.machine, base, self.rest, baseline_us=base)
        return predict(workload, self.limits(self.served.bytes()), model)

    def artifact(self, workload: Workload, kernels: Runs, dense_path: bool = False) -> Prediction:
        """dense_path: a bf16 copy of every quantized weight is kept as well, and used for each GEMM wherever it is faster.

        Errors: InputError when a request does not fit beside the weights.
        """
        own = self.linear_us(self.fastest(kernels) if dense_path else self.points(kernels))
        quantize = {m: us for m, us in self.points(kernels, APART).items() if us > 0}
        model = Model(
            self.served,
            self.machine,
            own,
            self.rest,
            num=self.num(kernels),
            quantize_us=Curve(quantize) if quantize and not dense_path else None,
            baseline_us=self.linear_us(self.points(None)),
        )
        return predict(workload, self.limits(self.weight_bytes + (self.copy_bytes if dense_path else 0)), model)

    def workload(self, workload: Workload, kernels: Runs) -> dict[str, Any]:
        """One entry of a profile's `workloads`."""
        base, own = self.baseline(workload), self.artifact(workload, kernels)
        return {
            "written": workload.written(),
            "linear_speedup": round(linears(base) / linears(own), 4),
            "speedup": round(base.seconds / own.seconds, 4),
            "tokens_per_s": round(own.total_per_s, 1),
            "output_tokens_per_s": round(own.output_per_s, 1),
            "baseline_tokens_per_s": round(base.total_per_s, 1),
            "seconds": round(own.seconds, 4),
            "baseline_seconds": round(base.seconds, 4),
            "shares": {part: round(own.share(part), 4) for part in own.parts},
            "baseline_shares": {part: round(base.share(part), 4) for part in base.parts},
            "by_m": [[row.m, row.steps, row.tokens, round(row.seconds, 4)] for row in own.by_m],
            "estimated": list(own.stands_in),
        }

    def speedup(self, workload: Workload, kernels: Runs) -> float:
        return self.baseline(workload).seconds / self.artifact(workload, kernels).seconds


def linears(prediction: Prediction) -> float:
    """Seconds in quantized linears, the quantizing of activations included."""
    return prediction.parts[LINEAR] + prediction.parts[QUANTIZE]
