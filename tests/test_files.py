"""Files are there whole or not at all, and the disk's errors say what to do."""

import errno
import os
from pathlib import Path

import pytest

from emadapt.files import (
    cache,
    disk_error,
    whole_file,
    whole_folder,
    write_json,
)


def test_a_file_is_there_whole_or_as_it_was(tmp_path):
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


def test_a_folder_is_replaced_at_the_end_or_stays(tmp_path):
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


def test_errors_of_the_disk_say_whether_reading_or_writing_failed(tmp_path, monkeypatch):
    there = tmp_path / "there"
    there.touch()
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.W_OK)  # root may do all
    for number, path, said in (
        (errno.EACCES, there, "no permission to read"),
        (errno.EACCES, tmp_path / "new", "no permission to write"),
        (errno.EROFS, there, "no permission to write"),
        (errno.ENOSPC, there, "a full disk"),
    ):
        assert said in str(disk_error(OSError(number, os.strerror(number), str(path))))
    assert "a full disk" in str(disk_error(RuntimeError("PytorchStreamWriter failed")))
    assert disk_error(OSError(errno.EIO, "Input/output error")) is None
    assert disk_error(ValueError("os error 28")) is None


def test_outside_a_project_the_cache_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert cache("weights") == tmp_path / "user/emadapt/weights"
    (tmp_path / "empty/params.yaml").touch()
    assert cache("weights") == Path("scratch/weights")
