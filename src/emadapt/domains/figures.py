"""Figures of `diagnose`: datasets on principal components, and distances."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from emadapt.data.splits import evenly_spaced
from emadapt.domains import pca
from emadapt.domains.features import Features
from emadapt.files import whole_folder, write_figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe and Ito
SHOWN_TOKENS = 700
Models = Mapping[str, Mapping[str, Features]]


def draw(folder: Path, title: str, models: Models, result: Mapping[str, Any]) -> None:
    """Write pca.png and distances.png under `folder`, of features and the JSON file."""
    with whole_folder(folder) as temporary:
        write_figure(temporary / "pca.png", pca_figure(title, models))
        write_figure(temporary / "distances.png", distances_figure(title, result))


def pca_figure(title: str, models: Models) -> Figure:
    """A row for each model: slices and tokens on the first two components, by dataset."""
    figure = Figure(figsize=(10, 0.6 + 4.2 * len(models)), dpi=100, layout="constrained")
    rows = figure.subplots(len(models), 2, squeeze=False)
    for (name, features), (left, right) in zip(models.items(), rows, strict=True):
        components, shares = pca.fit(features, 2)
        for number, f in enumerate(features.values()):
            colour, marker = COLOURS[number % len(COLOURS)], "os^D"[number // len(COLOURS) % 4]
            _scatter_slices(left, f, components, color=colour, marker=marker)
            _scatter_tokens(right, f, components, color=colour, marker=marker)
        left.set_title(f"{name}: one point per slice (mean token)", fontsize=10)
        right.set_title(f"{name}: up to {SHOWN_TOKENS} tokens per dataset", fontsize=10)
        left.legend(fontsize=8, frameon=False)
        for axes in (left, right):
            axes.set_xlabel(f"component 1 ({shares[0]:.0%} of the variance)", fontsize=9)
            axes.set_ylabel(f"component 2 ({shares[1]:.0%})", fontsize=9)
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
    rows[0, 1].legend(
        handles=[
            _dot("background token", markersize=3, color="0.5"),
            _dot("foreground token", markersize=5, color="0.7", markeredgecolor="black"),
        ],
        fontsize=8,
        frameon=False,
    )
    text = f"{title}: principal components of the last block's patch tokens"
    figure.suptitle(text, fontsize=11, weight="bold")
    return figure


def distances_figure(title: str, result: Mapping[str, Any]) -> Figure:
    """Relative Fréchet distances with their intervals, and the largest of each null."""
    entries = [(e["model"], e) for e in result["pairs"] if e["level"] == "token"]
    entries += [(f"control: {k}", e) for k, es in result["controls"].items() for e in es]
    figure = Figure(figsize=(9, 1.3 + 0.3 * len(entries)), dpi=100, layout="constrained")
    axes = figure.subplots()
    shown = [min(e["relative"], e["null"] * _unit(e)) for _, e in entries if e["frechet"]]
    floor = min(shown, default=0.01) / 3
    for y, (_, entry) in enumerate(reversed(entries)):
        _draw_distance(axes, y, entry, floor)
    names = [f"{model}: {e['a']} - {e['b']}" for model, e in entries]
    axes.set_yticks(range(len(entries)), names[::-1], fontsize=8)
    axes.set_ylim(-0.5, len(entries) - 0.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("Fréchet distance / tokens' variance (95 % interval)", fontsize=9)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    null = "largest distance between halves of one dataset"
    mark = Line2D([], [], color="black", marker="|", linestyle="", markersize=10, label=null)
    legend: dict[str, Any] = {"loc": "outside lower center", "frameon": False}
    figure.legend(handles=[mark], fontsize=8, **legend)
    figure.suptitle(f"{title}: distance between datasets", fontsize=11, weight="bold")
    return figure


def _scatter_slices(axes: Axes, f: Features, components: pca.Components, **how: Any) -> None:
    at = components.project(f.moments.slice_means())
    label = f"{f.name}, n = {len(at)}" + ("" if f.labelled else " (no labels)")
    axes.scatter(at[:, 0], at[:, 1], s=28, edgecolor="white", linewidth=0.6, label=label, **how)


def _scatter_tokens(axes: Axes, f: Features, components: pca.Components, **how: Any) -> None:
    some = evenly_spaced(len(f.tokens), SHOWN_TOKENS)
    at, true = components.project(f.tokens[some]), f.ids[some] > 0
    axes.scatter(at[~true, 0], at[~true, 1], s=5, alpha=0.35, linewidth=0, **how)
    axes.scatter(at[true, 0], at[true, 1], s=16, edgecolor="black", linewidth=0.6, **how)


def _dot(label: str, **how: Any) -> Line2D:
    return Line2D([], [], linestyle="", marker="o", label=label, **how)


def _unit(entry: Mapping[str, Any]) -> float:
    """What turns an entry's distances into relative ones."""
    return float(entry["relative"] / entry["frechet"]) if entry["frechet"] else 0.0


def _draw_distance(axes: Axes, y: int, entry: Mapping[str, Any], floor: float) -> None:
    """A distance with its interval and its null; none is drawn below `floor`."""
    unit = _unit(entry)
    interval = [max(value * unit, floor) for value in entry["ci95"]]
    axes.plot(interval, [y, y], color=COLOURS[0], linewidth=2.5, solid_capstyle="butt")
    dot: dict[str, Any] = {"color": COLOURS[0], "markeredgecolor": "white", "markersize": 7}
    axes.plot(max(entry["relative"], floor), y, "o", **dot)
    mark: dict[str, Any] = {"color": "black", "markersize": 11, "markeredgewidth": 1.6}
    axes.plot(max(entry["null"] * unit, floor), y, "|", **mark)
