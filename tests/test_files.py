"""Files are there whole or not at all, and the disk's errors say what to do."""

import errno
import os
from pathlib import Path

import pytest

from emadapt.errors import InputError
from emadapt.files import (
    cache,
    check_new_file,
    disk_error,
    whole_file,
    whole_folder,
    write_json,
)


def test_a_file_is_there_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_json(path, [1])

    def interrupted() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert path.read_text() == "[\n 1\n]\n"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_is_replaced_at_the_end_or_stays(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for content in ("old", "new"):
        with whole_folder(path) as temporary:
            (temporary / content).touch()
            assert path.exists() == (content == "new")
        assert [p.name for p in path.iterdir()] == [content]
    with pytest.raises(KeyError), whole_folder(path):
        raise KeyError
    assert [p.name for p in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_nothing_may_be_put_in_is_found_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_new_file(tmp_path / "a.csv", [".csv"], overwrite=False)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(InputError, match="in a folder that can be written to"):
        check_new_file(tmp_path / "a.csv", [".csv"], overwrite=False)


def test_errors_of_the_disk_say_whether_reading_or_writing_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there"
    there.touch()

    def said(number: int, path: Path) -> str:
        return str(disk_error(OSError(number, os.strerror(number), str(path))))

    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    assert "there: found no permission to read" in said(errno.EACCES, there)
    assert "no permission to write" in said(errno.EACCES, tmp_path / "new")
    assert "no permission to write" in said(errno.EROFS, there)
    assert "a full disk" in said(errno.ENOSPC, there)
    monkeypatch.undo()
    assert "no permission to write" in said(errno.EACCES, there)
    assert "a full disk" in str(disk_error(RuntimeError("PytorchStreamWriter failed")))
    assert disk_error(OSError(errno.EIO, "Input/output error")) is None
    assert disk_error(ValueError("os error 28")) is None


def test_outside_a_project_the_cache_is_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert cache("weights") == tmp_path / "user/emadapt/weights"
    (tmp_path / "empty/params.yaml").touch()
    assert cache("weights") == Path("scratch/weights")
