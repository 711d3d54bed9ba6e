import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emadapt.data.ingest import Volume
from emadapt.models import predict
from emadapt.models.predict import predict_cached, predict_slice, predict_slices, smooth_z
from emadapt.models.regimes import merge
from emadapt.models.segmenter import Segmenter, build_segmenter
from emadapt.models.tokens import token_views
from emadapt.study.study import BackboneSettings, RegimeSettings
from tiny import blobs

SPEC = BackboneSettings("tiny_dinov2", "random", tile=56, overlap=0.25, views=0, precision="fp32")
SHAPES = [
    {},
    {"scale": 2.0},
    {"scale": 0.7},
    {"longest_edge": 126},
    {"longest_edge": 98, "tile": 0},
    {"tile": 0},
    {"tile": 140},
]


@pytest.fixture(scope="module")
def volume() -> Volume:
    image, label = blobs((4, 90, 101), 3)
    return Volume(
        "v", image, label, {"split": {"train": [0], "val": [1], "test": [2, 3]}, "md5": "0"}
    )


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice's tiles do not fit into one batch, nor into whole batches."""
    monkeypatch.setattr(predict, "BATCH_TILES", 4)


def make(
    change: dict[str, Any] | None = None,
    head: str = "pyramid",
    regime: RegimeSettings | None = None,
) -> Segmenter:
    spec = dataclasses.replace(SPEC, **(change or {}))
    return build_segmenter(spec, regime or RegimeSettings("frozen"), head, seed=0).eval()


@pytest.mark.parametrize("change", SHAPES, ids=str)
def test_cached_and_online_predictions_agree(
    volume: Volume, tmp_path: Path, change: dict[str, Any]
) -> None:
    segmenter = make(change)
    [view] = token_views(segmenter.backbone, segmenter.spec, volume, range(1), tmp_path)
    for z, overlap in (
        (0, 0.0),
        (1, None),
        (3, None),
    ):  # training slices are cached without overlap
        online = predict_slice(segmenter, volume.image[z], overlap)
        cached = predict_cached(segmenter, view, z, (90, 101))
        for probability in (online, cached):
            assert (probability.shape, probability.dtype) == ((90, 101), np.float32)
            assert probability.min() >= 0
            assert probability.max() <= 1
        assert online.std() > 1e-3  # not the same by being constant
        np.testing.assert_allclose(cached, online, atol=3e-3)


def test_each_slice_comes_with_its_number_from_images_or_cache(
    volume: Volume, tmp_path: Path
) -> None:
    segmenter = make()
    [view] = token_views(segmenter.backbone, segmenter.spec, volume, range(1), tmp_path)
    online = dict(predict_slices(segmenter, volume, [3, 1]))
    cached = dict(predict_slices(segmenter, volume, [3, 1], view))
    assert list(online) == list(cached) == [3, 1]
    for z in (1, 3):
        np.testing.assert_array_equal(online[z], predict_slice(segmenter, volume.image[z]))
        np.testing.assert_allclose(cached[z], online[z], atol=3e-3)
    assert np.abs(online[1] - online[3]).max() > 0.01  # so that a mix-up would show


@pytest.mark.parametrize("change", SHAPES, ids=str)
def test_a_head_that_says_the_same_everywhere_leaves_no_seams(
    volume: Volume, change: dict[str, Any]
) -> None:
    segmenter = make(change)
    with torch.no_grad():
        segmenter.head.classify.weight.zero_()  # type: ignore[union-attr, operator]
        segmenter.head.classify.bias.copy_(torch.tensor([0.0, math.log(3)]))  # type: ignore[union-attr, operator]
    for overlap in (None, 0.0, 0.6):
        np.testing.assert_allclose(
            predict_slice(segmenter, volume.image[2], overlap), 0.75, atol=1e-5
        )


def test_one_tile_is_the_segmenters_own_answer(volume: Volume) -> None:
    segmenter = make({"tile": 0}, head="linear")
    image = volume.image[0, :84, :98]  # whole patches
    with torch.inference_mode():
        logits = segmenter(torch.from_numpy(image / np.float32(255))[None, None], (84, 98))
    foreground = 1 / (1 + torch.exp(logits[0, 0] - logits[0, 1]))
    np.testing.assert_allclose(predict_slice(segmenter, image), foreground.numpy(), atol=1e-5)


def test_tiles_see_only_their_own_pixels_and_each_pixel_counts(volume: Volume) -> None:
    """Without overlap a change in one tile changes that tile alone; with overlap it reaches its neighbours."""
    segmenter = make()
    image = volume.image[0][:56, :]  # 56 x 101: tiles at x = 0 and 45
    changed = image.copy()
    changed[:, 70:] = 255 - changed[:, 70:]
    plain = predict_slice(segmenter, image, 0.0) - predict_slice(segmenter, changed, 0.0)
    assert not plain[:, :45].any()
    assert np.abs(plain[:, 60:]).max() > 0.01


def test_lora_is_used_in_prediction_merged_or_not(volume: Volume) -> None:
    segmenter = make(regime=RegimeSettings("lora", rank=2, alpha=4.0))
    before = predict_slice(segmenter, volume.image[0])
    with torch.no_grad():
        for parameter in segmenter.trainable()["adapter"]:
            parameter.copy_(
                0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            )
    after = predict_slice(segmenter, volume.image[0])
    assert np.abs(after - before).max() > 0.01
    merge(segmenter.backbone)
    np.testing.assert_allclose(predict_slice(segmenter, volume.image[0]), after, atol=1e-4)


def test_stacked_tokens_are_split_into_their_blocks() -> None:
    segmenter = make({"blocks": (1, 2, 4)})
    blocks = [torch.full((2, 64, 3, 3), float(n)) for n in range(3)]
    split, image = segmenter.tokens(torch.cat(blocks, 1).half())
    assert image is None
    assert all(torch.equal(a, b) for a, b in zip(split, blocks, strict=True))
    assert split[0].dtype == torch.float32


@pytest.mark.parametrize("change", [{}, {"stride": 7}], ids=str)
@pytest.mark.parametrize(
    ("kind", "head"), [("frozen", "unet"), ("lora_last_k", "pyramid"), ("lora_last_k", "unet")]
)
def test_what_is_cached_is_enough_for_every_head_and_cut(
    volume: Volume, tmp_path: Path, kind: Any, head: str, change: dict[str, Any]
) -> None:
    """Adapters away from zero, several tiles a slice: the cache gives what a run from the image gives."""
    segmenter = make(
        change, head, RegimeSettings(kind, rank=2, k=2 if kind == "lora_last_k" else 0)
    )
    with torch.no_grad():
        for p in segmenter.trainable()["adapter"]:
            p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    [view] = token_views(
        segmenter.backbone, segmenter.spec, volume, range(1), tmp_path, segmenter.cut
    )
    assert (view.entering is not None) == (kind == "lora_last_k")
    for merged in (False, True):
        if merged:
            merge(segmenter.backbone)
        online, cached = (
            predict_slice(segmenter, volume.image[1]),
            predict_cached(segmenter, view, 1, (90, 101)),
        )
        assert online.std() > 1e-3
        np.testing.assert_allclose(cached, online, atol=5e-3)


@given(st.sets(st.integers(0, 25), min_size=1), st.floats(0.17, 4), st.integers(0, 99))
def test_smoothing_along_z_against_scipy_on_a_volume_with_holes(
    there: set[int], sigma: float, seed: int
) -> None:
    """Normalised convolution: the filter on values with zeros in holes, over the filter on what is there."""
    from scipy.ndimage import gaussian_filter1d

    values = np.random.default_rng(seed).random((26, 2, 3)).astype(np.float32)
    mask = np.zeros((26, 1, 1))
    mask[sorted(there)] = 1
    reach = int(3 * sigma + 0.5)
    blurred = [
        gaussian_filter1d(v, sigma, axis=0, mode="constant", radius=reach)
        for v in (values * mask, mask)
    ]
    found = dict(smooth_z(((z, values[z]) for z in sorted(there)), sigma))
    assert list(found) == sorted(there)
    for z, probability in found.items():
        np.testing.assert_allclose(probability, blurred[0][z] / blurred[1][z], atol=1e-5)


def test_smoothing_is_in_nm_and_keeps_few_slices_in_memory(volume: Volume) -> None:
    """Sections of 30 nm are left alone by 4 nm and mixed by 30; a hundred slices need a window, not a hundred."""
    thick = dataclasses.replace(volume, manifest=volume.manifest | {"voxel_nm": [30.0, 5.0, 5.0]})
    plain, little, much = (
        dict(predict_slices(make({"smooth_z_nm": nm}), thick, [0, 1, 3])) for nm in (0.0, 4.0, 30.0)
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
