"""What joint training, mispaired labels, the way to draw and the regime each do to the IoU, in a study that crosses them.

A *mispaired* dataset is one with `pairing: lexicographic` or `lexicographic_165`; its twin has the same files, rightly paired.
Where a study has both, its training sets differ by factors, and a linear model per test dataset reads the effect of each from
all units at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emadapt.report.comparisons import Groups, difference, with_holm
from emadapt.study.study import Study

METHOD = (
    "`fits`: ordinary least squares per backbone and test dataset over all units that were trained on it (or on its mispaired"
    " twin): foreground IoU = regime * (several datasets + mispaired + both + drawn by size) + seed (a block). Regimes against"
    " the first, factors under the first, and `under` another regime what they do there beyond that. Intervals: Student's t on"
    " the residuals, and the moving-block bootstrap over test slices (the same slices for every unit, widened for few blocks"
    " as Student's t is), in quadrature. Residuals hold what the factors do not explain, with one variance for"
    " all regimes; intervals of `fits` are not corrected for their number, and with a single block of slices they are of the"
    " residuals alone. `contrasts`: two training sets that"
    " differ in one factor, under each regime, difference as in `comparisons`, p_holm over all of them. `pooled`: IoU over the"
    " summed pixels of all rightly paired test datasets. `ceiling`: IoU of the right labels themselves against the mispaired"
    " ones, the score of a model without errors."
)
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    """A training set by its factors."""

    datasets: frozenset[str]
    """Rightly paired, or the twins of those that are not."""
    mispaired: str
    """How, or nothing."""
    by_size: bool

    def columns(self) -> dict[str, float]:
        """What is not 0 of its row of the design, without regime and seed."""
        several, how = len(self.datasets) > 1, f"mispaired, {self.mispaired}"
        row = {
            "several datasets": several,
            how: bool(self.mispaired),
            f"several datasets and {how}": several and self.mispaired,
        }
        return {
            name: 1.0 for name, there in (row | {"drawn by size": self.by_size}).items() if there
        }


def twins_of(study: Study) -> dict[str, str]:
    """Mispaired dataset -> the one with the same files, rightly paired."""
    folder = {name: study.dataset_settings[name].path or f"data/{name}" for name in study.tested}
    wrong = [name for name in study.tested if study.dataset_settings[name].mispaired]
    pairs = (
        (name, other)
        for name in wrong
        for other in study.tested
        if other not in wrong and folder[other] == folder[name]
    )
    return dict(pairs)


def cells_of(study: Study) -> dict[str, Cell]:
    """Training sets with all labels, by name."""
    twin, cells = twins_of(study), {}
    for name in study.train_sets:
        spec = study.train_set_settings[name]
        if not spec.few:
            by_size = len(spec.datasets) > 1 and (
                spec.draw == "proportional" or (not spec.draw and not study.train.balanced)
            )
            how = " and ".join(
                sorted({study.dataset_settings[d].pairing for d in spec.datasets if d in twin})
            )
            cells[name] = Cell(frozenset(twin.get(d, d) for d in spec.datasets), how, by_size)
    return cells


def factors(root: Path, study: Study, groups: Groups) -> dict[str, Any]:
    """Effects of a study's factors on IoU; {} for a study without a mispaired dataset and its twin.

    Args:
        root: the project root; with build/ingest for the ceilings.
        study: the study.
        groups: metrics of the seeds by (backbone, regime, training set).
    """
    twin, cells = twins_of(study), cells_of(study)
    if not twin:
        return {}
    tests = [name for name in study.tested if name not in twin]
    fits = [
        fit
        for backbone in study.backbones
        for test in tests
        if (fit := _fit(study, groups, cells, backbone, test))
    ]
    pooled = [
        _pooled(groups[key], tests)
        | dict(zip(("backbone", "regime", "train_set"), key, strict=True))
        for key in groups
    ]
    found = {
        "factors_method": METHOD,
        "fits": fits,
        "contrasts": _contrasts(study, groups, cells, tests),
        "pooled": pooled,
    }
    return found | {
        "ceiling": {wrong: _agreement(root, right, wrong) for wrong, right in twin.items()}
    }


def effects(
    iou: Floats, columns: Mapping[str, Floats], seeds: Sequence[int], draws: Floats, blocks: int
) -> list[dict[str, Any]]:
    """Least-squares effects with their intervals.

    Args:
        iou: (units,) pooled over the test slices; more units than columns and seeds.
        columns: (units,) of each factor; one that is constant, or that others make up, must not be among them.
        seeds: (units,) of the block effect.
        draws: (replicates, units) IoU under resampled slices.
        blocks: of slices that were drawn; with a single one, slices say nothing and intervals are of the residuals alone.

    Returns:
        `term`, `estimate` and `ci95` of each column.
    """
    from scipy.stats import t

    levels = sorted(set(seeds))
    block = [
        np.array([(s == level) - (s == levels[0]) for s in seeds], float) for level in levels[1:]
    ]
    design = np.column_stack([np.ones(len(iou)), *columns.values(), *block])
    inverse = np.linalg.pinv(design)
    beta, freedom = inverse @ iou, len(iou) - np.linalg.matrix_rank(design)
    residual = iou - design @ beta
    half = t.ppf(0.975, freedom) * np.sqrt(
        residual @ residual / freedom * np.diag(inverse @ inverse.T)
    )
    if blocks > 1:
        spread = (draws @ inverse.T).std(0) * np.sqrt(blocks / (blocks - 1))
        half = np.hypot(half, t.ppf(0.975, blocks - 1) * spread)
    return [
        {
            "term": name,
            "estimate": round(float(b), 6),
            "ci95": [round(float(b - h), 6), round(float(b + h), 6)],
        }
        for name, b, h in zip(columns, beta[1:], half[1:], strict=False)
    ]


def factors_table(summary: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown: the linear models, then single contrasts, the pooled IoU and the ceiling of mispaired labels."""
    lines = ["", "## What each factor does to the foreground IoU"]
    for fit in summary["fits"]:
        what = f"{fit['backbone']}, tested on `{fit['test_set']}`: {fit['units']} units, {fit['seeds']} seeds"
        lines += [
            "",
            f"{what}, {fit['n']} slices in {fit['blocks']} blocks.",
            "",
            *_head("factor", "effect:", "95 %:"),
        ]
        lines += [
            f"| {term['term']} | {_effect(term['estimate'], term['ci95'])} |"
            for term in fit["terms"]
        ]
    columns = (
        "tested on",
        "factor",
        "trained on",
        "against",
        "regime",
        "difference:",
        "95 %:",
        "p (Holm):",
    )
    lines += ["", "One factor changed, everything else the same:", "", *_head(*columns)]
    for c in sorted(summary["contrasts"], key=lambda c: (c["test_set"], c["term"], c["train_set"])):
        names = " | ".join(
            c[name] for name in ("test_set", "term", "train_set", "against", "regime")
        )
        lines.append(f"| {names} | {_effect(c['difference'], c['ci95'])} | {c['p_holm']:.4f} |")
    lines += ["", "IoU pooled over all pixels of the rightly paired test datasets:", ""]
    lines += _head("backbone", "regime", "trained on", "IoU:")
    lines += [
        f"| {p['backbone']} | {p['regime']} | {p['train_set']} | {p['mean']:.3f} |"
        for p in summary["pooled"]
    ]
    for wrong, value in summary["ceiling"].items():
        if value is not None:
            lines += [
                "",
                f"The right labels themselves score {value:.3f} against those of `{wrong}`.",
            ]
    return lines


def factors_png(
    path: Path, fits: Sequence[Mapping[str, Any]], contrasts: Sequence[Mapping[str, Any]]
) -> None:
    """Draws a panel per backbone and test dataset: effects of the linear model, and under each the contrasts by regime.

    Args:
        path: the PNG to write.
        fits: of `factors.factors`.
        contrasts: of `factors.factors`.
    """
    from matplotlib.figure import Figure  # takes half a second

    from emadapt.report.figures import BLUE, GREEN, ORANGE, forest, write_figure

    colour = dict(
        zip(
            dict.fromkeys(c["regime"] for c in contrasts),
            (BLUE, ORANGE, GREEN, "0.45", "0.7"),
            strict=False,
        )
    )
    panels: list[list[tuple[str, float, Sequence[float], str]]] = []
    for fit in fits:
        rows = [(t["term"], t["estimate"], t["ci95"], "black") for t in fit["terms"]]
        own = [
            c
            for c in contrasts
            if (c["backbone"], c["test_set"]) == (fit["backbone"], fit["test_set"])
        ]
        for c in sorted(own, key=lambda c: (c["term"], c["train_set"])):
            what = f"{c['train_set']} - {c['against']}: {c['regime']}"
            rows.append((what, c["difference"], c["ci95"], colour.get(c["regime"], "0.45")))
        panels.append(rows)
    figure = Figure(
        figsize=(6.2 * len(panels), 0.27 * max(map(len, panels)) + 1.2),
        dpi=110,
        layout="constrained",
    )
    for axes, rows, fit in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, fits, strict=True
    ):
        forest(axes, rows, f"{fit['backbone']}, tested on {fit['test_set']}")
        axes.axhline(len(fit["terms"]) - 0.5, color="0.8", linewidth=0.8)
    write_figure(path, figure)


def _head(*columns: str) -> list[str]:
    """Head of a Markdown table; a colon aligns to the right."""
    rule = ["---:" if name.endswith(":") else "---" for name in columns]
    return [f"| {' | '.join(name.rstrip(':') for name in columns)} |", f"|{'|'.join(rule)}|"]


def _effect(value: float, ci95: Sequence[float]) -> str:
    return f"{value:+.3f} | {ci95[0]:+.3f} to {ci95[1]:+.3f}"


def _fit(
    study: Study, groups: Groups, cells: Mapping[str, Cell], backbone: str, test: str
) -> dict[str, Any] | None:
    """The linear model of one backbone on one test dataset; None where no factor varies, or as many do as there are units."""
    from emadapt.metrics.pixels import block_bootstrap

    rows, iou, seeds, draws, n, block = [], [], [], [], 0, 1
    for (own, regime, train_set), runs in groups.items():
        if own != backbone or train_set not in cells or test not in cells[train_set].datasets:
            continue
        for run in runs:
            scores = run["test"][test]
            n, block = scores["n"], scores["block_slices"]
            factor = cells[train_set].columns()
            rows.append(
                {f"regime {regime}": 1.0}
                | factor
                | {f"{name}, under {regime}": 1.0 for name in factor}
            )
            iou.append(scores["iou"])
            seeds.append(run["seed"])
            draws.append(block_bootstrap(np.array(scores["counts"], np.int64), block)[:, 0])
    names = [f"regime {name}" for name in study.regimes[1:]]
    factor_names = {name for train_set in cells for name in cells[train_set].columns()}
    single = sorted(factor_names, key=lambda name: (len(name), name))
    names += single + [f"{name}, under {regime}" for regime in study.regimes[1:] for name in single]
    columns: dict[str, Floats] = {}
    for name in names:
        values = np.array([row.get(name, 0.0) for row in rows], float)
        others = np.column_stack([np.ones(len(rows)), *columns.values()])
        if np.linalg.matrix_rank(np.column_stack([others, values])) > others.shape[1]:
            columns[name] = values
    if not columns or len(rows) <= len(columns) + len(
        set(seeds)
    ):  # nothing to read, or no residual to read an interval from
        return None
    terms = effects(np.array(iou), columns, seeds, np.column_stack(draws), n // block)
    first = {
        "backbone": backbone,
        "test_set": test,
        "units": len(rows),
        "seeds": len(set(seeds)),
        "n": n,
        "blocks": n // block,
    }
    return first | {"terms": terms}


def _contrasts(
    study: Study, groups: Groups, cells: Mapping[str, Cell], tests: Sequence[str]
) -> list[dict[str, Any]]:
    """Training sets that differ in one factor, under each regime, on each test dataset that both were trained on."""
    found = []
    for one, other in itertools.permutations(cells, 2):
        a, b = cells[one], cells[other]
        differ = [
            name
            for name in ("datasets", "mispaired", "by_size")
            if getattr(a, name) != getattr(b, name)
        ]
        if len(differ) != 1 or not _more(a, b, differ[0]):
            continue
        term = {
            "datasets": "several datasets",
            "mispaired": f"mispaired, {a.mispaired}",
            "by_size": "drawn by size",
        }[differ[0]]
        for backbone, regime in itertools.product(study.backbones, study.regimes):
            for test in (t for t in tests if t in a.datasets & b.datasets):
                names = {
                    "backbone": backbone,
                    "regime": regime,
                    "term": term,
                    "train_set": one,
                    "against": other,
                }
                apart = difference(groups, (backbone, regime, one), (backbone, regime, other), test)
                found.append({**names, "test_set": test, **apart})
    return with_holm(found)


def _more(a: Cell, b: Cell, factor: str) -> bool:
    """Whether `a` is the one of the two that has the factor."""
    if factor == "datasets":
        return len(b.datasets) == 1 and b.datasets < a.datasets
    return bool(getattr(a, factor)) and not getattr(b, factor)


def _pooled(runs: Sequence[Mapping[str, Any]], tests: Sequence[str]) -> dict[str, Any]:
    """IoU over all pixels of the test datasets, as the reference scores a union, of each seed."""
    from emadapt.metrics.pixels import pooled

    values = [
        pooled(np.concatenate([np.array(run["test"][t]["counts"], np.int64) for t in tests]))["iou"]
        for run in runs
    ]
    return {"mean": round(float(np.mean(values)), 6), "values": [round(v, 6) for v in values]}


def _agreement(root: Path, right: str, wrong: str) -> float | None:
    """IoU of two datasets' labels over the test slices; None where they are not ingested."""
    from emadapt.data.ingest import INGESTED, open_volume
    from emadapt.metrics.pixels import overlap_counts, pooled

    if not all((root / INGESTED / name / "manifest.json").is_file() for name in (right, wrong)):
        return None
    a, b = (open_volume(name, root / INGESTED) for name in (right, wrong))
    slices = [z for z in a.split["test"] if z in b.split["test"]]
    counts = [
        overlap_counts(np.asarray(b.label[z]) > 0, np.asarray(a.label[z]) > 0) for z in slices
    ]
    return round(pooled(np.array(counts, np.int64))["iou"], 6)
