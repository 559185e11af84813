"""From evidence files to what the card's template shows. A figure that is in no evidence file has no way onto a card.

Evidence of another version may lack a key: what is absent is left out, never filled in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantpub.artifact import Artifact
from quantpub.card.calibration import calibration
from quantpub.card.components import Component, Use, activation_words, components, precision, scheme_names, uses
from quantpub.card.limits import limits
from quantpub.card.lineage import base_bytes, base_name, lineage, lineage_rows, size_of_weights
from quantpub.card.speed import speed
from quantpub.card.words import made_by, size
from quantpub.decode import Decoder
from quantpub.errors import InputError
from quantpub.kernel_tables import basis, hardware_rows, loaded
from quantpub.plots import sqnr
from quantpub.scheme import ActFormat
from quantpub.targets import TARGETS, unloadable

STAGES = ("verify", "profile", "eval")
LICENCE_KEYS = ("license", "license_name", "license_link")
LICENCE_FILES = ("license", "licence", "notice", "use_policy")
Facts = dict[str, Any]


def facts(artifact: Artifact, repo_id: str | None) -> Facts:
    """Everything the template needs. Errors: InputError when an evidence file is damaged."""
    run = artifact.run()
    evidence = {stage: read(artifact, stage) for stage in STAGES}
    decoder = Decoder(artifact)
    parts, used = components(artifact, decoder), uses(decoder)
    source, made, repacked = run["source"], run["stages"]["quantize"], lineage(run)
    name = repo_id.split("/")[-1] if repo_id else _name(run, repacked)
    found = {
        "name": name,
        "reference": repo_id or f"./{name}",
        "repo_id": repo_id,
        "run": run,
        "source": source,
        "repacked": repacked,
        "base": source.get("base_model") or (base_name(source) if "quantized_by" not in source else None),
        "front": front_matter(artifact, run, used),
        "schemes": list(scheme_names(used).values()),
        "summary": summary(artifact, run, made, used, repacked),
        "components": [_component(part) for part in parts],
        "engines": engines(run, used),
        "purpose": ["For"] if len(used) > 1 else [],
        "tensor_parallel": made.get("tensor_parallel", {}),
        "recipe": (artifact.meta / "recipe.yaml").read_text("utf-8").rstrip(),
        "made": made,
        "calibration": calibration(artifact),
        "quality": quality(evidence["eval"]),
        "speed": speed(evidence["profile"]),
        "verification": verification(evidence["verify"]),
        "licence": {key: source[key] for key in LICENCE_KEYS if source.get(key)},
        "licence_files": [f for f in artifact.files() if f.lower().startswith(LICENCE_FILES)],
    }
    return found | {"headline": headline(found), "limits": limits(found)}


def read(artifact: Artifact, stage: str) -> Facts | None:
    """The evidence of a stage, or None where it was not run. Errors: InputError when it names no maker."""
    if not artifact.has(f"{stage}.json"):
        return None
    evidence = artifact.read_json(f"{stage}.json")
    if not evidence.get("made_by"):
        raise InputError(
            "it does not say what made it: no figure of it can be on a card",
            where=str(artifact.meta / f"{stage}.json"),
            next=f"run `quantpub {stage}` again",
        )
    return evidence


def _name(run: Mapping[str, Any], repacked: Facts | None) -> str:
    """Of a card without a Hub id: the model's and the recipe's; of repacked weights the layout's too."""
    base, layout = base_name(run["source"]).split("/")[-1], f"-{run['layout']}" if repacked else ""
    return f"{base}{layout}" if repacked and repacked["by"] else f"{base}-{run['recipe']}{layout}"


def front_matter(artifact: Artifact, run: Mapping[str, Any], used: Sequence[Use]) -> Facts:
    """The metadata the Hub reads, in a fixed order, known values only: nothing is guessed, a licence least of all."""
    source, config = run["source"], artifact.config()
    method = (config.get("quantization_config") or {}).get("quant_method")
    tags = [
        "quantized",
        *(use.scheme.name.lower().replace("_", "-") for use in used),
        *(use.scheme.weight.num.split("_")[0] for use in used),
        method,
        *(engine for engine in run.get("engines", []) if engine != "transformers"),
    ]
    base = source.get("base_model") or source.get("repo")
    on_hub = {"base_model": base, "base_model_relation": "quantized"} if base else {}
    copied = {key: source[key] for key in (*LICENCE_KEYS, "language") if source.get(key)}
    return {
        **on_hub,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **copied,
        "tags": list(dict.fromkeys(tag for tag in tags if tag)),
    }


def summary(
    artifact: Artifact, run: Facts, made: Facts, used: Sequence[Use], repacked: Facts | None
) -> list[tuple[str, str]]:
    """The table at the top, as (label, value)."""
    config = artifact.config().get("quantization_config") or {}
    rows = [("Base model", _base(run["source"])), *lineage_rows(repacked), *_scheme_rows(used)]
    if used:
        rows += [("Bits per quantized weight, scales included", f"{made['bits_per_quantized_weight']:.3f}")]
    rows += [
        ("KV cache", "not quantized" if config.get("kv_cache_scheme") is None else "quantized"),
        ("Format", _format(config, run, used)),
        ("Parameters", f"{made['parameters']:,}, of which {made['quantized_parameters']:,} quantized"),
        ("Bits per parameter, whole checkpoint", f"{made['bits_per_weight']:.3f}"),
        ("Size of the weights", size_of_weights(made, repacked)),
    ]
    return rows


def _scheme_rows(used: Sequence[Use]) -> list[tuple[str, str]]:
    """The schemes in use, and of each its weights and its activations."""
    names = scheme_names(used)
    rows = [("Scheme" if len(names) == 1 else "Schemes", " and ".join(names.values()) or "nothing is quantized")]
    for scheme, name in names.items():
        weights, activations = precision(scheme)
        one = len(names) == 1
        rows += [("Weights of quantized layers" if one else f"Weights of {name} layers", weights)]
        rows += [("Activations there" if one else f"Activations of {name} layers", activations)]
    return rows


def _format(config: Mapping[str, Any], run: Mapping[str, Any], used: Sequence[Use]) -> str:
    form = next((f" `{config[key]}`" for key in ("format", "quant_algo", "version") if config.get(key)), "")
    layouts = list(dict.fromkeys(use.layout for use in used)) or [run["layout"]]
    named = " and ".join(f"`{layout}`" for layout in layouts)
    return f"{config.get('quant_method')}{form} (quantpub layout{'s' * (len(layouts) > 1)} {named})"


def _base(source: Mapping[str, Any]) -> str:
    if "quantized_by" in source:
        stated = source.get("base_model")
        return f"`{stated}`, as the card of what it was repacked from says" if stated else "not stated by its makers"
    if source["kind"] == "hub":
        return f"`{source['repo']}` at commit `{source['commit'][:7]}`"
    return f"`{source['name']}`, a local checkpoint"


def _component(part: Component) -> Facts:
    shapes = ", ".join("×".join(map(str, shape)) for shape in sorted(part.shapes))
    return {
        "name": part.name,
        "count": part.count,
        "shapes": shapes,
        "parameters": f"{part.parameters:,}",
        "weights": part.weights,
        "activations": part.activations,
    }


def engines(run: Mapping[str, Any], used: Sequence[Use]) -> list[Facts]:
    """The engines that run.json names: for each kind of weights versions, how that is known, and kernels by GPU."""
    names = [name for name in run.get("engines", []) if name in TARGETS]
    return [_engine(name, used) for name in names if not any(unloadable(name, *use.kind) for use in used)]


def _engine(name: str, used: Sequence[Use]) -> Facts:
    target = TARGETS[name]
    words = {use: [_purpose(use, used)] if len(used) > 1 else [] for use in used}
    return {
        "id": name,
        "title": target.summary,
        "seen": bool(loaded(name, [use.kind for use in used])),
        "needs": list(dict.fromkeys(package for use in used for package in target.loads[use.layout].needs)),
        "loads": [[*words[use], target.loads[use.layout].versions, basis(name, use.kind)] for use in used],
        "kernels": [[*words[use], *row] for use in used for row in hardware_rows(name, *use.kind)],
    }


def _purpose(use: Use, used: Sequence[Use]) -> str:
    """What a row is for. A scheme can have two layouts in no checkpoint: `treatments._beside`."""
    return scheme_names(used)[use.scheme] + (", experts" if use.experts else "")


def measured(figure: Mapping[str, Any], digits: int, scale: float = 1, unit: str = "") -> str:
    """A mean with its standard error."""
    mean, stderr = figure["mean"] * scale, figure.get("stderr")
    return f"{mean:.{digits}f}{unit}" + ("" if stderr is None else f" ± {stderr * scale:.{digits}f}{unit}")


def quality(evidence: Mapping[str, Any] | None) -> Facts | None:
    """The rows of the quality table, and how they were measured."""
    if evidence is None:
        return None
    perplexity, rows = evidence.get("perplexity", {}), []
    if {"base", "artifact"} <= set(perplexity):
        rows.append(("Perplexity", measured(perplexity["base"], 4), measured(perplexity["artifact"], 4)))
    if "ratio" in perplexity:
        rows.append(("Perplexity, relative to the base", "–", measured(perplexity["ratio"], 4)))
    if "kl" in evidence:
        rows.append(("KL to the base, nats per token", "–", measured(evidence["kl"], 5)))
    if "top1" in evidence:
        rows.append(("Same first choice as the base", "–", measured(evidence["top1"], 2, 100, " %")))
    act, baseline = evidence.get("activations", {}), evidence.get("baseline", {})
    return {
        "rows": rows,
        "kl": evidence.get("kl"),
        "verdict": evidence.get("verdict", {}),
        "data": evidence.get("data", {}),
        "made_by": made_by(evidence),
        "settings": evidence.get("made_by", {}).get("settings", {}),
        "rounded": [activation_words(ActFormat(**one)) for one in act.get("quantized") or ()],
        "not_emulated": act.get("not_emulated", []),
        "baseline": base_name(baseline),
        "is_source": baseline.get("is_source", False),
    }


def verification(evidence: Mapping[str, Any] | None) -> Facts | None:
    if evidence is None:
        return None
    tensors = evidence.get("tensors", {})
    return {
        "checks": evidence.get("checks", []),
        "verdict": evidence.get("verdict"),
        "made_by": made_by(evidence),
        "compared": tensors.get("compared"),
        "sqnr": tensors.get("sqnr_db"),
        "plot": bool(sqnr(evidence)),
    }


def headline(found: Facts) -> str:
    """One sentence of measured figures."""
    made, kind, repacked = found["made"], " and ".join(found["schemes"]), found["repacked"]
    base = base_bytes(made, repacked)
    said = [
        f"{made['bits_per_weight']:.2f} bits per parameter",
        f"{size(made['output_bytes'])} of weights" + ("" if base is None else f" in place of {size(base)}"),
    ]
    if found["quality"] and found["quality"]["kl"]:
        said.append(f"KL to the base {measured(found['quality']['kl'], 4)} nats per token")
    by = f"by {repacked['by']} " if repacked and repacked["by"] else ""
    how = f"quantized {by}to {kind}" if kind else "unquantized"
    how += f" and repacked as {found['run']['layout']}" if repacked else ""
    return f"`{found['base'] or base_name(found['source'])}` {how}: {', '.join(said)}."
