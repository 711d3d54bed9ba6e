"""Two processes together do what one does alone. The slow tests run whole trainings; the figures are in docs/how-to.md."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tifffile
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file

from emadapt.data.crops import Draw, deal, with_absent
from emadapt.data.ingest import ingest
from emadapt.models import parallel
from emadapt.models.heads import HEADS, BatchNorm, needs_image
from emadapt.study.study import load_study
from emadapt.training.launch import launch
from test_launch import is_gone
from tiny import make_study, settings

DIM = 8


@dataclass
class Shapes:
    """A dataset as far as `deal` and `with_absent` know one: member 1 is of another shape than members 0 and 2."""

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
        assert [tuple(i.shape[1:]) for i, _ in groups] == [
            (DIM, 3, 3),
            (DIM, 2, 4),
        ]  # as one process would
        assert [tuple(y.shape[1:]) for _, y in groups] == [(30, 30), (20, 40)]
        assert sum(len(y) for _, y in groups) == len(own)


def test_alone_it_is_torchs_own_batch_norm() -> None:
    ours, theirs = BatchNorm(3), torch.nn.BatchNorm2d(3)
    for _ in range(2):
        x = torch.randn(2, 3, 4, 5)
        assert torch.equal(ours(x), theirs(x))
    assert all(
        torch.equal(a, b)
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    )


def steps(name: str) -> dict[str, torch.Tensor]:
    """Three steps of a head on batches of two shapes, of which the smaller has one sample: the weights and losses."""
    torch.manual_seed(0)
    head = HEADS[name](DIM, 1)
    unused = torch.nn.Parameter(
        torch.ones(2)
    )  # no gradient: must stay as it is, weight decay or not
    parameters = [*head.parameters(), unused]
    optimiser = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.1)
    state = {}
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        groups: dict[tuple[int, ...], list[Any]] = {}
        total = 0.0
        for draw in BATCH:
            inputs, labels = DATA.shapes(draw.member)
            item = (
                torch.randn(inputs, generator=generator),
                torch.randint(0, 2, labels, generator=generator),
            )
            if draw in deal(DATA, BATCH, parallel.rank(), parallel.size()):
                groups.setdefault(inputs, []).append(item)
        own = [
            (torch.stack([i for i, _ in g]), torch.stack([y for _, y in g]))
            for g in groups.values()
        ]
        for inputs, labels in with_absent(DATA, BATCH, own):
            image = [labels[:, None].float()] if needs_image(name) else []
            logits = head([inputs.requires_grad_()], labels.shape[-2:], *image)
            loss = (
                F.cross_entropy(logits, labels) * (len(labels) / len(BATCH))
                if len(labels)
                else logits.sum()
            )
            loss.backward()
            total += loss.item()
        state[f"loss {step}"] = torch.tensor(parallel.add_up(parameters, total))
        optimiser.step()
        optimiser.zero_grad()
    return {**state, **head.state_dict(), "unused": unused.detach()}


BEFORE_NORM = ("project.0.bias", "fuse.0.0.running_mean")


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_through_every_head(tmp_path: Path) -> None:
    launch([sys.executable, __file__, str(tmp_path)], ["cpu", "cpu"], tmp_path)
    for name in HEADS:
        alone, first, second = (
            steps(name),
            *(torch.load(tmp_path / f"{name}-{n}.pt", weights_only=True) for n in (0, 1)),
        )
        for key, value in alone.items():
            assert torch.equal(first[key], second[key]), "the processes have drifted apart"
            # AdamW's first steps are the gradient's sign: where that is rounding, weights may differ by a learning rate. So
            # it is for all biases in front of BatchNorm, and the means that BatchNorm keeps follow them.
            allowed = 1e-3 if name == "pyramid_bn" and key in BEFORE_NORM else 1e-5
            assert (first[key] - value).abs().float().mean().item() < allowed, (name, key)
        assert torch.equal(first["unused"], torch.ones(2))


# ---- whole trainings

TIMES = {"epochs": 6, "steps_per_epoch": 1}  # one step an epoch: the history holds the loss of each


def write_study(place: Path, precision: str = "fp32", **train: Any) -> None:
    """Two datasets of different shapes, whole slices: a batch of 3 has groups of 2 and 1, or of 3."""
    params = settings(**{**TIMES, "batch": 3, "precision": precision, "warmup_steps": 0, **train})
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


def trained(unit: str, devices: str) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Weights and history of a unit, trained here and alone or on `devices`."""
    if devices:
        done = run("emadapt", "train", unit, "--devices", devices)
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        from emadapt.training.train import train_unit  # heavy, and the quick test needs none of it

        train_unit(load_study(), load_study().unit(unit))
    return result(unit)


def result(unit: str) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    folder = Path("build/units") / unit
    return load_file(folder / "model.safetensors"), json.loads(
        (folder / "history.json").read_text()
    )["epochs"]


def forget() -> None:
    Path("scratch/units").rename(f"gone-{time.monotonic_ns()}")


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Root mean square difference of all weights over their own."""
    flat = [torch.cat([w[k].float().flatten() for k in sorted(one)]) for w in (one, other)]
    return float((flat[0] - flat[1]).square().mean().sqrt() / flat[0].square().mean().sqrt())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMADAPT_TRACKING", "off")
    return tmp_path


EXACT = (1e-5, 1e-3)  # of fp32: losses, and weights as `apart` measures them


@pytest.mark.slow
@pytest.mark.parametrize(
    ("unit", "head", "precision", "tolerance"),
    [
        ("t-frozen-paired-0", "pyramid", "fp32", EXACT),
        ("t-frozen-paired-0", "deconv", "fp32", EXACT),
        ("t-lora-paired-0", "linear", "fp32", EXACT),
        ("t-lora-paired-0", "pyramid", "bf16", (5e-3, 1e-2)),
    ],
)
def test_two_processes_train_what_one_trains(
    place: Path, unit: str, head: str, precision: str, tolerance: tuple[float, float]
) -> None:
    write_study(place, precision, head=head)
    one, alone = trained(unit, "")
    forget()
    two, together = trained(unit, "cpu,cpu")
    losses = max(
        abs(a["train/loss"] - b["train/loss"]) for a, b in zip(alone, together, strict=True)
    )
    ious = max(abs(a["val/iou"] - b["val/iou"]) for a, b in zip(alone, together, strict=True))
    print(
        f"{unit} {head} {precision}: loss {losses:.1e}, val IoU {ious:.1e}, weights {apart(one, two):.1e}"
    )
    assert losses < tolerance[0]
    assert apart(one, two) < tolerance[1]
    assert json.loads((place / "build/units" / unit / "model.json").read_text())["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "devices", [("", "cpu,cpu"), ("cpu,cpu", "")], ids=["one, then two", "two, then one"]
)
def test_a_training_goes_on_with_another_number_of_processes(
    place: Path, devices: tuple[str, str]
) -> None:
    unit = "t-lora-paired-0"
    write_study(place, epochs=40)
    one, alone = trained(unit, "")
    forget()
    command = [sys.executable, "-m", "emadapt", "train", unit, "--devices", devices[0]]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for_epoch(process)
        process.send_signal(signal.SIGKILL)
    epochs = torch.load(next(place.glob("scratch/units/*/*/checkpoint.pt")), weights_only=True)[
        "progress"
    ]["epoch"]
    assert 1 <= epochs < 40, "it ended before it could be killed"
    two, together = trained(unit, devices[1])
    assert (
        max(abs(a["train/loss"] - b["train/loss"]) for a, b in zip(alone, together, strict=True))
        < 1e-3
    )
    assert apart(one, two) < 1e-2


def wait_for_epoch(process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 300
    while not list(Path.cwd().glob("scratch/units/*/*/checkpoint.pt")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_process_ends_the_training_and_leaves_nothing(place: Path) -> None:
    unit = "t-lora-paired-0"
    write_study(place, epochs=2000)
    command = [sys.executable, "-m", "emadapt", "train", unit, "--devices", "cpu,cpu"]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for_epoch(process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        second = next(
            c for c in children if b"RANK=1" in Path(f"/proc/{c}/environ").read_bytes().split(b"\0")
        )
        os.kill(int(second), signal.SIGKILL)
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 2
    assert "process 1 of 2, on device cpu, died (signal 9)" in said
    assert len(children) == 2
    assert all(is_gone(pid) for pid in children)
    assert not (place / "build/units" / unit).exists()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_said_once_and_only_one_run_is_logged(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EMADAPT_TRACKING")
    unit = "t-frozen-a-0"
    write_study(place)
    trained(unit, "cpu,cpu")
    from mlflow import MlflowClient

    from emadapt.tracking.relocate import tracking_uri

    client = MlflowClient(tracking_uri(place))
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.info.status == "FINISHED"
    assert logged.data.tags["processes"] == "2"
    assert len(client.get_metric_history(logged.info.run_id, "val/iou")) == TIMES["epochs"]
    params = yaml.safe_load((place / "params.yaml").read_text())
    params["train"] |= {"head_lr": 1e11, "clip": 1e11, "schedule": "constant"}
    (place / "params.yaml").write_text(yaml.safe_dump(params))
    done = run("emadapt", "train", unit, "--devices", "cpu,cpu")
    assert done.returncode == 2
    assert done.stderr.count("the loss is not finite") == 1, done.stderr


@pytest.mark.slow
def test_it_runs_under_accelerates_launcher_and_says_when_gpus_are_missing(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = "t-frozen-a-0"
    write_study(place)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = run(
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--main_process_port",
        "0",
        "-m",
        "emadapt",
        "train",
        unit,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    one, _ = result(unit)
    assert json.loads((place / "build/units" / unit / "model.json").read_text())["processes"] == 2
    forget()
    assert (
        apart(one, trained(unit, "cpu,cpu")[0]) < EXACT[1]
    )  # each process has fewer threads: another rounding
    done = run("emadapt", "train", unit, "--devices", "1000,1001")
    assert done.returncode == 2
    assert "devices 1000,1001: found 0 GPUs that work; expected 2" in done.stderr


if __name__ == "__main__":  # one of the two processes of the quick test
    parallel.join()
    for head_name in HEADS:
        torch.save(steps(head_name), Path(sys.argv[1]) / f"{head_name}-{parallel.rank()}.pt")
    parallel.leave()
