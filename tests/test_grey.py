"""A grey window that padding, empty slices and hot pixels do not move; where there is no image."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, rotate

from emadapt.segment.model import open_model
from emadapt.segment.runner import array_runner
from emadapt.volumes.grey import FLAT, constant, grey_window, to_uint8
from tiny import write_model

VOXEL = (30.0, 5.0, 5.0)


def tissue(shape: tuple[int, int, int] = (6, 120, 120), bits: int = 16) -> np.ndarray:
    """Smooth structures and noise, in the middle of the values of a type."""
    rng = np.random.default_rng(0)
    rough = gaussian_filter(rng.normal(size=shape), (0, 3, 3)) * 20 + rng.normal(size=shape)
    return np.asarray((rough * 0.05 + 0.5).clip(0.1, 0.9) * 2**bits).astype(f"uint{bits}")


def padded(volume: np.ndarray, value: int) -> np.ndarray:
    return np.pad(volume, ((0, 0), (30, 50), (40, 3)), constant_values=value)


def turned(volume: np.ndarray) -> np.ndarray:
    return np.asarray(rotate(volume, 30, axes=(1, 2), order=0))


def replaced(volume: np.ndarray, value: int, *slices: int) -> np.ndarray:
    out = volume.copy()
    out[list(slices)] = value
    return out


def speckled(volume: np.ndarray, value: int, share: float) -> np.ndarray:
    hot = np.random.default_rng(1).random(volume.shape) < share
    return np.where(hot, volume.dtype.type(value), volume)


@pytest.mark.parametrize("stored", ["<u4", ">i4", "<i8", "<f8"])
def test_large_values_of_little_contrast_keep_it(stored: str) -> None:
    values = np.arange(256.0).reshape(16, 16)
    found = to_uint8((values + 2e9).astype(stored), 2e9, 2e9 + 255)
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize(
    "spoiled",
    [
        lambda v: padded(v, 0),
        lambda v: padded(v, 65535),
        lambda v: padded(padded(v, 0), 700),
        turned,
        lambda v: replaced(v, 65535, 2),
        lambda v: replaced(v, 0, 0, 1, 5),
        lambda v: speckled(v, 65535, 0.02),
        lambda v: speckled(speckled(v, 65535, 0.01), 0, 0.01),
        lambda v: np.repeat(v, 8, 0)[:, :, :64],
    ],
)
def test_the_window_is_that_of_the_tissue(spoiled: Callable[[np.ndarray], np.ndarray]) -> None:
    volume = tissue()
    expected, found = (grey_window(v, "v") for v in (volume, spoiled(volume)))
    width = expected.high - expected.low
    assert found[:2] == pytest.approx(expected[:2], abs=0.03 * width)


def test_every_row_and_column_counts_and_what_was_left_out_is_said() -> None:
    bright = np.linspace(0, 30_000, 512).astype(np.uint16)
    noise = np.random.default_rng(0).integers(0, 100, (2, 512, 512), np.uint16)
    for ramp in (bright[:, None], bright[None, :]):
        volume = noise + ramp
        expected = np.percentile(volume, (0.5, 99.5))
        assert grey_window(volume, "v")[:2] == pytest.approx(expected, rel=0.1, abs=60)
    canvas = np.pad(noise + bright[:, None], ((0, 0), (0, 512), (0, 0)))
    assert grey_window(canvas, "v").left_out == pytest.approx(0.5, abs=0.01)
    assert "50.0% of the voxels are constant" in grey_window(canvas, "v").words()


def test_8_bits_stay_unless_they_are_faint() -> None:
    plain = tissue(bits=8)
    for volume in (plain, padded(plain, 0), replaced(plain, 255, 1), np.zeros_like(plain)):
        assert grey_window(volume, "v")[:2] == (0, 255)
    faint = plain // 4 + np.uint8(90)
    expected = np.percentile(faint, (0.5, 99.5))
    assert grey_window(padded(faint, 0), "v")[:2] == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.float32, np.float64])
def test_constant_areas_are_found_to_the_pixel_and_noise_is_none(dtype: type) -> None:
    image = (tissue(bits=8)[0] // 2).astype(dtype)
    assert not constant(image).any()
    image[:2], image[:, 100:], image[50 : 50 + FLAT, 20 : 20 + FLAT] = 0, 255 // 2, 7
    image[80 : 79 + FLAT, 20:29] = 3  # a row less than a square
    expected = np.zeros(image.shape, bool)
    expected[:2] = expected[:, 100:] = expected[50 : 50 + FLAT, 20 : 20 + FLAT] = True
    np.testing.assert_array_equal(constant(image), expected)
    y, x = np.mgrid[:120, :120]
    oblique = 2 * y + x < 100
    image = np.where(oblique, dtype(0), (tissue(bits=8)[0] // 2).astype(dtype))
    np.testing.assert_array_equal(constant(image), oblique)


@pytest.mark.parametrize("smooth", [0.0, 30.0])
def test_nothing_is_foreground_where_there_is_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smooth: float
) -> None:
    model = open_model(write_model(tmp_path / "m", smooth_z_nm=smooth))
    volume = replaced(padded(tissue((6, 60, 60)), 0), 65535, 3)
    empty = np.stack([constant(image) for image in volume])
    runner = array_runner(volume, model, VOXEL)
    whole = np.stack([probability for _, probability in runner.slices()])
    np.testing.assert_array_equal(whole == 0, empty)
    rows = dataclasses.replace(runner.job, rows=32, depth=2)
    runner.job = rows
    parts = np.stack([probability for _, probability in runner.slices()])
    np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_an_empty_slice_takes_no_part_in_smoothing_its_neighbours(tmp_path: Path) -> None:
    model = open_model(write_model(tmp_path / "m", smooth_z_nm=30.0))
    volume = np.repeat(tissue((1, 60, 60)), 5, 0)
    window = (float(volume.min()), float(volume.max()))

    def first(v: np.ndarray) -> np.ndarray:
        runner = array_runner(v, model, VOXEL, window=window)
        return next(iter(runner.slices()))[1]

    np.testing.assert_allclose(first(replaced(volume, 0, 1)), first(volume), atol=1e-5)
