"""The card's plots, drawn from evidence files alone: the same evidence gives the same bytes.

Each plot carries the digest of the figures it shows, so that a plot of older evidence is found out.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from quantpub.files import sha256_json

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#9c6b4e")
MARKERS = "osD^vP"
INK, GRID = "#333333", "#dddddd"
FORMS = ("png", "svg")
SIZE = (7.0, 3.6)  # inches
STYLE = {"svg.hashsalt": "quantpub", "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 9}


def speedups(profile: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """kernel → (M, speedup of the whole model's GEMMs), by M."""
    found: dict[str, list[tuple[int, float]]] = {}
    for total in profile.get("totals", []):
        found.setdefault(total["kernel"], []).append((total["m"], total["speedup"]))
    return {kernel: sorted(points) for kernel, points in found.items()}


def sqnr(verify: Mapping[str, Any]) -> list[float]:
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


def plots(profile: Mapping[str, Any] | None, verify: Mapping[str, Any] | None) -> list[Plot]:
    """The plots that are due. Nothing is drawn yet."""
    due = []
    if profile and (lines := speedups(profile)):
        shown = [lines, profile.get("baseline"), profile.get("device_class")]
        due.append(Plot("speedup", sha256_json(shown), lambda: draw_speedup(profile)))
    if verify and (ratios := sqnr(verify)):
        due.append(Plot("sqnr", sha256_json(ratios), lambda: draw_sqnr(ratios)))
    return due


def draw_speedup(profile: Mapping[str, Any]) -> Any:
    """Speedup over the baseline against the tokens in a batch, a line a kernel; below 1 is slower."""
    axes = _axes()
    for i, (kernel, points) in enumerate(speedups(profile).items()):
        axes.plot(
            *zip(*points, strict=True),
            label=kernel,
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=4,
            linewidth=1.5,
        )
    baseline = profile.get("baseline", {}).get("name", "baseline")
    ticks = sorted({m for points in speedups(profile).values() for m, _ in points})
    axes.axhline(1, color=INK, linewidth=1, linestyle="--", label=f"{baseline} = 1")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(m) for m in ticks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("M, tokens in a batch")
    axes.set_ylabel(f"speedup over {baseline}")
    axes.set_title(f"All GEMMs of the model, on the {profile.get('device_class', 'machine').upper()}", loc="left")
    axes.legend(frameon=False)
    return axes.figure


def draw_sqnr(values: list[float]) -> Any:
    """How many tensors reached which signal-to-quantization-noise ratio, and their median."""
    from matplotlib.ticker import MaxNLocator

    axes = _axes()
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.hist(values, bins=min(24, max(4, len(values) // 2)), color=COLOURS[0], edgecolor="white", linewidth=0.5)
    middle = statistics.median(values)
    axes.axvline(middle, color=INK, linewidth=1, linestyle="--", label=f"median {middle:.1f} dB")
    axes.set_xlabel("SQNR of a tensor, dB")
    axes.set_ylabel("tensors")
    axes.set_title("Quantized weights against the source", loc="left")
    axes.legend(frameon=False)
    return axes.figure


def _axes() -> Any:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


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
