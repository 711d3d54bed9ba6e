"""What a study found: reports/summary.json, the leaderboard, the figures and the page, from the metrics of its units."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emadapt.errors import InputError
from emadapt.files import write_text
from emadapt.report.aligned import (
    ALIGNED_METHOD,
    aligned_png,
    aligned_table,
    by_gain,
    compare_aligned,
)
from emadapt.report.comparisons import (
    COMPARISONS_METHOD,
    Groups,
    against_best,
    compare_regimes,
    headline,
    kind_of,
)
from emadapt.report.few_shot import FEW_SHOT_METHOD, few_shot_curves, few_shot_table, panels
from emadapt.report.objects import objects_table, of_seeds
from emadapt.report.page import build_page
from emadapt.report.transfer import domain_vs_iou, read_domain
from emadapt.report.transfer_matrix import (
    TRANSFER_METHOD,
    transfer_cells,
    transfer_png,
    transfer_table,
)
from emadapt.report.unions import unions, unions_table
from emadapt.study.study import Study, Unit
from emadapt.tracking.provenance import provenance_tags

METRICS = ("iou", "dice", "boundary_iou")
CI95_METHOD = (
    "one seed: bootstrap over blocks of test slices, widened for few blocks as Student's t is; several seeds: the half-widths of"
    " that, averaged over seeds,"
    " and of Student's t interval of the mean over seeds, added in quadrature and clipped to [0, 1]"
)


def build_report(root: Path, study: Study) -> Path:
    """Writes summary.json, leaderboard.md, domain-vs-iou.json, index.html and figures/ under <root>/reports.

    The same metrics in the same checkout give the same bytes.

    Args:
        root: the project root, with build/evaluate/<unit>/metrics.json of every unit of the study; what diagnose wrote
            (reports/domain) and model.json of the units are used where they are there.
        study: the study to report.

    Returns:
        The path of summary.json.

    Raises:
        InputError: metrics of a unit are missing, unreadable, or of another study or an older version; diagnostics likewise.
    """
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for unit in study.units():
        groups.setdefault((unit.backbone, unit.regime, unit.train_set), []).append(
            _metrics(root, unit, study.tested)
        )
    entries = [
        _entry(*key, test_set, runs) for key, runs in groups.items() for test_set in study.tested
    ]
    kinds = [_kind(study, entry) for entry in entries]
    cards = read_domain(root, study)
    joined = domain_vs_iou(study, entries, cards)
    made_from = provenance_tags(root)
    summary: dict[str, Any] = {
        "study": study.name,
        "git": _commit(made_from),
        "data_md5": made_from.get("data.md5"),
        "params_sha256": made_from.get("params.sha256"),
        "ci95_method": CI95_METHOD,
        "units": entries,
        "comparisons_method": COMPARISONS_METHOD,
        "comparisons": compare_regimes(study, groups),
        "against_best": against_best(study, groups, entries),
        "unions": unions(study, groups),
    }
    if curves := few_shot_curves(study, entries):
        summary |= {"few_shot_method": FEW_SHOT_METHOD, "few_shot": curves}
    if cells := transfer_cells(study, groups, entries):
        summary |= {"transfer_method": TRANSFER_METHOD, "transfer": cells}
    if rows := compare_aligned(study, groups):
        summary |= {"aligned_method": ALIGNED_METHOD, "aligned": rows}
    reports = root / "reports"
    _write(reports / "leaderboard.md", leaderboard(study, summary, kinds))
    _write(reports / "domain-vs-iou.json", json.dumps(joined, indent=1) + "\n")
    _figures(root, study, groups, summary, kinds, joined)

    _write(reports / "index.html", build_page(root, study, summary, kinds, groups, cards, joined))
    _write(reports / "summary.json", json.dumps(summary, indent=1) + "\n")
    return reports / "summary.json"


def _figures(
    root: Path,
    study: Study,
    groups: Groups,
    summary: Mapping[str, Any],
    kinds: Sequence[str],
    joined: Mapping[str, Any],
) -> None:
    """IoU by unit, labels and domain, overlays of each test dataset's best, IoU loss against distance: what there is."""
    from emadapt.report import figures  # matplotlib takes half a second

    folder, rows = root / "reports/figures", headline(study, summary["units"], kinds)
    figures.iou_png(folder / "iou.png", [entry for entry, _ in rows], [kind for _, kind in rows])
    draw: dict[str, tuple[str, Callable[[Path], None]]] = {
        "aligned.png": ("aligned", lambda path: aligned_png(path, by_gain(summary["aligned"]))),
        "transfer.png": ("transfer", lambda path: transfer_png(path, summary["transfer"])),
    }
    for name, (key, drawn) in draw.items():
        if summary.get(key):
            drawn(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)  # of an earlier report
    curves = summary.get("few_shot", [])
    shown, looks = (
        panels(curves),
        list(dict.fromkeys((curve["backbone"], curve["regime"]) for curve in curves)),
    )
    for test_set in study.tested:
        if own := [panel for panel in shown if panel["test_set"] == test_set]:
            figures.few_shot_png(folder / f"few-shot-{test_set}.png", own, looks)
        else:
            (folder / f"few-shot-{test_set}.png").unlink(missing_ok=True)
    if any(
        value is not None for point in joined["points"] for value in point["distances"].values()
    ):
        figures.scatter_png(folder / "domain-vs-iou.png", joined["points"], joined["correlations"])
    else:
        (folder / "domain-vs-iou.png").unlink(missing_ok=True)  # of an earlier report
    for test_set in study.tested:
        # The best of each kind, so that one figure shows what crossing domains costs.
        worst_first = sorted(rows, key=lambda pair: pair[0]["iou"]["mean"])
        best = {kind: entry for entry, kind in worst_first if entry["test_set"] == test_set}
        best_first = sorted(best.values(), key=lambda entry: -entry["iou"]["mean"])
        names = [groups[e["backbone"], e["regime"], e["train_set"]][0]["unit"] for e in best_first]
        overlays = [root / "build/evaluate" / name / f"overlay-{test_set}.png" for name in names]
        if there := [file for file in overlays if file.is_file()]:
            figures.stack_png(folder / f"overlays-{test_set}.png", there)


def leaderboard(study: Study, summary: Mapping[str, Any], kinds: Sequence[str]) -> str:
    """A summary as Markdown: a table per test dataset, the best foreground IoU first; few labels."""
    entries = summary["units"]
    shown = headline(study, entries, kinds)
    few = ["Training sets with few labels stand at the end."] if len(shown) < len(entries) else []
    if "oracle prompts" in kinds or "zero-shot" in kinds:
        few += [
            "zero-shot: a published system, not trained here; oracle prompts: one that is told by the labels of the test slices",
            "where the objects are, not to be compared with the others.",
        ]
    if unseen := any("unseen" in entry for entry in entries):
        few += [
            "All slices, unseen: IoU over the whole of a dataset of which no label was seen, and how many slices that are."
        ]
    lines = [
        f"# Leaderboard of study `{study.name}`",
        "",
        "Foreground metrics at native resolution, pooled over the test slices; mean over seeds with its 95 % interval.",
        "in-domain: trained on this dataset alone; union: on it and others; other labels: on its images under other labels;",
        "seen at the start: on others, begun from a model that was trained on it; cross-domain: on others only.",
        "Parameters are the trainable ones; time is that of training one seed. Figures: [IoU](figures/iou.png).",
        *few,
    ]
    for test_set in dict.fromkeys(entry["test_set"] for entry in entries):
        rows = [row for row in shown if row[0]["test_set"] == test_set]
        rows.sort(key=lambda row: -row[0]["iou"]["mean"])
        lines += ["", f"## Test dataset `{test_set}` ({rows[0][0]['n']} slices)", ""]
        lines += [
            "| | backbone | regime | trained on | | IoU | 95 % | Dice | boundary IoU | seeds | parameters | time |"
            + " all slices, unseen |" * unseen,
            "|---:|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|" + "---|" * unseen,
        ]
        for rank, (entry, kind) in enumerate(rows, 1):
            iou, seeds = entry["iou"], len(entry["iou"]["values"])
            spread = f" ± {iou['std']:.3f}" if seeds > 1 else ""
            cells = [
                str(rank),
                *(entry[name] for name in ("backbone", "regime", "train_set")),
                kind,
                f"**{iou['mean']:.3f}**{spread}",
                f"{iou['ci95'][0]:.3f} to {iou['ci95'][1]:.3f}",
                f"{entry['dice']['mean']:.3f}",
                f"{entry['boundary_iou']['mean']:.3f}",
                str(seeds),
                f"{entry['trainable_params']:,}",
                f"{entry['seconds']:,.0f} s",
                *([_unseen_cell(entry)] if unseen else []),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += objects_table(entries)
    if "aligned" in summary:
        lines += aligned_table(summary["aligned"])
    if summary["unions"]:
        lines += unions_table(summary["unions"])
    if "few_shot" in summary:
        lines += few_shot_table(summary["few_shot"])
    if "transfer" in summary:
        lines += transfer_table(summary["transfer"])
    return "\n".join(lines) + "\n"


def _unseen_cell(entry: Mapping[str, Any]) -> str:
    if "unseen" not in entry:
        return ""
    iou, n = entry["unseen"]["iou"], entry["unseen"]["n"]
    return f"{iou['mean']:.3f} ({iou['ci95'][0]:.3f} to {iou['ci95'][1]:.3f}), {n}"


def combine(values: Sequence[float], intervals: Sequence[Sequence[float]]) -> dict[str, Any]:
    """One metric over seeds: mean, standard deviation (n - 1; 0 for one seed), values, 95 % interval of the mean.

    The interval has two independent sources of error. Which slices were tested is the same for every seed, so the seeds'
    bootstrap half-widths are averaged and do not shrink with more seeds. Which seed was drawn gives Student's t interval of
    the mean. Independent errors add in quadrature, below and above the mean separately. With few seeds this is wide, as
    it must be: Student's factor is 12.7 for two seeds, 2.8 for five.

    Args:
        values: the metric of each seed, 0 to 1.
        intervals: each seed's (low, high) from the bootstrap over blocks of test slices.
    """
    mean, (low, high) = float(np.mean(values)), np.mean(intervals, axis=0)
    below, above, std = mean - low, high - mean, 0.0
    if len(values) > 1:
        from scipy.stats import t

        std = float(np.std(values, ddof=1))
        seeds = t.ppf(0.975, len(values) - 1) * std / len(values) ** 0.5
        below, above = np.hypot(below, seeds), np.hypot(above, seeds)
    interval = [_round(max(0.0, mean - below)), _round(min(1.0, mean + above))]
    return {
        "mean": _round(mean),
        "std": _round(std),
        "values": [_round(v) for v in values],
        "ci95": interval,
    }


def _metrics(root: Path, unit: Unit, datasets: Sequence[str]) -> dict[str, Any]:
    """What evaluate wrote about a unit, checked as far as the report needs it."""
    file = root / "build/evaluate" / unit.name / "metrics.json"
    expected, do = f"the test metrics of unit {unit.name}", f"Run `dvc repro evaluate@{unit.name}`."
    try:
        metrics = json.loads(file.read_text())
    except FileNotFoundError:
        raise InputError(file, found="no file", expected=expected, do=do) from None
    except ValueError as error:
        raise InputError(file, found=f"no JSON ({error})", expected=expected, do=do) from None
    if metrics.get("unit") != unit.name:
        raise InputError(file, found=f"unit {metrics.get('unit')}", expected=expected, do=do)
    if missing := [dataset for dataset in datasets if dataset not in metrics["test"]]:
        raise InputError(file, found=f"no test on {', '.join(missing)}", expected=expected, do=do)
    if any("counts" not in metrics["test"][dataset] for dataset in datasets):
        do = f"Run `dvc repro --force --single-item evaluate@{unit.name}` or `emadapt evaluate {unit.name}`."
        raise InputError(
            file,
            found="no `counts`: an older evaluate wrote it",
            expected="counts per test slice",
            do=do,
        )
    return metrics


def _entry(
    backbone: str, regime: str, train_set: str, test_set: str, runs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """One entry of the summary from the metrics of its seeds."""
    tests = [run["test"][test_set] for run in runs]
    return {
        "backbone": backbone,
        "regime": regime,
        "train_set": train_set,
        "test_set": test_set,
        "n": tests[0]["n"],
        **{
            name: combine([test[name] for test in tests], [test[f"{name}_ci95"] for test in tests])
            for name in METRICS
        },
        **_of_all_slices(tests),
        **of_seeds(tests, combine),
        "labelled": runs[0].get("labelled"),
        "trainable_params": runs[0]["trainable_params"],
        "seconds": _round(np.mean([run["train_seconds"] for run in runs])),
        "peak_mb": _round(max(run["peak_mb"] for run in runs)),
    }


def _of_all_slices(tests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`unseen`, the IoU over slices of the whole dataset, where every seed has seen none of its labels (`emadapt.training.unseen`)."""
    whole = [test["unseen"] for test in tests if "unseen" in test]
    if len(whole) < len(tests):
        return {}
    iou = combine([own["iou"] for own in whole], [own["iou_ci95"] for own in whole])
    return {"unseen": {"n": whole[0]["n"], "iou": iou}}


def _kind(study: Study, entry: Mapping[str, Any]) -> str:
    """How a model relates to its test dataset: what its training set does, or, if it was not trained, what it was told."""
    regime = study.regime_settings[entry["regime"]]
    if not regime.trains:
        return "oracle prompts" if regime.sees_test_labels else "zero-shot"
    return kind_of(study, entry["regime"], entry["train_set"], entry["test_set"])


def _commit(tags: Mapping[str, str]) -> str | None:
    commit = tags.get("git.commit")
    return commit and commit + ("-dirty" if tags["git.dirty"] != "false" else "")


def _round(value: float) -> float:
    return round(float(value), 6)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
