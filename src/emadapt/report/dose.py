"""Dose and response: what a shift of known kind and strength costs in IoU, and which distance sees it coming.

Datasets called `dialled_<dial>_<percent>` (`emadapt.data.phantom`) are copies of one volume, imaged worse. A model that was
trained on the volume as it is gives a curve for each dial; real pairs of datasets of the same study stand beside them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emadapt.report.transfer import DISTANCES, Card, distances, rank_correlation
from emadapt.study.study import Study

DIALLED = re.compile(r"dialled_([a-z]+)_(\d+)")
MEANING = (
    "the loss of a point is the mean IoU of the models trained on `train_set` on its own dataset's test slices minus that on the"
    " test slices of `dataset`. Dialled ones show the same scene. rho: Spearman's within a dial and over all dials of a backbone"
    " and regime; points share the models, so p is optimistic."
)


def dose_response(
    study: Study, entries: Sequence[Mapping[str, Any]], cards: Mapping[tuple[str, str], Card]
) -> dict[str, Any]:
    """Curves of IoU over dose and rank correlations of the loss with each distance; {} for a study without such curves.

    Args:
        study: training sets of one dataset that is not dialled, with all labels, make curves.
        entries: "units" of the summary.
        cards: from `transfer.read_domain`; points without one have no distances.
    """
    dialled = {name: match for name in study.tested if (match := DIALLED.fullmatch(name))}
    if not dialled:
        return {}
    iou = {(e["backbone"], e["regime"], e["train_set"], e["test_set"]): e["iou"] for e in entries}
    points = []
    for backbone, regime, train_set in dict.fromkeys(
        (e["backbone"], e["regime"], e["train_set"]) for e in entries
    ):
        spec = study.train_set_settings[train_set]
        if len(spec.datasets) > 1 or spec.few or (base := spec.datasets[0]) in dialled:
            continue
        card = cards.get((backbone, study.tokens_of(regime)))
        model = None if study.regime_settings[regime].pretrained_tokens else train_set
        own = iou[backbone, regime, train_set, base]["mean"]
        for name in [base, *(n for n in study.tested if n != base)]:
            found, match = iou[backbone, regime, train_set, name], dialled.get(name)
            far = (
                distances(card, model, base, name)
                if card and name != base
                else dict.fromkeys(DISTANCES)
            )
            points.append(
                {
                    "backbone": backbone,
                    "regime": regime,
                    "train_set": train_set,
                    "dataset": name,
                    "dial": match[1] if match else None,
                    "dose": int(match[2]) / 100 if match else 0.0 if name == base else None,
                    "iou": found["mean"],
                    "ci95": found["ci95"],
                    "loss": round(own - found["mean"], 6),
                    "distances": far,
                }
            )
    if not points:
        return {}
    return {
        "study": study.name,
        "meaning": MEANING,
        "points": points,
        "correlations": _correlations(points),
    }


def _correlations(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each backbone, regime and training set: within each dial, and over all of them."""
    found = []
    for key in dict.fromkeys((p["backbone"], p["regime"], p["train_set"]) for p in points):
        own = [
            p for p in points if (p["backbone"], p["regime"], p["train_set"]) == key and p["dial"]
        ]
        for dial in [None, *dict.fromkeys(p["dial"] for p in own)]:
            some = [p for p in own if dial in (None, p["dial"])]
            for name in DISTANCES:
                rho = rank_correlation(
                    [p["distances"][name] for p in some], [p["loss"] for p in some]
                )
                found.append(
                    {
                        **dict(zip(("backbone", "regime", "train_set"), key, strict=True)),
                        "dial": dial,
                        "distance": name,
                        **rho,
                    }
                )
    return found


def dose_png(
    path: Path,
    response: Mapping[str, Any],
    shown: Sequence[str] = ("fd_token", "outlier_auroc", "knn_iou_loss"),
) -> None:
    """Draws a row per backbone, regime and training set: IoU over dose for each dial, and the loss against some distances.

    Args:
        path: the PNG to write.
        response: of `dose.dose_response`.
        shown: keys of `transfer.DISTANCES`.
    """
    from matplotlib.figure import Figure  # takes half a second

    from emadapt.report.figures import BLUE, GREEN, ORANGE, write_figure

    points = response["points"]
    rows = list(dict.fromkeys((p["backbone"], p["regime"], p["train_set"]) for p in points))
    dials = list(dict.fromkeys(p["dial"] for p in points if p["dial"]))
    figure = Figure(
        figsize=(3.4 * (1 + len(shown)), 2.9 * len(rows) + 0.4), dpi=110, layout="constrained"
    )
    panels = figure.subplots(len(rows), 1 + len(shown), squeeze=False)
    colours = dict(zip(dials, (BLUE, ORANGE, GREEN, "black", "0.55"), strict=False))
    for row, key in zip(panels, rows, strict=True):
        own = [p for p in points if (p["backbone"], p["regime"], p["train_set"]) == key]
        _doses(row[0], own, colours)
        row[0].set_title(" ".join(key), fontsize=9)
        for axes, name in zip(row[1:], shown, strict=True):
            for p in own:
                if (x := p["distances"][name]) is None:
                    continue
                axes.plot(
                    x,
                    p["loss"],
                    "o" if p["dial"] else "D",
                    color=colours.get(p["dial"], "black"),
                    markersize=4,
                )
                if not p["dial"]:
                    axes.annotate(
                        p["dataset"], (x, p["loss"]), (4, 3), textcoords="offset points", fontsize=7
                    )
            of = next(
                c
                for c in response["correlations"]
                if (c["backbone"], c["regime"], c["train_set"]) == key
                and (c["dial"], c["distance"]) == (None, name)
            )
            axes.set_title(
                f"ρ = {of['rho']:.2f}, n = {of['n']}"
                if of["rho"] is not None
                else f"n = {of['n']}, no ρ",
                fontsize=9,
            )
            axes.set(xlabel=DISTANCES[name], ylabel="IoU lost")
    for axes in panels.flat:
        axes.tick_params(labelsize=8)
        axes.xaxis.label.set_size(8)
        axes.yaxis.label.set_size(8)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(fontsize=8, frameon=False)
    write_figure(path, figure)


def _doses(axes: Any, points: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    """IoU over dose, a line a dial from the volume as it is, with intervals."""
    base = next(p for p in points if p["dose"] == 0.0)
    for dial, colour in colours.items():
        curve = [base, *sorted((p for p in points if p["dial"] == dial), key=lambda p: p["dose"])]
        low, high = zip(*(p["ci95"] for p in curve), strict=True)
        doses = [p["dose"] for p in curve]
        axes.plot(doses, [p["iou"] for p in curve], "o-", color=colour, label=dial, markersize=4)
        axes.fill_between(doses, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set(xlabel="dose", ylabel="foreground IoU", ylim=(0, 1))
