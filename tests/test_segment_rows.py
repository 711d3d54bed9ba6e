"""Parts of a volume through a model against the whole volume at once, in 2D and in 3D."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from emadapt.data.tiles import geometry
from emadapt.segment.rows import View, _resized, _rows_below
from emadapt.training.model_files import load_model
from tiny import blobs, predicted, write_3d_model, write_model

IMAGE, _ = blobs((9, 150, 90), 2)
KINDS: dict[str, Any] = {
    "tiles": {},
    "one tile": {"tile": 0},
    "no overlap": {"overlap": 0.0},
    "neighbours": {"context": 1},
    "larger": {"scale": 1.7},
    "smaller": {"scale": 0.6},
    "windows": {"overlap": 0.5},
    "windows larger": {"overlap": 0.2, "scale": 1.3},
}


def make(folder: Path, kind: str) -> View:
    write = write_3d_model if "windows" in kind else write_model
    segmenter, _ = load_model(write(folder, **KINDS[kind]))
    geo = geometry((150, 90), segmenter.spec, segmenter.patch)
    return View(segmenter, geo, len(IMAGE))


def run(
    view: View, z: tuple[int, int], y: tuple[int, int], image: np.ndarray = IMAGE
) -> np.ndarray:
    """A part; nothing but the slices and rows that it is said to need may be read."""
    first, end = view.slices(*z)
    top, bottom = view.native_rows(*y)

    def read(k: int, y0: int, y1: int) -> np.ndarray:
        assert first <= k < end
        assert top <= y0 < y1 <= bottom
        return image[k, y0:y1]

    found = dict(view.predict(read, z, y))
    assert list(found) == list(range(*z))
    return np.stack(list(found.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_a_volume_is_a_part_of_the_whole(kind, tmp_path):
    view = make(tmp_path, kind)
    expected = predicted(tmp_path, IMAGE)
    assert expected.std() > 0.01
    whole = run(view, (0, 9), (0, 150))
    # Where both axes are resized, Pillow may begin with y; here x always comes first.
    exact = view.geo.resized == view.geo.native
    np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-6 if exact else 2e-2)
    # A resampled grey value may be rounded another way.
    for z, y in itertools.product([(0, 1), (4, 7), (8, 9)], [(0, 1), (40, 97), (97, 150)]):
        part, wanted = run(view, z, y), whole[slice(*z), slice(*y)]
        np.testing.assert_allclose(part, wanted, rtol=0, atol=1e-5 if exact else 1e-2)


@given(st.integers(1, 60), st.integers(1, 60), st.data())
def test_rows_are_resized_as_pillow_resizes_a_whole_slice(n_in, n_out, data):
    rng = np.random.default_rng(n_in * 61 + n_out)
    y0 = data.draw(st.integers(0, n_out - 1))
    y1 = data.draw(st.integers(y0 + 1, n_out))
    grey = rng.integers(0, 256, (n_in, 5), dtype=np.uint8)
    real = rng.random((n_in, 5), np.float32)
    for image, how, taps, away in (
        (grey, Image.Resampling.BICUBIC, 2, 1),
        (real, Image.Resampling.BILINEAR, 1, 1e-5),
    ):
        whole = np.asarray(Image.fromarray(image).resize((5, n_out), how), float)
        first, end = _rows_below(n_in, n_out, y0, y1, taps)
        place = y0 * n_in / n_out - first, y1 * n_in / n_out - first
        found = _resized(image[first:end], (y1 - y0, 5), place, how)
        np.testing.assert_allclose(found, whole[y0:y1], rtol=0, atol=away)
