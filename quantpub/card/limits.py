"""What a reader must not conclude, derived from what the evidence lacks or says: the card's limitations."""

from __future__ import annotations

from typing import Any

Facts = dict[str, Any]


def limits(found: Facts) -> list[str]:
    """One sentence each, those on quality first."""
    return [*_quality_limits(found), *_speed_limits(found), *_other_limits(found)]


def _quality_limits(found: Facts) -> list[str]:
    quality = found["quality"]
    if quality is None:
        return ["Quality was not measured."]
    said = ["Quality was measured as closeness to the base model on one text; no task was scored."]
    if not quality["is_source"]:
        said.append(f"The quality figures are against `{quality['baseline']}`, not the checkpoint this was made from.")
    if left_out := ", ".join(quality["not_emulated"]):
        said.append(f"The quality figures leave the quantization of activations out for {left_out}.")
    return said


def _speed_limits(found: Facts) -> list[str]:
    speed = found["speed"]
    if speed is None:
        return ["Speed was not measured."]
    said = ["No speed on a GPU is claimed: the kernels were timed on a CPU."] if speed["on_cpu"] else []
    if speed["verdict"].get("gate") not in (None, "passed"):
        said.append(f"The speed gate of the recipe is {speed['verdict']['gate']}.")
    return [*said, *_gpu_limits(speed["gpu"])] if speed["gpu"] else said


def _gpu_limits(gpu: Facts) -> list[str]:
    said = [f"Kernels were timed on the {gpu['device']}; another GPU may run others."]
    if gpu["workloads"]:
        said.append("Speed in workloads is a forecast from measured kernels; this model was not served.")
    if gpu["tensor_parallel"] > 1:
        said.append(f"The GEMMs timed are those of one of {gpu['tensor_parallel']} GPUs, without their exchange.")
    return said


def _other_limits(found: Facts) -> list[str]:
    verified = found["verification"]
    said = [] if verified else ["The weights were not verified against the source."]
    if verified and verified["verdict"] != "passed":
        said.append(f"Verification is {verified['verdict']}: see below.")
    if unseen := [engine["title"].split(",")[0] for engine in found["engines"] if not engine["seen"]]:
        loads, whose = ("loads", "its") if len(unseen) == 1 else ("load", "their")
        said.append(f"That {' and '.join(unseen)} {loads} it rests on reading {whose} source, not on a run.")
    if not found["engines"]:
        said.append("No engine is known to load it.")
    refused = [n for n, why in found["tensor_parallel"].items() if why != "ok" and n != "1"]
    said += [f"Tensor parallelism over {', '.join(refused)} GPUs is not possible."] if refused else []
    said += [note["note"] for note in found["made"].get("notes", [])]
    return [*said, "What the base model's card says of its limits holds here too."]
