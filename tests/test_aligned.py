"""Alignment against none: which pairs are compared, and what the report says of them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from emadapt.report import report
from emadapt.report.aligned import by_gain, compare_aligned, without_align
from emadapt.study.backbones import BackboneSettings
from emadapt.study.regimes import regime_settings
from emadapt.study.study import Study
from emadapt.training.evaluate import EVALUATED
from fakes import a_study, write_metrics
from pages import Reader

PLAIN = BackboneSettings(arch="dinov2_s", source="pypi")
SPECS = {
    "plain": PLAIN,
    "hist": PLAIN.changed(align="histogram", reference="lucchi"),
    "other": dataclasses.replace(
        PLAIN, align="voxel", reference="lucchi", overlap=0.1
    ),  # differs in its overlap as well
}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    study = dataclasses.replace(a_study(), backbones=tuple(SPECS), backbone_settings=SPECS)
    write_metrics(tmp_path, study)
    for unit in (
        study.units()
    ):  # aligned models find a tenth less on VNC, and are the same models on Lucchi
        file = tmp_path / EVALUATED / unit.name / "metrics.json"
        metrics = json.loads(file.read_text())
        if unit.backbone == "hist":
            counts = metrics["test"]["vnc"]["counts"]
            metrics["test"]["vnc"]["counts"] = [[round(0.9 * row[0]), *row[1:]] for row in counts]
        file.write_text(json.dumps(metrics))
    return study


def test_only_what_differs_in_nothing_else_is_compared_with(study: Study) -> None:
    specs = {
        "frozen": regime_settings(kind="frozen"),
        "coral": regime_settings(kind="frozen", align="coral", align_weight=9.0),
        "longer": regime_settings(kind="frozen", align="coral", epochs=9),
    }
    study = dataclasses.replace(study, regimes=tuple(specs), regime_settings=specs)
    found = {
        (name, regime): without_align(study, name, regime) for name in SPECS for regime in specs
    }
    control = ("plain", "frozen")
    assert {key: against for key, against in found.items() if against} == {
        ("hist", "frozen"): control,
        ("plain", "coral"): control,
        ("hist", "coral"): control,
    }


def test_of_features_and_of_both(study: Study, tmp_path: Path) -> None:
    regimes = {
        "frozen": regime_settings(kind="frozen"),
        "coral": regime_settings(kind="frozen", align="coral"),
    }
    study = dataclasses.replace(
        study, regimes=tuple(regimes), regime_settings=regimes, backbones=("plain", "hist")
    )
    groups: dict[tuple[str, str, str], list] = {}
    for unit in study.units():
        source = (
            tmp_path
            / EVALUATED
            / dataclasses.replace(unit, regime="lora" if unit.regime == "coral" else "frozen").name
        )
        metrics = json.loads((source / "metrics.json").read_text())
        groups.setdefault((unit.backbone, unit.regime, unit.train_set), []).append(metrics)
    rows = {(r["align"], r["train_set"], r["test_set"]): r for r in compare_aligned(study, groups)}
    assert {key[0] for key in rows} == {"coral", "histogram", "histogram + coral"}
    assert all((r["against"], r["against_regime"]) == ("plain", "frozen") for r in rows.values())
    assert (
        rows["histogram", "lucchi", "vnc"]["difference"]
        < 0
        < rows["coral", "lucchi", "vnc"]["difference"]
    )


def test_differences_are_those_of_pooled_iou_and_same_predictions_are_left_out(
    study: Study, tmp_path: Path
) -> None:
    groups: dict[tuple[str, str, str], list] = {}
    for unit in study.units():
        metrics = json.loads((tmp_path / EVALUATED / unit.name / "metrics.json").read_text())
        groups.setdefault((unit.backbone, unit.regime, unit.train_set), []).append(metrics)
    found = compare_aligned(study, groups)
    assert len(found) == len(study.regimes) * len(study.train_sets)
    assert {(row["backbone"], row["against"], row["test_set"]) for row in found} == {
        ("hist", "plain", "vnc")
    }
    for row in found:
        pooled = []
        for backbone in ("hist", "plain"):
            runs = [
                np.sum(run["test"]["vnc"]["counts"], 0)
                for run in groups[backbone, row["regime"], row["train_set"]]
            ]
            pooled.append(np.mean([hit / (one + other - hit) for hit, one, other in runs]))
        assert row["difference"] == pytest.approx(pooled[0] - pooled[1], abs=1e-6)
        assert row["ci95"][0] <= row["difference"] <= row["ci95"][1]
        assert row["p_holm"] >= row["p_value"]
    gains = [row["difference"] for row in by_gain(found) if row["kind"] == "cross-domain"]
    assert gains


def test_report_and_page_have_a_row_each(study: Study, tmp_path: Path) -> None:
    summary = json.loads(report.build_report(tmp_path, study).read_text())
    assert summary["aligned_method"].startswith("`aligned`")
    board = (tmp_path / "reports/leaderboard.md").read_text().partition("## Aligned")[2]
    assert board.count("| histogram |") == len(summary["aligned"]) == 6
    html = (tmp_path / "reports/index.html").read_text()
    read = Reader(html)
    assert read.open == []
    assert "Aligned" in read.text["h2"]
    assert html.count("<td>histogram</td>") == 6


def test_without_alignment_nothing_is_said(tmp_path: Path) -> None:
    plain = a_study()
    write_metrics(tmp_path, plain)
    summary = json.loads(report.build_report(tmp_path, plain).read_text())
    assert "aligned" not in summary
    assert "Aligned" not in (tmp_path / "reports/index.html").read_text()
