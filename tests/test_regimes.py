"""Every regime from training to the score."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emadapt.data.ingest import open_volume
from emadapt.models.backbones import Backbone
from emadapt.models.predict import predict_slices
from emadapt.study.study import Study, Unit
from emadapt.training.evaluate import evaluate_unit
from emadapt.training.model_files import load_model
from emadapt.training.regimes import REGIMES
from emadapt.training.train import train_unit
from tiny import make_study, settings, stop_after_an_epoch, trained

KINDS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "lora": {"rank": 2, "alpha": 4},
    "lora_last_k": {"k": 2, "rank": 2},
    "bitfit": {},
    "full": {},
    "ridge": {},
    "knn": {},
    "unet2d": {},
    "resunet3d": {"patch": [3, 32, 32], "channels": [4, 5, 6, 7, 8]},
}
"""MitoNet and SAM 2 have tests of their own."""
FROM_CACHE = ("frozen", "lora_last_k", "ridge", "knn", "unet2d", "resunet3d")


def a_study(root: Path, kind: str, **train: Any) -> tuple[Study, Unit]:
    params = settings(**{"steps_per_epoch": 6, "head_lr": 3e-3, "val_slices": 2, **train})
    params["regimes"] = {"r": {"kind": kind, **KINDS[kind]}}
    params["train_sets"] = {"a": ["a"]}
    params["study"] |= {"regimes": ["r"], "train_sets": ["a"], "datasets": ["a"]}
    return make_study(root, params), Unit("t", "r", "a", 0)


@pytest.fixture(autouse=True)
def place(tracking_off, plain_pictures, monkeypatch):
    monkeypatch.setattr("emadapt.models.unet2d.FEATURES", (8, 8, 16, 32, 64, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_from_training_to_the_score(tmp_path, monkeypatch, kind):
    """The score is that of what the saved model predicts; what can come from the cache does."""
    study, unit = a_study(tmp_path, kind)
    runs: list[int] = []
    whole = Backbone.forward

    def forward(self: Backbone, images: Any) -> Any:
        runs.append(len(images))
        return whole(self, images)

    monkeypatch.setattr(Backbone, "forward", forward)
    folder = train_unit(study, unit)
    runs.clear()
    metrics = json.loads(evaluate_unit(study, unit).read_text())
    assert bool(runs) == (kind not in FROM_CACHE)
    assert {f.name for f in folder.iterdir()} == {"model.safetensors", "model.json", "history.json"}
    segmenter, card = load_model(folder)
    volume, test = open_volume("a"), metrics["test"]["a"]
    found = np.stack([p for _, p in predict_slices(segmenter, volume, test["slices"])]) > 0.5
    truth = volume.label[test["slices"]] > 0
    iou = (found & truth).sum() / (found | truth).sum()
    assert test["iou"] == pytest.approx(iou, abs=0.02)  # cached tokens are fp16
    assert test["n"] == len(volume.split["test"])
    assert card["trainable_params"] == segmenter.n_trainable() == metrics["trainable_params"]
    if kind not in ("bitfit", "full", "lora"):  # a dozen steps are few
        assert test["iou"] > 0.5  # bright discs on noise: chance is 0.2


@pytest.mark.parametrize("kind", ["unet2d", "resunet3d", "lora_last_k"])
def test_stopped_after_an_epoch_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch, kind):
    study, unit = a_study(tmp_path, kind, steps_per_epoch=2)
    undisturbed = trained(study, unit)
    (tmp_path / "scratch/units").rename(tmp_path / "gone")
    (tmp_path / "build/units").rename(tmp_path / "gone too")
    stop_after_an_epoch(study, unit, monkeypatch)
    assert trained(study, unit) == undisturbed


@pytest.mark.parametrize("kind", ["ridge", "knn"])
def test_what_is_fitted_at_once_keeps_the_best_candidate(tmp_path, kind):
    study, unit = a_study(tmp_path, kind)
    folder = train_unit(study, unit)
    card, history = (json.loads((folder / f"{f}.json").read_text()) for f in ("model", "history"))
    ious = [entry["val/iou"] for entry in history["epochs"]]
    assert ious[card["best_epoch"]] == max(ious)
    # Maps are blended as probabilities, not as shares.
    assert card["val"]["iou"] == pytest.approx(max(ious), abs=0.02)


def test_there_is_a_class_for_each_kind():
    assert set(REGIMES) == {*KINDS, "mitonet", "sam2"}
