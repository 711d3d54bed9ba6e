import re
import shutil
from pathlib import Path

import pytest
import tifffile
from click.testing import CliRunner, Result

from emadapt.cli import main
from emadapt.data.ingest import Volume
from emadapt.models.token_statistics import token_facts
from emadapt.segment.domain import Domain
from emadapt.training.model_files import load_model
from pages import Reader, asked, chromium
from tiny import blobs, write_model

# Opens the page in a frame of 390 px, as a phone would, and reports what it finds.
PROBE = """<!DOCTYPE html><html><body><iframe id="f" style="width: 390px; height: 800px; border: 0" src="index.html"></iframe>
<pre id="found"></pre><script>
document.getElementById("f").addEventListener("load", ({target}) => {
  const page = target.contentDocument, root = page.documentElement, images = [...page.images];
  document.getElementById("found").textContent = [target.contentWindow.innerWidth, root.scrollWidth - root.clientWidth,
    images.length, images.filter(image => image.naturalWidth === 0).length].join(" ");
});
</script></body></html>
"""
IMAGE, _ = blobs((8, 150, 170), 5)
VOXEL = ["--voxel-nm", "30", "5", "5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows its data, a volume like these and one that is not, and the page of each."""
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
    assert not re.search(r"(src|href)=\"(?!data:)", page)


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


@pytest.mark.browser
def test_a_phone_shows_the_page_without_asking_for_anything(folder: Path, tmp_path: Path) -> None:
    run(folder, "unlike.tif", "phone.html", *VOXEL)
    shutil.copy(folder / "phone.html", tmp_path / "index.html")
    (tmp_path / "wide.html").write_text(PROBE)
    urls, log = asked(tmp_path, tmp_path / "index.html")
    assert {url for url in urls if not url.startswith("data:")} == set()
    assert "CONSOLE" not in log
    html, _ = chromium(
        tmp_path, tmp_path / "wide.html", "--allow-file-access-from-files", "--dump-dom"
    )
    width, wider, images, broken = map(int, Reader(html).text["pre"][0].split())
    assert (width, images, broken) == (390, 9, 0)
    assert wider <= 0
