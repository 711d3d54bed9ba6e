"""Figures of the report: a forest plot, a curve plot, a confusion matrix and a stack of pictures.

Drawn without pyplot, so without global state: the same input gives the same bytes. Colours are
those of Okabe and Ito, which the colour-blind can tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from emadapt.files import whole_file, write_figure

ORANGE, BLUE, GREEN, PINK = "#E69F00", "#0072B2", "#009E73", "#CC79A7"
LIGHT_BLUE, RED, GREY, BLACK = "#56B4E9", "#D55E00", "#8C8C8C", "#000000"
LINES = (BLUE, ORANGE, GREEN, BLACK, PINK, LIGHT_BLUE, RED, GREY)
MARKERS = "os^Dv"


class Row(NamedTuple):
    """A line of a forest plot: a value and its 95 % interval."""

    name: str
    value: float
    ci95: Sequence[float]
    colour: str


class Line(NamedTuple):
    """A line of a curve plot; its points are x, y, 95 % interval and whether it is hollow."""

    name: str  # for the legend; the same name looks the same in every panel
    points: Sequence[tuple[float, float, Sequence[float], bool]]


class Panel(NamedTuple):
    """Lines that share axes."""

    title: str
    xlabel: str
    lines: Sequence[Line]


def forest_png(
    path: Path,
    panels: Mapping[str, Sequence[Row]],
    xlabel: str,
    legend: Mapping[str, str],
    *,
    zero: bool = False,
) -> None:
    """Write values with intervals: a panel of rows by title, a legend of words by colour.

    With `zero` the values are differences, and 0 is marked; else the axis is 0 to 1.
    """
    most = max(len(rows) for rows in panels.values())
    names = [name for rows in panels.values() for name, *_ in rows]
    width = 1.2 + 0.075 * max(map(len, names)) + 3.0
    size = (width * len(panels), 1.3 + 0.3 * most)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, rows) in zip(row, panels.items(), strict=True):
        for y, (_, value, ends, colour) in enumerate(rows):
            axes.plot(ends, [y, y], color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot(value, y, "o", color=colour, markersize=7, markeredgecolor="white")
            text = f"{value:+.3f}" if zero else f"{value:.3f}"
            where = axes.get_yaxis_transform()  # x from 0 to 1 across the panel
            axes.text(1.02, y, text, transform=where, va="center", fontsize=8)
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=8.5)
        axes.set_ylim(most - 0.4, -0.6)
        if zero:
            axes.axvline(0, color="0.5", linewidth=1)
        else:
            axes.set_xlim(0, 1)
        _plain(axes, title, xlabel, "x")
    handles = [
        Line2D([], [], color=colour, marker="o", markeredgecolor="white", label=words)
        for colour, words in legend.items()
    ]
    _legend(figure, handles)
    write_figure(path, figure)


def curves_png(path: Path, panels: Sequence[Panel], ylabel: str, hollow: str) -> None:
    """Write lines of values, 0 to 1, over a logarithmic x; `hollow` says what such points are."""
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    looks = {
        name: (LINES[at % len(LINES)], MARKERS[at % len(MARKERS)]) for at, name in enumerate(names)
    }
    size = (0.8 + 4.8 * len(panels), 4.2)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(row, panels, strict=True):
        for line in panel.lines:
            colour, marker = looks[line.name]
            axes.plot([x for x, *_ in line.points], [y for _, y, *_ in line.points], color=colour)
            for x, y, ends, is_hollow in line.points:
                axes.plot([x, x], ends, color=colour, linewidth=1.2, alpha=0.7)
                inside = "white" if is_hollow else colour
                axes.plot(x, y, marker, color=inside, markeredgecolor=colour, markersize=7)
        places = sorted({x for line in panel.lines for x, *_ in line.points})
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks(places, [f"{x:g}" for x in places])
        _plain(axes, panel.title, panel.xlabel, "both")
    row[0].set_ylim(0, 1)
    row[0].set_ylabel(ylabel)
    handles = [
        Line2D([], [], color=colour, marker=marker, label=name)
        for name, (colour, marker) in looks.items()
    ]
    handles += [Line2D([], [], color="white", linestyle="", marker="o", mec="black", label=hollow)]
    _legend(figure, handles)
    write_figure(path, figure)


def confusion_png(path: Path, counts: Sequence[Sequence[int]], names: Sequence[str]) -> None:
    """Write a confusion matrix: of the pixels of each label, the share of each prediction."""
    shares = np.asarray(counts) / np.maximum(np.sum(counts, 1, keepdims=True), 1)
    side = 1.8 + 0.75 * len(names)
    figure = Figure(figsize=(side + 0.6, side), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (y, x), share in np.ndenumerate(shares):
        colour = "white" if share > 0.5 else "black"
        axes.text(x, y, f"{100 * share:.1f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8.5)
    axes.set_yticks(range(len(names)), names, fontsize=8.5)
    axes.set_xlabel("predicted")
    axes.set_ylabel("labelled")
    axes.set_title("% of the labelled pixels", fontsize=10)
    write_figure(path, figure)


def stack_jpg(path: Path, pictures: Sequence[Path]) -> None:
    """Write pictures below each other as one JPEG, which suits micrographs."""
    images = [Image.open(picture).convert("RGB") for picture in pictures]
    width = max(image.width for image in images)
    stack = Image.new("RGB", (width, sum(image.height for image in images)), "white")
    tops = np.cumsum([0, *(image.height for image in images)])
    for image, top in zip(images, tops[:-1], strict=True):
        stack.paste(image, (0, int(top)))
    with whole_file(path) as temporary:
        stack.save(temporary, "JPEG", quality=85, optimize=True)


def _legend(figure: Figure, handles: list[Line2D]) -> None:
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)


def _plain(axes: Axes, title: str, xlabel: str, grid: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel)
    axes.locator_params(axis="x", nbins=6)  # more labels of small differences would overlap
    axes.grid(axis=grid, color="0.9")  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
