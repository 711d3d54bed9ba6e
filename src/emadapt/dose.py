"""Dose and response: what a shift of known kind and strength costs in IoU, and which distance sees it coming.

Datasets called `dialled_<dial>_<percent>` (`emadapt.data.phantom`) are copies of one volume, imaged worse. A model that was
trained on the volume as it is gives a curve for each dial; real pairs of datasets of the same study stand beside them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from emadapt.config import Study
from emadapt.transfer import DISTANCES, Card, distances, rank_correlation

DIALLED = re.compile(r"dialled_([a-z]+)_(\d+)")
MEANING = (
    "the loss of a point is the mean IoU of the models trained on `train_set` on its own dataset's test slices minus that on the"
    " test slices of `dataset`. Dialled ones show the same scene. rho: Spearman's within a dial and over all dials of a backbone"
    " and regime; points share the models, so p is optimistic."
)


def dose_response(study: Study, entries: Sequence[Mapping[str, Any]], cards: Mapping[tuple[str, str], Card]) -> dict[str, Any]:
    """Curves of IoU over dose and rank correlations of the loss with each distance; {} for a study without dialled datasets.

    Args:
        study: training sets of one dataset that is not dialled, with all labels, make curves.
        entries: "units" of the summary.
        cards: from `transfer.read_domain`; points without one have no distances.
    """
    dialled = {name: match for name in study.datasets if (match := DIALLED.fullmatch(name))}
    if not dialled:
        return {}
    iou = {(e["backbone"], e["regime"], e["train_set"], e["test_set"]): e["iou"] for e in entries}
    points = []
    for backbone, regime, train_set in dict.fromkeys((e["backbone"], e["regime"], e["train_set"]) for e in entries):
        spec = study.train_set_specs[train_set]
        if len(spec.datasets) > 1 or spec.few or (base := spec.datasets[0]) in dialled:
            continue
        card = cards.get((backbone, study.tokens_of(regime)))
        model = None if study.regime_specs[regime].pretrained_tokens else train_set
        own = iou[backbone, regime, train_set, base]["mean"]
        for name in [base, *(n for n in study.datasets if n != base)]:
            found, match = iou[backbone, regime, train_set, name], dialled.get(name)
            far = distances(card, model, base, name) if card and name != base else dict.fromkeys(DISTANCES)
            points.append({
                "backbone": backbone, "regime": regime, "train_set": train_set, "dataset": name,
                "dial": match[1] if match else None, "dose": int(match[2]) / 100 if match else 0.0 if name == base else None,
                "iou": found["mean"], "ci95": found["ci95"], "loss": round(own - found["mean"], 6), "distances": far,
            })  # fmt: skip
    return {"study": study.name, "meaning": MEANING, "points": points, "correlations": _correlations(points)}


def _correlations(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each backbone, regime and training set: within each dial, and over all of them."""
    found = []
    for key in dict.fromkeys((p["backbone"], p["regime"], p["train_set"]) for p in points):
        own = [p for p in points if (p["backbone"], p["regime"], p["train_set"]) == key and p["dial"]]
        for dial in [None, *dict.fromkeys(p["dial"] for p in own)]:
            some = [p for p in own if dial in (None, p["dial"])]
            for name in DISTANCES:
                rho = rank_correlation([p["distances"][name] for p in some], [p["loss"] for p in some])
                found.append({**dict(zip(("backbone", "regime", "train_set"), key, strict=True)), "dial": dial,
                              "distance": name, **rho})  # fmt: skip
    return found
