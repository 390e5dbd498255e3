"""The front as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit.artifacts import Proportion
from toolkit.search.front import Limits, Point

INK, PALE, STAR = "#1f4e79", "#b8b8b8", "#c0392b"
TICKS = (1, 1.5, 2, 3, 4, 5, 7)
"""Of every power of ten, so that labels do not touch."""


def plot_front(
    path: Path,
    tried: Sequence[Point],
    bundles: Sequence[Point],
    limits: Limits,
    *,
    recommended: int | None,
    batch: int,
) -> None:
    """Write a PNG: accuracy, robust and clean, over latency.

    Args:
        path: the file.
        tried: all trials, with cheap evidence.
        bundles: those with full evidence.
        limits: the user's, drawn as lines.
        recommended: its trial.
        batch: size at which latency was measured.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    _panel(panels[0], "robust", tried, bundles, recommended, limits.min_robust)
    _panel(panels[1], "clean", tried, bundles, recommended, limits.min_accuracy)
    for panel in panels:
        panel.set_xlabel(f"milliseconds per call, batch {batch}")
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=TICKS))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter("{x:.3g}")
        panel.grid(True, color="#ececec", linewidth=0.6)
        panel.set_axisbelow(True)
        if limits.max_latency is not None:
            panel.axvline(limits.max_latency, color=STAR, linestyle="--", linewidth=1)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _panel(
    panel: Any,
    what: str,
    tried: Sequence[Point],
    bundles: Sequence[Point],
    recommended: int | None,
    least: float | None,
) -> None:
    panel.set_ylabel(f"{what} accuracy of the deployed graph, %")
    panel.scatter(
        [point.milliseconds for point in tried],
        [100 * _share(point, what).value for point in tried],
        s=18,
        color=PALE,
        label="tried (validation images, quick attacks; timed alone, not beside the bundles)",
    )
    for number, point in enumerate(bundles):
        share, best = _share(point, what), point.trial == recommended
        panel.errorbar(
            point.milliseconds,
            100 * share.value,
            yerr=[[100 * max(0.0, share.value - share.low)], [100 * max(0.0, share.high - share.value)]],
            fmt="*" if best else "o",
            markersize=14 if best else 6,
            color=STAR if best else INK,
            capsize=2,
            linewidth=1,
            label=_label(number, bundles, recommended, best=best),
        )
        panel.annotate(
            str(point.trial),
            (point.milliseconds, 100 * share.value),
            xytext=(6, 6),
            textcoords="offset points",
            fontsize=8,
        )
    if least is not None:
        panel.axhline(100 * least, color=STAR, linestyle="--", linewidth=1)


def _label(number: int, bundles: Sequence[Point], recommended: int | None, *, best: bool) -> str:
    """One entry of the legend for the recommended bundle, and one for all others."""
    if best:
        return "recommended"
    first = next(index for index, point in enumerate(bundles) if point.trial != recommended)
    return "bundle (evaluation images, 95 % interval)" if number == first else "_"


def _share(point: Point, what: str) -> Proportion:
    return point.robust if what == "robust" else point.clean
