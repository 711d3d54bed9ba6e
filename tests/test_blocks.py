"""Patches of neighbouring slices: where they lie, what augmentation may do to them."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest

from emadapt.data.batches import Draw
from emadapt.data.blocks import BlockDataset, augment
from emadapt.data.ingest import Volume
from emadapt.data.splits import runs_of, starts_in
from emadapt.study.backbones import BackboneSettings

SPEC = BackboneSettings(arch="tiny_dinov2", source="random", tile=48)
SPLIT = {"train": [*range(8), *range(12, 17)], "val": [9, 10], "test": [18, 19]}


@pytest.fixture
def volume() -> Volume:
    """Grey values tell the slice and, in label, where it lies in plane."""
    image = np.broadcast_to(np.arange(20, dtype=np.uint8)[:, None, None] * 10, (20, 60, 70)).copy()
    chequered = (np.add.outer(np.arange(60), np.arange(70)) % 2).astype(np.uint8)
    label = np.broadcast_to(chequered, image.shape).copy()
    return Volume("v", image, label, {"split": SPLIT, "voxel_nm": [30, 5, 5], "md5": "0"})


def test_starts_by_brute_force() -> None:
    slices = SPLIT["train"]
    runs = runs_of(slices)
    for depth in range(1, 9):
        assert starts_in(runs, depth) == [
            z for z in range(30) if all(z + k in slices for k in range(depth))
        ]
        apart = starts_in(runs, depth, apart=True)
        assert set(apart) <= set(starts_in(runs, depth))
        covered = {z + k for z in apart for k in range(depth)}
        assert covered == {z for run in runs if len(run) >= depth for z in run}
        assert len(apart) == sum(-(-len(run) // depth) for run in runs if len(run) >= depth)
    assert starts_in(runs, 9) == []
    assert all(b[0] - a[-1] > 1 for a, b in pairwise(runs))


def test_patches_lie_in_training_slices_alone(volume: Volume) -> None:
    data = BlockDataset([volume], SPEC, 16, False, patch=(4, 32, 32))
    [rows] = data.rows()
    seen = set()
    for row in rows:
        image, label = data[Draw(0, int(row), 5)]
        assert (image.shape, label.shape) == ((1, 4, 32, 32), (4, 32, 32))
        slices = (image[0, :, 0, 0] * 25.5).round().int().tolist()
        assert (np.diff(slices) == 1).all()
        assert set(slices) <= set(SPLIT["train"])
        seen |= set(slices)
    assert seen == set(SPLIT["train"])
    assert len(rows) == 5 + 2


def test_the_same_draw_gives_the_same_bytes_and_another_does_not(volume: Volume) -> None:
    noisy = dataclasses.replace(
        volume, image=np.random.default_rng(0).integers(0, 255, (20, 60, 70)).astype(np.uint8)
    )
    one, same = (BlockDataset([noisy], SPEC, 16, True, patch=(4, 32, 32)) for _ in range(2))
    same[Draw(0, 3, 1)]  # drawn in between
    for draw, other in ((Draw(0, 0, 11), Draw(0, 0, 12)), (Draw(0, 2, 11), Draw(0, 2, 13))):
        assert one[draw][0].equal(same[draw][0])
        assert one[draw][1].equal(same[draw][1])
        assert not one[draw][0].equal(one[other][0])


def test_augmentation_turns_all_slices_alike_and_changes_grey_values_alike() -> None:
    rng = np.random.default_rng(0)
    image, label = (rng.integers(*span, (3, 8, 8), np.uint8) for span in ((80, 160), (0, 2)))
    turned = [np.rot90(part, k, (1, 2)) for part in (label, label[:, ::-1]) for k in range(4)]
    allowed = [t.tobytes() for part in turned for t in (part, part[::-1])]
    found, changes = set(), set()
    for seed in range(120):
        grey, mask = augment(image, label, seed)
        where = allowed.index(mask.tobytes())
        found.add(where)
        # Undone in plane and z, grey values are one rising line of the old ones: brightness and
        # contrast, no local change.
        flipped = image[:, ::-1] if where >= 8 else image
        back = np.rot90(flipped, where // 2 % 4, (1, 2))[:: -1 if where % 2 else 1]
        order = np.argsort(back.ravel(), kind="stable")
        assert (np.diff(grey.ravel()[order].astype(int)) >= 0).all()
        changes.add(round(float(grey.mean())))
    assert len(found) == 16
    assert len(changes) > 10


def test_labelled_tiles_stay_where_they_are_and_unlabelled_volumes_have_no_labels(
    volume: Volume,
) -> None:
    tiles = [[(0, 3, 5), (12, 20, 30)]]
    data = BlockDataset([volume], SPEC, 16, False, tiles, [volume], patch=(4, 32, 32))
    assert [len(r) for r in data.rows()] == [2]
    assert [len(r) for r in data.unlabelled_rows()] == [7]
    image, label = data[Draw(0, 1, 99)]
    assert (label.numpy() == volume.label[12:16, 20:52, 30:62]).all()
    assert image[0, :, 0, 0].mul(25.5).round().int().tolist() == [12, 13, 14, 15]
    assert not data[Draw(1, 0, 99)][1].any()
