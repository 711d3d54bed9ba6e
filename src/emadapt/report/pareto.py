"""What adapting to one dataset gains on it against what it keeps on others: IoU in domain, IoU unseen, and the Pareto front."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from emadapt.report.comparisons import Entry, Groups, Key, difference, seen_elsewhere
from emadapt.study.study import Study, Unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEWEST = 3
"""Regimes below which there is no trade to show, and seeds below which an interval of a difference means nothing."""
PARETO_METHOD = (
    "units trained on all labels of one dataset, without published systems; in domain: its test slices; unseen: slices of all of"
    " a dataset of which neither"
    " the unit nor a unit that it started from has seen labels (its test slices, where not all regimes have the others). On the"
    " front: no other regime has at least this mean IoU on both and more on one. `against`: differences to the study's first"
    " frozen regime with the intervals of `comparisons`, over slices and seeds; `gives_up`: nothing, where both intervals lie at"
    f" or above 0; something, where one lies below; else open; not said below {FEWEST} seeds. They are not corrected for their"
    " number."
)
WORDS = {
    "nothing": "nothing",
    "something": "something",
    "open": "open",
    "too few seeds": f"not known below {FEWEST} seeds",
}


def trade_offs(study: Study, groups: Groups, entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """In-domain against unseen IoU of every regime, for each backbone and ordered pair of datasets with at least three regimes.

    Args:
        study: names the training sets; of those with all labels of a single dataset, the first counts.
        groups: metrics of the seeds by (backbone, regime, training set).
        entries: "units" of the summary.

    Returns:
        For each `backbone`, `train_set`, `a` and `b` (trained on a alone, b unseen): `n` slices of both, `seeds`, `frozen`
        (the regime that others are compared with, None without one) and `points`, the best in domain first.
    """
    found = {(e["backbone"], e["regime"], e["train_set"], e["test_set"]): e for e in entries}
    specs, single = study.train_set_settings, dict[str, str]()
    paired_rightly = [name for name in study.tested if not study.dataset_settings[name].mispaired]
    for name in study.train_sets:
        if len(specs[name].datasets) == 1 and not specs[name].few and not specs[name].unlabelled:
            single.setdefault(specs[name].datasets[0], name)
    trades = []
    for backbone, a, b in itertools.product(
        study.backbones, (d for d in single if d in paired_rightly), paired_rightly
    ):
        train_set = single[a]
        own = [
            r for r in study.regimes if not study.regime_settings[r].outside
        ]  # what those saw before is not known
        regimes = [
            r
            for r in own
            if b not in seen_elsewhere(study, Unit(backbone, r, train_set, study.seeds[0]))
        ]
        if a == b or len(regimes) < FEWEST:
            continue
        rows = {
            r: (found[backbone, r, train_set, a], found[backbone, r, train_set, b]) for r in regimes
        }
        whole = all("unseen" in other for _, other in rows.values())
        if whole:
            rows = {r: (own, other["unseen"]) for r, (own, other) in rows.items()}
        iou = {r: (own["iou"], other["iou"]) for r, (own, other) in rows.items()}
        frozen = next((r for r in regimes if study.regime_settings[r].kind == "frozen"), None)
        on_front = front([(own["mean"], other["mean"]) for own, other in iou.values()])
        points = [
            {
                "regime": r,
                "in_domain": iou[r][0],
                "unseen": iou[r][1],
                "front": on,
                **(
                    {
                        "against": against(
                            groups,
                            (backbone, r, train_set),
                            (backbone, frozen, train_set),
                            (a, b),
                            whole,
                        )
                    }
                    if frozen and r != frozen
                    else {}
                ),
            }
            for r, on in zip(regimes, on_front, strict=True)
        ]
        trades.append(
            {
                "backbone": backbone,
                "train_set": train_set,
                "a": a,
                "b": b,
                "seeds": len(study.seeds),
                "frozen": frozen,
                "n": [row["n"] for row in rows[regimes[0]]],
                "points": sorted(points, key=lambda point: -point["in_domain"]["mean"]),
            }
        )
    return trades


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other dominates, that is, is at least as high in both values and higher in one; equals do not."""
    kept, highest = [False] * len(points), -np.inf
    descending = sorted(range(len(points)), key=lambda i: points[i], reverse=True)
    for _, group in itertools.groupby(descending, key=lambda i: points[i][0]):
        alike = list(group)
        top = points[alike[0]][1]
        for i in alike:
            kept[i] = points[i][1] == top > highest
        highest = max(highest, top)
    return kept


def against(
    groups: Groups, one: Key, frozen: Key, tests: tuple[str, str], whole: bool
) -> dict[str, Any]:
    """Differences of two regimes on the datasets `tests` (in domain, unseen), and whether the first gives anything up.

    `whole`: unseen on slices of all of the dataset, which both then have, else on its test slices.
    """
    in_domain, unseen = (difference(groups, one, frozen, test, whole=whole) for test in tests)
    return {
        "in_domain": in_domain,
        "unseen": unseen,
        "gives_up": verdict([in_domain["ci95"], unseen["ci95"]], len(groups[one])),
    }


def verdict(intervals: Sequence[Sequence[float]], seeds: int) -> str:
    """What two intervals of differences say is given up: a key of WORDS."""
    if seeds < FEWEST:
        return "too few seeds"
    if min(low for low, _ in intervals) >= 0:
        return "nothing"
    return "something" if min(high for _, high in intervals) < 0 else "open"


def said(trade: Mapping[str, Any]) -> str:
    """Which settings give up nothing, in a sentence."""
    if trade["frozen"] is None:
        return "The study has no frozen regime to compare with."
    names = {
        verdict: [
            p["regime"]
            for p in trade["points"]
            if "against" in p and p["against"]["gives_up"] == verdict
        ]
        for verdict in WORDS
    }
    if names["too few seeds"]:
        n = f"{trade['seeds']} seed{'s' * (trade['seeds'] > 1)}"
        return f"Whether a setting gives up nothing cannot be said with {n}: {FEWEST} are needed."
    nothing = f"Settings that give up nothing against {trade['frozen']}: {', '.join(names['nothing']) or 'none that this shows'}."
    return nothing + (f" Open: {', '.join(names['open'])}." if names["open"] else "")


def pareto_table(trades: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown lines: a table per backbone and pair of datasets."""
    lines = [
        "",
        "## In domain against unseen",
        "",
        "IoU with its 95 % interval on the dataset trained on, and on one whose labels were never seen. ●: on the Pareto front",
        "(no other regime is as good on both and better on one). Differences to the frozen regime: over slices and seeds.",
        "[Figure](figures/pareto.png).",
    ]
    for trade in trades:
        a, b = trade["a"], trade["b"]
        lines += [
            "",
            f"### {trade['backbone']}, trained on `{a}`, `{b}` unseen",
            "",
            said(trade),
            "",
        ]
        lines += [
            f"| | regime | {a} | {b} | difference, {a} | difference, {b} | gives up |",
            "|---|---|---:|---:|---:|---:|---|",
        ]
        for point in trade["points"]:
            shown = [
                f"{iou['mean']:.3f} ({iou['ci95'][0]:.3f} to {iou['ci95'][1]:.3f})"
                for iou in (point["in_domain"], point["unseen"])
            ]
            versus = ["–", "–", "–"]
            if "against" in point:
                own = point["against"]
                versus = [
                    *(_difference(own[name]) for name in ("in_domain", "unseen")),
                    WORDS[own["gives_up"]],
                ]
            lines.append(
                f"| {'●' if point['front'] else ''} | {point['regime']} | {' | '.join([*shown, *versus])} |"
            )
    return lines


def _difference(found: Mapping[str, Any]) -> str:
    return f"{found['difference']:+.3f} ({found['ci95'][0]:+.3f} to {found['ci95'][1]:+.3f})"


def pareto_png(path: Path, trades: Sequence[Mapping[str, Any]]) -> None:
    """Writes a panel per backbone and pair of datasets: unseen over in-domain IoU, regimes named, the front as a staircase.

    Args:
        path: the PNG to write.
        trades: of `trade_offs`.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from emadapt.report.figures import BLUE, GREEN, ORANGE, write_figure

    columns = min(2, len(trades))
    rows = -(-len(trades) // columns)
    figure = Figure(figsize=(5.4 * columns, 4.6 * rows + 0.4), dpi=110, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for trade, axes in zip(trades, panels, strict=False):  # in this order, or a panel is lost
        for point in trade["points"]:
            (x, xs), (y, ys) = (
                (iou["mean"], iou["ci95"]) for iou in (point["in_domain"], point["unseen"])
            )
            axes.plot(xs, [y, y], color="0.8", linewidth=1, zorder=1)
            axes.plot([x, x], ys, color="0.8", linewidth=1, zorder=1)
            colour, marker = (
                (GREEN, "D")
                if point["regime"] == trade["frozen"]
                else (BLUE if point["front"] else ORANGE, "o")
            )
            axes.plot(x, y, marker, color=colour, markersize=8, markeredgecolor="white", zorder=3)
            if point["regime"] == trade["frozen"]:
                axes.axvline(x, color=GREEN, linestyle=":", linewidth=1, zorder=0)
                axes.axhline(y, color=GREEN, linestyle=":", linewidth=1, zorder=0)
        best = sorted(
            (p["in_domain"]["mean"], p["unseen"]["mean"]) for p in trade["points"] if p["front"]
        )
        axes.plot(
            *zip(*best, strict=True), color=BLUE, linewidth=1.4, drawstyle="steps-pre", zorder=2
        )
        axes.set_xlim(*_around([point["in_domain"]["mean"] for point in trade["points"]]))
        axes.set_ylim(*_around([point["unseen"]["mean"] for point in trade["points"]]))
        axes.set_title(f"{trade['backbone']}, trained on {trade['a']}", fontsize=10)
        axes.set_xlabel(f"foreground IoU on {trade['a']}, in domain")
        axes.set_ylabel(f"foreground IoU on {trade['b']}, unseen")
        axes.grid(color="0.93")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels:
        axes.set_axis_off()
    looks: tuple[tuple[str, str, Literal["-", "", ":"], str], ...] = (
        (BLUE, "o", "-", "Pareto front"),
        (ORANGE, "o", "", "dominated"),
        (GREEN, "D", ":", "frozen"),
    )
    handles = [
        Line2D(
            [],
            [],
            color=colour,
            marker=marker,
            linestyle=line,
            markeredgecolor="white",
            label=label,
        )
        for colour, marker, line, label in looks
    ]
    handles.append(Line2D([], [], color="0.8", label="95 % interval, as far as it is on the panel"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.draw_without_rendering()  # places the panels, so that the names' sizes are known
    for axes, trade in zip(figure.axes, trades, strict=False):
        _name(
            axes,
            {p["regime"]: (p["in_domain"]["mean"], p["unseen"]["mean"]) for p in trade["points"]},
        )
    write_figure(path, figure)


def _around(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis that show the points apart; intervals, which slices make wide and regimes share, may run off it."""
    pad = max(0.3 * (max(values) - min(values)), 0.005)
    return min(values) - pad, max(values) + pad


def _name(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Write names beside points, each at the first of eight places around its point where it covers no other name or point."""
    from matplotlib.transforms import Bbox

    centres = axes.transData.transform(list(points.values()))
    taken = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in centres]
    places = [
        ("left", 7, 6),
        ("left", 7, -6),
        ("right", -7, 6),
        ("right", -7, -6),
        ("center", 0, 12),
        ("center", 0, -12),
        ("left", 14, 18),
        ("right", -14, -18),
    ]
    for number, (name, point) in enumerate(points.items()):
        others = [box for i, box in enumerate(taken) if i != number]
        for side, dx, dy in places:
            text = axes.annotate(
                name,
                point,
                (dx, dy),
                textcoords="offset points",
                ha=side,
                va="center",
                fontsize=8,
                zorder=4,
            )
            text.set_in_layout(False)
            box = text.get_window_extent()
            if (
                not any(box.overlaps(other) for other in others)
                and axes.bbox.x0 <= box.x0
                and box.x1 <= axes.bbox.x1
            ):
                break
            if (side, dx, dy) != places[-1]:
                text.remove()
        taken.append(box)
