"""One model for several datasets: a training set of several against that of the test dataset alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emadapt.report.comparisons import Groups, difference
from emadapt.study.study import Study


def unions(study: Study, groups: Groups) -> list[dict[str, Any]]:
    """Every training set of several datasets against that of the test dataset alone with the same labels of it.

    So a union of all labels meets a model of all labels, and `slices: {b: 2}`, a new dataset's two labelled slices beside all
    of another one's, a model of these two slices.

    Args:
        study: the study.
        groups: metrics of the seeds by (backbone, regime, training set).

    Returns:
        Differences of foreground IoU, union minus alone, with intervals and p; `few`: whether not all labels are used.
    """
    specs = {name: study.train_set_settings[name] for name in study.train_sets}
    trained = [regime for regime in study.regimes if study.regime_settings[regime].trains]
    found = []
    for backbone, regime in (
        (backbone, regime) for backbone in study.backbones for regime in trained
    ):
        for union, spec in ((name, spec) for name, spec in specs.items() if len(spec.datasets) > 1):
            for test_set in spec.datasets:
                labels = (spec.slices_of(test_set), spec.crops)
                alone = [
                    name
                    for name, own in specs.items()
                    if own.datasets == (test_set,)
                    and (own.slices_of(test_set), own.crops) == labels
                ]
                for single in alone[:1]:
                    names = {
                        "backbone": backbone,
                        "regime": regime,
                        "train_set": union,
                        "against": single,
                        "test_set": test_set,
                    }
                    one, other = (backbone, regime, union), (backbone, regime, single)
                    found.append(
                        {**names, "few": spec.few, **difference(groups, one, other, test_set)}
                    )
    return found


def by_test_set(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The order that tables have them in: test dataset, whom it is compared with, regime, the largest gain first."""
    return sorted(
        rows, key=lambda row: (row["test_set"], row["against"], row["regime"], -row["difference"])
    )


def unions_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown lines: a row for each union and test dataset."""
    lines = [
        "",
        "## Together or alone",
        "",
        "Foreground IoU of a model of several datasets minus that of one of the test dataset alone with the same labels of it;"
        " same test slices and seeds; p not corrected.",
        "",
        "| tested on | trained on | against | backbone | regime | difference | 95 % | p |",
        "|---|---|---|---|---|---:|---:|---:|",
    ]
    for row in by_test_set(rows):
        cells = [
            *(row[name] for name in ("test_set", "train_set", "against", "backbone", "regime")),
            f"{row['difference']:+.3f}",
            f"{row['ci95'][0]:+.3f} to {row['ci95'][1]:+.3f}",
            f"{row['p_value']:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
