import re
from pathlib import Path

import pytest
import tifffile
from click.testing import CliRunner, Result

from emadapt.cli import main
from emadapt.data.ingest import Volume
from emadapt.models.token_statistics import token_facts
from emadapt.segment.domain import Domain
from emadapt.training.model_files import load_model
from pages import Reader
from tiny import blobs, write_model

IMAGE, _ = blobs((8, 150, 170), 5)
VOXEL = ["--voxel-nm", "30", "5", "5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a volume like its training data and one unlike them."""
    root = tmp_path_factory.mktemp("preview")
    write_model(root / "m")
    segmenter, _ = load_model(root / "m")
    own = Volume(
        "a",
        IMAGE,
        IMAGE,
        {
            "split": {"train": [0, 1, 2, 3], "val": [4, 5, 6], "test": []},
            "md5": "",
            "voxel_nm": [30, 5, 5],
        },
    )
    write_model(root / "m", facts={"tokens": token_facts(segmenter, [own], [])})
    tifffile.imwrite(root / "like.tif", IMAGE, photometric="minisblack")
    tifffile.imwrite(root / "unlike.tif", 255 - IMAGE // 3, photometric="minisblack")
    return root


def invoke(folder: Path, volume: str, page: str, *words: str, model: str = "m") -> Result:
    return CliRunner().invoke(
        main,
        [
            "preview",
            str(folder / volume),
            str(folder / page),
            "--model",
            str(folder / model),
            *words,
        ],
    )


def run(folder: Path, volume: str, page: str, *words: str, model: str = "m") -> str:
    result = invoke(folder, volume, page, *words, model=model)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_volume_like_the_training_data(folder: Path) -> None:
    said = run(folder, "like.tif", "like.html", *VOXEL)
    assert "is like the data" in said
    page = (folder / "like.html").read_text()
    read = Reader(page)
    assert len(read.all("img")) == 9
    assert "fine-tune" not in page
    assert (
        f"emadapt segment {folder / 'like.tif'} mask.tif --model {folder / 'm'} --voxel-nm 30 5 5"
        in page
    )
    places = re.findall(r"Slice (\d+), from row (\d+) and column (\d+)", page)
    assert places == [("1", "6", "10"), ("4", "19", "29"), ("6", "32", "48")]
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # asks the network for nothing


def test_a_volume_unlike_them_is_warned_of(folder: Path) -> None:
    said = run(folder, "unlike.tif", "unlike.html", *VOXEL)
    assert "expect poor results" in said
    assert "label 10 slices and fine-tune" in said
    page = (folder / "unlike.html").read_text()
    assert 'class="verdict unlike"' in page
    assert "label 10 slices" in page


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


def test_verdicts() -> None:
    for away, verdict in ((0.01, "like"), (0.15, "like"), (0.16, "unlike")):
        assert Domain({"a": away, "b": 5.0}, {"a": 0.05, "b": 0.1}).verdict == verdict
    assert Domain({"narrow": 0.1, "wide": 0.3}, {"narrow": 0.01, "wide": 0.3}).nearest == "wide"
