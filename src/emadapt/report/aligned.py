"""What alignment does: models with `align`, of slices (a backbone's) or of features (a regime's), against the same without."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emadapt.report.comparisons import METHOD, Groups, Key, difference, kind_of, with_holm
from emadapt.study.study import Study

ALIGNED_METHOD = (
    "`aligned`: models whose backbone or regime has `align`, or both, against those of the study that differ in nothing else and"
    " have neither, same training set; p_holm corrected after Holm for all of them. Left out: pairs whose predictions are the"
    f" same, as of a model that was trained and tested on the reference, which stays as it is. Difference: {METHOD}"
)


def without_align(study: Study, backbone: str, regime: str) -> tuple[str, str] | None:
    """The study's backbone and regime that differ from these in their alignment alone, and have none; None where they lack."""
    spec, own = study.backbone_settings[backbone], study.regime_settings[regime]
    if not spec.align and not getattr(own, "adversarial", 0):
        return None
    plain = spec.changed(align="", reference="")
    control = own.changed(adversarial=0.0)
    backbones = [name for name in study.backbones if study.backbone_settings[name] == plain]
    regimes = [name for name in study.regimes if study.regime_settings[name] == control]
    return (backbones[0], regimes[0]) if backbones and regimes else None


def compare_aligned(study: Study, groups: Groups) -> list[dict[str, Any]]:
    """Every model with an alignment against the same with none, for each training set and test dataset.

    Args:
        study: the study.
        groups: metrics of the seeds by (backbone, regime, training set).

    Returns:
        Differences of foreground IoU with intervals and corrected p; [] in a study without alignment. `align` names that of the
        slices, then the regime whose features are aligned.
    """
    found = []
    for one in groups:
        backbone, regime, train_set = one
        if not (plain := without_align(study, backbone, regime)):
            continue
        other: Key = (*plain, train_set)
        slices, features = (
            study.backbone_settings[backbone].align,
            regime if getattr(study.regime_settings[regime], "adversarial", 0) else "",
        )
        for test_set in study.tested:
            a, b = (
                [run["test"][test_set]["counts"] for run in groups[key]] for key in (one, other)
            )
            if a != b:
                found.append(
                    {
                        "backbone": backbone,
                        "align": " + ".join(filter(None, (slices, features))),
                        "against": plain[0],
                        "regime": regime,
                        "against_regime": plain[1],
                        "train_set": train_set,
                        "test_set": test_set,
                        "kind": kind_of(study, regime, train_set, test_set),
                        **difference(groups, one, other, test_set),
                    }
                )
    return with_holm(found)


def aligned_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown lines: a row for each comparison, unseen datasets first, the largest gain first."""
    lines = [
        "",
        "## Aligned",
        "",
        "Foreground IoU with the alignment minus that without it, same slices (of unseen data all of it) and seeds; p after"
        " Holm's correction for all.",
        "",
        "| tested on | trained on | | against regime | align | difference | 95 % | p |",
        "|---|---|---|---|---|---:|---:|---:|",
    ]
    for row in by_gain(rows):
        cells = [
            row["test_set"],
            row["train_set"],
            row["kind"],
            row["against_regime"],
            row["align"],
            f"{row['difference']:+.3f}",
            f"{row['ci95'][0]:+.3f} to {row['ci95'][1]:+.3f}",
            f"{row['p_holm']:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def by_gain(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The order that tables have them in: test dataset, unseen before seen, regime without, the largest gain first."""
    return sorted(
        rows,
        key=lambda r: (
            r["test_set"],
            r["kind"] != "cross-domain",
            r["train_set"],
            r["against_regime"],
            -r["difference"],
        ),
    )


def aligned_png(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws a panel per test dataset: what each alignment changes, on unseen data above, in the order of `rows`.

    Args:
        path: the PNG to write.
        rows: of `compare_aligned`.
    """
    from matplotlib.figure import Figure  # takes half a second

    from emadapt.report.figures import BLUE, ORANGE, forest, write_figure

    panels: dict[str, list[tuple[str, float, Sequence[float], str]]] = {}
    for row in rows:
        what = f"{row['align']} ({row['against_regime']}, {row['train_set']})"
        colour = ORANGE if row["kind"] == "cross-domain" else BLUE
        panels.setdefault(row["test_set"], []).append(
            (what, row["difference"], row["ci95"], colour)
        )
    figure = Figure(
        figsize=(6.2 * len(panels), 0.27 * max(map(len, panels.values())) + 1.2),
        dpi=110,
        layout="constrained",
    )
    for axes, (test_set, own) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        forest(axes, own, f"tested on {test_set} (orange: unseen)")
    write_figure(path, figure)
