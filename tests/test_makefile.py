"""What `make` says where something around it is not as it should be."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run make in a folder with nothing but the Makefile, in the environment of the tests."""
    shutil.copy(ROOT / "Makefile", folder)
    command = ["make", "--old-file=venv", f"BIN={Path(sys.executable).parent}", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_a_port_that_is_taken_is_said_and_another_one_advised(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = make(tmp_path, "ui", f"PORT={port}")
    assert done.returncode
    assert f"port {port} is taken" in done.stderr
    assert f"PORT={port + 1}" in done.stderr
    assert "open http" not in done.stdout


def test_a_folder_without_git_is_called_that(tmp_path: Path) -> None:
    done = make(tmp_path, "repro")
    assert done.returncode
    assert "not a git repository" in done.stderr
    assert "git init" in done.stderr


def test_clean_removes_what_is_made_again(tmp_path: Path) -> None:
    kept = ["scratch/sweeps/journal.log", "scratch/track/unit.json", "scratch/mitonet.pt"]
    for name in (*kept, "scratch/tokens/key/tokens.npy", "build/plan/a.json", "src/a", "tests/b"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert not make(tmp_path, "clean").returncode
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*kept, "src/a", "tests/b", "Makefile"}
