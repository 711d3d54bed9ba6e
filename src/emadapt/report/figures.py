"""Figures of evaluate and report. Drawn without pyplot (no global state), the same input gives the same bytes.

Colours are of Okabe and Ito's palette, which people with any common colour blindness can tell apart.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

ORANGE, BLUE, GREEN, PINK = "#E69F00", "#0072B2", "#009E73", "#CC79A7"
KINDS = {
    "in-domain": (BLUE, "o"),
    "union": (GREEN, "s"),
    "other labels": (PINK, "D"),
    "cross-domain": (ORANGE, "^"),
    "seen at the start": ("0.7", "P"),
    "zero-shot": ("0.45", "v"),
    "oracle prompts": ("black", "*"),
}
LIMIT = 1_000_000  # bytes of a figure that goes into git


def iou_png(path: Path, entries: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> None:
    """Writes foreground IoU by unit with intervals: one panel per test dataset, the same rows in each.

    Args:
        path: the PNG to write.
        entries: "units" of the summary.
        kinds: for each entry a key of `KINDS`.
    """
    datasets = list(dict.fromkeys(entry["test_set"] for entry in entries))
    rows: dict[tuple[str, str, str], list[float]] = {}
    for entry in entries:
        rows.setdefault((entry["backbone"], entry["regime"], entry["train_set"]), []).append(
            entry["iou"]["mean"]
        )
    train_sets = list(dict.fromkeys(train_set for _, _, train_set in rows))
    # By training set, the best of each on top; the y axis points up.
    order = sorted(rows, key=lambda row: (-train_sets.index(row[2]), np.mean(rows[row])))
    borders = [y - 0.5 for y in range(1, len(order)) if order[y][2] != order[y - 1][2]]
    figure = Figure(
        figsize=(3.2 + 3.4 * len(datasets), 1.5 + 0.34 * len(order)), dpi=110, layout="constrained"
    )
    panels = figure.subplots(1, len(datasets), sharey=True, squeeze=False)[0]
    for axes, dataset in zip(panels, datasets, strict=True):
        for entry, kind in zip(entries, kinds, strict=True):
            if entry["test_set"] != dataset:
                continue
            y = order.index((entry["backbone"], entry["regime"], entry["train_set"]))
            iou, (colour, marker) = entry["iou"], KINDS[kind]
            axes.plot(iou["ci95"], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
            if len(iou["values"]) > 1:
                axes.plot(
                    iou["values"],
                    [y] * len(iou["values"]),
                    "|",
                    color="black",
                    markersize=7,
                    alpha=0.6,
                )
            axes.plot(iou["mean"], y, marker, color=colour, markersize=7, markeredgecolor="white")
            right = iou["mean"] < 0.85  # the number stands beside the interval, inside the panel
            x = iou["ci95"][1] + 0.015 if right else iou["ci95"][0] - 0.015
            axes.text(
                x, y, f"{iou['mean']:.3f}", va="center", ha="left" if right else "right", fontsize=8
            )
        for border in borders:
            axes.axhline(border, color="0.8", linewidth=0.8)
        axes.set_title(f"test: {dataset}", fontsize=10)
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.6, len(order) - 0.4)
        axes.set_xlabel("foreground IoU")
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(order)), [f"{b}  {r}  on {t}" for b, r, t in order], fontsize=9)
    handles: list[Line2D] = [
        Line2D([], [], color=colour, marker=marker, markeredgecolor="white", label=kind)
        for kind, (colour, marker) in KINDS.items()
        if kind in kinds
    ]
    if any(len(entry["iou"]["values"]) > 1 for entry in entries):
        handles.append(Line2D([], [], color="black", marker="|", linestyle="", label="one seed"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    write_figure(path, figure)


def few_shot_png(
    path: Path, panels: Sequence[Mapping[str, Any]], looks: Sequence[tuple[str, str]]
) -> None:
    """Writes foreground IoU against the number of labels with intervals: one panel each, a line per backbone and regime.

    Args:
        path: the PNG to write.
        panels: of `few_shot.panels`, all of the same test dataset; the curves may differ from panel to panel.
        looks: every (backbone, regime) of the study's curves, so that one looks the same in all figures.
    """
    colours, markers = (BLUE, ORANGE, GREEN, "black", "0.55"), "os^Dv"
    figure = Figure(figsize=(0.8 + 5.6 * len(panels), 4.4), dpi=110, layout="constrained")
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(row, panels, strict=True):
        for curve in panel["curves"]:
            look = looks.index((curve["backbone"], curve["regime"]))
            colour, marker = colours[look % 5], markers[look % 5]
            ends = [n for n, _ in panel["n"]]
            aside = (ends[-1] / ends[0]) ** (
                0.01 * (look - (len(looks) - 1) / 2)
            )  # so that intervals stand beside each other
            x = [point["n"] * aside for point in curve["points"]]
            y = [point["iou"] for point in curve["points"]]
            axes.plot(x, y, "-" if look < 5 else "--", color=colour, linewidth=1.4)
            for at, point in zip(x, curve["points"], strict=True):
                axes.plot([at, at], point["ci95"], color=colour, linewidth=1.1, alpha=0.7)
                inside = "white" if point["all"] else colour
                edge = colour if point["all"] else "white"
                axes.plot(
                    at,
                    point["iou"],
                    marker,
                    color=inside,
                    markersize=8,
                    markeredgecolor=edge,
                    markeredgewidth=1.3,
                )
                if curve["enough"] and point["n"] == curve["enough"]["n"] and not point["all"]:
                    axes.plot(
                        at,
                        point["iou"],
                        "o",
                        color="none",
                        markersize=15,
                        markeredgecolor=colour,
                        markeredgewidth=1.2,
                    )
        places = {
            n: f"{n}\nall" if every else str(n) for n, every in panel["n"]
        }  # ascending: `all` wins a shared place
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks(list(places), list(places.values()), fontsize=9)
        axes.set_xlim(min(places) / 1.3, max(places) * 1.3)
        axes.set_title(f"test: {panel['test_set']}", fontsize=10)
        axes.set_xlabel(f"labelled {panel['amount']} of {' and '.join(panel['datasets'])}")
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    row[0].set_ylim(0, 1)
    row[0].set_ylabel("foreground IoU")
    one = len({backbone for backbone, _ in looks}) == 1
    shown = {(curve["backbone"], curve["regime"]) for panel in panels for curve in panel["curves"]}
    handles = [
        Line2D(
            [],
            [],
            color=colours[at % 5],
            marker=markers[at % 5],
            linestyle="-" if at < 5 else "--",
            markeredgecolor="white",
            label=regime if one else f"{backbone} {regime}",
        )
        for at, (backbone, regime) in enumerate(looks)
        if (backbone, regime) in shown
    ]
    if any(
        point["all"] for panel in panels for curve in panel["curves"] for point in curve["points"]
    ):
        handles.append(
            Line2D(
                [],
                [],
                color="white",
                marker="o",
                linestyle="",
                markeredgecolor="black",
                label="all labels",
            )
        )
    if any(
        curve["enough"] and curve["enough"]["n"] for panel in panels for curve in panel["curves"]
    ):
        words = "first with 90 % of the IoU of all labels"
        handles.append(
            Line2D(
                [],
                [],
                color="none",
                marker="o",
                linestyle="",
                markersize=13,
                markeredgecolor="black",
                label=words,
            )
        )
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=3 * len(panels),
        fontsize=9,
        frameon=False,
    )
    write_figure(path, figure)


def stack_png(path: Path, pictures: Sequence[Path]) -> None:
    """Writes PNGs on top of each other as one of at most 1 MB."""
    images = [Image.open(picture).convert("RGB") for picture in pictures]
    width = max(image.width for image in images)
    whole = Image.new("RGB", (width, sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height
    _write(path, whole)


def write_figure(path: Path, figure: Figure) -> None:
    """Writes a drawn figure as a PNG, under a temporary name first."""
    _write(path, _picture(figure))


def _picture(figure: Figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _few_colours(picture: Image.Image) -> Image.Image:
    """Reduces to greys and the colours of this module mixed into greys.

    A palette by frequency would merge the rare blue into green, and Pillow's own search for the nearest colour greys the white.
    """
    greys = np.repeat(np.linspace(0, 255, 60)[:, None], 3, axis=1)
    below = np.repeat(np.linspace(0, 255, 13)[:, None], 3, axis=1)
    tints = [
        (1 - share) * below + share * _rgb(colour)
        for colour in (ORANGE, BLUE, GREEN)
        for share in (0.25, 0.45, 0.65, 0.85)
    ]
    pure = np.stack([_rgb(colour) for colour in (ORANGE, BLUE, GREEN)])
    palette = np.concatenate([greys, *tints, pure]).round()  # (219, 3)
    packed = np.asarray(picture).astype(np.int32) @ np.array([65536, 256, 1], np.int32)
    colours, index = np.unique(packed, return_inverse=True)
    rgb = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=1).astype(float)
    nearest = np.argmax(rgb @ palette.T - (palette**2).sum(axis=1) / 2, axis=1)
    few = Image.fromarray(nearest[index].reshape(packed.shape).astype(np.uint8), "L")
    few.putpalette(palette.astype(np.uint8).tobytes())
    return few


def _rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)], np.float32)


def _write(path: Path, picture: Image.Image) -> None:
    """Writes a PNG with few colours, smaller where it would be over 1 MB (EM noise does not compress), then renames it."""
    small = picture
    while True:
        data = io.BytesIO()
        _few_colours(small).save(data, "PNG", optimize=True)
        if data.tell() <= LIMIT:
            break
        scale = max(0.5, 0.95 * (LIMIT / data.tell()) ** 0.5)
        small = picture.resize(
            (int(small.width * scale), int(small.height * scale)), Image.Resampling.LANCZOS
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(data.getvalue())
    temporary.replace(path)


def scatter_png(
    path: Path, points: Sequence[Mapping[str, Any]], correlations: Mapping[str, Mapping[str, Any]]
) -> None:
    """Writes the IoU that crossing datasets costs against each distance: a panel per distance that has values.

    Args:
        path: the PNG to write.
        points: of domain-vs-iou.json; regimes differ in colour, backbones in marker.
        correlations: of domain-vs-iou.json: label, rho, p_value and n of each distance.
    """
    names = [
        name
        for name in correlations
        if any(point["distances"][name] is not None for point in points)
    ]
    regimes, backbones = (
        list(dict.fromkeys(point[key] for point in points)) for key in ("regime", "backbone")
    )
    colours, markers = (BLUE, ORANGE, GREEN, "black", "0.55"), "os^Dv"
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.3 * columns, 2.7 * rows + 0.5), dpi=110, layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, name in zip(panels.flat, names, strict=False):
        there = [point for point in points if point["distances"][name] is not None]
        middle = np.mean([end(point["distances"][name] for point in there) for end in (min, max)])
        for point in there:
            x = point["distances"][name]
            colour = colours[regimes.index(point["regime"]) % len(colours)]
            marker = markers[backbones.index(point["backbone"]) % len(markers)]
            axes.plot(x, point["loss"], marker, color=colour, markersize=6, markeredgecolor="white")
            note, side = (
                f"{point['a']}→{point['b']}",
                -1 if x > middle else 1,
            )  # towards the middle: it stays in the panel
            where = {
                "textcoords": "offset points",
                "ha": "right" if side < 0 else "left",
                "va": "center",
            }
            axes.annotate(note, (x, point["loss"]), (6 * side, 0), fontsize=6.5, **where)
        of = correlations[name]
        rho = (
            f"ρ = {of['rho']:.2f}, p = {of['p_value']:.2g}, n = {of['n']}"
            if of["rho"] is not None
            else f"n = {of['n']}, no ρ"
        )
        axes.set_title(rho, fontsize=9)
        axes.set_xlabel(of["label"], fontsize=8)
        axes.tick_params(labelsize=8)
        axes.locator_params(axis="x", nbins=4)
        axes.margins(0.1, 0.15)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("IoU lost", fontsize=8)
    for axes in panels.flat[len(names) :]:
        axes.set_axis_off()
    handles = [
        Line2D(
            [],
            [],
            linestyle="",
            color=colours[r % len(colours)],
            marker=markers[b % len(markers)],
            label=f"{name} {regime}",
        )
        for b, name in enumerate(backbones)
        for r, regime in enumerate(regimes)
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(4, len(handles)),
        fontsize=9,
        frameon=False,
    )
    write_figure(path, figure)


def forest(axes: Any, rows: Sequence[tuple[str, float, Sequence[float], str]], title: str) -> None:
    """Changes of IoU one below the other: what, difference, its 95 % interval, colour."""
    for y, (_, value, (low, high), shade) in enumerate(rows):
        axes.plot([low, high], [y, y], color=shade, linewidth=1.6)
        axes.plot(value, y, "o", color=shade, markersize=5)
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("change of foreground IoU, 95 % interval", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
