"""What does changing one thing do? Models that differ in one factor, compared on the same slices.

A factor names the column of the table of units that varies, and the columns that must be the
same. Every question of the report is one entry of FACTORS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from emadapt.metrics import classification
from emadapt.metrics.contrasts import Contrast, holm, paired, verdict
from emadapt.report.units import MODEL, score_of


@dataclass(frozen=True)
class Factor:
    """One thing that a study can vary."""

    title: str  # heading of its section
    question: str  # what its contrasts answer
    varies: str  # the column that differs
    same: tuple[str, ...]  # the columns that do not
    baseline: str | None = None  # what other values are compared with; None: the first in the study
    baseline_name: str = ""  # the baseline in words, where its value says too little


FACTORS = {
    "backbone": Factor(
        "Backbone",
        "What does another backbone change?",
        varies="plain_backbone",
        same=("alignment", "regime", "train_set"),
    ),
    "regime": Factor(
        "Regime",
        "What does another way of adapting change?",
        varies="regime",
        same=("backbone", "train_set"),
    ),
    "union": Factor(
        "One model for several datasets",
        "What does it change to train on other datasets as well?",
        varies="others",
        same=("backbone", "regime", "labels"),
        baseline="",
        baseline_name="one dataset alone",
    ),
    "warm_start": Factor(
        "Warm start",
        "What does it change to start from a model that is already trained?",
        varies="warm_start",
        same=("backbone", "cold_regime", "train_set"),
        baseline="",
        baseline_name="no warm start",
    ),
    "alignment": Factor(
        "Alignment",
        "What does it change to make the datasets look alike?",
        varies="alignment",
        same=("plain_backbone", "plain_regime", "train_set"),
        baseline="",
        baseline_name="no alignment",
    ),
    "labels": Factor(
        "Number of labels",
        "What do fewer labels cost?",
        varies="labels",
        same=("backbone", "regime", "others"),
        baseline="all",
        baseline_name="all labels",
    ),
}
ALWAYS_SAME = ("test_set", "seen_before")


def contrasts(rows: pd.DataFrame, factor: str) -> list[dict[str, Any]]:
    """Every pair of models that differ in one factor, against the factor's baseline.

    Both are scored on slices of the whole dataset where neither has seen a label of it, else on
    the test slices. Pairs with the same predictions are left out.

    Args:
        rows: of `read_units`.
        factor: a key of FACTORS.

    Returns:
        For each pair `factor`, `test_set`, `relation`; `model` and `against` (backbone, regime,
        training set), `level` and `baseline` (their values of the factor); then what `_compare`
        gives, with p corrected for the contrasts of this factor (`p_holm`) and the `verdict`.

    Raises:
        InputError: two units were not tested on the same slices.
    """
    spec = FACTORS[factor]
    rows = rows[rows[spec.varies].notna()]
    if rows.empty:
        return []
    baseline = rows[spec.varies].iloc[0] if spec.baseline is None else spec.baseline
    found: list[dict[str, Any]] = []
    same = [*spec.same, *ALWAYS_SAME]
    for _, group in rows.groupby(same, sort=False, dropna=False):
        levels = {level: _first_model(own) for level, own in group.groupby(spec.varies, sort=False)}
        plain = levels.pop(baseline, None)
        if plain is None:
            continue
        for level, own in levels.items():
            found += _compare(factor, level, spec.baseline_name or baseline, own, plain)
    return _corrected(found)


def against_best(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Every model for a dataset against the one with the best score on it; factor "best".

    The highest of many is too high by chance, so the others are shown too low rather than too
    high.
    """
    found: list[dict[str, Any]] = []
    for _, group in rows[candidates(rows)].groupby("test_set", sort=False):
        models = [own for _, own in group.groupby(MODEL, sort=False)]
        best = max(models, key=lambda own: float(np.mean([t[score_of(t)] for t in own["test"]])))
        for own in models:
            if own is not best:
                found += _compare("best", "/".join(own.iloc[0][MODEL]), "best", own, best)
    return _corrected(found)


def candidates(table: pd.DataFrame) -> pd.Series:
    """Which rows are candidates for a dataset: models trained on it, with all labels if any."""
    usable = table["relation"].isin(["in-domain", "union", "zero-shot"])
    usable &= ~table["seen_before"].astype(bool)
    complete = usable & ~table["few"].astype(bool)
    any_complete = complete.groupby(table["test_set"]).transform("any")
    return complete.where(any_complete, usable)


def _first_model(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the first of several models with the same level."""
    return rows[(rows[MODEL] == rows.iloc[0][MODEL]).all(axis=1)]


def _compare(
    factor: str, level: str, baseline: str, own: pd.DataFrame, plain: pd.DataFrame
) -> list[dict[str, Any]]:
    """The contrast of two models on the same slices; [] where their predictions are the same.

    The best is ranked by its test slices, and so compared on these.
    """
    whole = factor != "best" and bool(own["unseen"].notna().all() & plain["unseen"].notna().all())
    column = "unseen" if whole else "test"
    a, b = list(own[column]), list(plain[column])
    score = score_of(a[0])
    made_of = "counts" if score == "iou" else "probability"
    of_a, of_b = (np.array([scores[made_of] for scores in tests]) for tests in (a, b))
    if np.array_equal(of_a, of_b):
        return []
    first = own.iloc[0]
    result = paired(of_a, of_b) if score == "iou" else classification.paired(a, b)
    contrast = {
        "factor": factor,
        "test_set": first["test_set"],
        "relation": first["relation"],
        "model": first[MODEL].to_dict(),
        "against": plain.iloc[0][MODEL].to_dict(),
        "level": level,
        "baseline": baseline,
        "slices": "all" if whole else "test",
        "n": a[0]["n"],
        "seeds": list(result.seeds),
        score: round(result.score[0], 6),
        f"against_{score}": round(result.score[1], 6),
        "difference": round(result.difference, 6),
        "ci95": [round(end, 6) for end in result.ci95],
        "at_least": round(result.at_least, 6),
        "as_good": result.as_good,
        "p": round(result.p_value, 6),
        "contrast": result,
    }
    return [contrast]


def _corrected(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With `p_holm` and `verdict`, corrected for all in the list."""
    results: list[Contrast] = [row.pop("contrast") for row in found]
    corrected = holm([result.p_value for result in results])
    return [
        {**row, "p_holm": round(p, 6), "verdict": verdict(result, p)}
        for row, result, p in zip(found, results, corrected, strict=True)
    ]
