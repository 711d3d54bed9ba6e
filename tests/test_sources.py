"""Public datasets are fetched whole, from the right bytes, or not at all."""

import dataclasses
import functools
import hashlib
import io
import json
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urljoin

import numpy as np
import pytest
import tifffile
import yaml
from PIL import Image

from emadapt.data.fetch import fetch
from emadapt.data.ingest import ingest, open_volume
from emadapt.data.sources import DATASETS, Archive
from emadapt.errors import InputError
from emadapt.study.loading import load_study
from tiny import blobs, settings

LUCCHI = DATASETS["lucchi"]
assert LUCCHI.archive is not None
ARCHIVE: Archive = LUCCHI.archive
BY_HAND = [name for name, dataset in DATASETS.items() if dataset.archive is None]
Files = dict[str, bytes]
Go = Callable[..., Path]


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 5), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def files() -> Files:
    """A tiny dataset in the layout of Lucchi++, by path below its folder."""
    found = {}
    for half in ("Train", "Test"):
        for i in range(3):
            found[f"{half}_In/mask{i:04d}.png"] = png(i)
            found[f"{half}_Out/{i}.png"] = png(255 - i)
    return found


def write(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def read(folder: Path) -> Files:
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name != "SOURCE.json"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def zipped(files: Files, root: str = "Lucchi++/") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(root + name, content)
    return buffer.getvalue()


def known_as(monkeypatch: pytest.MonkeyPatch, archive: bytes, *urls: str) -> None:
    """`lucchi` is this archive at these addresses meanwhile."""
    sha256 = hashlib.sha256(archive).hexdigest()
    changed = dataclasses.replace(ARCHIVE, urls=urls, sha256=sha256)
    monkeypatch.setitem(DATASETS, "lucchi", dataclasses.replace(LUCCHI, archive=changed))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def archive(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The archive of the dataset, in a folder that a server gives out."""
    extra = ("notes.txt", "Train_In/readme.txt", "other/mask0000.png", "Train_In/../../../evil.png")
    path = tmp_path / "www/a.zip"
    path.parent.mkdir()
    path.write_bytes(zipped(files | dict.fromkeys(extra, b"not part of the layout")))
    handler = functools.partial(SimpleHTTPRequestHandler, directory=path.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{http.server_address[1]}/a.zip"
        known_as(monkeypatch, path.read_bytes(), url)
        yield path
        http.shutdown()


@pytest.fixture
def go(tmp_path: Path) -> Go:
    """Calls `fetch` with folders of this test."""
    return lambda name="lucchi", **how: fetch(
        name, root=tmp_path / "data", downloads=tmp_path / "down", **how
    )


def leftovers(tmp_path: Path) -> list[Path]:
    files = [path for path in (tmp_path / "down").rglob("*") if path.is_file()]
    return [*tmp_path.glob("data/.*"), *files, *tmp_path.rglob("evil.png")]


def test_download_gives_the_files_of_the_layout(
    go: Go, archive: Path, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = go()
    assert target == tmp_path / "data" / "lucchi"
    assert read(target) == files
    said = capsys.readouterr().out
    assert LUCCHI.licence in said
    assert LUCCHI.citation in said
    record = json.loads((target / "SOURCE.json").read_text())
    assert record["archive_sha256"] == hashlib.sha256(archive.read_bytes()).hexdigest()
    assert record["licence"] == LUCCHI.licence
    assert not leftovers(tmp_path)


def test_second_fetch_does_nothing_and_force_replaces(
    go: Go, archive: Path, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    target = go()
    (target / "Train_In/mask0000.png").write_bytes(png(77))
    archive.rename(archive.with_name("gone"))
    go()
    assert "already there" in capsys.readouterr().out
    archive.with_name("gone").rename(archive)
    go(force=True)
    assert read(target) == files
    (target / "Test_Out/1.png").unlink()
    with pytest.raises(InputError, match=r"incomplete.*--force"):
        go()


@pytest.mark.parametrize("first", ["none.zip", "wrong.zip", "http://127.0.0.1:9/dead.zip"])
def test_mirror_is_used_when_the_first_address_fails(
    go: Go, archive: Path, files: Files, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    archive.with_name("wrong.zip").write_bytes(b"<html>moved</html>")
    [mirror] = DATASETS["lucchi"].archive.urls  # type: ignore[union-attr]
    known_as(monkeypatch, archive.read_bytes(), urljoin(mirror, first), mirror)
    assert read(go()) == files


def test_wrong_bytes_are_refused(go: Go, archive: Path, tmp_path: Path) -> None:
    right = archive.read_bytes()
    archive.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    with pytest.raises(InputError, match=r"SHA256.*--from"):
        go()
    assert not (tmp_path / "data/lucchi").exists()
    assert not leftovers(tmp_path)
    archive.write_bytes(right)
    go()


def test_what_a_stopped_run_unpacked_is_not_taken(
    go: Go, archive: Path, files: Files, tmp_path: Path
) -> None:
    left = write(tmp_path / "down/lucchi", {f"Lucchi++/{name}": b"half" for name in files})
    shutil.copy(archive, left / "archive.zip")
    assert read(go()) == files


@pytest.mark.parametrize("below", ["", "lucchi", "Lucchi++"])
def test_from_a_folder_that_may_be_read_only(
    go: Go, files: Files, tmp_path: Path, below: str
) -> None:
    extra = {"Train_In/Thumbs.db": b"", "other/secret.txt": b"", ".DS_Store": b""}
    have = write(tmp_path / "have" / below, files | extra)
    for path in [p for p in have.rglob("*") if p.is_file()]:
        path.chmod(0o444)
    target = go(from_dir=tmp_path / "have")
    assert read(target) == files
    assert json.loads((target / "SOURCE.json").read_text())["archive_sha256"] is None
    (target / "Train_In/mask0000.png").write_bytes(b"mine now")


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("Test_Out/", "Test_Out.*empty|Test_Out.*no such folder"),
        ("Train_Out/1.png", "mask0001.png has no label"),
        ("T", r"beach\.jpg.*Train_In, Train_Out"),
    ],
)
def test_from_a_folder_in_another_layout(
    go: Go, files: Files, tmp_path: Path, drop: str, message: str
) -> None:
    kept = {name: content for name, content in files.items() if not name.startswith(drop)}
    write(tmp_path / "have", kept | {"beach.jpg": b""})
    with pytest.raises(InputError, match=message):
        go(from_dir=tmp_path / "have")
    assert not leftovers(tmp_path)
    with pytest.raises(InputError, match="Check the path of --from"):
        go(from_dir=tmp_path / "none")


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand_says_page_files_and_place_and_takes_what_is_there(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, target = DATASETS[name], tmp_path / "data" / name
    with pytest.raises(InputError) as told:
        fetch(name, tmp_path / "data")
    for words in (dataset.by_hand, f"{target}/", dataset.settings):
        assert words in str(told.value)
    image, label = blobs((30, 60, 70), 0)
    if dataset.layout == "folders":
        for kind, array in (("images", image), ("labels", 255 * label)):
            (target / kind).mkdir(parents=True)
            for z, plane in enumerate(array):
                tifffile.imwrite(target / kind / f"{z:04d}.tif", plane)
    else:
        target.mkdir(parents=True)
        tifffile.imwrite(target / "image.tif", image, photometric="minisblack")
        tifffile.imwrite(target / "label.tif", label, photometric="minisblack")
    assert fetch(name, tmp_path / "data") == target
    assert dataset.citation in capsys.readouterr().out
    params = settings()
    params["datasets"]["a"] = yaml.safe_load(dataset.settings) | {"path": str(target)}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    study = load_study(tmp_path / "params.yaml")
    assert study.dataset_settings["a"].voxel_nm == dataset.voxel_nm
    ingest(study, "a", tmp_path / "data", tmp_path / "build")
    volume = open_volume("a", tmp_path / "build")
    np.testing.assert_array_equal(volume.label, label)
    assert volume.manifest["source"]["licence"] == dataset.licence
