"""The page that says whether a volume is like the training data, on three places of it."""

from typing import Any

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner

from emadapt.cli import main
from emadapt.data.ingest import Volume
from emadapt.models.token_statistics import token_facts
from emadapt.segment.domain import CLEAR, INVERTED, Domain, domain_of_volume
from emadapt.segment.model import open_model
from emadapt.segment.runner import array_runner
from emadapt.training.model_files import load_model
from pages import Reader
from tiny import blobs, write_model

IMAGE, _ = blobs((8, 150, 170), 5)
VOXEL = (30.0, 5.0, 5.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, its training data as a volume, and with black and white exchanged."""
    root = tmp_path_factory.mktemp("preview")
    write_model(root / "m")
    segmenter, _ = load_model(root / "m")
    split = {"train": [0, 1, 2, 3], "val": [4, 5, 6], "test": []}
    own = Volume("a", IMAGE, IMAGE, {"split": split, "md5": "", "voxel_nm": [30, 5, 5]})
    write_model(root / "m", facts={"tokens": token_facts(segmenter, [own], [])})
    volumes = {"like": IMAGE, "inverted": 255 - IMAGE, "one": IMAGE[0]}
    for name, volume in volumes.items():
        tifffile.imwrite(root / f"{name}.tif", volume, photometric="minisblack")
    return root


@pytest.mark.parametrize(
    ("name", "pixel", "pictures"), [("like", "5", 9), ("inverted", "5", 9), ("one", "10", 3)]
)
def test_a_page_shows_three_places_and_says_inverted_contrast(folder, name, pixel, pictures):
    page = folder / f"{name}.html"
    words = ["preview", str(folder / f"{name}.tif"), str(page), "--model", str(folder / "m")]
    result = CliRunner().invoke(main, [*words, "--voxel-nm", "30", pixel, pixel])
    assert result.exit_code == 0, result.output
    shown = [own["src"] or "" for own in Reader(page.read_text()).all("img")]
    assert len(shown) == pictures
    assert all(src.startswith("data:") for src in shown)  # asks the network for nothing
    assert (INVERTED in result.output) == (INVERTED in page.read_text()) == (name == "inverted")
    before = page.read_bytes()
    again = CliRunner().invoke(main, [*words, "--voxel-nm", "30", pixel, pixel])
    assert (again.exit_code, "--overwrite" in again.output) == (2, True)
    assert page.read_bytes() == before


def test_the_figures_are_those_of_the_volume(folder):
    model = open_model(folder / "m")
    like, inverted, dark = (
        domain_of_volume(array_runner(image, model, VOXEL, window=(0.0, 255.0)))
        for image in (IMAGE, 255 - IMAGE, IMAGE // 2)
    )
    assert like.grey == pytest.approx(np.percentile(IMAGE, (5, 50, 95)), abs=8)
    assert like.grey == pytest.approx(like.trained_grey["a"], abs=8)
    assert dark.grey == pytest.approx(np.percentile(IMAGE // 2, (5, 50, 95)), abs=8)
    assert like.polarity["a"] == pytest.approx(-inverted.polarity["a"])
    assert min(like.polarity["a"], dark.polarity["a"]) > CLEAR
    assert like.found == inverted.found[::-1]
    assert like.distances["a"] < 3 * like.usual["a"][1] < dark.distances["a"]
    assert [own.inverted for own in (like, inverted, dark)] == [False, True, False]


@pytest.mark.parametrize(
    ("polarity", "found", "tiles", "inverted"),
    [
        (-0.8, (0.1, 0.1), 4, True),
        (-0.8, (0.1, 0.1), 1, False),
        (-0.2, (0.03, 0.3), 4, True),
        (-0.2, (0.3, 0.03), 4, False),
        (0.8, (0.03, 0.3), 4, False),
    ],
)
def test_an_unclear_polarity_is_decided_by_what_an_inversion_finds(
    polarity, found, tiles, inverted
):
    own: dict[str, Any] = {"trained_nm": {"a": VOXEL}, "trained_found": {"a": (0.06, 0.04)}}
    own |= {"grey": [], "trained_grey": {}, "polarity": {"a": polarity}}
    own |= {"distances": {"a": 0.1}, "usual": {"a": (0.01, 0.05)}}
    assert Domain(voxel_nm=VOXEL, tiles=tiles, found=found, **own).inverted == inverted
