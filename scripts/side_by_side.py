"""Predicted against measured throughput, run by run: a Markdown table on stdout, and JSON.

usage: python scripts/side_by_side.py OUT.json BENCH.json[,MORE.json…] PROFILES [--base bf16] [--config config.json]

BENCH.json is serve_bench.py's; runs of one checkpoint may stand in several. PROFILES holds NAME/.quantpub/profile.json or
NAME.json for each of its checkpoints; the model's config.json is the one of NAME/, else the one given. Each run that was
measured is predicted as it was run, scaled or not. The base has no profile of its own: its prediction is the median of what
the profiles' baselines say.
error = predicted / measured − 1, of tokens per second; spread = (longest − shortest) / median of the repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

Evidence = Mapping[str, Any]
Predict = Callable[[Evidence, Mapping[str, Any], str], Mapping[str, Any]]
GOOD, FAIR = 0.10, 0.15  # errors
NAMES = ("checkpoint", "workload", "as run")
CARRIED = ("shares", "baseline_shares", "estimated", "by_m")  # of a prediction: why it says what it says


def forecast(evidence: Evidence, config: Mapping[str, Any], ran: str) -> Mapping[str, Any]:
    """An entry of a profile's `workloads`, for any workload as it is written."""
    from quantpub.forecast import Forecast
    from quantpub.workloads import parse

    return Forecast(evidence, config).workload(parse(ran), evidence["engine"]["runs"])


def profiles(folder: Path, names: Sequence[str], config: Path | None) -> dict[str, tuple[Evidence, Mapping[str, Any]]]:
    """name → its profile and the model's configuration, for those that have a profile."""
    found = {}
    for name in names:
        places = (folder / name / ".quantpub" / "profile.json", folder / f"{name}.json")
        if path := next((place for place in places if place.is_file()), None):
            configs = (folder / name / "config.json", folder / "config.json", *([config] if config else []))
            shape = next((each for each in configs if each.is_file()), None)
            found[name] = json.loads(path.read_text()), json.loads(shape.read_text()) if shape else {}
    return found


def merged(benches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One of several: the runs of a checkpoint after one another."""
    checkpoints: dict[str, Any] = {}
    for name, found in (item for bench in benches for item in bench["checkpoints"].items()):
        known = checkpoints.setdefault(name, {**found, "workloads": []})
        known["workloads"] = [*known["workloads"], *found["workloads"]]
    return {"made_by": benches[0]["made_by"], "checkpoints": checkpoints}


def joined(bench: Mapping[str, Any], known: Mapping[str, Any], base: str, predict: Predict) -> list[dict[str, Any]]:
    """One row for each run of each checkpoint. What cannot be predicted says why."""
    checkpoints = bench["checkpoints"]
    of_base = {run["ran"]: run for run in checkpoints.get(base, {}).get("workloads", ())}
    rows = []
    for name, found in checkpoints.items():
        for run in found["workloads"]:
            said = prediction(name == base, known, name, run["ran"], predict)
            rows.append(row(name, run, said, of_base.get(run["ran"])))
    return rows


def prediction(is_base: bool, known: Mapping[str, Any], name: str, ran: str, predict: Predict) -> dict[str, Any]:
    asked = list(known.values()) if is_base else [known[name]] if name in known else []
    if not asked:
        return {"missing": "no profile"}
    try:
        said = [predict(evidence, config, ran) for evidence, config in asked]
    except (KeyError, ValueError, TypeError, AssertionError) as error:
        return {"missing": f"{type(error).__name__}: {error}"}
    baseline = statistics.median(one["baseline_seconds"] for one in said)
    own = baseline if is_base else said[0]["seconds"]
    return {"seconds": own, "baseline": baseline} | {key: said[0][key] for key in CARRIED if key in said[0]}


def row(name: str, run: Mapping[str, Any], said: Mapping[str, Any], base: Mapping[str, Any] | None) -> dict[str, Any]:
    found = {
        **{"checkpoint": name, "workload": run["workload"], "ran": run["ran"], "scaled": run["scaled"]},
        **{"measured_s": run["median_s"], "repeats": len(run["seconds"]), "spread": run["spread"]},
        "measured_tokens_per_s": run["total_tokens_per_s"],
        "measured_speedup": round(base["median_s"] / run["median_s"], 4) if base else None,
    }
    if "missing" in said:
        return found | {"missing": said["missing"]}
    return found | {
        "predicted_s": round(said["seconds"], 4),
        "predicted_tokens_per_s": round(run["total_tokens_per_s"] * run["median_s"] / said["seconds"], 1),
        "predicted_speedup": round(said["baseline"] / said["seconds"], 4),
        "error": round(run["median_s"] / said["seconds"] - 1, 4),
        "prediction": {key: said[key] for key in CARRIED if key in said},
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    errors = [abs(row["error"]) for row in rows if "error" in row]
    return {
        "runs": len(rows),
        "predicted": len(errors),
        "within_10_percent": sum(error <= GOOD for error in errors),
        "within_15_percent": sum(error <= FAIR for error in errors),
        "largest_error": max(errors, default=None),
        "median_error": round(statistics.median(errors), 4) if errors else None,
    }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = [*NAMES, "measured tokens/s", "spread", "predicted tokens/s", "error", "speedup measured", "predicted"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(NAMES) + "---:|" * (len(heads) - len(NAMES))]
    return "\n".join([*lines, *(f"| {' | '.join(cells(row))} |" for row in rows)])


def cells(row: Mapping[str, Any]) -> list[str]:
    measured = [f"{row['measured_tokens_per_s']:,.0f}", f"{row['spread']:.1%}" if row["repeats"] > 1 else "one run"]
    own = times(row["measured_speedup"])
    names = [row["checkpoint"], row["workload"], row["ran"]]
    if "missing" in row:
        return [*names, *measured, row["missing"], "–", own, "–"]
    predicted = [f"{row['predicted_tokens_per_s']:,.0f}", f"{row['error']:+.1%}"]
    return [*names, *measured, *predicted, own, times(row["predicted_speedup"])]


def times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("bench")
    parser.add_argument("profiles", type=Path)
    parser.add_argument("--base", default="bf16")
    parser.add_argument("--config", type=Path)
    given = parser.parse_args()
    bench = merged([json.loads(Path(name).read_text()) for name in given.bench.split(",")])
    rows = joined(bench, profiles(given.profiles, list(bench["checkpoints"]), given.config), given.base, forecast)
    found = {"made_by": bench["made_by"], "summary": summary(rows), "rows": rows}
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(markdown(rows))
    print("\n" + json.dumps(found["summary"]))


if __name__ == "__main__":
    main()
