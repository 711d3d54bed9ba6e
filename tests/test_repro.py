"""Which stage runs when and on what; DVC is a script that notes down what it was called with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from emadapt.errors import EmadaptError
from emadapt.pipeline import repro
from emadapt.pipeline.repro import place, run_pipeline, useful_devices
from tiny import make_study, settings, under_dvc

FOUR = ["0", "1", "2", "3"]
DVC = """#!/bin/sh
began=$(date +%s%N)
sleep 0.2
printf '{"devices": "%s", "cuda": "%s", "threads": "%s", "began": %s, "ended": %s}' "$EMADAPT_DEVICES" \\
    "${CUDA_VISIBLE_DEVICES-unset}" "$OMP_NUM_THREADS" "$began" "$(date +%s%N)" > "seen-$4.json"
"""
TRAIN = {"train@x": 4, "train@y": 2, "train@z": 4}


@pytest.mark.parametrize(
    ("ready", "free", "room", "expected"),
    [
        ([], FOUR, 4, {}),
        (["train@x", "train@y"], [], 4, {}),
        (["train@x"], FOUR, 4, {"train@x": FOUR}),  # one unit on many
        (["train@x"], ["2"], 4, {"train@x": ["2"]}),
        (["train@x", "train@z"], FOUR, 4, {"train@x": ["0", "2"], "train@z": ["1", "3"]}),
        (
            ["train@x", "train@y", "train@z"],
            FOUR,
            4,
            {"train@x": ["0", "3"], "train@y": ["1"], "train@z": ["2"]},
        ),
        (["train@y"], FOUR, 4, {"train@y": ["0", "1"]}),  # no more than its batch has samples
        (["tokens@a", "train@x"], FOUR, 4, {"tokens@a": ["0"], "train@x": ["1", "2", "3"]}),
        (["train@x", "train@z"], FOUR, 1, {"train@x": FOUR}),  # --jobs 1
        (["train@x", "train@z", "train@y"], ["0", "1"], 2, {"train@x": ["0"], "train@z": ["1"]}),
        (["train@x"], ["", ""], 2, {"train@x": [""]}),
        (["train@x"], ["cpu", "cpu"], 2, {"train@x": ["cpu", "cpu"]}),
    ],
)
def test_who_gets_which_devices(
    ready: list[str], free: list[str], room: int, expected: dict[str, list[str]]
) -> None:
    assert place(ready, free, room, TRAIN if any(free) else {}) == expected


def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int, gpus: list[str], slow: str = ""
) -> dict[str, dict[str, str]]:
    """Environment that each stage saw, and from when to when it ran."""
    monkeypatch.chdir(tmp_path)
    for name in ("EMADAPT_DEVICES", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    dvc = tmp_path / "bin/dvc"
    dvc.parent.mkdir()
    dvc.write_text(DVC)
    dvc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{dvc.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("emadapt.pipeline.repro.os.sched_getaffinity", lambda _: set(range(8)))
    run_pipeline(jobs, gpus)
    return {
        f.stem.removeprefix("seen-"): json.loads(f.read_text())
        for f in tmp_path.glob("seen-*.json")
    }


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four units that wait for one stage; one more that waits for all of them."""
    units = [
        f"train@t-{regime}-{data}-0" for regime in ("frozen", "lora") for data in ("a", "paired")
    ]
    needs = {
        "ingest": set(),
        **{u: {"ingest"} for u in units[:3]},
        units[3]: set(units[:3]),
        "report": {units[3]},
    }
    monkeypatch.setattr("emadapt.pipeline.repro.stage_graph", lambda: needs)


def test_units_share_out_the_devices_and_one_alone_gets_them_all(
    tmp_path: Path, monkeypatch, graph: None
) -> None:
    make_study(tmp_path, settings(batch=4), ingested=False)
    seen = run(tmp_path, monkeypatch, 3, ["0", "1", "2"])
    assert (seen["ingest"]["devices"], seen["ingest"]["cuda"]) == ("0", "0")
    side_by_side = [
        v for k, v in seen.items() if k.startswith("train@") and k != "train@t-lora-paired-0"
    ]
    assert sorted(s["devices"] for s in side_by_side) == ["0", "1", "2"]
    assert all(s["threads"] == "2" for s in side_by_side)
    alone = seen["train@t-lora-paired-0"]
    assert sorted(alone["devices"].split(",")) == ["0", "1", "2"]
    assert alone["cuda"] == alone["devices"]
    assert alone["threads"] == "8"
    assert len(seen["report"]["devices"]) == 1


def test_more_jobs_than_devices_share_them_and_no_unit_gets_several(
    tmp_path: Path, monkeypatch, graph: None
) -> None:
    make_study(tmp_path, settings(batch=4), ingested=False)
    seen = run(tmp_path, monkeypatch, 4, ["0", "1"])
    assert all(s["devices"] in ("0", "1") for s in seen.values())
    assert len({s["devices"] for k, s in seen.items() if k.startswith("train@")}) == 2


def test_without_devices_stages_run_side_by_side_as_many_as_asked_for(
    tmp_path: Path, monkeypatch, graph: None
) -> None:
    seen = run(tmp_path, monkeypatch, 2, [])
    assert all(
        s["devices"] == "" and s["cuda"] == "unset" and s["threads"] == "4" for s in seen.values()
    )
    spans = sorted((int(s["began"]), int(s["ended"])) for s in seen.values())
    assert all(sum(a <= moment < b for a, b in spans) <= 2 for moment, _ in spans)


def test_one_stage_at_a_time_has_the_whole_machine(
    tmp_path: Path, monkeypatch, graph: None
) -> None:
    seen = run(tmp_path, monkeypatch, 1, [])
    assert {s["threads"] for s in seen.values()} == {""}
    assert len(seen) == 6


def test_as_many_devices_are_of_use_as_a_batch_has_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_study(tmp_path, settings(batch=1), ingested=False)
    assert useful_devices() == {
        "train@t-frozen-a-0": 1,
        "train@t-frozen-paired-0": 2,
        "train@t-lora-a-0": 1,
        "train@t-lora-paired-0": 2,
    }


@pytest.mark.slow
def test_the_pipeline_on_two_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real dvc.yaml around a tiny study of one unit, which gets both."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMADAPT_TRACKING", "off")
    params = settings()
    params["study"] |= {"regimes": ["frozen"], "train_sets": ["paired"]}
    make_study(tmp_path, params, ingested=False)
    under_dvc(tmp_path)("emadapt", "repro", "--gpus", "cpu,cpu")
    assert (
        json.loads(Path("build/units/t-frozen-paired-0/model.json").read_text())["processes"] == 2
    )
    assert Path("reports/summary.json").is_file()


def test_two_at_once_in_one_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is refused before it does anything, while the first lives; not by what a killed one left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(repro, "stage_graph", dict)
    hold = (
        "import time; from emadapt.pipeline import repro; repro.stage_graph = lambda: (print('held', flush=True), time.sleep(60)); "
        "repro.run_pipeline(1, [])"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(EmadaptError, match="another `emadapt repro`"):
            repro.run_pipeline(1, [])
        first.kill()
    assert Path("scratch/repro/lock").is_file()
    assert repro.run_pipeline(1, []) == 0
