"""`emadapt init`: a project in an empty folder, from a checkout and from a wheel."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from emadapt.cli import main
from emadapt.errors import InputError
from emadapt.pipeline.check import check_study
from emadapt.pipeline.new_project import new_project
from emadapt.study.loading import load_study
from tiny import blobs, write_stack

ROOT = Path(__file__).resolve().parents[1]


def test_a_new_project_is_one_that_dvc_reads(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    (folder / "data/mine").mkdir(parents=True)  # what is there stays
    assert CliRunner().invoke(main, ["init", str(folder)], catch_exceptions=False).exit_code == 0
    monkeypatch.chdir(folder)
    for command in (["git", "init", "-q"], ["dvc", "status", "--quiet"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "ERROR" not in done.stderr
    assert (folder / "dvc.yaml").read_text() == (ROOT / "dvc.yaml").read_text()
    assert {p.parent.name for p in folder.glob("studies/*/study.yaml")} == {
        "mine",
        *(p.parent.name for p in ROOT.glob("studies/*/study.yaml")),
    }
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    assert load_study(folder / "studies/mine/study.yaml") == load_study()
    assert "expected one volume called image" in " ".join(check_study(Path("params.yaml")))
    (folder / "data/mine").rmdir()
    write_stack(folder / "data/mine", *blobs((12, 60, 60), 0))
    assert check_study(Path("params.yaml")) == []


def test_files_that_are_there_are_not_replaced(tmp_path):
    (tmp_path / "params.yaml").write_text("mine")
    with pytest.raises(InputError, match=r"params\.yaml"):
        new_project(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


@pytest.mark.slow
def test_files_of_the_user_keep_their_names(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/dot-plot.png").write_text("new")
    (tmp_path / "mine/.plot.png").write_text("old")
    new_project(tmp_path)
    assert (tmp_path / "mine/dot-plot.png").read_text() == "new"
    assert (tmp_path / "mine/.plot.png").read_text() == "old"
    assert (tmp_path / ".dvc/.gitignore").is_file()


def test_a_wheel_begins_the_same_project(tmp_path):
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
        assert not any("analyse.py" in name for name in file.namelist())
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-m", "emadapt", "init", "from-wheel"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    new_project(tmp_path / "from-checkout")
    both = [
        {
            str(path.relative_to(folder)): path.read_text()
            for path in folder.rglob("*")
            if path.is_file()
        }
        for folder in (tmp_path / "from-wheel", tmp_path / "from-checkout")
    ]
    assert both[0] == both[1]
