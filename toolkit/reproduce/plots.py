"""The figures, as the paper draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

mpl.use("agg")

COLOURS = {"test": "tab:blue", "robust": "tab:orange"}
LABELS = {"test": "test accuracy", "robust": "robust accuracy (PGD-20)"}
CLEAN, ATTACKED = "tab:blue", "tab:red"


def draw(document: Mapping[str, Any], path: Path) -> bool:
    """Draw what is known of a document; False, and no file, if there is nothing to draw."""
    embeddings = [panel["embedding"] for panel in document["panels"] if "file" in panel.get("embedding", {})]
    if embeddings:
        _draw_layouts(embeddings[0], path)
        return True
    curves = [
        (panel, curve)
        for panel in document["panels"]
        for curve in panel["curves"]
        if any(p["runs"] for p in curve["points"])
    ]
    if curves:
        _draw_curves(curves, path)
        return True
    cells = [
        (panel, cell) for panel in document["panels"] for cell in panel["cells"] if cell["in_paper"] and cell["runs"]
    ]
    if cells:
        _draw_cells(cells, path)
    return bool(cells)


def _draw_curves(curves: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], path: Path) -> None:
    figure = Figure(figsize=(4.6 * len(curves), 3.8), layout="constrained")
    panes = _axes(figure, len(curves))
    for axes, (panel, curve) in zip(panes, curves, strict=True):
        bits = curve["axis"] == "bits"
        points = sorted(curve["points"], key=lambda p: -p["x"] if bits else p["x"])
        places = np.arange(len(points))
        axes.set_xticks(places, [f"int{p['x']:g}" if bits else f"{p['x']:g}" for p in points])
        axes.set_xlim(-0.5, len(points) - 0.5)
        for name, colour in COLOURS.items():
            # what was not run is a gap, and what has no error no bar
            values = np.array([p["means"][name]["value"] if p["runs"] else np.nan for p in points])
            errors = [p["means"][name]["error"] if p["runs"] else None for p in points]
            bars = [np.nan if error is None else error for error in errors]
            axes.errorbar(places, values, yerr=bars, color=colour, marker="o", capsize=4, label=LABELS[name])
            single = [error is None for error in errors]
            label = f"{name}: one network"
            axes.plot(places[single], values[single], "o", color=colour, mfc="white", zorder=3, label=label)
        axes.set_title(f"{panel['title']}: {curve['title']}", fontsize=10)
        axes.set_xlabel("precision" if bits else curve["axis"])
        axes.set_ylabel("accuracy, %")
        axes.set_ylim(-2, 102)
        axes.grid(alpha=0.3)
    figure.legend(*panes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def _draw_cells(cells: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], path: Path) -> None:
    """Ours beside the paper's, one row a network."""
    figure = Figure(figsize=(11, 1.4 + 0.42 * len(cells)), layout="constrained")
    places = np.arange(len(cells))[::-1]
    for axes, name in zip(_axes(figure, 2), COLOURS, strict=True):
        for place, (_, cell) in zip(places, cells, strict=True):
            mean = cell["means"][name]
            axes.barh(place + 0.2, mean["value"], 0.38, xerr=mean["error"], color=COLOURS[name], capsize=3)
            if cell["paper"]:
                theirs = cell["paper"][name]
                axes.barh(place - 0.2, theirs["mean"], 0.38, xerr=theirs["error"], color="0.7", capsize=3)
        axes.barh(0, 0, color=COLOURS[name], label="ours")
        axes.barh(0, 0, color="0.7", label="paper")
        axes.set_xlim(0, 100)
        axes.set_xlabel(f"{LABELS[name]}, %")
        axes.grid(axis="x", alpha=0.3)
        axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
        axes.set_ylim(-0.6, len(cells) - 0.4)
        axes.set_yticks(places)
        names = [_row_name(panel, cell, cells) for panel, cell in cells]
        axes.set_yticklabels(names if name == "test" else [""] * len(names), fontsize=8)
    figure.savefig(path, dpi=150)


def _row_name(panel: Mapping[str, Any], cell: Mapping[str, Any], cells: Sequence[Any]) -> str:
    several = len({other["title"] for other, _ in cells}) > 1
    tuned = "no fine-tuning" if cell["column"] == "none" else f"{cell['column']} fine-tuning"
    return f"{panel['title'] + ': ' if several else ''}{cell['row']}; {tuned}"


def _draw_layouts(found: Mapping[str, Any], path: Path) -> None:
    """One row a network, one column a layer; clean and attacked images in one layout."""
    networks, layers = list(found["networks"]), ["input", *(name for name in found["layers"] if name != "input")]
    figure = Figure(figsize=(2.6 * len(layers), 2.5 * len(networks)), layout="constrained")
    grid = figure.subplots(len(networks), len(layers), squeeze=False)
    with np.load(found["file"], allow_pickle=False) as points:
        for row, network in zip(grid, networks, strict=True):
            for axes, layer in zip(row, layers, strict=True):
                layout = points[f"{network}|{layer}"]
                half = len(layout) // 2
                axes.scatter(*layout[:half].T, s=4, color=CLEAN, label="clean", alpha=0.6, linewidths=0)
                axes.scatter(*layout[half:].T, s=4, color=ATTACKED, label="attacked", alpha=0.6, linewidths=0)
                axes.set_xticks([])
                axes.set_yticks([])
                if network == networks[0]:
                    axes.set_title(layer, fontsize=10)
            row[0].set_ylabel(network, fontsize=9)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=2, markerscale=3)
    figure.savefig(path, dpi=130)


def _axes(figure: Figure, count: int) -> list[Axes]:
    return list(figure.subplots(1, count, squeeze=False)[0])
