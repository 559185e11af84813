"""Makes a stored profile, from which `quantpub advise` derives kernel times, of profiles measured on one GPU.

usage: python scripts/store_profile.py quantpub/stored_profiles/NAME.json PROFILE.json... [--config CONFIG.json]

PROFILE: what `quantpub profile` wrote on a CUDA device, or scripts/kernel_table.py (whose times are sums over a layer's shapes).
Kept of each GEMM and kernel: N, K, M, the medians of the kernel and of bf16 beside it; of the first profile that has them the
rates that the GPU reached and what runs beside the linears, with the dimensions of the model that they hold for. These come from
CONFIG, or from the config.json of the artifact that the profile lies in. Name evidence by its path in the repository.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantpub.gpus import of_device
from quantpub.kernels import KERNELS
from quantpub.kernels.moe import MOE_KERNELS
from quantpub.registry import load
from quantpub.served import served

DIMENSIONS = (
    "layers",
    "hidden",
    "heads",
    "kv_heads",
    "head_dim",
    "intermediate",
    "vocab",
    "window",
    "top_k",
    "qk_norm",
)
CONTROL = "dequantized"
TABLE = {"tinygemm": ("tinygemm", "W4A16_FLOAT_ZERO"), "machete": ("Machete", "W4A16"), "marlin": ("Marlin", "W4A16")}
Evidence = Mapping[str, Any]


def row_of(kernel: str) -> str:
    """The kernel's name in the kernel tables."""
    found = load(KERNELS | MOE_KERNELS, "kernel", kernel)
    return str(found.row)


def series_of_profile(evidence: Evidence) -> Iterator[dict[str, Any]]:
    gemms = {entry["name"]: entry for entry in evidence["gemms"]}
    cures = {kernel["name"]: kernel["repacked"]["scheme"] for kernel in evidence["kernels"] if kernel.get("repacked")}
    cells: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in evidence["rows"]:
        if row["kernel"] != CONTROL:
            cells.setdefault((row["gemm"], row["kernel"]), []).append(row)
    for (name, kernel), rows in cells.items():
        gemm = gemms[name]
        scheme = cures.get(kernel) or gemm.get("scheme") or evidence["weights"].get("scheme")
        if scheme is None:
            raise SystemExit(f"{name}: the profile does not say its scheme")
        rows = sorted(rows, key=lambda row: row["m"])
        facts: dict[str, Any] = {"kernel": kernel, "row": row_of(kernel), "scheme": scheme, "parts": parts_of(gemm)}
        if "group" in gemm:
            facts["group"] = gemm["group"]
        yield facts | {
            "m": [row["m"] for row in rows],
            "us": [row["median_us"] for row in rows],
            "bf16_us": [row["baseline_us"] for row in rows],
        }


def parts_of(gemm: Mapping[str, Any]) -> list[list[int]]:
    """[n, k], of experts [n, k, experts, top_k]: w13 and w2, which run as one."""
    if "intermediate" not in gemm:
        return [[gemm["n"], gemm["k"]]]
    width, hidden, many = gemm["intermediate"], gemm["hidden"], [gemm["experts"], gemm["top_k"]]
    return [[2 * width, hidden, *many], [hidden, width, *many]]


def series_of_table(evidence: Evidence) -> Iterator[dict[str, Any]]:
    parts, rows = list(evidence["made_by"]["shapes_NK"].values()), evidence["rows"]
    for kernel, (row, scheme) in TABLE.items():
        yield {
            "kernel": kernel, "row": row, "scheme": scheme, "parts": parts,
            "m": [r["m"] for r in rows], "us": [r[f"{kernel}_us"] for r in rows], "bf16_us": [r["bf16_us"] for r in rows],
        }  # fmt: skip


def gpu_of(evidence: Evidence) -> str:
    made = evidence["made_by"]
    device = made["gpu"] if "gpu" in made else (made["device"]["gpu"] or {"name": "no GPU"})["name"]
    found = of_device(device)
    if found is None:
        raise SystemExit(f"{device} is not in the table of GPUs")
    return found.name


def around_of(evidence: Evidence, path: Path, config: Path | None) -> dict[str, Any]:
    """machine; with rest and model where the model's dimensions are known."""
    around = evidence.get("around") or {}
    if "machine" not in around:
        return {}
    config = config or path.parent.parent / "config.json"
    if not config.is_file():
        print(f"{path}: no config.json, so only the GPU's rates are kept of what was measured around the linears")
        return {"machine": around["machine"]}
    model = served(json.loads(config.read_text()))
    return {
        "machine": around["machine"],
        "rest": around.get("rest", {}),
        "model": {name: getattr(model, name) for name in DIMENSIONS},
    }


def provenance(path: Path, evidence: Evidence) -> dict[str, Any]:
    made = evidence["made_by"]
    driver = made.get("driver") or (made.get("device", {}).get("gpu") or {}).get("driver")
    name = path.name if path.is_absolute() else path.as_posix()
    return {"evidence": name, "versions": made["versions"], "driver": driver}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("profiles", type=Path, nargs="+")
    parser.add_argument("--config", type=Path)
    asked = parser.parse_args()
    found = {path: json.loads(path.read_text()) for path in asked.profiles}
    gpus = {gpu_of(evidence) for evidence in found.values()}
    if len(gpus) > 1:
        raise SystemExit(f"one GPU a file, not {', '.join(sorted(gpus))}")
    series = [
        one
        for evidence in found.values()
        for one in (series_of_profile if "gemms" in evidence else series_of_table)(evidence)
    ]
    arounds = (around_of(evidence, path, asked.config) for path, evidence in found.items())
    content = {
        "gpu": gpus.pop(),
        "made_by": {"command": "scripts/store_profile.py", "from": [provenance(*each) for each in found.items()]},
        "around": next((around for around in arounds if around), {}),
    }
    lines = ",\n".join(json.dumps(one) for one in series)
    head = json.dumps(content, indent=1).removesuffix("\n}")
    asked.out.write_text(f'{head},\n "series": [\n{lines}\n ]\n}}\n')
    print(f"{asked.out}: {len(series)} series")


if __name__ == "__main__":
    main()
