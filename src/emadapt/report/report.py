"""What a study found: leaderboard.md and bars, which DVC follows; the page, summary.json, figures.

The latter change with seconds, memory and the commit, so they are outside of git and DVC.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from emadapt.files import whole_folder, write_json, write_text
from emadapt.report import sections
from emadapt.report.contrasts import FACTORS, against_best, contrasts
from emadapt.report.domain import read_cards
from emadapt.report.page import build_page
from emadapt.report.tables import Section, Table, markdown
from emadapt.report.units import entries, read_units, score_of
from emadapt.study.study import Study
from emadapt.tracking.provenance import provenance_tags


def build_report(root: Path, study: Study) -> Path:
    """Write summary.json, leaderboard.md, index.html, figures/ and plots/ under <root>/reports.

    The same metrics in the same checkout give the same bytes.

    Args:
        root: the project root, with build/evaluate of every unit of the study; what diagnose
            wrote in reports/domain, and model.json of the units, are used where they are there.
        study: the study to report.

    Returns:
        The path of summary.json.

    Raises:
        InputError: metrics of a unit are missing, unreadable, of another study or of other weights
            or data than those of another unit; so are diagnostics.
    """
    rows = read_units(root, study)
    cards = read_cards(root, study)
    units = entries(rows)
    changed = {factor: contrasts(rows, factor) for factor in FACTORS}
    found = [row for own in changed.values() for row in own] + against_best(rows)
    made_from = provenance_tags(root)
    commit = made_from.get("git.commit")
    dirty = "-dirty" if made_from.get("git.dirty") != "false" else ""
    summary = {
        "study": study.name,
        "git": commit and commit + dirty,
        "data_md5": made_from.get("data.md5"),
        "params_sha256": made_from.get("params.sha256"),
        "units": units,
        "contrasts": found,
    }
    reports, folder = root / "reports", root / "reports/figures"
    _remove_figures(folder)
    of_volumes = any(study.dataset_settings[name].of_volumes for name in study.tested)
    curves = sections.labels(folder, units, found)
    parts = [
        sections.leaderboard(folder, units, of_volumes=of_volumes),
        *(sections.changes(folder, factor, own) for factor, own in changed.items() if own),
        *([curves] if curves else []),
        sections.distances(root, cards),
        sections.slices(folder, root, rows, units),
    ]
    write_text(reports / "leaderboard.md", leaderboard(study, parts))
    _write_bars(reports / "plots", rows)
    write_text(reports / "index.html", build_page(root, study, summary, parts))
    write_json(reports / "summary.json", summary)
    return reports / "summary.json"


def leaderboard(study: Study, parts: list[Section]) -> str:
    """The sections that git follows, as Markdown."""
    lines = [f"# Results of study `{study.name}`"]
    for section in parts:
        if not section.kept:
            continue
        lines += ["", f"## {section.title}"]
        for paragraph in section.text:
            lines += ["", paragraph]
        for part in section.parts:
            if isinstance(part, Table):
                lines += ["", f"### {part.caption}", "", *markdown(part)]
    return "\n".join(lines) + "\n"


def _write_bars(folder: Path, rows: pd.DataFrame) -> None:
    """The headline of each unit on each test dataset, for `dvc plots`."""
    with whole_folder(folder) as temporary:
        for test_set, own in rows.groupby("test_set"):
            score = [round(test[score_of(test)], 4) for test in own["test"]]
            own[["unit"]].assign(score=score).to_csv(temporary / f"{test_set}.csv", index=False)


def _remove_figures(folder: Path) -> None:
    """Figures of an earlier report, which this one may not draw."""
    names = ("iou", "curves", *FACTORS)
    for file in [folder / f"{name}.png" for name in names] + [
        *folder.glob("overlays-*.jpg"),
        *folder.glob("confusion-*.png"),
    ]:
        file.unlink(missing_ok=True)
