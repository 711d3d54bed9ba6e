"""Dose-response of dialled shifts."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from emadapt.report.dose import dose_png, dose_response
from emadapt.report.transfer import DISTANCES
from emadapt.study.study import DatasetSettings, RegimeSettings, Study, TrainSetSettings
from fakes import a_study

DIALS = {"noise": 0.2, "blur": 0.5}
DOSES = (25, 50, 100)
DATASETS = ("fib", "lucchi", *(f"dialled_{dial}_{dose}" for dial in DIALS for dose in DOSES))


def study() -> Study:
    sets = {
        "fib": TrainSetSettings(("fib",)),
        "few": TrainSetSettings(("fib",), slices=2),
        "both": TrainSetSettings(("fib", "lucchi")),
    }
    return dataclasses.replace(
        a_study(seeds=(0,), regimes=("frozen", "lora")),
        datasets=DATASETS,
        train_sets=tuple(sets),
        dataset_settings={name: DatasetSettings("stack", (5, 5, 5)) for name in DATASETS},
        train_set_settings=sets,
        regime_settings={n: RegimeSettings(n) for n in ("frozen", "lora")},
    )


def iou(name: str) -> float:
    dial, dose = name.split("_")[1:] if "_" in name else ("", "0")
    return (
        0.8
        - DIALS.get(dial, 0.4 if name == "lucchi" else 0) * int(dose or 0) / 100
        - (0.4 if name == "lucchi" else 0)
    )


def entries(own: Study) -> list[dict[str, Any]]:
    return [
        {
            "backbone": b,
            "regime": r,
            "train_set": t,
            "test_set": d,
            "iou": {"mean": iou(d), "ci95": [iou(d) - 0.02, iou(d) + 0.01]},
        }
        for b in own.backbones
        for r in own.regimes
        for t in own.train_sets
        for d in own.datasets
    ]


def card(train_set: str | None) -> dict[str, Any]:
    """Token distances that grow with the loss, kNN mixing that says nothing."""
    pairs = [
        {
            "train_set": train_set,
            "a": "fib",
            "b": name,
            "level": "token",
            "class": "all",
            "frechet": 1.0,
            "relative": (0.8 - iou(name)) ** 2,
            "knn_mixing": 0.5,
        }
        for name in DATASETS[1:]
    ]
    return {"pairs": pairs, "segmentation": [], "outliers": []}


def test_curves_of_models_trained_on_the_volume_as_it_is() -> None:
    own = study()
    response = dose_response(
        own, entries(own), {("dinov2_s", "frozen"): card(None), ("dinov2_s", "lora"): card("fib")}
    )
    points = response["points"]
    assert {p["train_set"] for p in points} == {"fib"}, "neither few labels nor a union"
    assert len(points) == 2 * len(DATASETS)
    for p in points:
        assert p["loss"] == pytest.approx(0.8 - iou(p["dataset"]), abs=1e-6)
        assert p["dose"] == {"fib": 0.0, "lucchi": None}.get(
            p["dataset"],
            int(p["dataset"].rpartition("_")[2] or 0) / 100 if "_" in p["dataset"] else None,
        )
        assert (p["distances"]["fd_token"] is None) == (p["dataset"] == "fib")
    found = {(c["regime"], c["dial"], c["distance"]): c for c in response["correlations"]}
    assert found["lora", None, "fd_token"]["rho"] == 1.0
    assert found["lora", None, "fd_token"]["n"] == 6
    assert found["frozen", "noise", "fd_token"]["rho"] is None, "three points decide nothing"
    assert found["frozen", None, "knn_unmixing"]["rho"] is None, "constant"


def test_a_study_without_dialled_datasets_has_none() -> None:
    assert dose_response(a_study(), [], {}) == {}


def test_nor_has_one_whose_models_make_no_curve() -> None:
    own = dataclasses.replace(
        study(), train_sets=("both",), train_set_settings={"both": TrainSetSettings(DATASETS[:2])}
    )
    assert dose_response(own, entries(own), {}) == {}


def test_the_figure_has_a_row_per_model_and_the_same_bytes_again(tmp_path: Path) -> None:
    own = study()
    response = dose_response(own, entries(own), {("dinov2_s", "frozen"): card(None)})
    assert set(response["points"][0]["distances"]) == set(DISTANCES)
    for name in ("one.png", "two.png"):
        dose_png(tmp_path / name, response)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    picture = np.asarray(Image.open(tmp_path / "one.png").convert("RGB"))
    assert picture.shape[0] > 500
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
