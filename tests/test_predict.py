"""Probabilities of slices: from the cache as from images, without seams, in blocks as MONAI's,
smoothed along z."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data.utils import compute_importance_map
from monai.inferers import sliding_window_inference

from emadapt.data.ingest import Volume
from emadapt.models import predict, segmenter
from emadapt.models.predict import predict_slices, smooth_z
from emadapt.models.segmenter import Segmenter
from emadapt.models.tokens import token_views
from emadapt.study.regimes import RegimeSettings, regime_settings
from tiny import TINY, blobs, predict_slice, regime_for

SHAPES: list[dict[str, Any]] = [
    {},
    {"scale": 2.0},
    {"scale": 0.7},
    {"longest_edge": 98, "tile": 0},
    {"tile": 140},
]
MANIFEST = {"md5": "0", "voxel_nm": [30.0, 5.0, 5.0]}


@pytest.fixture(scope="module")
def volume() -> Volume:
    image, label = blobs((4, 90, 101), 3)
    split = {"train": [0], "val": [1], "test": [2, 3]}
    return Volume("v", image, label, MANIFEST | {"split": split})


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice's tiles do not fit into one batch, nor into whole batches."""
    monkeypatch.setattr(predict, "BATCH_TILES", 4)
    monkeypatch.setattr(segmenter, "BATCH_TILES", 4)


def make(
    change: dict[str, Any] | None = None,
    head: str = "pyramid",
    settings: RegimeSettings | None = None,
) -> Segmenter:
    return regime_for(TINY | (change or {}), settings, head).build(seed=0).eval()


def cached(model: Segmenter, volume: Volume, cache: Path, z: int) -> np.ndarray:
    [view] = token_views(model.backbone, model.spec, volume, range(1), cache, model.cut)
    return dict(predict_slices(model, volume, [z], view))[z]


@pytest.mark.parametrize("change", SHAPES, ids=str)
def test_cached_and_online_predictions_agree(
    volume: Volume, tmp_path: Path, change: dict[str, Any]
) -> None:
    model = make(change)
    for z, overlap in ((0, 0.0), (1, None), (3, None)):  # training slices: without overlap
        online = predict_slice(model, volume.image[z], overlap)
        assert (online.shape, online.dtype) == ((90, 101), np.float32)
        assert 0 <= online.min() < online.max() <= 1
        assert online.std() > 1e-3
        np.testing.assert_allclose(cached(model, volume, tmp_path, z), online, atol=3e-3)


@pytest.mark.parametrize("change", SHAPES, ids=str)
def test_a_head_that_says_the_same_everywhere_leaves_no_seams(
    volume: Volume, change: dict[str, Any]
) -> None:
    model = make(change)
    with torch.no_grad():
        model.head.classify.weight.zero_()  # type: ignore[union-attr, operator]
        model.head.classify.bias.copy_(torch.tensor([0.0, math.log(3)]))  # type: ignore[union-attr, operator]
    for overlap in (None, 0.0, 0.6):
        found = predict_slice(model, volume.image[2], overlap)
        np.testing.assert_allclose(found, 0.75, atol=1e-5)


# ---------------------------------------------------------------- blocks of slices

IMAGE = np.random.default_rng(0).integers(0, 256, (11, 64, 80)).astype(np.uint8)


def block_model(depth: int, tile: int) -> Segmenter:
    settings = regime_settings(kind="resunet3d", patch=(depth, 32, 32), channels=(2, 2, 2, 2, 2))
    model = make({"tile": tile, "overlap": 0.5}, "resunet3d", settings).train()
    with torch.no_grad():
        model(torch.rand(2, 1, depth, 32, 32), (32, 32))  # running statistics of its own
        model.head.after.conv.weight.mul_(20)  # type: ignore[union-attr, operator]
    return model.eval()


def predicted(
    model: Segmenter, image: np.ndarray, slices: Any, overlap: float | None = None
) -> dict[int, np.ndarray]:
    volume = Volume("v", image, np.zeros_like(image), MANIFEST)
    return dict(predict_slices(model, volume, list(slices), overlap=overlap))


@torch.inference_mode()
def whole(model: Segmenter, image: np.ndarray) -> np.ndarray:
    shown = torch.from_numpy(image / np.float32(255))[None, None]
    return model(shown, image.shape[1:]).softmax(1)[0, 1].numpy()


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_streamed_along_z_it_is_monai_on_the_whole_volume(overlap: float) -> None:
    model = block_model(4, 32)
    got = predicted(model, IMAGE, range(11), overlap)
    along = compute_importance_map((4,), mode="gaussian")
    with torch.inference_mode():
        expected = sliding_window_inference(
            torch.from_numpy(IMAGE / np.float32(255))[None, None],
            (4, 32, 32),
            2,
            lambda x: model(x, (32, 32)).softmax(1)[:, 1:],
            overlap=overlap,
            mode="gaussian",
            roi_weight_map=along[:, None, None] * compute_importance_map((32, 32), mode="gaussian"),
        )
    assert list(got) == list(range(11))
    stacked = np.stack(list(got.values()))
    np.testing.assert_allclose(stacked, torch.as_tensor(expected)[0, 0].numpy(), atol=2e-6)
    assert stacked.std() > 0.01


def test_other_slices_are_not_looked_at() -> None:
    model, other = block_model(3, 32), IMAGE.copy()
    other[[0, 5, 10]] = 255 - other[[0, 5, 10]]
    slices = [1, 2, 3, 4, 6, 7, 8, 9]
    one, two = predicted(model, IMAGE, slices), predicted(model, other, slices)
    assert list(one) == slices
    assert all(np.array_equal(one[z], two[z]) for z in slices)


# ---------------------------------------------------------------- smoothing


@given(st.sets(st.integers(0, 25), min_size=1), st.floats(0.17, 4), st.integers(0, 99))
def test_smoothing_along_z_against_scipy_on_a_volume_with_holes(
    there: set[int], sigma: float, seed: int
) -> None:
    """Normalised convolution: the filter on values with zeros in holes, over the filter on what is
    there."""
    from scipy.ndimage import gaussian_filter1d

    values = np.random.default_rng(seed).random((26, 2, 3)).astype(np.float32)
    mask = np.zeros((26, 1, 1))
    mask[sorted(there)] = 1
    how = {"sigma": sigma, "axis": 0, "mode": "constant", "radius": int(3 * sigma + 0.5)}
    blurred, weight = (gaussian_filter1d(v, **how) for v in (values * mask, mask))
    found = dict(smooth_z(((z, values[z]) for z in sorted(there)), sigma))
    assert list(found) == sorted(there)
    for z, probability in found.items():
        np.testing.assert_allclose(probability, blurred[z] / weight[z], atol=1e-5)


def test_smoothing_is_in_nm_and_keeps_few_slices_in_memory(volume: Volume) -> None:
    """Sections of 30 nm are left alone by 4 nm and mixed by 30; a hundred slices need a window, not
    a hundred."""
    plain, little, much = (
        dict(predict_slices(make({"smooth_z_nm": nm}), volume, [0, 1, 3]))
        for nm in (0.0, 4.0, 30.0)
    )
    for z in (0, 1, 3):
        np.testing.assert_array_equal(plain[z], little[z])
        assert not np.array_equal(plain[z], much[z])
    taken: list[int] = []

    def slices() -> Iterator[tuple[int, np.ndarray]]:
        for z in range(100):
            taken.append(z)
            yield z, np.full((1, 1), z, np.float32)

    for z, _ in smooth_z(slices(), 2.0):
        assert len(taken) <= z + 2 + 6
