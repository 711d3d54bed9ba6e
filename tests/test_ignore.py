"""What nobody knows (`ignore` of a dataset) moves neither losses nor scores nor pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from scipy.ndimage import distance_transform_edt

from emadapt.data.foreground import IGNORE, patch_classes
from emadapt.data.ingest import Volume, ingest, open_volume
from emadapt.training.objective import LOSSES
from emadapt.training.scores import Scores
from tiny import blobs, make_study, settings

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_gradient_are_those_of_the_known_pixels_alone(name):
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


def test_a_patch_is_of_its_most_frequent_class_where_half_of_it_is_foreground():
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


def test_scores_and_pictures_do_not_depend_on_what_is_predicted_where_nobody_knows(tmp_path):
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


def test_the_band_of_a_boundary_that_may_be_hidden_is_left_out(tmp_path):
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
