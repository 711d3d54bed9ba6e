"""IoU over the whole of a dataset that a model has seen no label of: which datasets, which slices, and what the report does."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import jaccard_score

from emadapt.data.ingest import open_volume
from emadapt.metrics.pixels import overlap_counts
from emadapt.models import regimes
from emadapt.models.predict import predict_slice, predict_slices
from emadapt.models.segmenter import load_segmenter
from emadapt.report.report import build_report
from emadapt.study.settings import DatasetSettings, RegimeSettings, TrainSetSettings
from emadapt.study.study import Study, Unit
from emadapt.training.evaluate import evaluate_unit
from emadapt.training.train import train_unit
from emadapt.training.unseen import score_unseen, spaced, unseen_by
from fakes import a_study, write_metrics
from tiny import make_study, settings


@pytest.mark.parametrize(
    ("slices", "voxel_z_nm", "expected"),
    [
        (20, 50.0, list(range(20))),
        (9, 5.0, [0, 4, 8]),
        (4, 6.0, [0]),
        (5, 20.0, [0, 1, 2, 3, 4]),
        (1, 1.0, [0]),
    ],
)
def test_slices_apart(slices: int, voxel_z_nm: float, expected: list[int]) -> None:
    assert spaced(slices, voxel_z_nm) == expected


def test_which_datasets_are_unseen() -> None:
    study = a_study()
    first = study.seeds[0]
    assert unseen_by(study, Unit("dinov2_s", "frozen", "lucchi", first)) == ["vnc"]
    assert unseen_by(study, Unit("dinov2_s", "frozen", "paired", first)) == []
    specs = study.regime_settings | {
        "from_vnc": RegimeSettings("lora", init_from="frozen-vnc"),
        "after": RegimeSettings("lora", init_from="from_vnc"),
        "folder": RegimeSettings("lora", init_from="models/some"),
        "after_folder": RegimeSettings("lora", init_from="folder"),
        "deep": RegimeSettings("resunet3d"),
        "given": RegimeSettings("mitonet"),
        "tuned": RegimeSettings("mitonet", finetune=True),
    }
    study = dataclasses.replace(study, regime_settings=specs)
    for regime in ("from_vnc", "after", "folder", "after_folder", "deep", "given", "tuned"):
        assert unseen_by(study, Unit("dinov2_s", regime, "lucchi", first)) == [], regime
    twin = DatasetSettings("lucchi", (5, 5, 5), path="data/lucchi", pairing="lexicographic")
    study = dataclasses.replace(
        study,
        datasets=("lucchi", "wrong", "vnc"),
        dataset_settings=study.dataset_settings | {"wrong": twin},
        train_set_settings=study.train_set_settings
        | {
            "wrong": TrainSetSettings(("wrong",)),
            "to_vnc": TrainSetSettings(("lucchi",), unlabelled=("vnc",)),
        },
    )
    assert unseen_by(study, Unit("dinov2_s", "frozen", "wrong", first)) == [
        "vnc"
    ]  # the right labels are on images it has seen
    assert unseen_by(study, Unit("dinov2_s", "frozen", "vnc", first)) == [
        "lucchi"
    ]  # mispaired labels are not worth a score
    assert unseen_by(study, Unit("dinov2_s", "frozen", "to_vnc", first)) == ["vnc"]  # images alone


@pytest.mark.parametrize("regime", ["frozen", "lora"])
def test_every_slice_is_scored_as_a_user_would_predict_it(
    regime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMADAPT_TRACKING", "off")
    study = make_study(tmp_path, settings(epochs=1, steps_per_epoch=2))
    unit = Unit("t", regime, "a", 0)
    train_unit(study, unit)
    test = json.loads(evaluate_unit(study, unit).read_text())["test"]
    assert "unseen" not in test["a"]
    own, volume = test["b"]["unseen"], open_volume("b")
    assert own["slices"] == spaced(len(volume.image), volume.manifest["voxel_nm"][0])
    assert set(own["slices"]) & set(volume.split["train"])
    assert own["n"] == len(own["counts"]) > test["b"]["n"]
    known = dict(zip(test["b"]["slices"], test["b"]["counts"], strict=True))
    assert all(
        own["counts"][own["slices"].index(z)] == counts
        for z, counts in known.items()
        if z in own["slices"]
    )
    segmenter, _ = load_segmenter(Path("build/units") / unit.name)
    regimes.merge(segmenter.backbone)
    predicted = np.array(
        [predict_slice(segmenter, np.asarray(volume.image[z])) > 0.5 for z in own["slices"]]
    )
    label = np.array([np.asarray(volume.label[z]) > 0 for z in own["slices"]])
    assert own["iou"] == pytest.approx(
        jaccard_score(label.ravel(), predicted.ravel()), abs=2e-3
    )  # cached tokens are fp16


def with_unseen(root: Path, study: Study, shift: float) -> None:
    """Metrics of the study, to which lora's models have `shift` more IoU over the whole of what they have not seen."""
    write_metrics(root, study)
    for unit in study.units():
        file = root / "build/evaluate" / unit.name / "metrics.json"
        metrics = json.loads(file.read_text())
        for name in unseen_by(study, unit):
            both = 500 + round(1000 * shift) * (unit.regime == "lora") + unit.seed
            counts = [[both, both, 1000]] * 24
            metrics["test"][name]["unseen"] = {
                "n": 24,
                "slices": list(range(24)),
                "block_slices": 4,
                "iou": both / 1000,
                "iou_ci95": [0.1, 0.9],
                "counts": counts,
            }
        file.write_text(json.dumps(metrics))


def test_the_report_compares_on_all_slices_where_neither_has_seen_them(tmp_path: Path) -> None:
    study = dataclasses.replace(
        a_study((0, 1, 2), ("frozen", "lora", "last3")), train_sets=("lucchi", "vnc", "paired")
    )
    with_unseen(tmp_path, study, 0.1)
    summary = json.loads(build_report(tmp_path, study).read_text())
    rows = {(c["regime"], c["train_set"], c["test_set"]): c for c in summary["comparisons"]}
    assert rows["lora", "lucchi", "vnc"]["n"] == 24
    assert rows["lora", "lucchi", "vnc"]["difference"] == pytest.approx(0.1)
    assert rows["last3", "lucchi", "vnc"]["difference"] == pytest.approx(0)
    assert rows["lora", "lucchi", "lucchi"]["n"] != 24
    units = {(u["regime"], u["train_set"], u["test_set"]): u for u in summary["units"]}
    assert {key for key, unit in units.items() if "unseen" in unit} == {
        key for key in units if {*key[1:]} == {"lucchi", "vnc"}
    }
    assert units["lora", "lucchi", "vnc"]["unseen"]["iou"]["values"] == [0.6, 0.601, 0.602]
    assert "| 0.601 (" in (tmp_path / "reports/leaderboard.md").read_text()


def test_models_of_an_earlier_version_are_compared_on_test_slices(tmp_path: Path) -> None:
    study = dataclasses.replace(
        a_study((0, 1, 2), ("frozen", "lora", "last3")), train_sets=("lucchi",)
    )
    with_unseen(tmp_path, study, 0.1)
    for file in (tmp_path / "build/evaluate").glob("*frozen*/metrics.json"):
        metrics = json.loads(file.read_text())
        del metrics["test"]["vnc"]["unseen"]
        file.write_text(json.dumps(metrics))
    summary = json.loads(build_report(tmp_path, study).read_text())
    n = next(u["n"] for u in summary["units"] if u["test_set"] == "vnc")
    assert {c["n"] for c in summary["comparisons"] if c["test_set"] == "vnc"} == {n}


def test_slices_are_smoothed_with_all_of_their_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMADAPT_TRACKING", "off")
    params = settings(epochs=1, steps_per_epoch=2)
    params["backbones"]["t"]["smooth_z_nm"] = 20.0
    params["datasets"]["b"]["voxel_nm"] = [10, 4, 4]
    study = make_study(tmp_path, params)
    unit, volume = Unit("t", "frozen", "a", 0), open_volume("b")
    segmenter, _ = load_segmenter(train_unit(study, unit))
    whole = dict(predict_slices(segmenter, volume, list(range(len(volume.image)))))
    own = score_unseen(segmenter, volume, [], [])
    assert own["slices"] == [0, 2, 4, 6, 8]
    expected = [
        overlap_counts(whole[z] > 0.5, np.asarray(volume.label[z]) > 0) for z in own["slices"]
    ]
    np.testing.assert_array_equal(own["counts"], expected)
