"""Objects that touch: from numbered labels over training and scores to instances."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tifffile
from sklearn.metrics import jaccard_score

from emadapt.data.ingest import open_volume
from emadapt.segment.job import Order
from emadapt.segment.run import segment_volume
from emadapt.study.study import Unit
from emadapt.training.evaluate import evaluate_unit
from emadapt.training.scores import Scores
from emadapt.training.train import train_unit
from tiny import ingested, settings, write_stack

LABEL = np.zeros((10, 90, 100), np.uint16)
LABEL[:, 10:40, 10:40], LABEL[:, 10:40, 40:70], LABEL[:, 60:80, 20:90] = 7, 300, 9
IMAGE = np.random.default_rng(0).normal(np.where(LABEL > 0, 80, 180), 9).astype(np.uint8)
VOXEL = (30.0, 5.0, 5.0)


def params(**dataset: Any) -> dict[str, Any]:
    own = settings(epochs=1, steps_per_epoch=10, head_lr=0.01)
    own["study"] |= {"datasets": ["a"], "train_sets": ["a"]}
    about = {"layout": "stack", "voxel_nm": [30, 5, 5], "foreground": ">0", "boundaries": True}
    own |= {"datasets": {"a": about | dataset}, "train_sets": {"a": ["a"]}}
    return own


@pytest.fixture
def study(tmp_path, tracking_off):
    write_stack(Path("data/a"), IMAGE, LABEL)
    return ingested(Path(), params())


def test_a_boundary_is_between_objects_that_touch_and_around_each(study):
    found = open_volume("a").label[0]
    assert np.array_equal(found > 0, LABEL[0] > 0)
    inside = np.zeros(LABEL.shape[1:], bool)  # 25 nm are five pixels
    inside[15:35, 15:35] = inside[15:35, 45:65] = inside[65:75, 25:85] = True
    assert np.array_equal(found == 1, inside)


def test_scores_are_of_the_foreground_and_of_objects_one_by_one(study):
    volume = open_volume("a")
    apart, joined = Scores(volume), Scores(volume)
    for z in apart.slices:
        ids = np.asarray(volume.label[z])
        apart.add(z, np.stack([ids == 1, ids == 2]).astype(np.float32))
        joined.add(z, np.stack([ids > 0, ids < 0]).astype(np.float32))
    for scores, ap50, merged in ((apart, 1, 0), (joined, 1 / 4, 1)):
        found = scores.summary()
        assert (found["iou"], found["instances"]["labelled"]) == (1, 3)
        assert (found["instances"]["ap50"], found["instances"]["merged"]) == (ap50, merged)
        assert "classes" not in found


def test_a_model_of_boundaries_from_training_to_instances(study):
    unit = Unit("t", "frozen", "a", 0)
    model = train_unit(study, unit)
    metrics = json.loads(evaluate_unit(study, unit).read_text())
    segment_volume(Order("data/a/image.tif", "m.tif", str(model), 0, False, True, 50, None, VOXEL))
    mask, instances = tifffile.imread("m.tif"), tifffile.imread("m-instances.tif")
    assert set(np.unique(mask)) <= {0, 1, 2}
    slices = metrics["test"]["a"]["slices"]
    expected = jaccard_score((LABEL[slices] > 0).ravel(), (mask[slices] > 0).ravel())
    assert metrics["test"]["a"]["iou"] == pytest.approx(expected, abs=0.01)
    table = pd.read_csv("m-instances.csv")
    assert list(table["id"]) == list(np.unique(instances)[1:])
    assert list(table["voxels"]) == list(np.bincount(instances.ravel())[1:])
