import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emadapt.data.tiles import Geometry, geometry, label_to_input, merge_tiles, to_input, to_native
from emadapt.study.backbones import BackboneSettings

SIDES = st.tuples(st.integers(2, 200), st.integers(2, 200))
SPECS = st.builds(
    BackboneSettings,
    arch=st.just("tiny_dinov2"),
    source=st.just("random"),
    tile=st.integers(0, 120),
    views=st.just(0),
    overlap=st.floats(0, 0.89),
    scale=st.sampled_from([0.5, 1.0, 1.3, 2.0]),
    longest_edge=st.sampled_from([0, 0, 196]),
)
PATCHES = st.sampled_from([14, 16])

example = settings(deadline=None, max_examples=60)


def plain(**settings: Any) -> BackboneSettings:
    return BackboneSettings(**{"arch": "tiny_dinov2", "source": "random", **settings})


def blended(array: np.ndarray, geo: Geometry) -> np.ndarray:
    """A padded slice, cut into tiles and merged again."""
    corners, (h, w) = geo.corners(), geo.tile
    tiles = np.stack([array[y : y + h, x : x + w] for y, x in corners])
    return to_native(merge_tiles(tiles, corners, geo), geo)


def smooth(shape: tuple[int, int]) -> np.ndarray:
    """Probabilities between 0 and 1 without sharp edges."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    return (0.5 + 0.25 * np.sin(y / 17 + 0.3) + 0.25 * np.cos(x / 23)).astype(np.float32)


@example
@given(SIDES, SPECS, PATCHES)
def test_tiles_cover_every_pixel_overlap_as_asked_and_hold_whole_patches(
    shape: tuple[int, int], spec: BackboneSettings, patch: int
) -> None:
    geo = geometry(shape, spec, patch)
    assert all(side > 0 and side % patch == 0 for side in geo.tile)
    assert all(p >= max(r, t) for p, r, t in zip(geo.padded, geo.resized, geo.tile, strict=True))
    corners = geo.corners()
    assert len(set(corners)) == len(corners)
    covered = np.zeros(geo.padded, bool)
    for y, x in corners:
        assert 0 <= y <= geo.padded[0] - geo.tile[0]
        assert 0 <= x <= geo.padded[1] - geo.tile[1]
        covered[y : y + geo.tile[0], x : x + geo.tile[1]] = True
    assert covered.all()
    for axis, side in enumerate(geo.tile):
        places = sorted({c[axis] for c in corners})
        assert len(corners) % len(places) == 0  # a grid
        shared = [side - (b - a) for a, b in itertools.pairwise(places)]
        assert all(s >= min(spec.overlap * side, side - 1) - 1e-6 for s in shared)


@example
@given(SIDES, st.integers(14, 90), st.floats(0, 0.89), st.integers(0, 2**32 - 1))
def test_tiles_of_one_map_blend_into_that_map(
    shape: tuple[int, int], tile: int, overlap: float, seed: int
) -> None:
    geo = geometry(shape, plain(tile=tile, overlap=overlap), 14)
    known = np.random.default_rng(seed).random(geo.padded, dtype=np.float32)
    found = blended(known, geo)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, known[: shape[0], : shape[1]], atol=1e-5)


@example
@given(SIDES, SPECS, PATCHES, st.floats(0, 1))
def test_a_constant_stays_constant_at_the_slices_own_shape(
    shape: tuple[int, int], spec: BackboneSettings, patch: int, value: float
) -> None:
    geo = geometry(shape, spec, patch)
    found = blended(np.full(geo.padded, value, np.float32), geo)
    assert found.shape == shape
    np.testing.assert_allclose(found, value, atol=1e-5)
    assert found.min() >= 0
    assert found.max() <= 1 + 1e-6


@pytest.mark.parametrize(
    "change", [{"scale": 2.0}, {"scale": 0.5}, {"longest_edge": 196}, {"longest_edge": 70}]
)
def test_what_was_scaled_comes_back_to_its_place(change: dict[str, Any]) -> None:
    spec = plain(tile=70, **change)
    shape = (120, 150)
    geo = geometry(shape, spec, 14)
    assert geo.resized != shape
    marked = np.round(smooth(shape) * 255).astype(np.uint8)
    seen = to_input(marked, geo).astype(np.float32) / 255
    assert seen.shape == geo.padded
    back = blended(seen, geo)
    assert back.shape == shape
    np.testing.assert_allclose(back, smooth(shape), atol=0.03)


@example
@given(st.integers(100, 5000), st.integers(100, 5000), PATCHES)
def test_longest_edge_floors_to_the_patch_without_rounding_errors(
    a: int, b: int, patch: int
) -> None:
    geo = geometry((a, b), plain(longest_edge=1022), patch)
    exact = [side * 1022 // max(a, b) // patch * patch for side in (a, b)]
    assert list(geo.resized) == exact
    assert max(geo.resized) == 1022 // patch * patch


@given(st.integers(5, 55), st.integers(5, 80))
@example
def test_a_slice_smaller_than_a_tile_is_padded_by_reflection_and_cropped_back(
    height: int, width: int
) -> None:
    geo = geometry((height, width), plain(tile=60), 14)
    image = np.random.default_rng(height).integers(0, 256, (height, width), np.uint8)
    padded = to_input(image, geo)
    assert padded.shape == geo.padded
    assert padded.shape[0] == 56
    np.testing.assert_array_equal(padded[:height, :width], image)
    # period of the mirror
    rows, columns = [np.r_[np.arange(n), np.arange(n)[::-1]] for n in (height, width)]
    expected = image[rows[np.arange(padded.shape[0]) % (2 * height)]][
        :, columns[np.arange(padded.shape[1]) % (2 * width)]
    ]
    np.testing.assert_array_equal(padded, expected)
    np.testing.assert_allclose(blended(padded / np.float32(255), geo), image / 255, atol=1e-5)


@example
@given(SIDES, SPECS, PATCHES)
def test_a_resized_label_holds_0_and_1_and_lies_on_its_image(
    shape: tuple[int, int], spec: BackboneSettings, patch: int
) -> None:
    geo = geometry(shape, spec, patch)
    label = (smooth(shape) > 0.5).astype(np.uint8)
    seen = label_to_input(label, geo)
    assert seen.shape == geo.padded
    assert seen.dtype == np.uint8
    assert set(np.unique(seen)) <= {0, 1}
    if min(shape) >= 40 and min(geo.resized) >= 40:
        image = to_input(label * 255, geo) > 127
        assert (image == seen).mean() > 0.9  # only edges may differ
