"""What nobody knows (`ignore` of a dataset) moves neither losses nor scores nor pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from scipy.ndimage import distance_transform_edt

from emadapt.data.foreground import IGNORE, class_ids, patch_classes
from emadapt.data.ingest import Volume, ingest, open_volume
from emadapt.models.tokens import TokenView
from emadapt.training.objective import LOSSES
from emadapt.training.regimes.at_once import tokens_and_classes
from emadapt.training.scores import Scores
from tiny import blobs, make_study, settings

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_gradient_are_those_of_the_known_pixels_alone(name: str) -> None:
    logits = torch.randn(1, 2, 6, 8, requires_grad=True)
    label = torch.randint(0, 2, (1, 1, 6, 8))
    label[..., 5:] = IGNORE
    loss = LOSSES[name](logits, label)
    loss.backward()
    known = LOSSES[name](logits[..., :5], label[..., :5])
    assert loss.item() == pytest.approx(known.item())
    assert logits.grad is not None
    assert not logits.grad[..., 5:].any()
    nothing = LOSSES[name](logits, torch.full_like(label, IGNORE))
    assert nothing.item() == pytest.approx(0.0)


def test_patches_that_are_mostly_unknown_teach_nothing() -> None:
    tokens = RNG.normal(size=(2, 5, 3, 3)).astype(np.float16)
    labels = RNG.integers(0, 2, (2, 12, 12)).astype(np.uint8)
    labels[:, :4] = IGNORE  # the first row of patches
    labels[:, 4:6, :4] = IGNORE  # half of one more, which counts by what is known
    labels[0, 6:8, :4], labels[1, 6:8, :4] = 0, 1
    view = TokenView(tokens, labels, np.zeros((2, 3), np.int32), {"train": [0]})
    found, classes = tokens_and_classes(view, np.arange(2))
    np.testing.assert_array_equal(found, np.moveaxis(tokens[:, :, 1:], 1, -1).reshape(-1, 5))
    assert (classes[0], classes[6]) == (0, 1)


def test_a_patch_is_of_its_most_frequent_class_where_half_of_it_is_foreground() -> None:
    labels = RNG.choice([0, 1, 2, 3, IGNORE], (40, 3, 3), p=[0.4, 0.2, 0.2, 0.1, 0.1])
    for patch, found in zip(labels, patch_classes(labels.astype(np.uint8), (1, 2)), strict=True):
        pixels = np.bincount(patch.ravel(), minlength=256)
        known = 9 - pixels[IGNORE]
        expected = 1 + pixels[1:4].argmax() if pixels[1:4].sum() >= known / 2 else 0
        assert np.isnan(found) if known < 4.5 else found == expected


def ingested(root: Path, label: np.ndarray, image: np.ndarray, **dataset: Any) -> Volume:
    params = settings()
    params["datasets"]["a"] |= dataset
    study = make_study(root, params, ingested=False)
    tifffile.imwrite(root / "data/a/image.tif", image, photometric="minisblack")
    tifffile.imwrite(root / "data/a/label.tif", label, photometric="minisblack")
    ingest(study, "a", root / "data", root / "build")
    return open_volume("a", root / "build")


def test_scores_and_pictures_do_not_depend_on_what_is_predicted_where_nobody_knows(
    tmp_path: Path,
) -> None:
    image, truth = blobs((10, 90, 100), 0)
    hidden = np.zeros(truth.shape, bool)
    hidden[:, 20:55, 10:50] = True
    label = np.where(hidden, 255, truth)
    volume = ingested(tmp_path, label, image, ignore=[255])
    assert set(np.unique(volume.label)) == {0, 1, IGNORE}
    share = truth[volume.split["test"]][~hidden[volume.split["test"]]].mean()
    assert volume.manifest["foreground_fraction"]["test"] == pytest.approx(share, abs=1e-6)
    guess = RNG.random(truth.shape).astype(np.float32)
    summaries, pictures = [], []
    for number, filled in enumerate((0.0, 1.0)):
        scores = Scores(volume)
        for z in volume.split["test"]:
            scores.add(z, np.where(hidden[z], np.float32(filled), guess[z]))
        folder = tmp_path / str(number)
        scores.draw(folder, "t")
        pictures.append([file.read_bytes() for file in sorted(folder.iterdir())])
        summaries.append({k: v for k, v in scores.summary().items() if k != "instances"})
    assert pictures[0] == pictures[1]
    assert summaries[0] == summaries[1]
    found, real = guess > 0.5, truth > 0
    known = ~hidden
    expected = [int(m[z][known[z]].sum()) for z in volume.split["test"] for m in (found & real,)]
    both = [np.sum(slice_, (0, 1))[0] for slice_ in summaries[0]["counts"]]
    assert both == expected


def test_the_band_of_a_boundary_that_may_be_hidden_is_left_out(tmp_path: Path) -> None:
    image, truth = blobs((10, 90, 100), 0)
    truth[:, 30:70, 30:70] = 1
    label = truth.copy()
    label[:, :, 40:45] = 9
    volume = ingested(tmp_path, label, image, ignore=[9])
    scores = Scores(volume)
    for z in volume.split["test"]:
        scores.add(z, truth[z].astype(np.float32))
    z = volume.split["test"][0]
    inner = truth[z].astype(bool) & (distance_transform_edt(truth[z]) <= scores.band)
    sure = distance_transform_edt(label[z] != 9) > scores.band
    assert (scores.boundary[0].sum((0, 1)) == int((inner & sure).sum())).all()


def test_objects_that_are_mostly_where_nobody_knows_are_not_counted(tmp_path: Path) -> None:
    image, truth = blobs((10, 90, 100), 0)
    truth[:] = 0
    truth[:, 10:20, 10:20] = 1
    label = truth.copy()
    label[:, 50:60, 50:60] = 9
    volume = ingested(tmp_path, label, image, ignore=[9])
    scores = Scores(volume)
    for z in volume.split["test"]:
        found = truth[z].astype(np.float32)
        found[49:61, 49:60] = 1  # an object of which nobody knows, a pixel wider
        scores.add(z, found)
    objects = scores.summary()["instances"]
    assert (objects["predicted"], objects["labelled"], objects["matched"]) == (1, 1, 1)


def test_ids_to_ignore_come_before_the_rule() -> None:
    label = np.array([[0, 1, 200, 255]])
    np.testing.assert_array_equal(
        class_ids(label, [">0"], ignore=(200, 255)), [[0, 1, IGNORE, IGNORE]]
    )
