"""Which models of a study differ: paired comparisons of foreground IoU on the same slices."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from emadapt.study.study import Study, Unit

Key = tuple[str, str, str]
"""Backbone, regime, training set."""
Groups = Mapping[Key, Sequence[Mapping[str, Any]]]
"""Metrics of the seeds by (backbone, regime, training set)."""
Entry = Mapping[str, Any]

METHOD = (
    "mean foreground IoU of the first minus that of the other on the same slices, `n` of them: the test slices, or, where neither"
    " has seen a label of the dataset, slices of all of it; paired bootstrap over blocks of"
    " slices, widened for few blocks as Student's t is, with Welch's t noise of the means over seeds where there are several;"
    " p_value two-sided"
)
COMPARISONS_METHOD = (
    f"`comparisons`: `regime` against `against`, same backbone and training set, p_holm corrected after Holm for all of them;"
    " `against_best`: every model that was trained with all labels of the test dataset against the one with the highest IoU;"
    " `unions`: a training set of several datasets against that of the test dataset alone with the same labels of it"
    " (these two without correction)."
    f" Difference: {METHOD}"
)


def difference(
    groups: Groups, one: Key, other: Key, test_set: str, *, whole: bool = True
) -> dict[str, Any]:
    """Mean IoU of `one` minus that of `other` on a dataset, with its interval, rounded to 6 digits.

    On slices of all of the dataset where both were scored on these (`emadapt.training.unseen`) and `whole`, else on the test slices.

    Raises:
        InputError: the two were not tested on the same slices.
    """
    from emadapt.metrics.contrasts import REPLICATES, paired_bootstrap

    scores = [[run["test"][test_set] for run in groups[key]] for key in (one, other)]
    if whole and all("unseen" in own for runs in scores for own in runs):
        scores = [[own["unseen"] for own in runs] for runs in scores]
    a, b = (np.array([own["counts"] for own in runs], np.int64) for runs in scores)
    block = scores[0][0]["block_slices"]
    result = paired_bootstrap(a, b, block)
    return {
        "n": result.n,
        "block_slices": block,
        "seeds": list(result.seeds),
        "replicates": REPLICATES,
        "difference": round(result.difference, 6),
        "ci95": [round(end, 6) for end in result.ci95],
        "p_value": round(result.p_value, 6),
    }


def with_holm(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Comparisons with `p_holm`, corrected for all that are in the list."""
    from emadapt.metrics.contrasts import holm

    corrected = holm([comparison["p_value"] for comparison in found])
    return [
        {**comparison, "p_holm": round(p, 6)}
        for comparison, p in zip(found, corrected, strict=True)
    ]


def compare_regimes(study: Study, groups: Groups) -> list[dict[str, Any]]:
    """Every regime against the study's first one, for each backbone, training set and test dataset; [] with a single regime.

    Left out: test datasets of which one of the two has seen more labels, through the model that it started from.
    """
    first, found = study.regimes[0], []
    for backbone, regime, train_set in groups:
        if regime != first:
            names = {
                "backbone": backbone,
                "regime": regime,
                "against": first,
                "train_set": train_set,
            }
            one, other = (backbone, regime, train_set), (backbone, first, train_set)
            seen = [seen_elsewhere(study, Unit(*key, study.seeds[0])) for key in (one, other)]
            fair = [name for name in study.tested if (name in seen[0]) == (name in seen[1])]
            found += [
                {**names, "test_set": name, **difference(groups, one, other, name)} for name in fair
            ]
    return with_holm(found)


def against_best(study: Study, groups: Groups, entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Every model that was trained on a test dataset against the one with the highest IoU there; few labels are left out.

    The highest of many is too high by chance, so these differences are too low rather than too high.
    """
    found = []
    for test_set in study.tested:
        iou = {key_of(e): e["iou"]["mean"] for e in trained_on(study, entries, test_set)}
        if not iou:
            continue
        best = max(iou, key=lambda key: iou[key])
        against = dict(zip(("backbone", "regime", "train_set"), best, strict=True))
        for key in iou:
            if key != best:
                own = dict(zip(("backbone", "regime", "train_set"), key, strict=True))
                found.append(
                    {
                        **own,
                        "test_set": test_set,
                        "against": against,
                        **difference(groups, key, best, test_set),
                    }
                )
    return found


def trained_on(study: Study, entries: Sequence[Entry], test_set: str) -> list[Entry]:
    """Entries of models that were trained on the dataset that they are tested on: those with all labels where there are any.

    Without models that are prompted from the labels of the test slices.
    """
    specs = study.train_set_settings
    own = [
        e
        for e in entries
        if e["test_set"] == test_set and test_set in specs[e["train_set"]].datasets
    ]
    own = [e for e in own if not study.regime_settings[e["regime"]].sees_test_labels]
    return [e for e in own if not specs[e["train_set"]].few] or own


def kind_of(study: Study, regime: str, train_set: str, test_set: str) -> str:
    """How a test dataset relates to what a model saw: "in-domain", "union", "seen at the start", "other labels", "cross-domain".

    "seen at the start": not of its training set, but of a model that it starts from. "other labels": on the same images (the same
    folder of raw data), but under other labels, as of a mispaired twin.
    """
    trained_on = study.train_set_settings[train_set].datasets
    if test_set in trained_on:
        return "union" if len(trained_on) > 1 else "in-domain"
    if test_set in seen_elsewhere(
        study, Unit(study.backbones[0], regime, train_set, study.seeds[0])
    ):
        return "seen at the start"
    images = {study.images_of(name) for name in trained_on}
    return "other labels" if study.images_of(test_set) in images else "cross-domain"


def seen_elsewhere(study: Study, unit: Unit) -> set[str]:
    """Datasets of which the models that a unit starts from saw labels that its own training set lacks.

    What a model in a folder was trained on is not known here and counts as nothing.
    """
    own = study.train_set_settings[unit.train_set]
    others = {source.train_set for source in study.sources_of(unit)} - {unit.train_set}
    found = {
        dataset for train_set in others for dataset in study.train_set_settings[train_set].datasets
    }
    return found - {
        dataset for dataset in own.datasets if not own.slices_of(dataset) and not own.crops
    }


def headline(
    study: Study, entries: Sequence[Entry], kinds: Sequence[str]
) -> list[tuple[Entry, str]]:
    """Entries, each with its kind, that leaderboards show: those with all labels, where there are any; else all.

    Rows of many amounts of labels would bury what all labels give.
    """
    pairs = list(zip(entries, kinds, strict=True))
    return [
        (e, kind) for e, kind in pairs if not study.train_set_settings[e["train_set"]].few
    ] or pairs


def key_of(entry: Entry) -> Key:
    """Which models an entry of the summary is about."""
    return entry["backbone"], entry["regime"], entry["train_set"]
