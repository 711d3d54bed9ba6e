"""What is recommended follows from the summary; a summary that does not fit is refused."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from emadapt.errors import InputError
from emadapt.report.recommend import WIDTH, recommend
from emadapt.report.report import build_report
from fakes import FEW, TRAIN_SETS, WITH_RIDGE, a_study, write_metrics

STUDY = a_study((0, 1), WITH_RIDGE, {**FEW, **TRAIN_SETS})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("recommend")
    write_metrics(root, STUDY)
    (root / "params.yaml").write_text("a: 1\n")
    return json.loads(build_report(root, STUDY).read_text())


@pytest.fixture
def summary(made):
    return copy.deepcopy(made)


def said(root: Path, summary: Any, *datasets: str) -> str:
    """What is recommended, in one line."""
    (root / "reports").mkdir(exist_ok=True)
    (root / "reports/summary.json").write_text(json.dumps(summary))
    (root / "params.yaml").write_text("a: 1\n")
    lines = recommend(root, STUDY, datasets or STUDY.datasets)
    assert all(len(line) <= WIDTH for line in lines)
    return " ".join(" ".join(lines).split())


def rival(summary: dict[str, Any], regime: str, *, as_good: bool, verdict: str) -> None:
    """What the models of a regime are said to be against the best."""
    for row in summary["contrasts"]:
        if row["factor"] == "best" and row["model"]["regime"] == regime:
            row.update(as_good=as_good, verdict=verdict)


def test_the_best_with_what_it_takes(tmp_path, summary):
    text = said(tmp_path, summary, "lucchi")
    own = [u for u in summary["units"] if u["test_set"] == "lucchi"]
    best = max(own, key=lambda u: u["iou"]["mean"])
    low, high = best["iou"]["ci95"]
    assert "lucchi (32 test slices)" in text
    assert "Best: lora on dinov2_s, head pyramid, trained on lucchi." in text
    assert f"IoU {best['iou']['mean']:.3f} ({low:.3f} to {high:.3f}). 100 s, 0.9 GB." in text
    assert "vnc (12 test slices)" not in text
    assert "params.yaml has changed" not in text
    assert "params.yaml has changed" in said(tmp_path, {**summary, "params_sha256": "another"})


def test_cheaper_only_where_it_is_shown_to_be_as_good(tmp_path, summary):
    for regime in ("ridge", "frozen"):
        rival(summary, regime, as_good=False, verdict="undecided")
    assert "Nothing cheaper was shown to be as good" in said(tmp_path, summary, "lucchi")
    rival(summary, "ridge", as_good=True, verdict="undecided")
    text = said(tmp_path, summary, "lucchi")
    assert re.search(r"Cheaper and as good \(within 0.02 IoU\): ridge on dinov2_s, trained", text)
    assert re.search(r"Baselines compared with the best: ridge .*, as good\.", text)


def test_a_baseline_that_is_the_best(tmp_path: Path, summary: dict[str, Any]) -> None:
    swap = {"ridge": "lora", "lora": "ridge"}
    text = json.dumps(summary)
    text = re.sub('"(ridge|lora)"', lambda found: f'"{swap[found[1]]}"', text)
    assert "The best is a baseline" in said(tmp_path, json.loads(text))


def test_labels(tmp_path, summary):
    text = said(tmp_path, summary)
    assert "Labels: no fewer slices were shown to be as good as all (within 0.02 IoU)." in text
    for row in summary["contrasts"]:
        row["as_good"] |= row["model"]["train_set"] == "lucchi_16"
    assert "Labels: 16 slices were shown to be as good as all" in said(tmp_path, summary)
    for entry in summary["units"]:
        entry["amount"] = "all"
    assert "add training sets such as vnc_4: {datasets: [vnc]" in said(tmp_path, summary)


def test_a_summary_that_does_not_fit(tmp_path, summary):
    with pytest.raises(InputError, match=r"summary.json: found no file; .*`emadapt report`"):
        recommend(tmp_path, STUDY, STUDY.datasets)
    odd = {**summary["units"][0], "regime": "other"}
    for change, words in (
        ({"study": "another"}, "found that of study another"),
        ({"units": summary["units"][1:]}, "other in dinov2_s"),
        ({"units": [*summary["units"], odd]}, "other in dinov2_s-other"),
    ):
        with pytest.raises(InputError, match=words):
            said(tmp_path, {**summary, **change})
    for wrong in ("{", "[]", "{}", "3"):
        (tmp_path / "reports/summary.json").write_text(wrong)
        with pytest.raises(InputError, match="`emadapt report`"):
            recommend(tmp_path, STUDY, STUDY.datasets)
