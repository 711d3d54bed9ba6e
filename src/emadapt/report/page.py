"""The page that people read: reports/index.html, one file with its figures inside."""

from __future__ import annotations

import io
import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

import emadapt
from emadapt.report.contrasts import FACTORS, candidates
from emadapt.report.html import data_address, render
from emadapt.report.tables import Picture, Section
from emadapt.study.study import SAID, Study
from emadapt.training.tracked import UNITS

WIDEST = 1000  # px of an embedded picture
PACKAGES = ("torch", "timm", "peft", "numpy", "scipy", "scikit-learn", "dvc", "mlflow")
Summary = Mapping[str, Any]


def build_page(root: Path, study: Study, summary: Summary, sections: Sequence[Section]) -> str:
    """The page as HTML; the same input gives the same text.

    Args:
        root: the project root, for model.json of the units, used where it is there.
        study: the study.
        summary: the content of summary.json.
        sections: what the page shows; their figures are drawn.
    """
    return render(
        "report",
        "page.html.jinja",
        study=study.name,
        findings=findings(study, summary),
        sections=[_shown(section) for section in sections],
        provenance=[
            ("git commit", summary["git"] or "not in a git checkout"),
            ("data md5 (data.dvc)", summary["data_md5"] or "no data.dvc"),
            ("params.yaml sha256", summary["params_sha256"] or "no params.yaml"),
            *_weights(root, study),
            _versions(),
        ],
    )


def findings(study: Study, summary: Summary) -> list[str]:
    """What was found, a sentence each."""
    sizes = [
        (len(study.units()), "model"),
        (len(study.backbones), "backbone"),
        (len(study.regimes), "regime"),
        (len(study.train_sets), "training set"),
        (len(study.seeds), "seed"),
    ]
    counted = [f"{n} {word}{'s' * (n > 1)}" for n, word in sizes]
    said = [f"Study {study.name}: {counted[0]} ({', '.join(counted[1:])})."]
    table = pd.DataFrame(summary["units"], dtype=object)
    for test_set, own in table[candidates(table)].groupby("test_set", sort=False):
        best = max(own.to_dict("records"), key=lambda entry: entry[study.score]["mean"])
        score = best[study.score]
        low, high = score["ci95"]
        said.append(
            f"Best on {test_set}: {best['regime']} on {best['backbone']}, trained on"
            f" {best['train_set']}, {SAID[study.score]} {score['mean']:.3f}"
            f" ({low:.3f} to {high:.3f})."
        )
    for factor, spec in FACTORS.items():
        rows = [row for row in summary["contrasts"] if row["factor"] == factor]
        if rows:
            said.append(f"{spec.title}: {_counted(rows)}.")
    if len(study.seeds) == 1:
        said.append("With one seed, no model is called better than another.")
    return said


def _counted(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many contrasts are decided, e.g. "of 6 comparisons 2 better, none worse"."""
    verdicts = [row["verdict"] for row in rows]
    counts = {name: verdicts.count(name) for name in ("better", "worse")}
    words = [f"{n or 'none'} {name}" for name, n in counts.items()]
    many = f"{len(rows)} comparison{'s' * (len(rows) > 1)}"
    return f"of {many} with {rows[0]['baseline']}, {' and '.join(words)}"


def _shown(section: Section) -> dict[str, Any]:
    """A section as the template takes it."""
    parts = [
        {"picture": picture(part.file), "caption": part.caption}
        if isinstance(part, Picture)
        else {"table": part}
        for part in section.parts
    ]
    return {**vars(section), "parts": parts}


def picture(file: Path) -> dict[str, Any]:
    """`src` (a data URI), `width` and `height` of a picture of at most WIDEST pixels across.

    Plots are smallest as PNG, micrographs as JPEG: the smaller is taken.
    """
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    if image.width > WIDEST:
        height = round(image.height * WIDEST / image.width)
        image = image.resize((WIDEST, height), Image.Resampling.LANCZOS)
    forms = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 82})):
        data = io.BytesIO()
        image.save(data, kind, **options)
        forms.append((data.tell(), kind, data.getvalue()))
    _, kind, content = min(forms)
    return {"src": data_address(content, kind), "width": image.width, "height": image.height}


def _weights(root: Path, study: Study) -> list[tuple[str, str]]:
    """Where each backbone's weights came from, as its trained units say."""
    found: dict[tuple[str, str], None] = {}
    for unit in study.units():
        file = root / UNITS / unit.name / "model.json"
        if file.is_file():
            origin = json.loads(file.read_text())["weights"]
            words = [origin["source"], origin.get("name", ""), f"sha256 {origin['sha256']}"]
            found[f"weights of {unit.backbone}", ", ".join(filter(None, words))] = None
    return list(found) or [("weights", "unknown: the trained units are not here")]


def _versions() -> tuple[str, str]:
    """Packages that decide numbers, in the environment that writes the page."""
    found = [f"emadapt {emadapt.__version__}", f"python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return "report written with", ", ".join(found)
