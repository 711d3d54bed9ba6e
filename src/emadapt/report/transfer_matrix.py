"""Does it pay to start from a model of another training set? IoU by source and target, against starting from nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emadapt.report.comparisons import METHOD, Entry, Groups, difference, seen_elsewhere, with_holm
from emadapt.study.study import Study, Unit

TRANSFER_METHOD = (
    "IoU on the target's own test data of units that start from the adapter and head of a source (`warm_start`), and of those of"
    " `base`, the regime with the same adapter and head that starts from pretrained weights alone, or where there is no backbone"
    " from random values; `differs`: other settings in which the two regimes differ. `seen`: the source was trained on labels of"
    " the test dataset that the target does not have, so that there is no comparison. p_holm corrected after Holm for all"
    " differences of this list."
    f" Difference: {METHOD}"
)


def base_of(study: Study, regime: str) -> tuple[str, list[str]] | None:
    """The regime of the study that is `regime` without its source, and in which settings it differs besides.

    Adapter (kind, rank, alpha, k) and head must be the same; of several, the one that differs in the fewest other settings.
    """
    spec, found = study.regime_settings[regime], []
    for name in study.regimes:
        other = study.regime_settings[name]
        alike = all(
            getattr(other, key, None) == getattr(spec, key, None)
            for key in ("kind", "rank", "alpha", "k")
        )
        if (
            alike
            and not getattr(other, "warm_start", "")
            and study.head_of(name) == study.head_of(regime)
        ):
            ignored = ("warm_start", "head")
            found.append(
                (
                    name,
                    [
                        key
                        for key, value in vars(other).items()
                        if key not in ignored and value != getattr(spec, key)
                    ],
                )
            )
    return min(found, key=lambda pair: len(pair[1]), default=None)


def transfer_cells(study: Study, groups: Groups, entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """A cell per backbone, regime that starts from another training set (and its base), target and test dataset of the target.

    Returns:
        [] where no regime of the study starts from another training set. `source` is None in the rows of a base;
        `difference`, `ci95`, `p_value` and `p_holm` are there where there is a base and the source has not seen the test dataset.
    """
    starting = [regime for regime in study.regimes if _names_a_training_set(study, regime)]
    bases = {regime: base_of(study, regime) for regime in starting}
    rows = [*dict.fromkeys(base[0] for base in bases.values() if base), *starting]
    iou = {(e["backbone"], e["regime"], e["train_set"], e["test_set"]): e for e in entries}
    plain: list[dict[str, Any]] = []
    compared: list[dict[str, Any]] = []
    for backbone, regime, target in (
        (b, r, t) for b in study.backbones for r in rows for t in study.train_sets
    ):
        unit = Unit(backbone, regime, target, study.seeds[0])
        source, base = study.source_of(unit) if regime in starting else None, bases.get(regime)
        seen = seen_elsewhere(study, unit)
        for test_set in study.train_set_settings[target].datasets:
            entry = iou[backbone, regime, target, test_set]
            cell = {
                "backbone": backbone,
                "regime": regime,
                "base": base[0] if base else None,
                "differs": base[1] if base else [],
                "begins": "random values"
                if study.regime_settings[regime].from_scratch
                else "pretrained weights alone",
                "source": source.train_set if source else None,
                "source_regime": source.regime if source else None,
                "target": target,
                "test_set": test_set,
                "labelled": entry["labelled"],
                "seen": test_set in seen,
                "n": entry["n"],
                "iou": entry["iou"],
            }
            if base and test_set not in seen:
                paired = difference(
                    groups, (backbone, regime, target), (backbone, base[0], target), test_set
                )
                compared.append(cell | {key: value for key, value in paired.items() if key != "n"})
            else:
                plain.append(cell)
    order = {regime: at for at, regime in enumerate(rows)}
    return sorted(
        [*plain, *with_holm(compared)],
        key=lambda c: (
            study.backbones.index(c["backbone"]),
            order[c["regime"]],
            study.train_sets.index(c["target"]),
            study.train_set_settings[c["target"]].datasets.index(c["test_set"]),
        ),
    )


def matrices(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The cells as tables: one per backbone and base; rows are sources, the base's first, columns targets.

    Returns:
        For each `backbone`, `base` (None: without one), `columns` (target, test dataset where the target has several, labelled)
        and `rows` (source or None, regime, differs, cells in the order of the columns).
    """
    tables: dict[tuple[str, str | None], dict[str, Any]] = {}
    for cell in cells:
        base = cell["regime"] if cell["source"] is None else cell["base"]
        table = tables.setdefault((cell["backbone"], base), {"columns": {}, "rows": {}})
        table["columns"][cell["target"], cell["test_set"]] = cell["labelled"]
        table["rows"].setdefault(cell["regime"], []).append(cell)
    return [
        {
            "backbone": backbone,
            "base": base,
            "columns": [
                (
                    target,
                    test_set if sum(other == target for other, _ in table["columns"]) > 1 else "",
                    labelled,
                )
                for (target, test_set), labelled in table["columns"].items()
            ],
            "rows": [
                (own[0]["source"], regime, own[0]["differs"], own)
                for regime, own in table["rows"].items()
            ],
        }
        for (backbone, base), table in tables.items()
    ]


def labelled_words(labelled: Mapping[str, Sequence[int]] | None) -> str:
    """E.g. "4 of 48 slices", "8 of 192 tiles", "48 slices"; empty where it is not known."""
    if labelled is None:
        return ""
    (n, of), (tiles, of_tiles) = labelled["slices"], labelled["crops"]
    whole = of and of_tiles * n == tiles * of  # all tiles of the labelled slices count
    if not whole:
        return f"{tiles} of {of_tiles} tiles"
    return f"{n} of {of} slices" if n < of else f"{of} slices"


def transfer_table(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown lines of the matrices."""
    lines = [
        "",
        "## Starting from another model",
        "",
        "IoU on the target's own test slices with its 95 % interval, then the difference to the first row with its own (paired):",
        "**bold** where it is significant after Holm's correction. †: the source has seen labels of this dataset that the target"
        " lacks. [Figure](figures/transfer.png).",
    ]
    for table in matrices(cells):
        names = [
            f"`{target}`" + (f" on {test}" if test else "") + _brackets(labelled_words(labelled))
            for target, test, labelled in table["columns"]
        ]
        lines += [
            "",
            f"### {table['backbone']}",
            "",
            f"| starts from | {' | '.join(names)} |",
            "|---|" + "---:|" * len(names),
        ]
        for source, regime, differs, own in table["rows"]:
            start = f"`{source}`" if source else own[0]["begins"]
            other = f"; other {', '.join(differs)}" if differs else ""
            lines.append(f"| {start} ({regime}{other}) | {' | '.join(map(_cell, own))} |")
    return lines


def transfer_png(path: Path, cells: Sequence[Mapping[str, Any]]) -> None:
    """Draws the matrices: sources down, targets across, colour the difference to the first row, numbers IoU and difference.

    Args:
        path: the PNG to write.
        cells: of `transfer_cells`.
    """
    from matplotlib.figure import Figure  # takes half a second

    from emadapt.report.figures import write_figure

    tables = matrices(cells)
    largest = (
        max((abs(cell["difference"]) for cell in cells if "difference" in cell), default=0.0) or 1.0
    )
    columns, lines = (
        max(len(table["columns"]) for table in tables),
        sum(len(table["rows"]) + 1.5 for table in tables),
    )
    figure = Figure(
        figsize=(1.45 * columns + 3.2, 0.62 * lines + 0.4), dpi=110, layout="constrained"
    )
    panels = figure.subplots(
        len(tables), 1, squeeze=False, height_ratios=[len(table["rows"]) + 1.0 for table in tables]
    )[:, 0]
    for axes, table in zip(panels, tables, strict=True):
        rows = [own for *_, own in table["rows"]]
        values = [[cell.get("difference", float("nan")) for cell in own] for own in rows]
        axes.set_facecolor("0.93")  # nothing to compare
        shown = axes.imshow(values, cmap="PuOr_r", vmin=-largest, vmax=largest, aspect="auto")
        for y, x in np.ndindex(len(rows), len(table["columns"])):
            cell = rows[y][x]
            text = f"{cell['iou']['mean']:.3f}" + (" †" if cell["seen"] else "")
            if "difference" in cell:
                low, high = cell["ci95"]
                text += f"\n{cell['difference']:+.3f}{'*' if cell['p_holm'] < 0.05 else ''} ({low:+.2f} to {high:+.2f})"
            dark = abs(cell.get("difference", 0.0)) > 0.7 * largest
            axes.text(
                x,
                y,
                text,
                ha="center",
                va="center",
                fontsize=7.5,
                color="white" if dark else "black",
            )
        axes.set_xticks(
            range(len(table["columns"])),
            [
                f"{target}\n{labelled_words(labelled)}" + (f"\non {test}" if test else "")
                for target, test, labelled in table["columns"]
            ],
            fontsize=8,
        )
        axes.set_yticks(
            range(len(rows)),
            [f"{own[0]['source'] or own[0]['begins']}\n({own[0]['regime']})" for own in rows],
            fontsize=8,
        )
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.set_title(
            f"{table['backbone']}: from a source (rows) to a target (columns), IoU", fontsize=9
        )
    figure.colorbar(
        shown, ax=list(panels), label="difference in IoU to the first row", fraction=0.04
    )
    write_figure(path, figure)


def _cell(cell: Mapping[str, Any]) -> str:
    text = (
        f"{cell['iou']['mean']:.3f} ({cell['iou']['ci95'][0]:.3f} to {cell['iou']['ci95'][1]:.3f})"
    )
    if cell["seen"]:
        return f"{text} †"
    if "difference" not in cell:
        return text
    low, high = cell["ci95"]
    found = f"{cell['difference']:+.3f}"
    return (
        f"{text}; {f'**{found}**' if cell['p_holm'] < 0.05 else found} ({low:+.3f} to {high:+.3f})"
    )


def _brackets(text: str) -> str:
    return f" ({text})" if text else ""


def _names_a_training_set(study: Study, regime: str) -> bool:
    start = getattr(study.regime_settings[regime], "warm_start", "")
    return "-" in start and "/" not in start
