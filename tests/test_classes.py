"""Several classes at once: from label values to scores, with scikit-learn as the oracle."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from sklearn.metrics import confusion_matrix, jaccard_score

from emadapt.data.crops import crop
from emadapt.data.foreground import masks_of
from emadapt.data.ingest import open_volume
from emadapt.errors import ConfigError
from emadapt.metrics.intervals import influence, over_seeds
from emadapt.metrics.pixels import overlap_counts
from emadapt.report.report import build_report
from emadapt.study.study import Study, Unit
from emadapt.training.evaluate import evaluate_unit
from emadapt.training.model_files import load_model, save_model
from emadapt.training.prepare import prepare
from emadapt.training.regimes import regime_of
from emadapt.training.scores import Scores
from emadapt.training.train import train_unit
from tiny import blobs, ingested, settings

CLASSES = {"disc": [3], "bar": [5, 6], "dot": [9]}
RNG = np.random.default_rng(0)


def params(**regimes: Any) -> dict[str, Any]:
    own = settings(epochs=1, steps_per_epoch=20, head_lr=0.01)
    own["study"] |= {"datasets": ["a"], "train_sets": ["a"]}
    own["datasets"] = {"a": {"layout": "stack", "voxel_nm": [30, 5, 5], "classes": CLASSES}}
    own["train_sets"] = {"a": ["a"]}
    deep = {"kind": "resunet3d", "patch": [2, 32, 32], "channels": [4, 4, 4, 4, 4]}
    own["regimes"] |= {"unet": {"kind": "unet2d"}, "deep": deep}
    own["regimes"] |= {kind: {"kind": kind} for kind in ("ridge", "knn")} | regimes
    own["study"]["regimes"] = list(own["regimes"])
    return own


def scene() -> tuple[np.ndarray, np.ndarray]:
    """Discs, a bar and a rare dot of grey values of their own: image, and label values."""
    _, discs = blobs((10, 90, 100), 0)
    label, grey = 3 * discs, 90 + 60 * discs
    label[:, 5:15], grey[:, 5:15] = 5, 30
    label[:, 9:15, 50:] = 6
    label[:, 78:86, 88:96], grey[:, 78:86, 88:96] = 9, 230
    image = np.clip(RNG.normal(grey, 12), 0, 255).astype(np.uint8)
    return image, label


def study_in(root: Path, own: dict[str, Any] | None = None) -> Study:
    image, label = scene()
    (root / "data/a").mkdir(parents=True, exist_ok=True)
    for name, array in (("image", image), ("label", label)):
        tifffile.imwrite(root / f"data/a/{name}.tif", array, photometric="minisblack")
    return ingested(root, own or params())


@pytest.fixture
def study(tmp_path, tracking_off):
    return study_in(tmp_path)


def test_ids_are_numbered_in_the_order_of_the_settings(study):
    volume, (_, label) = open_volume("a"), scene()
    expected = np.select([label == 3, (label == 5) | (label == 6), label == 9], [1, 2, 3])
    np.testing.assert_array_equal(volume.label, expected)
    assert volume.classes == tuple(CLASSES)
    masks, known = volume.truth(0)
    np.testing.assert_array_equal(masks.argmax(0) + masks.any(0), expected[0])
    assert known.all()


def test_a_mean_over_classes_is_the_mean_of_their_iou():
    label, predicted = RNG.integers(0, 4, (2, 5, 20, 30)).astype(np.uint8)
    pairs = zip(predicted, label, strict=True)
    counts = np.array([overlap_counts(masks_of(a, 3), masks_of(b, 3), (2, 3)) for a, b in pairs])
    value, lifts = influence(counts)
    expected = jaccard_score(label.ravel(), predicted.ravel(), labels=[1, 2, 3], average="macro")
    assert value == pytest.approx(expected)
    assert lifts.shape == (5, 2, 3)
    assert over_seeds(counts[None])["mean"] == pytest.approx(expected, abs=1e-6)
    alike = np.repeat(counts[:, :1], 3, 1)  # three times the same class is that class
    assert over_seeds(alike[None]) == over_seeds(counts[None, :, 0])


def test_a_rare_class_is_in_a_quarter_of_the_crops_at_least():
    label = np.zeros((300, 400), np.uint8)
    label[100, 7] = 3
    seen = [
        (crop(label, label, (40, 30), seed, False, classes=3)[1] == 3).any() for seed in range(200)
    ]
    assert 35 <= np.sum(seen) <= 80
    plain = [(crop(label, label, (40, 30), seed, False)[1] == 3).any() for seed in range(200)]
    assert np.sum(plain) <= 5


@pytest.mark.parametrize("regime", ["frozen", "ridge", "knn", "unet", "deep"])
def test_a_unit_learns_and_is_scored_by_class(study, plain_pictures, regime):
    unit = Unit("t", regime, "a", 0)
    _, card = load_model(train_unit(study, unit))
    assert card["classes"] == list(CLASSES)
    by_class = [card["val"][f"iou.a.{name}"] for name in CLASSES]
    assert card["val"]["iou"] == pytest.approx(np.mean(by_class))
    metrics = json.loads(evaluate_unit(study, unit).read_text())
    scores = metrics["test"]["a"]
    assert list(scores["classes"]) == list(CLASSES)
    assert regime != "unet" or scores["classes"]["bar"]["iou"] > 0.4
    assert "| a, bar |" in (Path("build/evaluate") / unit.name / "model-card.md").read_text()


def random_scores() -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Scores of random probabilities on the test slices, their labels and predictions."""
    volume = open_volume("a")
    scores, predicted = Scores(volume), []
    for z in scores.slices:
        probability = RNG.dirichlet(np.ones(4), (90, 100)).astype(np.float32)
        predicted.append(probability.argmax(-1))
        scores.add(z, np.moveaxis(probability[..., 1:], -1, 0))
    return scores.summary(), np.asarray(volume.label[scores.slices]).ravel(), np.ravel(predicted)


def test_scores_of_random_predictions_against_scikit_learn(study):
    found, *pair = random_scores()
    expected = jaccard_score(*pair, labels=[1, 2, 3], average=None)
    assert [own["iou"] for own in found["classes"].values()] == pytest.approx(expected, abs=1e-6)
    assert found["iou"] == pytest.approx(expected.mean(), abs=1e-6)
    np.testing.assert_array_equal(found["confusion"], confusion_matrix(*pair, labels=range(4)))


def test_the_report_has_each_class(study, tmp_path):
    known = {"key": "k", "made_from": {}, "trainable_params": 1, "backbone_share": 0.0}
    known |= {"labelled": {"slices": [1, 1]}}
    truth = []
    for unit in study.units():
        scores, *pair = random_scores()
        truth.append(jaccard_score(*pair, labels=[2], average=None)[0])
        path = tmp_path / "build/evaluate" / unit.name / "metrics.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(known | {"unit": unit.name, "test": {"a": scores}}))
    summary = json.loads(build_report(tmp_path, study).read_text())
    found = [unit["classes"]["bar"]["iou"]["mean"] for unit in summary["units"]]
    assert found == pytest.approx(truth, abs=1e-6)
    assert "IoU by class, tested on a." in (tmp_path / "reports/leaderboard.md").read_text()
    assert (tmp_path / "reports/figures/confusion-a.png").is_file()


@pytest.mark.parametrize(
    ("regime", "last"),
    [
        ("frozen", "head.classify"),
        ("lora", "head.classify"),
        ("unet", "head.net.final_conv"),
        ("deep", "head.after.conv"),
    ],
)
def test_a_model_of_another_number_of_classes_gives_all_but_its_last_layer(
    study, tmp_path, capsys, regime, last
):
    anew = started_anew(study, tmp_path, regime, {"organelle": "bar"})
    assert anew == [f"{last}.weight", f"{last}.bias"]
    assert f"its classes are disc, bar, dot; new: {last}." in capsys.readouterr().out


def started_anew(study: Study, tmp_path: Path, regime: str, changes: dict[str, Any]) -> list[str]:
    """Tensors that a unit does not take from a model of the study, where labels mean others."""
    unit = Unit("t", regime, "a", 0)
    trained = prepare(study, unit).segmenter
    for tensor in trained.live_state().values():
        tensor.copy_(torch.randn(tensor.shape))
    save_model(trained, regime_of(study, unit), Path("mine"), {})
    own = params()
    own["regimes"][regime] |= {"warm_start": "./mine"}
    own["datasets"]["a"] |= changes
    state = prepare(study_in(tmp_path, own), unit).segmenter.trained_state()
    before = trained.trained_state()
    return [name for name in state if not torch.equal(state[name], before[name])]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": {"a": [1], "b": [1]}}, "a label id is in two classes"),
        ({"foreground": [1]}, "classes and foreground both say"),
        ({"organelle": "er"}, "organelle must be one of disc, bar, dot"),
    ],
)
def test_classes_that_mean_nothing_are_refused(tmp_path, change, words):
    own = params()
    own["datasets"]["a"] |= change
    with pytest.raises(ConfigError, match=words):
        study_in(tmp_path, own)


def test_a_study_has_the_same_classes_throughout(tmp_path):
    own = params(mitonet={"kind": "mitonet", "weights": "mitonet.pt"})
    own["datasets"]["b"] = own["datasets"]["a"] | {"classes": dict(reversed(CLASSES.items()))}
    own["study"]["datasets"] = ["a", "b"]
    with pytest.raises(ConfigError) as error:
        study_in(tmp_path, own)
    assert "datasets.b.classes: found dot, bar, disc; expected disc, bar, dot" in str(error.value)
    assert "regimes.mitonet: it segments one class" in str(error.value)
