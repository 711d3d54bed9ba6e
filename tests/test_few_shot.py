"""Curves of IoU against the number of labels: which units make them, what is read off them, and how they are shown."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from emadapt.cli import main
from emadapt.report import figures, report
from emadapt.report.few_shot import enough, enough_words, few_shot_curves, panels
from emadapt.study.regimes import regime_settings
from emadapt.study.study import Study, load_study
from fakes import few_study, iou_of, labelled_of, transfer_study, write_metrics
from test_overlays import pixels
from tiny import make_study, settings


def entries(study: Study) -> list[dict[str, Any]]:
    """`units` of a summary as far as curves need them."""
    found = []
    for backbone, regime, train_set, test_set in {
        (unit.backbone, unit.regime, unit.train_set, test_set): None
        for unit in study.units()
        for test_set in study.datasets
    }:
        unit = next(
            u
            for u in study.units()
            if (u.backbone, u.regime, u.train_set) == (backbone, regime, train_set)
        )
        iou = iou_of(study, unit, test_set)
        found.append(
            {
                "backbone": backbone,
                "regime": regime,
                "train_set": train_set,
                "test_set": test_set,
                "labelled": labelled_of(study.train_set_settings[train_set]),
                "iou": {
                    "mean": iou,
                    "values": [iou] * len(study.seeds),
                    "ci95": [iou - 0.02, iou + 0.01],
                },
            }
        )
    return found


def point(n: int, iou: float, *, every: bool = False, wide: float = 0.0) -> dict[str, Any]:
    return {"n": n, "iou": iou, "ci95": [iou - wide, iou + wide], "all": every}


def test_the_smallest_measured_number() -> None:
    points = [
        point(1, 0.5, wide=0.1),
        point(2, 0.7, wide=0.1),
        point(4, 0.73, wide=0.1),
        point(48, 0.8, every=True),
    ]
    found = enough(points)
    assert found == {"share": 0.9, "iou": 0.72, "n": 4, "earliest": 2, "latest": None}
    assert enough_words({"points": points, "enough": found}) == "4 (2 to > 4)"
    assert enough([point(4, 0.72, wide=0.0), point(8, 0.8, every=True)])["n"] == 4  # type: ignore[index]  # just reached
    assert enough([point(4, 0.719), point(8, 0.8, every=True)])["n"] is None  # type: ignore[index]  # nothing interpolated
    assert enough([point(4, 0.9)]) is None


@given(st.lists(st.tuples(st.floats(0.1, 1), st.floats(0, 0.3)), min_size=2, max_size=6))
def test_wider_intervals_never_bring_the_ends_together(values: list[tuple[float, float]]) -> None:
    points = [
        point(2**i, iou, wide=wide, every=i == len(values) - 1)
        for i, (iou, wide) in enumerate(values)
    ]
    found = enough(points)
    assert found is not None
    earliest, n, latest = (found[key] or 10**6 for key in ("earliest", "n", "latest"))
    assert earliest <= n <= latest
    for own in points[:-1]:
        if own["n"] < n:
            assert own["iou"] < 0.9 * points[-1]["iou"]


def test_one_curve_per_regime_and_dataset() -> None:
    study = few_study()
    curves = few_shot_curves(study, entries(study))
    assert [(c["regime"], c["test_set"], c["amount"]) for c in curves] == [
        (regime, dataset, "slices")
        for dataset in ("lucchi", "vnc")
        for regime in ("frozen", "ridge", "lora")
    ]
    lora = curves[2]
    assert [(p["train_set"], p["n"], p["of"], p["all"]) for p in lora["points"]] == [
        ("lucchi_1", 1, 48, False),
        ("lucchi_4", 4, 48, False),
        ("lucchi_16", 16, 48, False),
        ("lucchi", 48, 48, True),
    ]
    # fakes.iou_of: 0.85 less 0.4 sqrt(1/n - 1/48); 90 % of 0.85 is 0.765.
    assert [p["iou"] for p in lora["points"]] == pytest.approx(
        [0.454, 0.659, 0.768, 0.85], abs=1e-3
    )
    assert (lora["enough"]["n"], lora["enough"]["latest"]) == (16, None)
    assert [panel["n"] for panel in panels(curves)] == [
        [(1, False), (4, False), (16, False), (48, True)],
        [(4, False), (12, True)],
    ]


def test_tiles_instead_of_slices() -> None:
    study = few_study(amount="crops")
    (curve, *_) = few_shot_curves(study, entries(study))
    assert (curve["amount"], [p["n"] for p in curve["points"]]) == ("crops", [1, 4, 16, 192])


def test_a_source_that_saw_more_labels_makes_no_curve() -> None:
    study = transfer_study()
    curves = few_shot_curves(study, entries(study))
    assert {(c["regime"], c["test_set"]) for c in curves} == {
        *((regime, "lucchi") for regime in ("lora", "frozen", "lpft")),
        *((r, "vnc") for r in study.regimes),
    }


def test_without_all_labels_and_without_few() -> None:
    study = few_study()
    few = dataclasses.replace(study, train_sets=("lucchi_1", "lucchi_4"))
    curves = few_shot_curves(few, entries(few))
    assert [c["enough"] for c in curves] == [None] * 3
    whole = dataclasses.replace(study, train_sets=("lucchi", "paired"))
    assert few_shot_curves(whole, entries(whole)) == []


def test_all_labels_from_an_older_version() -> None:
    study = few_study()
    old = [
        {**e, "labelled": e["labelled"] if "_" in e["train_set"] else None} for e in entries(study)
    ]
    assert few_shot_curves(study, old) == few_shot_curves(study, entries(study))


def test_the_figure_shows_every_regime(tmp_path: Path) -> None:
    kinds = ("frozen", "ridge", "lora")
    study = few_study()
    looks = [("dinov2_s", kind) for kind in kinds]
    figures.few_shot_png(
        tmp_path / "one.png", panels(few_shot_curves(study, entries(study)))[:1], looks
    )
    for colour in (figures.BLUE, figures.ORANGE, figures.GREEN):
        assert pixels(tmp_path / "one.png", colour) > 100
    looks = [("dinov2_s", f"lora{i}") for i in range(9)]
    many = few_study(regimes={f"lora{i}": regime_settings(kind="lora") for i in range(9)})
    figures.few_shot_png(
        tmp_path / "many.png", panels(few_shot_curves(many, entries(many)))[:1], looks
    )
    with Image.open(tmp_path / "many.png") as picture:
        assert picture.width > 500


def test_the_report_has_curves_and_a_leaderboard_of_all_labels(tmp_path: Path) -> None:
    study = few_study((0,))
    write_metrics(tmp_path, study)
    summary = json.loads(report.build_report(tmp_path, study).read_text())
    assert len(summary["few_shot"]) == 6
    assert "validation slices" in summary["few_shot_method"].lower()
    board, few = (tmp_path / "reports/leaderboard.md").read_text().split("## Few labels")
    assert "lucchi_4" not in board
    rows = [line for line in few.splitlines() if line.startswith("| dinov2_s ")]
    assert len(rows) == 6
    for curve, row in zip(summary["few_shot"], rows, strict=True):
        for own in curve["points"]:
            assert f"{own['iou']:.3f} ({own['ci95'][0]:.3f} to {own['ci95'][1]:.3f})" in row
    figure = tmp_path / "reports/figures/few-shot-lucchi.png"
    assert figure.is_file()
    report.build_report(tmp_path, dataclasses.replace(study, train_sets=("lucchi", "vnc")))
    assert not figure.exists()


@pytest.mark.slow
def test_few_labels_and_another_start_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights and tiny data through train, evaluate, report and recommend."""
    from emadapt.training.evaluate import evaluate_unit
    from emadapt.training.train import train_unit

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMADAPT_TRACKING", "off")
    own = settings(epochs=1, steps_per_epoch=2, augment=False)
    own["train_sets"] = {"a": ["a"], "a_1": {"datasets": ["a"], "slices": 1}, "b": ["b"]}
    own["regimes"]["from_b"] = own["regimes"]["lora"] | {"warm_start": "lora-b"}
    own["study"] |= {"regimes": ["lora", "from_b"], "train_sets": ["a_1", "a"]}
    study = make_study(tmp_path, own)
    for unit in study.units():
        train_unit(study, unit)
        evaluate_unit(study, unit)
    summary = json.loads(report.build_report(tmp_path, load_study()).read_text())
    curves = {curve["regime"]: curve for curve in summary["few_shot"]}
    assert [(p["n"], p["of"], p["all"]) for p in curves["lora"]["points"]] == [
        (1, 5, False),
        (5, 5, True),
    ]
    assert set(curves) == {"lora", "from_b"}
    cells = {(cell["regime"], cell["target"]): cell for cell in summary["transfer"]}
    assert set(cells) == {
        (regime, target) for regime in study.regimes for target in study.train_sets
    }
    mean = {
        (e["regime"], e["train_set"]): e["iou"]["mean"]
        for e in summary["units"]
        if e["test_set"] == "a"
    }
    assert cells["from_b", "a_1"]["difference"] == pytest.approx(
        mean["from_b", "a_1"] - mean["lora", "a_1"], abs=1e-5
    )
    done = CliRunner().invoke(main, ["recommend", "--dataset", "a"])
    assert done.exit_code == 0, done.output
    assert "What is not known. One seed" in done.output
    assert "random weights: a control" in " ".join(done.output.split())
    assert "\nb, " not in done.output
