"""Results as people read them: short lines and tables on stdout."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from quantpub.hardware import GENERATIONS
from quantpub.output import Output

CALIBRATES = {
    "inputs": "scales of activations",
    "kv": "scales of the KV cache",
    "hessian": "Hessians of inputs",
    "transform": "smoothing",
}


def size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def name_of(source: dict[str, Any]) -> str:
    return f"{source['repo']}@{source['commit'][:7]}" if source["kind"] == "hub" else str(source["name"])


def show_names(out: Output, rows: dict[str, str]) -> None:
    width = max(map(len, rows), default=0)
    for name, summary in rows.items():
        out.line(f"{name:<{width}}  {summary}")


def show_repacked(out: Output, report: dict[str, Any]) -> None:
    proof = report["repack"]
    out.line(
        f"{report['artifact']}: {' and '.join(proof['from']['layouts'])} → {report['layout']}, {size(report['output_bytes'])}"
    )
    out.line(f"{proof['equal']} of {proof['modules']} linears are the same weights, bit for bit")
    if proof["rounded"]:
        out.line(f"global scales were rounded in float32's last place: by {proof['rounded']:.1g} at most")
    for conversion in proof["conversions"]:
        out.line(
            f"{conversion['note']}: {100 * proof['lost']['max']:.2g} % of the norm at most ({proof['lost']['worst']})"
        )


def show_plans(out: Output, plans: list[dict[str, Any]]) -> None:
    for facts in plans:
        _show_plan(out, facts)


def _show_plan(out: Output, facts: dict[str, Any]) -> None:
    schemes = " and ".join(facts["schemes"]) or facts["scheme"]
    out.line(f"{name_of(facts['model'])} → {facts['recipe']} ({schemes}) as {facts['layout']}")
    copied = ", ".join(f"{count} {role}" for role, count in facts["copied"].items())
    out.line(f"  tensors          {facts['quantized']} quantized, copied: {copied or 'none'}; {facts['shards']} shards")
    out.line(
        f"  size             {size(facts['source_bytes'])} → {size(facts['output_bytes'])} ({facts['output_bytes']} bytes)"
    )
    out.line(
        f"  bits per weight  {facts['bits_per_quantized_weight']} where quantized, {facts['bits_per_weight']} over all parameters"
    )
    if facts["calibrates"]:
        out.line(f"  calibration      needs data, for {', '.join(CALIBRATES[name] for name in facts['calibrates'])}")
    out.line(f"  peak memory      about {size(facts['peak_memory_bytes'])}")
    for degree, verdict in facts["tensor_parallel"].items():
        out.line(f"  tensor parallel  {degree}: {verdict}")
    for line in engine_lines({} if facts["rejected"] else facts["engines"]):
        out.line(f"  engines          {line}")
    for entry in facts["ignore_unmatched"]:
        out.line(f"  no effect        {entry} matches nothing that is quantized")
    if facts["left_behind"]:
        out.line(f"  left behind      {', '.join(facts['left_behind'])}")
    for names, reason in alike(facts["rejected"]):
        out.line(f"  rejected         {names}: {reason}")
    for line in kernel_lines(facts["kernels"]):
        out.line(f"  kernel           {line}")
    for line in alignment_lines(facts["kernels"]):
        out.line(f"  alignment        {line}")
    for note in facts["notes"]:
        out.line(f"  note             {note['note']} [{note['id']}]")
    if "actions" in facts:
        rows = [
            [
                a["as"],
                a["dtype"],
                "×".join(map(str, a["shape"])),
                a["action"],
                a["reason"] or ", ".join(f"{n.rpartition('.')[2]} {d}" for n, (d, _) in a["outputs"].items()),
            ]
            for a in facts["actions"]
        ]
        out.table("", ["tensor", "dtype", "shape", "action", "becomes, or why not"], rows)


def alike(rejected: dict[str, str]) -> list[tuple[str, str]]:
    """One line for what differs in numbers only: (name, how many more of its kind; reason of the first)."""
    found: dict[tuple[str, str], list[str]] = {}
    for tensor, reason in rejected.items():
        found.setdefault((re.sub(r"\d+", "*", tensor), re.sub(r"\.\d+\.", ".*.", reason)), []).append(tensor)
    return [
        (names[0] + (f" (and {len(names) - 1} of its kind)" if len(names) > 1 else ""), rejected[names[0]])
        for names in found.values()
    ]


def engine_lines(engines: dict[str, str]) -> list[str]:
    """Those that load it in one line, each other with what refuses it."""
    loading = [engine for engine, verdict in engines.items() if verdict == "ok"]
    refused = [f"not {engine}: {verdict}" for engine, verdict in engines.items() if verdict != "ok"]
    return [*([", ".join(loading)] if loading else []), *refused]


def kernel_lines(entries: list[dict[str, Any]]) -> list[str]:
    """One line for each engine, version and kind of weight: kernels, the GPUs that run them, and which were seen."""
    lines: dict[str, dict[str, list[str]]] = {}
    for e in entries:
        kind = f"{e['scheme']}{' experts' if e['experts'] else ''}"
        words = e["kernel"] or f"refused ({e['refused']})"
        gpu = e["gpu"] + ("*" if e["source"].startswith("seen") else "")
        lines.setdefault(f"{e['engine']} {e['version']}, {kind}", {}).setdefault(words, []).append(gpu)
    said = [
        f"{head}: {'; '.join(f'{words} on {_gpus(gpus)}' for words, gpus in outcomes.items())}"
        for head, outcomes in lines.items()
    ]
    return [*said, "* seen here; the others were read in the engine's source"] if any("*" in x for x in said) else said


def _gpus(names: list[str]) -> str:
    return "every GPU and the CPU" if len(names) == len(GENERATIONS) else " ".join(names)


def alignment_lines(entries: list[dict[str, Any]]) -> list[str]:
    """Of the kernels whose wants are known: which take every merged weight as it is, and of the others the first misfit."""
    judged = [entry for entry in entries if entry.get("aligned") is not None]
    lines = []
    for e in judged:
        if odd := e["misaligned"]:
            head = f"{e['kernel']}, {e['engine']} {e['version']}: {e['aligned']} of {e['gemms']} merged weights fit"
            lines.append(f"{head}; {odd['gemm']}: {odd['reason']}; {odd['effect']}")
    fitting = sorted({e["kernel"] for e in judged} - {e["kernel"] for e in judged if e["misaligned"]})
    return [*([f"every merged weight fits {', '.join(fitting)}"] if fitting else []), *dict.fromkeys(lines)]


def show_quantized(out: Output, reports: list[dict[str, Any]]) -> None:
    for report in reports:
        _show_quantized(out, report)


def _show_quantized(out: Output, report: dict[str, Any]) -> None:
    if not report["changed"]:
        out.line(f"nothing to do: {report['artifact']} is finished, and every shard has its sha256")
        return
    resumed = (
        f", {report['shards_resumed']} of {report['shards']} shards kept from an earlier run"
        if report["shards_resumed"]
        else ""
    )
    out.line(
        f"wrote {report['artifact']}: {report['quantized']} of {report['tensors']} tensors quantized, "
        f"{size(report['source_bytes'])} → {size(report['output_bytes'])}, {report['bits_per_weight']} bits a parameter{resumed}"
    )


def show_checks(out: Output, evidence: dict[str, Any]) -> None:
    for check in evidence["checks"]:
        out.line(f"  {check['status']:<8} {check['id']:<15}  {check['detail']}")
    if seen := evidence.get("engine"):
        out.line(f"  {seen['verdict']:<8} {seen['engine']:<15}  {seen['reason']}")
        for kernel, count in Counter(seen.get("kernels", {}).values()).items():
            out.line(f"           {'':<15}  {kernel}: {count} modules")
        for warning in seen.get("warnings", []):
            out.line(f"           {'':<15}  warning: {warning:.200}")
    out.line(f"verdict: {evidence['verdict']}")


def show_eval(out: Output, evidence: dict[str, Any]) -> None:
    def figure(value: dict[str, Any], digits: int) -> str:
        error = "" if value.get("stderr") is None else f" ± {value['stderr']:.{digits}f}"
        return f"{value['mean']:.{digits}f}{error}"

    artifact, base, ratio = (figure(evidence["perplexity"][key], 4) for key in ("artifact", "base", "ratio"))
    out.line(f"  perplexity  {artifact}, base {base}, ratio {ratio}")
    out.line(f"  KL to base  {figure(evidence['kl'], 5)} nats per token")
    out.line(f"  top-1       {figure(evidence['top1'], 4)} of the base's first choices")
    out.line(f"gate: {evidence['verdict']['gate']}: {evidence['verdict']['reason']}")


def show_published(out: Output, report: dict[str, Any], rehearsed: bool) -> None:
    where = "a Hub on this machine" if rehearsed else "the Hub"
    changed = "one commit" if report.get("changed") else "nothing changed"
    out.line(
        f"{report.get('repo')}: {changed} on {where}, {len(report.get('files', []))} files, commit {report.get('commit')}"
    )
    if report.get("verified"):
        out.line("  read back and compared: every file has the artifact's sha256")


def show_demo(out: Output, report: dict[str, Any], folder: Path) -> None:
    made, checked, quality = report["quantize"], report["verify"], report["eval"]
    ratio = quality["perplexity"]["ratio"]["mean"]
    sizes = f"{size(made['source_bytes'])} → {size(made['output_bytes'])}"
    out.line(f"  quantized  {sizes}, {made['quantized']} of {made['tensors']} tensors")
    out.line(f"  verified   {checked['verdict']}; worst tensor {checked['sqnr_db']['min']:.1f} dB SQNR")
    out.line(f"  profiled   gate {report['profile']['gate']}: {report['profile']['reason']}")
    out.line(
        f"  evaluated  KL {quality['kl']['mean']:.4f} nats per token, perplexity × {ratio:.4f}; gate {quality['verdict']['gate']}"
    )
    out.line(f"  rehearsed  {len(report['publish']['files'])} files in one commit, read back and compared")
    out.line()
    out.line(f"artifact  {folder}")
    out.line(f"card      {folder / 'README.md'}")
    out.line(f"plots     {folder / '.quantpub' / 'plots'}")
