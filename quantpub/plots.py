"""The card's plots, drawn from evidence files alone: the same evidence gives the same bytes.

Each plot carries the digest of the figures it shows, so that a plot of older evidence is found out.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quantpub import findings
from quantpub.files import sha256_json

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#9c6b4e")
MARKERS = "osD^vP"
INK, GRID = "#333333", "#dddddd"
FORMS = ("png", "svg")
SIZE = (7.0, 3.6)  # inches
WIDE = 8  # speedups that span more than this factor are drawn on a logarithmic axis
DENSE, AS_RUN = "dequantized", "as the engine runs them"
STYLE = {"svg.hashsalt": "quantpub", "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 9}
Evidence = Mapping[str, Any]
Line = list[tuple[int, float]]  # (M, speedup), by M


def on_gpu(profile: Evidence) -> bool:
    return profile.get("device_class") == "cuda"


def engines(profile: Evidence) -> list[str]:
    """The kernels that the serving engine would run, each once."""
    return list(dict.fromkeys((profile.get("engine") or {}).get("runs", {}).values()))


def labels(profile: Evidence, kernels: Iterable[str]) -> dict[str, str]:
    """kernel → its name with what it is here, as tables and legends call it."""
    mine = engines(profile)
    repacked = {kernel["name"] for kernel in profile.get("kernels", []) if kernel.get("repacked")}
    return {k: f"{k} (the engine's)" if k in mine else f"{k} (repacked)" if k in repacked else k for k in kernels}


def speedups(profile: Evidence) -> dict[str, Line]:
    """kernel → (M, speedup of the whole model's GEMMs), by M.

    On a GPU the engine's kernel comes first; where it runs several, AS_RUN is all of them together.
    """
    found: dict[str, Line] = {}
    for total in profile.get("totals", []):
        found.setdefault(total["kernel"], []).append((total["m"], total["speedup"]))
    return _shown({AS_RUN: as_run(profile), **found}, profile)


def as_run(profile: Evidence) -> Line:
    """All GEMMs, each on the kernel that the engine runs for it; nothing where that is one kernel, which has totals."""
    runs = (profile.get("engine") or {}).get("runs", {})
    counts, cells = {gemm["name"]: gemm["count"] for gemm in profile.get("gemms", [])}, dict[int, list[Any]]()
    for row in profile.get("rows", []) if len(engines(profile)) > 1 else ():
        if runs.get(row["gemm"]) == row["kernel"]:
            cells.setdefault(row["m"], []).append((counts[row["gemm"]], row))
    whole = {m: cell for m, cell in cells.items() if len(cell) == len(counts)}
    return [(m, findings.total(AS_RUN, m, cell)["speedup"]) for m, cell in whole.items()]


def layers(profile: Evidence) -> dict[str, dict[str, Line]]:
    """GEMM → kernel → (M, speedup), by M."""
    found: dict[str, dict[str, Line]] = {}
    for row in profile.get("rows", []):
        found.setdefault(row["gemm"], {}).setdefault(row["kernel"], []).append((row["m"], row["speedup"]))
    panels = {gemm: _shown(lines, profile) for gemm, lines in found.items()}
    return {gemm: lines for gemm, lines in panels.items() if lines}


def _shown(lines: Mapping[str, Line], profile: Evidence) -> dict[str, Line]:
    """On a GPU the engine's own first, and not the dense copy, which is the baseline again."""
    names = list(lines)
    if on_gpu(profile):
        own = [AS_RUN, *engines(profile)]
        names = [k for k in own if k in lines] + [k for k in lines if k not in (*own, DENSE)]
    return {kernel: sorted(lines[kernel]) for kernel in names if lines[kernel]}


def sqnr(verify: Evidence) -> list[float]:
    return [entry["sqnr_db"] for entry in verify.get("per_tensor", [])]


@dataclass(frozen=True)
class Plot:
    """A plot that the evidence has figures for. digest: of those figures, carried by the files."""

    name: str
    digest: str
    draw: Callable[[], Any]

    @property
    def names(self) -> list[str]:
        return [f"{self.name}.{form}" for form in FORMS]

    def files(self) -> dict[str, bytes]:
        """File name → bytes, as .png and .svg."""
        return _files(self.name, self.draw(), self.digest)


def plots(profile: Evidence | None, verify: Evidence | None) -> list[Plot]:
    """The plots that are due. Nothing is drawn yet."""
    due = []
    if profile and (lines := speedups(profile)):
        due.append(Plot("speedup", _digest(lines, lines, profile), lambda: draw_speedup(lines, profile)))
    if profile and (panels := layers(profile)):
        kernels = _kernels(panels)
        due.append(Plot("layers", _digest(panels, kernels, profile), lambda: draw_layers(panels, profile)))
    if verify and (ratios := sqnr(verify)):
        due.append(Plot("sqnr", sha256_json(ratios), lambda: draw_sqnr(ratios)))
    return due


def _digest(figures: object, kernels: Iterable[str], profile: Evidence) -> str:
    """Of everything that a reader sees: figures, names, baseline and device."""
    return sha256_json([figures, labels(profile, kernels), _baseline(profile), _device(profile)])


def draw_speedup(lines: Mapping[str, Line], profile: Evidence) -> Any:
    """Speedup over the baseline against the tokens in a batch, a line a kernel; below 1 is slower."""
    (axes,) = _panels(1, 1)
    _lines(axes, lines, list(lines), profile, 14)
    _speedup_axis([axes], [lines])
    axes.set_xlabel("M, tokens in a batch")
    axes.set_ylabel(f"speedup over {_baseline(profile)}")
    axes.set_title(f"All GEMMs of the model, on the {_device(profile)}", loc="left")
    axes.legend(frameon=False)
    return axes.figure


def draw_layers(panels: Mapping[str, Mapping[str, Line]], profile: Evidence) -> Any:
    """A panel a GEMM, on one scale; a kernel has one colour in all of them."""
    columns = min(2, len(panels))
    grid = _panels(-(-len(panels) // columns), columns)
    kernels, figure = _kernels(panels), grid[0].figure
    for axes, (gemm, lines) in zip(grid, panels.items(), strict=False):
        _lines(axes, lines, kernels, profile, 14 // columns)
        axes.set_title(gemm, loc="left")
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    _speedup_axis(grid, list(panels.values()))
    handles = {label: line for axes in grid for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), frameon=False, ncols=3, loc="outside upper center")
    figure.supxlabel("M, tokens in a batch", fontsize="medium")
    figure.supylabel(f"speedup over {_baseline(profile)}, on the {_device(profile)}", fontsize="medium")
    return figure


def _kernels(panels: Mapping[str, Mapping[str, Line]]) -> list[str]:
    return list(dict.fromkeys(kernel for lines in panels.values() for kernel in lines))


def _baseline(profile: Evidence) -> str:
    return str(profile.get("baseline", {}).get("name", "baseline"))


def _device(profile: Evidence) -> str:
    gpu = profile.get("made_by", {}).get("device", {}).get("gpu")
    return gpu["name"] if gpu and on_gpu(profile) else "CPU"


def _lines(axes: Any, lines: Mapping[str, Line], kernels: list[str], profile: Evidence, ticks: int) -> None:
    """Speedup over M on a logarithmic axis, a line a kernel. kernels: all that have a colour. ticks: labels at most."""
    mine, names = {AS_RUN, *engines(profile)}, labels(profile, kernels)
    for kernel, points in lines.items():
        i = kernels.index(kernel)
        axes.plot(
            *zip(*points, strict=True),
            label=names[kernel],
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=4,
            linewidth=2.2 if kernel in mine else 1.5,
            zorder=3 if kernel in mine else 2,
        )
    axes.axhline(1, color=INK, linewidth=1, linestyle="--", label=f"{_baseline(profile)} = 1")
    axes.set_xscale("log", base=2)
    sizes = spread(sorted({m for points in lines.values() for m, _ in points}), ticks)
    axes.set_xticks(sizes, [str(m) for m in sizes])


def spread(sizes: list[int], most: int) -> list[int]:
    """Those that can be labelled on a logarithmic axis with room for `most`; powers of 2 have their place first."""
    apart, kept = math.log2(max(sizes) / min(sizes)) / most, list[int]()
    for size in sorted(sizes, key=lambda m: (m & (m - 1) > 0, m)):
        if all(abs(math.log2(size / other)) > apart for other in kept):
            kept.append(size)
    return sorted(kept)


def _speedup_axis(grid: list[Any], panels: Iterable[Mapping[str, Line]]) -> None:
    """From 0; logarithmic where the ratios, that of the baseline among them, span more than WIDE."""
    values = [1.0, *(value for lines in panels for points in lines.values() for _, value in points)]
    low, high = min(values), max(values)
    for axes in grid:
        if high <= WIDE * low:
            axes.set_ylim(0, 1.05 * high)
            continue
        axes.set_yscale("log", base=2)
        powers = range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
        axes.set_ylim(2.0 ** powers[0], 2.0 ** powers[-1] * 1.1)
        axes.set_yticks([2.0**p for p in powers], [f"{2**p}" if p >= 0 else f"1/{2**-p}" for p in powers])


def draw_sqnr(values: list[float]) -> Any:
    """How many tensors reached which signal-to-quantization-noise ratio, and their median."""
    from matplotlib.ticker import MaxNLocator

    (axes,) = _panels(1, 1)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.hist(values, bins=min(24, max(4, len(values) // 2)), color=COLOURS[0], edgecolor="white", linewidth=0.5)
    middle = statistics.median(values)
    axes.axvline(middle, color=INK, linewidth=1, linestyle="--", label=f"median {middle:.1f} dB")
    axes.set_xlabel("SQNR of a tensor, dB")
    axes.set_ylabel("tensors")
    axes.set_title("Quantized weights against the source", loc="left")
    axes.legend(frameon=False)
    return axes.figure


def _panels(rows: int, columns: int) -> list[Any]:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        height = SIZE[1] if rows == 1 else 2.6 * rows
        figure = Figure(figsize=(SIZE[0], height), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
    return list(grid.flat)


def _files(name: str, figure: Any, figures_digest: str) -> dict[str, bytes]:
    """The figure in both formats. No date and no version of the drawing library goes into them."""
    import matplotlib

    metadata = {
        "png": {"Software": "quantpub", "Description": figures_digest},
        "svg": {"Creator": "quantpub", "Date": None, "Description": figures_digest},
    }
    files = {}
    for form, entries in metadata.items():
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            figure.savefig(buffer, format=form, dpi=150, metadata=entries)
        files[f"{name}.{form}"] = buffer.getvalue()
    return files
