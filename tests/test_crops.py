from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emadapt.data.batches import Item, load_epoch, plan_epoch
from emadapt.data.crops import CropDataset, augment, crop
from emadapt.data.ingest import Volume
from emadapt.data.tiles import Grey
from emadapt.models.tokens import TokenView
from emadapt.study.backbones import BackboneSettings
from emadapt.study.datasets import Sampling
from emadapt.study.training import TrainSettings
from emadapt.training.samples import TokenDataset

SPEC = BackboneSettings(arch="tiny_dinov2", source="random", tile=56)
SPLIT = {"train": [2, 3, 4, 7], "val": [0, 5], "test": [1, 8]}  # 6 lies in a gap
example = settings(deadline=None, max_examples=60)


def volume(image: Grey, label: Grey, split: dict[str, list[int]] = SPLIT) -> Volume:
    return Volume("v", image, label, {"split": split, "md5": "0", "voxel_nm": [30, 5, 5]})


def noise(shape: tuple[int, int, int] = (9, 70, 80), seed: int = 0) -> Volume:
    rng = np.random.default_rng(seed)
    return volume(rng.integers(0, 256, shape, np.uint8), rng.integers(0, 2, shape, np.uint8))


def ragged(height: int = 56, width: int = 56) -> Grey:
    """A 0/1 label without any symmetry."""
    y, x = np.mgrid[:height, :width]
    blob = (y - 15) ** 2 + (x - 20) ** 2 < 100
    return (blob | ((x > 30) & (y > 25) & (y < 32)) | ((x > 40) & (x < 46) & (y > 10))).astype(
        np.uint8
    )


def epoch_of(
    dataset: CropDataset | TokenDataset, number: int = 0, workers: int = 0, **train: Any
) -> list[list[Item]]:
    plan = plan_epoch(dataset.rows(), TrainSettings(**train), 0, number)
    return list(load_epoch(dataset, plan, workers))


def flat(batches: list[list[Item]]) -> Iterator[tuple[bytes, bytes]]:
    for batch in batches:
        for inputs, labels in batch:
            for a, b in zip(inputs, labels, strict=True):
                yield a.numpy().tobytes(), b.numpy().tobytes()


# ---------------------------------------------------------------- crops and augmentation


def test_the_seed_alone_decides_a_crop() -> None:
    data = noise()
    first = {seed: crop(data.image[0], data.label[0], (56, 56), seed, True) for seed in range(20)}
    for seed in reversed(range(20)):  # in another order: nothing carries over from the crop before
        again = crop(data.image[0], data.label[0], (56, 56), seed, True)
        assert all(np.array_equal(a, b) for a, b in zip(again, first[seed], strict=True))
    assert len({image.tobytes() for image, _ in first.values()}) == 20


def test_a_plain_crop_is_cut_from_image_and_label_at_one_place_and_reaches_every_corner() -> None:
    y, x = np.mgrid[:60, :59]
    places = set()
    for seed in range(200):
        image, label = crop((10 * y).astype(np.uint8), x.astype(np.uint8), (56, 56), seed, False)
        top, left = int(image[0, 0]) // 10, int(label[0, 0])
        assert np.array_equal(image, (10 * y).astype(np.uint8)[top : top + 56, left : left + 56])
        assert np.array_equal(label, x[top : top + 56, left : left + 56])
        places.add((top, left))
    assert places == {(top, left) for top in range(5) for left in range(4)}


def test_augmentation_moves_image_and_label_together() -> None:
    """The label's pixels are bright in the image; where they are bright afterwards, the label must
    be."""
    label = ragged()
    image = (60 + 120 * label).astype(np.uint8)
    symmetries = {
        np.rot90(flipped, k).tobytes() for flipped in (label, label[::-1]) for k in range(4)
    }
    assert len(symmetries) == 8
    seen, bent, levels = set(), 0, set()
    for seed in range(200):
        out, moved = augment(image, label, seed)
        assert out.dtype == moved.dtype == np.uint8
        assert set(np.unique(moved)) == {0, 1}
        bright = out > (float(out.min()) + float(out.max())) / 2
        assert (bright != moved.astype(bool)).mean() < 0.03
        if moved.tobytes() in symmetries:
            seen.add(moved.tobytes())
            assert np.array_equal(bright, moved)  # flips and rotations are exact
        else:
            bent += 1
            assert 0.7 < moved.sum() / label.sum() < 1.4  # mild
        levels.add((int(out.min()), int(out.max())))
    assert seen == symmetries  # all eight are drawn
    assert 30 < bent < 90  # elastic: three in ten
    assert len(levels) > 100  # brightness and contrast


# ---------------------------------------------------------------- an epoch


def test_the_number_of_workers_changes_nothing_and_no_two_crops_are_alike() -> None:
    dataset = CropDataset([noise(), noise((9, 60, 66), 1)], SPEC, 14, augmented=True)
    train = {"batch": 4, "steps_per_epoch": 10}
    alone, helped = (list(flat(epoch_of(dataset, workers=n, **train))) for n in (0, 2))
    assert len(alone) == 40
    assert alone == helped
    assert len({image for image, _ in alone}) == 40
    following = list(flat(epoch_of(dataset, 1, **train)))
    assert not {image for image, _ in alone} & {image for image, _ in following}


@pytest.mark.parametrize("sampling", ["balanced", "proportional"])
def test_only_training_slices_are_ever_drawn(sampling: Sampling) -> None:
    # a slice's grey is its number
    z = np.broadcast_to(np.arange(9, dtype=np.uint8)[:, None, None] * 20, (9, 70, 80))
    other = {"train": [0, 8], "val": [3], "test": [4, 5, 6]}
    volumes = [volume(z, z), volume(z, z, other)]
    dataset = CropDataset(volumes, SPEC, 14, augmented=False)
    seen: tuple[set[int], set[int]] = (set(), set())
    for epoch in range(3):
        plan = plan_epoch(
            dataset.rows(), TrainSettings(batch=4, steps_per_epoch=8, sampling=sampling), 0, epoch
        )
        for draw in (d for batch in plan for d in batch):
            image, _ = dataset[draw]
            seen[draw.member].update(round(v * 255 / 20) for v in image.unique().tolist())
    assert seen == ({2, 3, 4, 7}, {0, 8})


def test_only_training_rows_of_the_cache_are_ever_drawn() -> None:
    """Two views whose tokens hold slice number and view; the second, as all from 1 on, has fewer
    rows."""
    index = np.array([(z, 0, x) for z in range(9) for x in (0, 56)], np.int32)
    views = []
    for number, rows in enumerate((index, index[np.isin(index[:, 0], SPLIT["train"])])):
        tokens = np.zeros((len(rows), 8, 4, 4), np.float16)
        tokens[:, 0], tokens[:, 1] = rows[:, 0, None, None], number
        labels = np.broadcast_to(rows[:, 0, None, None].astype(np.uint8), (len(rows), 56, 56))
        views.append(TokenView(tokens, labels, rows, SPLIT))
    dataset = TokenDataset([views])
    assert [len(r) for r in dataset.rows()] == [2 * 2 * len(SPLIT["train"])]
    drawn: Counter[tuple[int, int]] = Counter()
    for batch in epoch_of(dataset, steps_per_epoch=0, batch=3):
        for tokens_, labels_ in batch:
            assert tokens_.dtype == torch.float16
            # tokens and labels of the same row
            assert torch.equal(tokens_[:, 0, 0, 0].long(), labels_[:, 0, 0])
            drawn.update((int(t[0, 0, 0]), int(t[1, 0, 0])) for t in tokens_)
    assert drawn == {(z, view): 2 for z in SPLIT["train"] for view in (0, 1)}


# ---------------------------------------------------------------- plan_epoch

ROWS = st.lists(st.integers(1, 30), min_size=1, max_size=4).map(
    lambda sizes: [np.arange(n) * 3 + 1 for n in sizes]
)
TRAIN = st.builds(
    TrainSettings,
    batch=st.integers(1, 8),
    steps_per_epoch=st.integers(0, 12),
    sampling=st.sampled_from(["balanced", "proportional"]),
)
SEEDS = st.integers(0, 10_000)


@example
@given(ROWS, TRAIN, SEEDS, st.integers(0, 50))
def test_a_plan_draws_as_much_as_asked_from_what_may_be_drawn(
    rows: list[np.ndarray], train: TrainSettings, seed: int, epoch: int
) -> None:
    plan = plan_epoch(rows, train, seed, epoch)
    assert plan == plan_epoch(rows, train, seed, epoch)
    assert all(d.row in rows[d.member] for batch in plan for d in batch)
    size = max(train.batch, len(rows))
    if train.steps_per_epoch:
        assert [len(batch) for batch in plan] == [size] * train.steps_per_epoch
    else:  # one pass
        assert sum(len(batch) for batch in plan) == sum(map(len, rows))
        assert all(len(batch) == size for batch in plan[:-1])


@example
@given(ROWS, TRAIN.filter(lambda t: t.sampling == "balanced"), SEEDS)
def test_balanced_datasets_come_equally_often_whatever_their_size(
    rows: list[np.ndarray], train: TrainSettings, seed: int
) -> None:
    plan = plan_epoch(rows, train, seed, 0)
    for batch in plan if train.steps_per_epoch else plan[:-1]:
        counts = Counter(d.member for d in batch)
        assert set(counts) == set(range(len(rows)))  # each in every batch
        assert max(counts.values()) - min(counts.values()) <= 1
    total = Counter(d.member for batch in plan for d in batch)
    assert max(total.values()) - min(total[m] for m in range(len(rows))) <= 1
    for member, own in enumerate(rows):
        drawn = Counter(d.row for batch in plan for d in batch if d.member == member)
        # none twice before all were once
        assert max(drawn[r] for r in own) - min(drawn[r] for r in own) <= 1


@example
@given(ROWS, st.integers(1, 8), SEEDS, st.integers(1, 4))
def test_unbalanced_datasets_come_in_proportion(
    rows: list[np.ndarray], batch: int, seed: int, passes: int
) -> None:
    n, size = sum(map(len, rows)), max(batch, len(rows))
    train = TrainSettings(
        batch=batch, sampling="proportional", steps_per_epoch=-(-passes * n // size)
    )
    draws = [(d.member, d.row) for b in plan_epoch(rows, train, seed, 0) for d in b]
    everything = sorted((m, int(r)) for m, own in enumerate(rows) for r in own)
    for start in range(0, passes * n, n):  # each pass holds each row once
        assert sorted(draws[start : start + n]) == everything
    one_pass = plan_epoch(
        rows, TrainSettings(batch=batch, sampling="proportional", steps_per_epoch=0), seed, 0
    )
    assert sorted((d.member, d.row) for b in one_pass for d in b) == everything


def test_jitter_changes_the_scale_and_the_label_follows() -> None:
    label = np.zeros((120, 120), np.uint8)
    label[30:90, 30:90] = 1
    areas = []
    for seed in range(30):
        image, moved = crop(200 * label, label, (56, 56), seed, True, jitter=True)
        again = crop(200 * label, label, (56, 56), seed, True, jitter=True)
        assert image.shape == moved.shape == (56, 56)
        assert np.array_equal(image, again[0])
        assert np.array_equal(moved, again[1])
        areas.append(moved.mean())
        if 0.1 < moved.mean() < 0.9:
            assert image[moved == 1].mean() > image[moved == 0].mean() + 40
    plain = [crop(label, label, (56, 56), seed, False)[1].mean() for seed in range(30)]
    assert not np.allclose(areas, plain)
