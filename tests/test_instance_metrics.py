"""Instance metrics against a brute-force oracle: sets of voxels, all pairs, no table."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import label as components
from scipy.stats import entropy

from emadapt.metrics import instances as module
from emadapt.metrics.instances import Instances, instance_metrics

NUMBERED = arrays(np.int32, (3, 4, 4), elements=st.integers(0, 4))


def brute_force(predicted: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Every object as a set of voxels, every pair looked at."""
    found, true = (
        [{tuple(v) for v in np.argwhere(a == k).tolist()} for k in set(a.ravel().tolist()) - {0}]
        for a in (predicted, label)
    )
    ious = [len(p & t) / len(p | t) for p, t in itertools.product(found, true)]
    out = {}
    for name, least in (("ap50", 0.5), ("ap75", 0.75)):
        tp = sum(iou > least for iou in ious)
        fp, fn = len(found) - tp, len(true) - tp
        out[name] = tp / (tp + fp + fn) if found or true else 1.0
    good = [iou for iou in ious if iou > 0.5]
    fp, fn = len(found) - len(good), len(true) - len(good)
    out["pq"] = sum(good) / (len(good) + fp / 2 + fn / 2) if found or true else 1.0
    out["sq"] = sum(good) / len(good) if good else float(not (found or true))
    out["rq"] = len(good) / (len(good) + fp / 2 + fn / 2) if found or true else 1.0
    out["split"] = sum(sum(len(p & t) > 0.1 * len(t) for p in found) > 1 for t in true)
    out["merged"] = sum(sum(len(p & t) > 0.1 * len(t) for t in true) > 1 for p in found)
    inside = label > 0
    for name, one, other in (("vi_split", label, predicted), ("vi_merge", predicted, label)):
        parts = [other[inside & (one == k)] for k in set(one[inside].tolist())]
        bits = [entropy(np.unique(part, return_counts=True)[1], base=2) for part in parts]
        out[name] = sum(len(p) * b for p, b in zip(parts, bits, strict=True)) / max(inside.sum(), 1)
    return out | {"predicted": len(found), "labelled": len(true), "matched": len(good)}


@settings(max_examples=60)
@given(NUMBERED, NUMBERED, st.floats(0, 1))
def test_against_brute_force(predicted, label, alike):
    # From unlike to almost the same.
    mixed = np.where(np.random.default_rng(0).random(label.shape) < alike, label, predicted)
    assert instance_metrics(mixed, label) == pytest.approx(brute_force(mixed, label), abs=1e-6)


def test_slices_of_a_volume_and_those_that_are_no_neighbours():
    rng = np.random.default_rng(1)
    predicted, label = rng.random((2, 6, 9, 11)) < 0.35
    collected = Instances(range(6), (9, 11))
    for z in range(6):
        collected.add(z, predicted[z], label[z], np.ones((9, 11), bool))
    assert collected.summary() == instance_metrics(components(predicted)[0], components(label)[0])
    column = np.ones((1, 2), bool)
    apart = Instances([3, 4, 8], (1, 2))
    for z in (3, 4, 8):
        apart.add(z, column, column, column)
    found = apart.summary()
    assert found is not None
    assert found["labelled"] == 2


def test_objects_do_not_grow_into_slices_that_are_no_neighbours():
    """Cores in slices 0 and 1 alone; 10 and 11 are of another volume."""
    whole, core = np.ones((1, 2), bool), np.array([[1, 0]], bool)
    collected = Instances([0, 1, 10, 11], (1, 2), (5.0, 5.0, 5.0))
    for z in (0, 1, 10, 11):
        both = np.stack([whole, core & (z < 2)])
        collected.add(z, both, both, whole)
    objects = collected._objects(collected.label)
    assert [set(plane.ravel().tolist()) for plane in objects] == [{1}, {1}, {0}, {0}, {0}]


def test_too_many_voxels_have_no_instance_metrics(monkeypatch):
    monkeypatch.setattr(module, "MOST_VOXELS", 3)
    collected = Instances([0, 1], (1, 2))
    collected.add(0, *np.ones((3, 1, 2), bool))
    assert collected.summary() is None
