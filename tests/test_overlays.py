"""Overlays show both kinds of error, at any size of slice, and are the same again."""

import numpy as np
import pytest
from PIL import Image

from emadapt.training import overlays
from emadapt.training.overlays import overlay_png


def pixels(path, colour):
    """How many pixels of a picture are close to a colour."""
    with Image.open(path) as picture:
        rgb = np.asarray(picture.convert("RGB")).astype(int)
    target = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return int((np.abs(rgb - target).max(axis=-1) < 40).sum())


def test_overlay_shows_both_errors_also_when_rare(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (420, 420), dtype=np.uint8)
    label, prediction = np.zeros((2, 420, 420), bool)
    label[100:200, 100:200] = prediction[100:200, 104:204] = True
    file = tmp_path / "new folder" / "overlay.png"
    overlay_png(file, image, label, prediction, "a title")
    legend = tmp_path / "legend.png"
    overlay_png(legend, image, label, label, "a title")  # no errors: what the legend alone has
    for colour in (overlays.FALSE_POSITIVE, overlays.FALSE_NEGATIVE):
        assert pixels(file, colour) - pixels(legend, colour) == pytest.approx(400, abs=60)
    with Image.open(file) as picture:
        assert picture.convert("RGB").getpixel((1, 1)) == (255, 255, 255)
    assert [path.name for path in file.parent.iterdir()] == ["overlay.png"]


@pytest.mark.parametrize("shape", [(1500, 2500), (7, 5), (64, 900)])
def test_overlay_of_any_size(tmp_path, shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    overlay_png(tmp_path / "a.png", image, np.zeros(shape), np.ones(shape), "nothing to find")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width == 4 * max(1, round(shape[1] * overlays.PANEL / max(shape))) + 5 * 8
