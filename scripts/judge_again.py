"""Computes what a profile says beside its rows once more, from those rows, by the code of today.

usage: python scripts/judge_again.py CONFIG.json PROFILE.json ...

Rows, numerics, what was measured around them and the engine's answers stay as they were; forecasts, crossovers, roofline,
dense path and verdict are functions of these. `judged_again` says which version computed them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
from quantpub import __version__
from quantpub.files import dump_json
from quantpub.findings import totals
from quantpub.recipe import Gate
from quantpub.verdict import judged

DERIVED = ("workloads", "crossover", "roofline", "dense_path", "fp4", "faster", "verdict")


def again(evidence: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The gate asked about is the one that the evidence holds."""
    asked = evidence["verdict"]
    gate = Gate(workload=asked["workload"], min_speedup=asked["min_speedup"])
    kept = {key: value for key, value in evidence.items() if key not in DERIVED}
    counts = {entry["name"]: entry["count"] for entry in kept["gemms"]}
    kept["totals"] = totals(counts, kept["rows"], kept["engine"]["runs"])
    return kept | judged(kept, config, gate, None) | {"judged_again": f"quantpub {__version__}"}


def main(config: str, *profiles: str) -> None:
    for profile in map(Path, profiles):
        evidence = again(json.loads(profile.read_text()), json.loads(Path(config).read_text()))
        profile.write_bytes(dump_json(evidence))
        print(profile.name, evidence["verdict"]["gate"], evidence["verdict"]["reason"])


if __name__ == "__main__":
    main(*sys.argv[1:])
