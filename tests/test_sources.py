"""Public datasets are fetched whole, from the right bytes, or not at all."""

import dataclasses
import hashlib
import io
import json
import os
import re
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from emadapt.data import fetch as fetching
from emadapt.data.fetch import fetch, layout_files, unpack
from emadapt.data.sources import LAYOUTS, MANUAL, SOURCES
from emadapt.errors import InputError

LUCCHI = SOURCES["lucchi"]


def _lucchi_files(n=3):
    """Contents of a tiny dataset in the layout of Lucchi++, by path below its folder."""
    files = {}
    for half in ("Train", "Test"):
        for i in range(n):
            files[f"{half}_In/mask{i:04d}.png"] = os.urandom(3000)
            files[f"{half}_Out/{i}.png"] = os.urandom(300)
    return files


def _write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def _read(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "SOURCE.json"
    }


def _zip(files, root="Lucchi++/", compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as z:
        for name, content in files.items():
            z.writestr(name if isinstance(name, zipfile.ZipInfo) else root + name, content)
    return buffer.getvalue()


class _Server:
    """Serves bytes by path, honours Range, and can cut each answer after some bytes."""

    def __init__(self, files):
        self.files, self.cut, self.ranges = files, None, True
        self.log: list[tuple[str, str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                content, asked = outer.files.get(self.path), self.headers.get("Range")
                outer.log.append((self.path, asked))
                if content is None:
                    return self.send_error(404)
                start = (
                    int(asked.removeprefix("bytes=").rstrip("-")) if asked and outer.ranges else 0
                )
                if start >= len(content):
                    return self.send_error(416)
                self.send_response(206 if start else 200)
                if start:
                    self.send_header(
                        "Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"
                    )
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                self.wfile.write(
                    content[start:] if outer.cut is None else content[start : start + outer.cut]
                )

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def files():
    return _lucchi_files()


@pytest.fixture
def server(files, monkeypatch):
    """A server of the tiny archive, which is the source of `lucchi` meanwhile."""
    archive = _zip(files | {"notes.txt": b"not part of the layout"})
    server = _Server({"/lucchi.zip": archive})
    source = dataclasses.replace(
        LUCCHI, urls=(f"{server.url}/lucchi.zip",), sha256=hashlib.sha256(archive).hexdigest()
    )
    monkeypatch.setitem(SOURCES, "lucchi", source)
    monkeypatch.setattr(fetching, "PAUSE_S", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def go(tmp_path):
    """Calls `fetch` with folders of this test."""
    return lambda name="lucchi", **kw: fetch(
        name, root=tmp_path / "data", downloads=tmp_path / "down", **kw
    )


def _leftovers(tmp_path):
    return (
        [p.name for p in (tmp_path / "data").iterdir() if p.name.startswith(".")]
        if (tmp_path / "data").exists()
        else []
    )


@pytest.mark.parametrize("name", SOURCES)
def test_sources_are_complete(name):
    source = SOURCES[name]
    assert source.name == name
    assert source.layout in LAYOUTS
    assert re.fullmatch("[0-9a-f]{64}", source.sha256)
    assert source.urls
    assert all(u.startswith(("http://", "https://")) and u.endswith(".zip") for u in source.urls)
    assert len(source.voxel_nm) == 3
    assert min(source.voxel_nm) > 0
    assert source.licence
    assert source.citation
    assert source.note


def test_download_gives_the_files_of_the_layout(go, server, files, tmp_path, capsys):
    target = go()
    assert target == tmp_path / "data" / "lucchi"
    assert _read(target) == files
    said = capsys.readouterr().out
    assert LUCCHI.licence in said
    assert LUCCHI.citation in said
    record = json.loads((target / "SOURCE.json").read_text())
    assert record["archive_sha256"] == SOURCES["lucchi"].sha256
    assert record["licence"] == LUCCHI.licence
    assert not _leftovers(tmp_path)
    assert not list((tmp_path / "down").iterdir())


def test_second_fetch_does_nothing_and_force_replaces(go, server, files, capsys):
    target = go()
    requests = len(server.log)
    (target / "Train_In" / "mask0000.png").write_bytes(b"changed")
    go()
    assert len(server.log) == requests
    assert "already there" in capsys.readouterr().out
    go(force=True)
    assert _read(target) == files


def test_incomplete_dataset_in_place_is_not_called_present(go, server):
    target = go()
    (target / "Test_Out" / "1.png").unlink()
    with pytest.raises(InputError, match=r"incomplete.*--force"):
        go()


def test_cut_connections_are_resumed_where_they_ended(go, server, files):
    server.cut = 5000
    assert _read(go()) == files
    starts = [0 if asked is None else int(asked[6:-1]) for _, asked in server.log]
    assert starts == list(range(0, len(server.files["/lucchi.zip"]), 5000))
    assert len(starts) > 3


def test_next_call_resumes(go, server, files, tmp_path):
    half = len(server.files["/lucchi.zip"]) // 2
    (tmp_path / "down").mkdir()
    (tmp_path / "down" / "lucchi-0.zip").write_bytes(server.files["/lucchi.zip"][:half])
    assert _read(go()) == files
    assert server.log == [("/lucchi.zip", f"bytes={half}-")]


def test_complete_download_that_was_not_unpacked_is_used(go, server, files, tmp_path):
    (tmp_path / "down").mkdir()
    (tmp_path / "down" / "lucchi-0.zip").write_bytes(server.files["/lucchi.zip"])
    assert _read(go()) == files


def test_server_without_ranges_starts_over(go, server, files, tmp_path):
    server.ranges = False
    (tmp_path / "down").mkdir()
    (tmp_path / "down" / "lucchi-0.zip").write_bytes(b"x" * 700)
    assert _read(go()) == files


def test_wrong_sha256_is_refused_and_not_resumed_from(go, server, tmp_path, monkeypatch):
    right = server.files["/lucchi.zip"]
    server.files["/lucchi.zip"] = right[:-1] + bytes([right[-1] ^ 1])
    with pytest.raises(InputError, match=r"sha256.*--from"):
        go()
    assert not (tmp_path / "data" / "lucchi").exists()
    assert not list((tmp_path / "down").iterdir())
    server.files["/lucchi.zip"] = right
    go()


@pytest.mark.parametrize("first", ["missing", "wrong", "dead"])
def test_mirror_is_used_when_the_first_address_fails(go, server, files, monkeypatch, first):
    url = {
        "missing": f"{server.url}/none.zip",
        "wrong": f"{server.url}/wrong.zip",
        "dead": "http://127.0.0.1:9/x.zip",
    }[first]
    server.files["/wrong.zip"] = b"<html>moved</html>"
    source = SOURCES["lucchi"]
    monkeypatch.setitem(SOURCES, "lucchi", dataclasses.replace(source, urls=(url, *source.urls)))
    assert _read(go()) == files


def test_no_network_is_an_error_in_seconds(go, monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setitem(
        SOURCES, "lucchi", dataclasses.replace(LUCCHI, urls=("http://127.0.0.1:9/a.zip",))
    )
    start = time.monotonic()
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9.*--from DIR"):
        go()
    assert time.monotonic() - start < 5
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())


def test_unknown_dataset(go):
    with pytest.raises(InputError, match=r"'mito'.*lucchi, vnc"):
        go("mito")


# --- from a folder


@pytest.mark.parametrize("below", ["", "lucchi", "Lucchi++"])
def test_from_a_folder(go, files, tmp_path, below):
    _write(
        tmp_path / "have" / below,
        files | {"Train_In/Thumbs.db": b"", "other/secret.txt": b"", ".DS_Store": b""},
    )
    target = go(from_dir=tmp_path / "have")
    assert _read(target) == files
    assert json.loads((target / "SOURCE.json").read_text())["archive_sha256"] is None


def test_from_a_read_only_folder_gives_writable_files(go, files, tmp_path):
    have = _write(tmp_path / "have", files)
    for path in [p for p in have.rglob("*") if p.is_file()]:
        path.chmod(0o444)
    (go(from_dir=have) / "Train_In" / "mask0000.png").write_bytes(b"mine now")


def test_vnc_from_a_folder(go, tmp_path):
    files = {f"raw/{i:02d}.tif": b"image" for i in range(4)} | {
        f"mitochondria/{i:02d}.png": b"label" for i in range(4)
    }
    assert (
        _read(
            go(
                "vnc",
                from_dir=_write(tmp_path / "have" / "vnc", files | {"synapses/00.png": b""}).parent,
            )
        )
        == files
    )


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [
        ("Test_Out/", {}, "Test_Out.*no such folder"),
        ("Train_Out/1.png", {}, r"Train_Out.*2 labels for 3 images.*Complete slice 1\."),
        (
            "Train_In/",
            {"Train_In/0.tif": b"x"},
            r"Train_In.*found 0\.tif.*expected files called mask",
        ),
        (
            "Train_In/",
            {"Train_In/0.png": b"x"},
            r"Train_In.*found 0\.png",
        ),  # labels where the images belong
        ("nothing", {"Test_Out/01.png": b"x"}, "Test_Out.*4 files with 3 numbers"),
    ],
)
def test_from_a_folder_in_another_layout(go, files, tmp_path, drop, add, message):
    _write(tmp_path / "have", {k: v for k, v in files.items() if not k.startswith(drop)} | add)
    with pytest.raises(InputError, match=message):
        go(from_dir=tmp_path / "have")
    assert not (tmp_path / "data").exists()


def test_from_nothing(go, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        go(from_dir=tmp_path / "none")
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "beach.jpg").touch()
    with pytest.raises(InputError, match=r"beach\.jpg.*Train_In/ and Train_Out/"):
        go(from_dir=tmp_path / "holiday")


def test_links_out_of_the_folder_are_not_followed(go, files, tmp_path):
    have = _write(tmp_path / "have", files)
    (tmp_path / "private").write_bytes(b"secret")
    (have / "Train_In" / "mask0001.png").unlink()
    (have / "Train_In" / "mask0001.png").symlink_to(tmp_path / "private")
    with pytest.raises(InputError, match=r"mask0001\.png.*link"):
        go(from_dir=have)


def test_a_failed_copy_leaves_what_was_there(go, files, tmp_path, monkeypatch):
    target = go(from_dir=_write(tmp_path / "have", files))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetching.shutil, "copyfile", full)
    with pytest.raises(InputError, match="No space left"):
        go(from_dir=tmp_path / "have", force=True)
    assert _read(target) == files
    assert not _leftovers(tmp_path)


# --- archives


def _unpack(tmp_path, content):
    (tmp_path / "a.zip").write_bytes(content)
    unpack(LUCCHI, tmp_path / "a.zip", tmp_path / "deep" / "out")
    return tmp_path / "deep" / "out"


@pytest.mark.parametrize(
    "name",
    ["../evil.png", "Lucchi++/../../evil.png", "/tmp/evil.png", "..\\evil.png", "C:\\evil.png"],
)
def test_paths_out_of_the_archive_are_refused(tmp_path, files, name):
    with pytest.raises(InputError, match="evil"):
        _unpack(tmp_path, _zip(files | {zipfile.ZipInfo(name): b"x"}))
    assert not (tmp_path / "deep").exists()


def test_links_in_the_archive_are_refused(tmp_path, files):
    link = zipfile.ZipInfo("Lucchi++/Train_In/mask0009.png")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with pytest.raises(InputError, match="link"):
        _unpack(tmp_path, _zip(files | {link: b"/etc/passwd"}))


def test_a_zip_bomb_is_refused(tmp_path, files, monkeypatch):
    bomb = files | {"Train_In/mask0009.png": bytes(20_000_000)}
    with pytest.raises(InputError, match="and 50 to 1"):
        _unpack(tmp_path, _zip(bomb, compression=zipfile.ZIP_DEFLATED))
    monkeypatch.setattr(fetching, "MAX_UNPACKED", 10_000)
    with pytest.raises(InputError, match="at most 10000 bytes"):
        _unpack(tmp_path, _zip(files))
    assert not (tmp_path / "deep").exists()


def test_only_the_files_of_the_layout_are_unpacked(tmp_path, files):
    extra = {
        "Train_In/readme.txt": b"",
        "Train_In/deeper/mask0000.png": b"",
        "other/mask0000.png": b"",
        "mask0000.png": b"",
    }
    mac = zipfile.ZipInfo("__MACOSX/Lucchi++/Train_In/mask0000.png")
    out = _unpack(tmp_path, _zip(extra | files | {mac: b""}))
    assert _read(out) == files
    assert len(layout_files(LUCCHI, out)) == len(files)


@pytest.mark.parametrize("damage", ["cut", "not a zip", "flipped"])
def test_damaged_archives(tmp_path, files, damage):
    good = _zip(files)
    at = good.index(files["Train_In/mask0001.png"])
    content = {
        "cut": good[:-200],
        "not a zip": b"<html>",
        "flipped": good[:at] + bytes([good[at] ^ 255]) + good[at + 1 :],
    }
    with pytest.raises(InputError, match="damaged archive"):
        _unpack(tmp_path, content[damage])


@pytest.mark.parametrize(
    "source", [*SOURCES.values(), *MANUAL.values()], ids=lambda source: source.name
)
def test_every_dataset_has_a_doi_to_cite_and_its_citation_names_no_other_first(source):
    assert re.fullmatch(r"10\.\d{4,9}/\S+[^.\s]", source.doi)
    if "Used by" not in source.citation:
        assert set(re.findall(r"10\.\d{4,9}/\S+?(?=\.?(?:\s|$))", source.citation)) <= {source.doi}
