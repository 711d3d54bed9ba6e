import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner, Result

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
VOXEL = ["--voxel-nm", "30", "5", "5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its training data as a volume, and with black and white exchanged."""
    root = tmp_path_factory.mktemp("preview")
    write_model(root / "m")
    segmenter, _ = load_model(root / "m")
    split = {"train": [0, 1, 2, 3], "val": [4, 5, 6], "test": []}
    own = Volume("a", IMAGE, IMAGE, {"split": split, "md5": "", "voxel_nm": [30, 5, 5]})
    write_model(root / "m", facts={"tokens": token_facts(segmenter, [own], [])})
    tifffile.imwrite(root / "like.tif", IMAGE, photometric="minisblack")
    tifffile.imwrite(root / "inverted.tif", 255 - IMAGE, photometric="minisblack")
    return root


def invoke(folder: Path, volume: str, page: str, *words: str) -> Result:
    command = ["preview", str(folder / volume), str(folder / page), "--model", str(folder / "m")]
    return CliRunner().invoke(main, [*command, *words])


def run(folder: Path, volume: str, page: str, *words: str) -> str:
    result = invoke(folder, volume, page, *words)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_page_has_three_places_and_the_figures(folder: Path) -> None:
    said = run(folder, "like.tif", "like.html", *VOXEL)
    page = (folder / "like.html").read_text()
    read = Reader(page)
    assert len(read.all("img")) == 9
    for figure in ("voxel size", "grey values", "polarity", "token distance"):
        assert f"preview: {figure}:" in said
        assert f">{figure}</th>" in page
    assert "inverted" not in said
    assert (
        f"emadapt segment {folder / 'like.tif'} mask.tif --model {folder / 'm'} --voxel-nm 30 5 5"
        in page
    )
    places = re.findall(r"Slice (\d+), from row (\d+) and column (\d+)", page)
    assert places == [("1", "6", "10"), ("4", "19", "29"), ("6", "32", "48")]
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # asks the network for nothing


def test_inverted_contrast_is_said(folder: Path) -> None:
    said = run(folder, "inverted.tif", "inverted.html", *VOXEL)
    assert f"preview: {INVERTED}" in said
    assert INVERTED in (folder / "inverted.html").read_text()


def test_the_figures_are_those_of_the_volume(folder: Path) -> None:
    model = open_model(folder / "m")
    like, inverted, dark = (
        domain_of_volume(array_runner(image, model, (30.0, 5.0, 5.0), window=(0.0, 255.0)))
        for image in (IMAGE, 255 - IMAGE, IMAGE // 2)
    )
    assert like.grey == pytest.approx(np.percentile(IMAGE, (5, 50, 95)), abs=8)
    assert like.grey == pytest.approx(like.trained_grey["a"], abs=8)
    assert dark.grey == pytest.approx(np.percentile(IMAGE // 2, (5, 50, 95)), abs=8)
    assert like.polarity["a"] == pytest.approx(-inverted.polarity["a"])
    assert min(like.polarity["a"], dark.polarity["a"]) > CLEAR
    assert like.found == inverted.found[::-1]
    assert like.distances["a"] < 3 * like.usual["a"][1] < dark.distances["a"]
    assert not like.inverted
    assert inverted.inverted
    assert not dark.inverted


def test_other_pixel_sizes_and_few_slices(folder: Path) -> None:
    tifffile.imwrite(folder / "one.tif", IMAGE[0], photometric="minisblack")
    run(folder, "one.tif", "one.html", "--voxel-nm", "30", "10", "10")
    page = (folder / "one.html").read_text()
    assert "in plane by 2 x 2, as a" in page
    assert len(Reader(page).all("img")) == 3


def test_pages_that_cannot_be_written(folder: Path) -> None:
    for page, words, expected in (
        ("p.txt", VOXEL, "FILE with .html"),
        ("like2.html", [], "no voxel size"),
    ):
        result = invoke(folder, "like.tif", page, *words)
        assert result.exit_code == 2
        assert expected in result.output
    (folder / "there.html").write_text("precious")
    result = invoke(folder, "like.tif", "there.html", *VOXEL)
    assert "--overwrite" in result.output
    assert (folder / "there.html").read_text() == "precious"


def test_an_unclear_polarity_is_decided_by_what_is_found_after_an_inversion() -> None:
    def domain(polarity: float, *found: float, tiles: int = 4) -> Domain:
        return Domain(
            voxel_nm=(30.0, 5.0, 5.0),
            trained_nm={"a": (30.0, 5.0, 5.0)},
            tiles=tiles,
            grey=[],
            trained_grey={},
            polarity={"a": polarity},
            found=(found[0], found[1]),
            trained_found={"a": (0.06, 0.04)},
            distances={"a": 0.1},
            usual={"a": (0.01, 0.05)},
        )

    assert domain(-0.8, 0.1, 0.1).inverted
    assert not domain(-0.8, 0.1, 0.1, tiles=1).inverted
    assert domain(-0.2, 0.03, 0.3).inverted
    assert not domain(-0.2, 0.3, 0.03).inverted
    assert not domain(0.8, 0.03, 0.3).inverted
