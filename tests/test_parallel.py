"""Two processes together do what one does alone. The slow tests run whole trainings."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tifffile
import torch
from safetensors.torch import load_file

from emadapt.data.batches import Draw, deal, with_absent
from emadapt.data.ingest import ingest
from emadapt.models.parallel import BatchNorm
from emadapt.study.loading import load_study
from emadapt.training import devices
from emadapt.training.devices import parse_devices, visible
from emadapt.training.train import train_unit
from processes import alive, children, until
from tiny import make_study, settings

DIM = 8


class Shapes:
    """A dataset as far as `deal` and `with_absent` know one: member 1 is of another shape than
    members 0 and 2."""

    def shapes(self, member: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return ((DIM, 2, 4), (20, 40)) if member == 1 else ((DIM, 3, 3), (30, 30))


DATA: Any = Shapes()
BATCH = [Draw(0, 0, 0), Draw(1, 1, 1), Draw(2, 2, 2)]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_batch_is_dealt_out_whole_and_evenly(size: int) -> None:
    batch = [Draw(m, r, 0) for r in range(3) for m in range(3)]
    own = [deal(DATA, batch, rank, size) for rank in range(size)]
    assert {d for part in own for d in part} == set(batch)
    assert sum(map(len, own)) == len(batch)
    for member in (1, 0):  # each shape by itself, as far as it goes
        counts = [sum(DATA.shapes(d.member) == DATA.shapes(member) for d in part) for part in own]
        assert max(counts) - min(counts) <= 1


def test_every_process_goes_through_the_same_groups() -> None:
    items = [(torch.ones((1, *s[0])), torch.ones((1, *s[1]))) for s in map(DATA.shapes, (0, 1))]
    for own in ([], items[:1], items[1:], items, items[::-1]):
        groups = with_absent(DATA, BATCH, own)
        assert [tuple(i.shape[1:]) for i, _ in groups] == [(DIM, 3, 3), (DIM, 2, 4)]
        assert [tuple(y.shape[1:]) for _, y in groups] == [(30, 30), (20, 40)]
        assert sum(len(y) for _, y in groups) == len(own)


def test_alone_it_is_torchs_own_batch_norm() -> None:
    ours, theirs = BatchNorm(3), torch.nn.BatchNorm2d(3)
    for _ in range(2):
        x = torch.randn(2, 3, 4, 5)
        assert torch.equal(ours(x), theirs(x))
    states = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("0", ["0"]),
        (" 3, 1", ["3", "1"]),
        ("cpu,cpu", ["cpu", "cpu"]),
        ("MIG-1a/2,GPU-3b", ["MIG-1a/2", "GPU-3b"]),
    ],
)
def test_devices_are_gpu_numbers_or_cpus(text: str, names: list[str]) -> None:
    assert parse_devices(text) == names
    assert visible(names)["CUDA_VISIBLE_DEVICES"] == ",".join(n for n in names if n != "cpu")


# ---------------------------------------------------------------- whole trainings


@pytest.mark.parametrize(("said", "cores"), [("6", 6), ("4,2", 4), ("", None), ("many", None)])
def test_cores_to_share(said: str, cores: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    cores = cores or len(os.sched_getaffinity(0))
    assert devices.share_of_cores(2) == {"OMP_NUM_THREADS": str(max(1, cores // 2))}
    assert devices.share_of_cores(1) == {}


TIMES = {"epochs": 6, "steps_per_epoch": 1}  # one step an epoch: the history has the loss of each


def write_study(place: Path, **train: Any) -> None:
    """Two datasets of different shapes, whole slices: a batch of 3 has groups of 2 and 1, or of
    3."""
    params = settings(**{**TIMES, "batch": 3, "precision": "fp32", "warmup_steps": 0, **train})
    params["train"]["augment"] = False
    params["backbones"]["t"] |= {"tile": 0, "views": 0, "precision": "fp32"}
    make_study(place, params, ingested=False)
    for name in ("image", "label"):
        stack = tifffile.imread(place / f"data/b/{name}.tif")
        tifffile.imwrite(place / f"data/b/{name}.tif", stack[:, :72], photometric="minisblack")
    for name in ("a", "b"):
        ingest(load_study(), name)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)


def result(unit: str) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Weights and history."""
    folder = Path("build/units") / unit
    history = json.loads((folder / "history.json").read_text())
    return load_file(folder / "model.safetensors"), history["epochs"]


def trained(unit: str, devices: str) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """The result of a unit, trained here and alone or on `devices`."""
    if devices:
        done = run("emadapt", "train", unit, "--devices", devices)
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        train_unit(load_study(), load_study().unit(unit))
    return result(unit)


def forget() -> None:
    Path("scratch/units").rename(f"gone-{time.monotonic_ns()}")


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Root mean square difference of all weights over their own."""
    flat = [torch.cat([w[k].float().flatten() for k in sorted(one)]) for w in (one, other)]
    return float((flat[0] - flat[1]).square().mean().sqrt() / flat[0].square().mean().sqrt())


@pytest.fixture
def place(tmp_path: Path, tracking_off: None) -> Path:
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("unit", "head"),
    [
        ("t-frozen-paired-0", "pyramid"),
        ("t-frozen-paired-0", "deconv"),
        ("t-lora-paired-0", "linear"),
    ],
)
def test_two_processes_train_what_one_trains(place: Path, unit: str, head: str) -> None:
    write_study(place, head=head)
    one, alone = trained(unit, "")
    forget()
    two, together = trained(unit, "cpu,cpu")
    for key in ("train/loss", "val/iou"):
        away = [abs(a[key] - b[key]) for a, b in zip(alone, together, strict=True)]
        assert max(away) < (1e-5 if key == "train/loss" else 1e-2)
    assert apart(one, two) < 1e-3
    assert json.loads((place / "build/units" / unit / "model.json").read_text())["processes"] == 2


@pytest.fixture
def running(place: Path) -> Iterator[subprocess.Popen[str]]:
    """A long training by two processes, of which a checkpoint is there."""
    write_study(place, epochs=2000)
    command = [sys.executable, "-m", "emadapt", "train", "t-lora-paired-0"]
    with subprocess.Popen(
        [*command, "--devices", "cpu,cpu"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        until(lambda: list(place.glob("scratch/units/*/*/checkpoint.pt")), 300)
        yield process
        process.kill()


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """Processes below it that train."""
    below = children(process.pid)
    return [pid for pid in below if b"RANK=" in Path(f"/proc/{pid}/environ").read_bytes()]


@pytest.mark.slow
def test_a_killed_process_ends_the_training_and_leaves_nothing(
    running: subprocess.Popen[str], place: Path
) -> None:
    pids = workers_of(running)
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    said = running.communicate(timeout=120)[1]
    assert running.returncode == 2
    assert "of 2, on device cpu, died" in said
    until(lambda: not any(map(alive, pids)))
    assert not (place / "build/units/t-lora-paired-0").exists()


@pytest.mark.slow
def test_nothing_is_left_when_the_launcher_is_killed(running: subprocess.Popen[str]) -> None:
    pids = workers_of(running)
    running.kill()
    running.wait()
    until(lambda: not any(map(alive, pids)))
