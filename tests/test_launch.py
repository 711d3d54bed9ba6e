"""Processes that are started together end together, whatever ends one of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from emadapt.errors import EmadaptError, InputError
from emadapt.training.launch import is_one_of_several, launch, parse_devices, visible

SAY = """
import json, os, pathlib, sys, time
here = pathlib.Path(sys.argv[1])
(here / f"{os.environ['RANK']}.part").write_text(json.dumps(dict(os.environ) | {"pid": str(os.getpid())}))
(here / f"{os.environ['RANK']}.part").rename(here / f"{os.environ['RANK']}.json")
"""
STAY = (
    SAY
    + "from emadapt.training.launch import die_with\ndie_with(int(os.environ['EMADAPT_LAUNCHER']))\ntime.sleep(600)\n"
)


def command(code: str, folder: Path) -> list[str]:
    return [sys.executable, "-c", code, str(folder)]


def said(folder: Path, number: int) -> dict[str, str]:
    """What a process wrote, once it is there."""
    deadline = time.monotonic() + 120
    while not (folder / f"{number}.json").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return dict(json.loads((folder / f"{number}.json").read_text()))


def is_gone(pid: str) -> bool:
    """Whether a process is no more; one that is killed may take a moment."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize(
    ("text", "names"), [("", []), ("3", ["3"]), ("0, 1", ["0", "1"]), ("cpu,cpu", ["cpu", "cpu"])]
)
def test_devices_are_gpu_numbers_or_cpus(text: str, names: list[str]) -> None:
    assert parse_devices(text) == names
    assert visible(names)["CUDA_VISIBLE_DEVICES"] == "".join(text.split()).replace("cpu,cpu", "")


@pytest.mark.parametrize("text", ["0,0", "0,cpu", "a", "0,,1", "-1", "0;1"])
def test_other_devices_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="GPU numbers, each once"):
        parse_devices(text)


def test_each_process_learns_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    launch(command(SAY + "print('hello')", tmp_path), ["3", "4"], tmp_path / "logs")
    first, second = said(tmp_path, 0), said(tmp_path, 1)
    assert [
        p["RANK"] + p["LOCAL_RANK"] + p["WORLD_SIZE"] + p["LOCAL_WORLD_SIZE"]
        for p in (first, second)
    ] == ["0022", "1122"]
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert all(
        p["CUDA_VISIBLE_DEVICES"] == "3,4" and p["OMP_NUM_THREADS"] == "3" for p in (first, second)
    )
    assert (tmp_path / "logs/process-1.log").read_text() == "hello\n"
    assert not is_one_of_several()


def test_one_that_dies_ends_all_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emadapt.training.launch.GRACE", 0.3)
    dies = (
        SAY
        + "if os.environ['RANK'] == '1':\n print('so far', flush=True); os.kill(os.getpid(), 9)\ntime.sleep(600)\n"
    )
    with pytest.raises(
        EmadaptError,
        match=r"process 1 of 2, on device cpu, died \(signal 9\)[^$]*process-1.log ends with\s+so far",
    ):
        launch(command(dies, tmp_path), ["cpu", "cpu"], tmp_path)
    assert all(is_gone(said(tmp_path, n)["pid"]) for n in (0, 1))


def test_the_one_that_was_killed_is_named_not_the_one_that_complains_of_it(tmp_path: Path) -> None:
    both = SAY + "os.kill(os.getpid(), 9) if os.environ['RANK'] == '1' else sys.exit(1)\n"
    with pytest.raises(EmadaptError, match=r"process [01] of 2, on device cpu, died"):
        launch(command(both, tmp_path), ["cpu", "cpu"], tmp_path)


def test_an_error_that_the_first_one_printed_is_not_said_twice(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        launch(command("import sys; sys.exit(2)", tmp_path), ["cpu", "cpu"], tmp_path)
    assert end.value.code == 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "told to stop"])
def test_nothing_is_left_when_the_launcher_ends(tmp_path: Path, number: signal.Signals) -> None:
    code = f"from emadapt.training.launch import launch\nfrom pathlib import Path\nimport sys\nlaunch([sys.executable, '-c', {STAY!r}, "
    code += f"{str(tmp_path)!r}], ['cpu', 'cpu'], Path({str(tmp_path)!r}))"
    launcher = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.DEVNULL, env=dict(os.environ)
    )
    pids = [said(tmp_path, n)["pid"] for n in (0, 1)]
    time.sleep(0.5)  # they now wait to die with it
    launcher.send_signal(number)
    assert launcher.wait(60) != 0
    assert all(is_gone(pid) for pid in pids)
