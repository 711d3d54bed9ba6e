"""Layout `volumes`: many short volumes are one dataset, and nothing reaches over their ends."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import tifffile
from scipy import ndimage
from scipy.stats import t

from emadapt.data.batches import Draw
from emadapt.data.blocks import BlockDataset
from emadapt.data.crops import CropDataset
from emadapt.data.foreground import IGNORE
from emadapt.data.ingest import ingest, open_volume
from emadapt.data.labelled import few_slices
from emadapt.data.tiles import with_neighbours
from emadapt.models.predict import predict_slices
from emadapt.study.backbones import BackboneSettings
from emadapt.study.datasets import TrainSetSettings
from emadapt.study.regimes import regime_settings
from emadapt.study.study import Study, Unit
from emadapt.training.evaluate import evaluate_unit
from emadapt.training.scores import Scores
from emadapt.training.train import train_unit
from tiny import blobs, ingested, regime_for, settings

SHAPES = [(4 + k % 3, 60 + 4 * k, 70 - 3 * k) for k in range(6)]
ENDS = np.cumsum([0, *(shape[0] for shape in SHAPES)]).tolist()
OWN = [*np.repeat(range(6), [shape[0] for shape in SHAPES]).tolist(), -1]
"""The volume of each slice, and none after the last."""
MM = 1_000_000
DEEP = {"kind": "resunet3d", "patch": [4, 32, 32], "channels": [4] * 5}


def params() -> dict[str, Any]:
    own = settings(epochs=1, steps_per_epoch=2)
    own["study"] |= {"datasets": ["a"], "train_sets": ["a"], "regimes": ["frozen", "deep"]}
    own["datasets"] = {"a": {"layout": "volumes", "voxel_nm": [MM] * 3, "foreground": [1]}}
    own["train_sets"] = {"a": ["a"], "two": {"datasets": ["a"], "slices": 2}}
    own["regimes"]["deep"] = DEEP
    own["backbones"]["t"] |= {"context": 1}
    own["split"] = {"gap_nm": 0}
    return own


def pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    return [blobs(shape, k) for k, shape in enumerate(SHAPES)]


def write(folder: Path, name: str, array: np.ndarray, kind: str = "nii.gz") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.{kind}"
    if kind == "tif":
        tifffile.imwrite(path, array, photometric="minisblack")
    else:
        nibabel.save(nibabel.Nifti1Image(array.T, np.eye(4)), path)


def study_in(root: Path, own: dict[str, Any] | None = None) -> Study:
    """Volumes of different sizes, formats and types under the names v1, v2, ... v10."""
    for k, (image, label) in enumerate(pairs()):
        wide = image if k % 2 else image.astype(np.uint16) * (100 + k)
        name = f"v{2 * k}"  # v10 comes after v8
        write(root / "data/a/images", name, wide, "tif" if k == 3 else "nii.gz")
        write(root / "data/a/labels", name, label)
    return ingested(root, own or params())


@pytest.fixture
def study(tmp_path, tracking_off):
    return study_in(tmp_path)


def test_each_volume_is_kept_with_its_own_window_and_padded_by_what_nobody_knows(study):
    volume = open_volume("a")
    assert volume.ends == ENDS
    assert volume.image.shape[1:] == tuple(np.max(SHAPES, 0)[1:])
    for k, (image, label) in enumerate(pairs()):
        own, (_, height, width) = slice(*volume.ends[k : k + 2]), image.shape
        np.testing.assert_array_equal(volume.label[own, :height, :width], label)
        assert (volume.label[own, height:] == IGNORE).all()
        assert (volume.label[own, :, width:] == IGNORE).all()
        low, high = (0, 255) if k % 2 else np.percentile(image, (0.5, 99.5))
        wanted = np.clip((image.astype(float) - low) / (high - low) * 255, 0, 255)
        assert np.abs(volume.image[own, :height, :width] - wanted).max() <= 2


def test_a_volume_is_in_one_part_of_the_split(study, tmp_path):
    split = open_volume("a").split
    parts = {part: {OWN[z] for z in slices} for part, slices in split.items()}
    assert parts == {"train": {0, 1, 2, 3}, "val": {4}, "test": {5}}
    assert sorted(z for slices in split.values() for z in slices) == list(range(ENDS[-1]))
    own = tmp_path / "other"
    for k, (image, label) in enumerate(pairs()):
        for kind, array in (("images", image), ("labels", label)):
            write(own / "data/a" / ("test" if k in (1, 4) else "train") / kind, f"v{k}", array)
    ingest(study, "a", own / "data", own)
    halves = open_volume("a", own)
    assert len(halves.split["test"]) == SHAPES[1][0] + SHAPES[4][0]
    assert halves.split["test"][-1] == ENDS[-1] - 1


def test_neighbours_and_blocks_end_with_their_volume(study):
    volume = open_volume("a")
    spec = BackboneSettings(arch="tiny_dinov2", source="random", tile=56, views=0)
    crops = CropDataset([volume], spec, 14, augmented=False)
    for first, end in pairwise(ENDS):
        below = with_neighbours(volume, first, 1)[..., 0]
        np.testing.assert_array_equal(below, volume.image[first + 1])
        above = with_neighbours(volume, end - 1, 1)[..., 2]
        np.testing.assert_array_equal(above, volume.image[end - 2])
    train = volume.split["train"]
    for z in train:
        for step in (-1, 1):
            beside = z + step if OWN[z] == OWN[z + step] else z
            assert crops.beside(Draw(0, z, 0), step).row == beside
    blocks = BlockDataset([volume], spec, 16, False, patch=(4, 32, 32))
    assert blocks.starts[0].tolist() == [z for z in train if OWN[z] == OWN[z + 3]]


def test_few_labels_are_whole_volumes(study):
    volume = open_volume("a")
    two = TrainSetSettings(datasets=("a",), slices=2)
    drawn = {tuple(few_slices(volume, two, seed).split["train"]) for seed in range(8)}
    whole = [list(range(*ends)) for ends in pairwise(ENDS)]
    assert len(drawn) > 1
    for slices in drawn:
        held = [own for own in whole if set(own) & set(slices)]
        assert len(held) == 2
        assert [z for own in held for z in own] == list(slices)


@pytest.mark.slow
@pytest.mark.parametrize("regime", ["frozen", "deep"])
def test_a_unit_is_trained_on_a_few_volumes_and_scored_by_volume(tmp_path, tracking_off, regime):
    own = params()
    own["study"]["train_sets"] = ["two"]
    study, unit = study_in(tmp_path, own), Unit("t", regime, "two", 0)
    train_unit(study, unit)
    test = json.loads(evaluate_unit(study, unit).read_text())["test"]["a"]
    both, predicted, labelled = np.sum(test["counts"], (0, 1, 2))
    volume = open_volume("a")
    assert labelled == (volume.label[volume.split["test"]] == 1).sum()
    assert test["iou"] == pytest.approx(both / (predicted + labelled - both), abs=1e-6)


@pytest.mark.parametrize("settings", [{"kind": "frozen"}, DEEP], ids=["frozen", "deep"])
def test_a_volume_is_predicted_as_it_is_alone(study, settings):
    volume = open_volume("a")
    backbone = {"arch": "tiny_dinov2", "source": "random", "tile": 56, "views": 0}
    smooth = backbone | {"precision": "fp32", "smooth_z_nm": 1.5 * MM}
    model = regime_for(smooth, regime_settings(**settings)).build(0).eval()
    every = dict(predict_slices(model, volume, range(ENDS[-1])))
    for first, end in pairwise(ENDS):
        for z, alone in predict_slices(model, volume, range(first, end)):
            np.testing.assert_allclose(every[z], alone, atol=1e-6)


def test_objects_end_with_their_volume_and_intervals_are_over_volumes(study):
    volume = open_volume("a")
    volume.manifest["split"]["test"] = list(range(ENDS[-1]))
    scores = Scores(volume)
    rng = np.random.default_rng(0)
    found = {k: rng.uniform(0.2, 0.8) for k in range(6)}  # each volume has an error of its own
    masks = []
    for z in range(ENDS[-1]):
        label = volume.label[z] == 1
        masks.append(label & (rng.random(label.shape) < found[OWN[z]]))
        scores.add(z, masks[-1].astype(np.float32))
    own = scores.summary()
    assert own["n"] == ENDS[-1]
    labels = [ndimage.label(volume.label[slice(*ends)] == 1)[1] for ends in pairwise(ENDS)]
    assert own["instances"]["labelled"] == sum(labels)
    both, union = (
        np.array([of[slice(*ends)].sum() for ends in pairwise(ENDS)])
        for of in (np.array(masks), volume.label == 1)
    )
    assert own["iou"] == pytest.approx(both.sum() / union.sum(), abs=1e-6)
    lifts = (both - own["iou"] * union) / union.sum()  # a ratio of sums, linearised
    spread = np.sqrt(6 / 5 * (lifts**2).sum())
    low, high = own["iou_ci95"]
    assert (high - low) / 2 == pytest.approx(t.ppf(0.975, 5) * spread, rel=0.25)
