from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from emadapt.data.foreground import foreground_mask
from emadapt.errors import InputError
from emadapt.volumes.grey import to_uint8
from emadapt.volumes.opening import open_source

RNG = np.random.default_rng(0)


def read_slice(path: Path, z: int = 0) -> np.ndarray:
    return open_source(str(path)).read(z, z + 1)[0]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32, bool])
@pytest.mark.parametrize(
    "options",
    [{}, {"compression": "zlib"}, {"compression": "lzw"}, {"bigtiff": True}, {"tile": (16, 16)}],
)
def test_every_slice_of_a_stack_comes_back_as_written(tmp_path: Path, dtype, options) -> None:
    if dtype is bool and options:
        pytest.skip("tifffile writes bool only plain")
    stack = (RNG.random((3, 20, 30)) * 200).astype(dtype)
    path = tmp_path / "stack.tif"
    tifffile.imwrite(path, stack, photometric="minisblack", **options)
    assert open_source(str(path)).shape[0] == 3
    for z in range(3):
        np.testing.assert_array_equal(read_slice(path, z), stack[z])


@pytest.mark.parametrize("kind", ["ome", "imagej"])
def test_ome_and_imagej_stacks(tmp_path: Path, kind: str) -> None:
    stack = RNG.integers(0, 60000, (4, 20, 30)).astype(np.uint16)
    path = tmp_path / ("s.ome.tif" if kind == "ome" else "s.tif")
    tifffile.imwrite(
        path, stack, metadata={"axes": "ZYX"}, ome=kind == "ome", imagej=kind == "imagej"
    )
    assert open_source(str(path)).shape[0] == 4
    np.testing.assert_array_equal(read_slice(path, 2), stack[2])


def test_grey_in_colour_is_accepted_and_colour_is_not(tmp_path: Path) -> None:
    grey = RNG.integers(0, 255, (8, 9)).astype(np.uint8)
    Image.fromarray(np.stack([grey] * 3, -1)).save(tmp_path / "grey.png")
    tifffile.imwrite(tmp_path / "grey.tif", np.stack([grey] * 3, -1), photometric="rgb")
    for name in ("grey.png", "grey.tif"):
        np.testing.assert_array_equal(read_slice(tmp_path / name), grey)
    Image.fromarray(RNG.integers(0, 255, (8, 9, 3)).astype(np.uint8)).save(tmp_path / "rgb.png")
    with pytest.raises(InputError, match="channels differ"):
        read_slice(tmp_path / "rgb.png")


def _write_with_alpha(
    path: Path, stack: np.ndarray, channels: int, planarconfig: str = "contig"
) -> None:
    """PNG of one slice, or TIFF, whose last channel is `alpha`; stack: (Z, Y, X, channels)."""
    if path.suffix == ".png":
        path.write_bytes(imagecodecs.png_encode(stack[0]))
        return
    photometric = "minisblack" if channels == 2 else "rgb"
    data = np.moveaxis(stack, -1, 1) if planarconfig == "separate" else stack
    tifffile.imwrite(
        path, data, photometric=photometric, planarconfig=planarconfig, extrasamples=["unassalpha"]
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [2, 4])  # grey + alpha, RGBA
@pytest.mark.parametrize(
    ("suffix", "planarconfig"), [("png", "contig"), ("tif", "contig"), ("tif", "separate")]
)
def test_alpha_is_dropped_where_it_says_nothing(
    tmp_path: Path, dtype, channels: int, suffix: str, planarconfig: str
) -> None:
    path, top = tmp_path / f"a.{suffix}", np.iinfo(dtype).max
    grey = RNG.integers(0, top, (1 if suffix == "png" else 3, 8, 9)).astype(dtype)
    for alpha in (top, 0):
        stack = np.stack([*[grey] * (channels - 1), np.full_like(grey, alpha)], -1)
        _write_with_alpha(path, stack, channels, planarconfig)
        for z in range(len(grey)):
            found = read_slice(path, z)
            assert found.dtype == dtype
            np.testing.assert_array_equal(found, grey[z])
    stack[:, 3, 4, -1] = 7  # one transparent pixel
    _write_with_alpha(path, stack, channels, planarconfig)
    with pytest.raises(InputError, match=r"transparent pixels \(alpha from 0 to 7\)"):
        read_slice(path)
    if channels == 4:
        stack[..., -1], stack[:, 3, 4, 1] = top, stack[:, 3, 4, 1] ^ 1
        _write_with_alpha(path, stack, channels, planarconfig)
        with pytest.raises(InputError, match="channels differ"):
            read_slice(path)


@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_a_transparent_value_is_an_alpha_channel(tmp_path: Path, mode: str) -> None:
    grey = np.arange(72, dtype=np.uint8).reshape(8, 9)
    image = Image.fromarray(grey)
    if mode == "P":
        image.putpalette([v for v in range(256) for _ in "rgb"])  # makes it one
    elif mode == "RGB":
        image = image.convert("RGB")
    for value, used in ((5, True), (200, False)):
        image.save(tmp_path / "a.png", transparency=(value,) * 3 if mode == "RGB" else value)
        if used:
            with pytest.raises(InputError, match="transparent pixels"):
                read_slice(tmp_path / "a.png")
        else:
            np.testing.assert_array_equal(read_slice(tmp_path / "a.png"), grey)


def test_16_bit_png(tmp_path: Path) -> None:
    image = RNG.integers(0, 65535, (8, 9)).astype(np.uint16)
    Image.fromarray(image).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_slice(tmp_path / "a.png"), image)
    (tmp_path / "rgb.png").write_bytes(imagecodecs.png_encode(np.stack([image] * 3, -1)))
    np.testing.assert_array_equal(read_slice(tmp_path / "rgb.png"), image)


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.9])
@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_truncated_files_are_refused(tmp_path: Path, keep: float, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    image = RNG.integers(0, 255, (64, 64)).astype(np.uint8)
    tifffile.imwrite(path, np.stack([image] * 3)) if suffix == "tif" else Image.fromarray(
        image
    ).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InputError, match=f"a.{suffix}"):
        [read_slice(path, z) for z in range(3 if suffix == "tif" else 1)]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_counted(tmp_path: Path, value: float) -> None:
    image = np.ones((8, 8), np.float32)
    image[2, 3:5] = value
    tifffile.imwrite(tmp_path / "a.tif", image)
    with pytest.raises(InputError, match="2 NaN or infinite"):
        read_slice(tmp_path / "a.tif")


def test_several_channels_and_not_an_image(tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "a.ome.tif", np.zeros((2, 3, 8, 8), np.uint8), metadata={"axes": "CZYX"}
    )
    with pytest.raises(InputError, match="axes CZYX"):
        open_source(str(tmp_path / "a.ome.tif")).shape[0]
    (tmp_path / "b.tif").write_text("not a TIFF")
    with pytest.raises(InputError, match="no readable TIFF"):
        open_source(str(tmp_path / "b.tif")).shape[0]


@given(arrays(np.uint8, (4, 5)), st.integers(0, 254), st.sets(st.integers(0, 255), min_size=1))
def test_foreground_rules_against_python(label: np.ndarray, threshold: int, ids: set[int]) -> None:
    label[0, :3] = 255, 254, 0
    above, chosen = foreground_mask(label, f">{threshold}"), foreground_mask(label, tuple(ids))
    for y, x in np.ndindex(label.shape):
        assert above[y, x] == (int(label[y, x]) > threshold)
        assert chosen[y, x] == (int(label[y, x]) in ids)


@pytest.mark.parametrize("rule", [">127", ">0", ">0.5", (1,)])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_white_of_a_file_of_1_bit_a_pixel_is_foreground(
    tmp_path: Path, rule: str | tuple[int, ...], ending: str
) -> None:
    mask = np.random.default_rng(0).random((9, 13)) > 0.6
    Image.fromarray(mask).save(tmp_path / f"a.{ending}")
    label = read_slice(tmp_path / f"a.{ending}")
    assert Image.open(tmp_path / f"a.{ending}").mode == "1"
    np.testing.assert_array_equal(foreground_mask(label, rule), mask)


def test_a_mask_of_0_and_1_among_those_of_0_and_255_is_refused() -> None:
    mask = np.eye(5, dtype=np.uint8)
    with pytest.raises(
        InputError, match=r"label: found a label of the values 0, 1; .* >127 leaves none"
    ):
        foreground_mask(mask, ">127")
    faint = mask * 7 + mask[::-1] * 9  # edges of a smooth mask
    for fine in (np.zeros((5, 5), np.uint8), mask * 255, faint):
        np.testing.assert_array_equal(foreground_mask(fine, ">127"), fine > 127)


def test_ids_of_fractions_are_refused() -> None:
    with pytest.raises(InputError, match="fractions"):
        foreground_mask(np.full((2, 2), 0.5), (1,))


def test_8_bit_stays_and_16_bit_is_mapped_linearly() -> None:
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert to_uint8(image, 0.0, 255.0) is image or (to_uint8(image, 0.0, 255.0) == image).all()
    wide = np.array([[0, 1000, 2000, 3000, 65535]], np.uint16)
    assert to_uint8(wide, 1000, 3000).tolist() == [[0, 0, 128, 255, 255]]


@pytest.mark.parametrize("dtype", [np.uint8, bool])
def test_values_that_are_shown_inverted_are_refused(tmp_path: Path, dtype: type) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.eye(20).astype(dtype), photometric="miniswhite")
    with pytest.raises(InputError, match=r"a\.tif.*WhiteIsZero.*Invert LUT"):
        read_slice(tmp_path / "a.tif")
