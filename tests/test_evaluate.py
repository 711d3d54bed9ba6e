import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import label as components
from sklearn.metrics import f1_score, jaccard_score

from emadapt.errors import InputError
from emadapt.metrics.intervals import influence
from emadapt.metrics.pixels import boundary_band, column_grid, overlap_counts
from emadapt.models.predict import predict_slices
from emadapt.study.loading import load_study
from emadapt.study.study import Unit
from emadapt.training import scores
from emadapt.training.evaluate import evaluate_unit
from emadapt.training.model_files import load_model
from emadapt.training.train import train_unit
from tiny import make_study, predict_slice, settings

MASKS = arrays(bool, (3, 6, 7))


def pooled(counts: np.ndarray) -> dict[str, float]:
    cells = counts.reshape(len(counts), -1, 1, 3)
    return {metric: influence(cells, metric)[0] for metric in ("iou", "dice")}


@given(MASKS, MASKS)
def test_iou_and_dice_against_scikit_learn(predicted, label):
    counts = np.asarray([overlap_counts(p, lab) for p, lab in zip(predicted, label, strict=True)])
    ours = pooled(counts)
    assert ours["iou"] == pytest.approx(
        jaccard_score(label.ravel(), predicted.ravel(), zero_division=1.0)
    )
    assert ours["dice"] == pytest.approx(
        f1_score(label.ravel(), predicted.ravel(), zero_division=1.0)
    )


@given(MASKS, MASKS, st.integers(1, 6), st.integers(1, 7))
def test_metrics_are_bounded_ordered_symmetric_and_the_same_on_every_grid(
    predicted, label, rows, columns
):
    grid = rows, columns
    counts = np.array([overlap_counts(p, m, grid) for p, m in zip(predicted, label, strict=True)])
    ours, swapped = pooled(counts), pooled(counts[..., [0, 2, 1]])
    assert counts.shape == (3, rows, columns, 3)
    assert ours == swapped
    assert ours == pooled(
        np.array([overlap_counts(p, m) for p, m in zip(predicted, label, strict=True)])
    )
    assert 0 <= ours["iou"] <= ours["dice"] <= 1
    assert ours["dice"] == pytest.approx(2 * ours["iou"] / (1 + ours["iou"]))


def test_columns_are_a_micrometre_wide_and_part_the_plane():
    assert column_grid((768, 1024), (5, 5, 5)) == (4, 5)
    assert column_grid((100, 100_000), (50, 4, 4)) == (1, 8)
    mask = np.random.default_rng(0).random((10, 7)) < 0.5
    counts = overlap_counts(mask, mask, (2, 3))[..., 0]
    np.testing.assert_array_equal(
        counts, [[mask[y : y + 5, x:e].sum() for x, e in ((0, 2), (2, 4), (4, 7))] for y in (0, 5)]
    )


@given(arrays(bool, (9, 8)), st.floats(1, 4))
def test_the_boundary_band_against_brute_force(mask, width):
    band = boundary_band(mask, width)
    outside = np.argwhere(~mask)
    for y, x in np.ndindex(mask.shape):
        near = len(outside) > 0 and np.hypot(*(outside - (y, x)).T).min() <= width
        assert band[y, x] == (mask[y, x] and near)


def test_datasets_that_differ_in_their_labels_alone_are_predicted_once_and_scored_each(
    tmp_path, tracking_off, plain_pictures, monkeypatch
):
    params = settings(steps_per_epoch=15, head_lr=3e-3)
    params["study"] |= {"datasets": ["a", "b", "c"]}
    # What is not foreground in a.
    params["datasets"]["c"] = params["datasets"]["a"] | {"path": "data/a", "foreground": [0]}
    study = make_study(tmp_path, params)
    unit = Unit("t", "lora", "a", 0)
    train_unit(study, unit)
    asked: list[str] = []

    def spied(segmenter, volume, slices, view):
        asked.append(volume.name)
        return predict_slices(segmenter, volume, slices, view)

    monkeypatch.setattr(scores, "predict_slices", spied)
    test = json.loads(evaluate_unit(study, unit).read_text())["test"]
    assert asked == ["a", "b"]
    assert list(test) == ["a", "b", "c"]
    pixels = 90 * 100
    for a, c in zip(*(np.sum(test[name]["counts"], (1, 2)) for name in "ac"), strict=True):
        assert a[1] == c[1], "the same prediction"
        assert (a[0] + c[0], a[2] + c[2]) == (a[1], pixels)
    assert test["a"]["iou"] > test["c"]["iou"]
    assert (tmp_path / "build/evaluate" / unit.name / "overlay-c-worst.png").is_file()


def test_metrics_of_a_unit_are_those_of_its_predictions(tmp_path, tracking_off):
    study = make_study(tmp_path, settings(steps_per_epoch=15, epochs=3, head_lr=3e-3))
    unit = Unit("t", "lora", "a", 0)
    train_unit(study, unit)
    path = evaluate_unit(study, unit)
    metrics = json.loads(path.read_text())
    segmenter, card = load_model(tmp_path / "build/units" / unit.name)
    for name in ("a", "b"):
        image, label = (
            np.load(tmp_path / f"build/ingest/{name}/{kind}.npy") for kind in ("image", "label")
        )
        slices = metrics["test"][name]["slices"]
        found = np.stack([predict_slice(segmenter, image[z]) > 0.5 for z in slices])
        truth = label[slices] > 0
        expected = (found & truth).sum() / (found | truth).sum()
        # Merged adapters round differently.
        assert metrics["test"][name]["iou"] == pytest.approx(expected, abs=2e-3)
        low, high = metrics["test"][name]["iou_ci95"]
        assert low <= metrics["test"][name]["iou"] <= high
        assert len(metrics["test"][name]["per_slice"]["iou"]) == len(slices)
        np.testing.assert_allclose(
            np.sum(metrics["test"][name]["counts"], (0, 1, 2)),
            [(found & truth).sum(), found.sum(), truth.sum()],
            rtol=5e-3,
        )
        assert metrics["test"][name]["instances"]["labelled"] == components(truth)[1]
        assert metrics["test"][name]["instances"]["predicted"] == pytest.approx(
            components(found)[1], abs=2
        )
        for which in ("", "-best", "-worst"):
            assert (path.parent / f"overlay-{name}{which}.png").stat().st_size > 1000
    assert metrics["trainable_params"] == card["trainable_params"]
    assert card["threshold"] == 0.5


def test_a_model_of_other_settings_is_refused(tmp_path, tracking_off):
    study = make_study(tmp_path)
    unit = Unit("t", "frozen", "a", 0)
    with pytest.raises(InputError, match="no model"):
        evaluate_unit(study, unit)
    train_unit(study, unit)
    text = (tmp_path / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("epochs: 2", "epochs: 3"))
    with pytest.raises(InputError, match=r"other settings.*dvc repro train@t-frozen-a-0"):
        evaluate_unit(load_study(), unit)
