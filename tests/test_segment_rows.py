import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from emadapt.data.align import Aligner
from emadapt.data.tiles import Geometry, geometry
from emadapt.models import predict
from emadapt.models.predict import predict_slice
from emadapt.models.segmenter import Segmenter, build_segmenter
from emadapt.segment import rows as rows_module
from emadapt.segment.rows import grey_rows, predict_rows, real_rows, taps
from emadapt.study.study import BackboneSettings, RegimeSettings

SPEC = BackboneSettings("tiny_dinov2", "random", tile=56, overlap=0.4, views=0, precision="fp32")
IMAGE = np.random.default_rng(0).integers(0, 256, (150, 90), dtype=np.uint8)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches end within a row of tiles, and rows are read in many parts."""
    for module in (predict, rows_module):
        monkeypatch.setattr(module, "BATCH_TILES", 3)
    monkeypatch.setattr(rows_module, "FETCH", 60 * 90)


def make(**change: Any) -> tuple[Segmenter, Geometry, Aligner]:
    zoom = change.pop("zoom", (1.0, 1.0))
    spec = dataclasses.replace(SPEC, **change)
    segmenter = build_segmenter(spec, RegimeSettings("frozen"), "pyramid", seed=0).eval()
    aligner = Aligner(zoom=zoom)
    return segmenter, geometry((150, 90), spec, 14, aligner), aligner


@given(st.integers(1, 60), st.integers(1, 60), st.data())
def test_rows_are_resized_as_pillow_resizes_a_slice(
    n_in: int, n_out: int, data: st.DataObject
) -> None:
    resized: Any
    rng = np.random.default_rng(n_in * 61 + n_out)
    y0 = data.draw(st.integers(0, n_out - 1))
    y1 = data.draw(st.integers(y0 + 1, n_out))
    ways: list[tuple[Any, Any, Any]] = [
        (np.uint8, Image.Resampling.BICUBIC, grey_rows),
        (np.float32, Image.Resampling.BILINEAR, real_rows),
    ]
    for dtype, how, resized in ways:
        image = (
            rng.integers(0, 256, (n_in, 5)).astype(dtype)
            if dtype == np.uint8
            else rng.random((n_in, 5), np.float32)
        )
        whole = np.asarray(Image.fromarray(image).resize((5, n_out), how))
        t = taps(n_in, n_out, how)
        first, stop = int(t.first[y0]), int(t.stop[y1 - 1])
        np.testing.assert_array_equal(resized(image[first:stop], first, t, y0, y1), whole[y0:y1])


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"scale": 1.7},
        {"scale": 0.6},
        {"zoom": (1.3, 0.8)},
        {"zoom": (1.0, 0.5)},
        {"tile": 0},
        {"longest_edge": 98, "tile": 0},
        {"tile": 140},
        {"overlap": 0.0},
    ],
    ids=str,
)
def test_a_slice_in_any_parts_is_the_slice_as_a_whole(change: dict[str, Any]) -> None:
    segmenter, geo, aligner = make(**change)
    whole = predict_slice(segmenter, IMAGE, aligner=aligner)
    assert whole.std() > 1e-3

    def joined(*cuts: int) -> np.ndarray:
        return np.concatenate(
            [
                p
                for y0, y1 in itertools.pairwise(cuts)
                for p in predict_rows(segmenter, lambda a, b: IMAGE[a:b], geo, y0, y1)
            ]
        )

    one = joined(0, 150)
    # Where both axes are resized, Pillow begins with y if that is less work; here x always comes first.
    np.testing.assert_allclose(one, whole, rtol=0, atol=0 if geo.resized == geo.native else 5e-3)
    np.testing.assert_array_equal(joined(0, 1, 63, 64, 140, 150), one)


def test_no_more_rows_are_read_than_tiles_need() -> None:
    segmenter, geo, _ = make()
    seen: list[tuple[int, int]] = []

    def read(a: int, b: int) -> np.ndarray:
        seen.append((a, b))
        return IMAGE[a:b]

    list(predict_rows(segmenter, read, geo, 0, 10))
    assert (
        max(b for _, b in seen) <= 112
    )  # the first row of tiles, and the second, which a batch begins
    seen.clear()
    list(predict_rows(segmenter, read, geo, 0, 150))
    assert max(b - a for a, b in seen) < 150


def test_flips_are_a_mean_over_mirrored_slices() -> None:
    """The grid of tiles is its own mirror image, so the mirrored slice gives the mirrored tiles."""
    segmenter, geo, _ = make()
    flipped = np.concatenate(
        list(predict_rows(segmenter, lambda a, b: IMAGE[a:b], geo, 0, 150, flips=True))
    )
    views = [
        np.flip(predict_slice(segmenter, np.ascontiguousarray(np.flip(IMAGE, axes))), axes)
        for axes in ((), (0,), (1,), (0, 1))
    ]
    np.testing.assert_allclose(flipped, np.mean(views, 0), atol=1e-5)
    assert np.abs(flipped - views[0]).max() > 1e-3


def test_where_the_grid_begins_matters_little() -> None:
    """A model that sees less well towards the borders of a tile: where the grid begins changes little, and there are no seams."""
    segmenter, _, _ = make(overlap=0.5)
    image = np.random.default_rng(1).integers(0, 256, (180, 180), dtype=np.uint8)

    def foreground(_: Any, batch: torch.Tensor, size: tuple[int, int], flips: bool) -> np.ndarray:
        """A model that sees less well towards the borders of a tile: the middle says 0.6, the border 0.5."""
        ramp = np.minimum(np.arange(size[0]), np.arange(size[0])[::-1]) / (size[0] / 2)
        return np.broadcast_to(
            0.5 + 0.1 * np.minimum.outer(ramp, ramp), (len(batch), *size)
        ).astype(np.float32)

    def run(part: np.ndarray) -> np.ndarray:
        geo = geometry(part.shape, segmenter.spec, 14)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rows_module, "over_flips", foreground)
            return np.concatenate(
                list(predict_rows(segmenter, lambda a, b: part[a:b], geo, 0, len(part)))
            )

    whole = run(image)
    for offset in (1, 7, 14, 23):
        shifted = run(image[offset:, offset:])
        assert (
            np.abs(
                whole[offset + 56 : 124, offset + 56 : 124]
                - shifted[56 : 124 - offset, 56 : 124 - offset]
            ).max()
            < 0.06
        )
    steps = np.abs(np.diff(whole, axis=0)).max()
    assert steps < 0.012  # tiles put side by side would step by 0.1
