"""benchmarks/gpu.sh and the jobs of studies/paper, as far as they run without GPU and cluster."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from benchmarks import gpu, workplace
from emadapt.study.loading import load_study
from shipped import emadapt

ROOT = Path(__file__).resolve().parents[1]
PAPER = ROOT / "studies/paper"


@pytest.mark.slow
def test_all_of_it_runs_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verbs run in this process: each in one of its own takes seconds to start."""
    here = SimpleNamespace(run=lambda command, **_: emadapt(*command[3:]), DEVNULL=None)
    monkeypatch.setattr(workplace, "subprocess", here)
    monkeypatch.setenv("EMADAPT_TRACKING", "off")
    out = tmp_path / "gpu.json"
    gpu.measured(gpu.SMALL, list(gpu.SECTIONS), out)
    rows = json.loads(out.read_text())["rows"]
    assert not [row["what"] for row in rows if row["what"].startswith("failed")]
    assert {row["section"] for row in rows} == set(gpu.SECTIONS)
    errors = [row["value"] for row in rows if row["unit"] == "relative error"]
    assert max(errors) < 0.02, "half precision on the device against fp32 on the CPU"


@pytest.mark.slow
def test_the_script_runs_a_section(tmp_path: Path) -> None:
    words = ["--small", "--out", str(tmp_path / "gpu.json"), "setup"]
    environment = os.environ | {"PYTHON": sys.executable}
    subprocess.run([ROOT / "benchmarks/gpu.sh", *words], env=environment, check=True)
    assert (tmp_path / "gpu.json").is_file()


@pytest.mark.parametrize("index", [0, 179])
@pytest.mark.parametrize("variable", ["SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX"])
def test_the_papers_jobs_train_each_unit_once(tmp_path: Path, index: int, variable: str) -> None:
    """Of SLURM's array and of Kubernetes' indexed job, with a stub in the place of emadapt."""
    units = sorted(unit.name for unit in load_study(PAPER / "study.yaml").units())
    job = yaml.safe_load((PAPER / "job.yaml").read_text())["spec"]
    script = (PAPER / "train.sbatch").read_text()
    assert job["completions"] == len(units)
    assert f"--array=0-{len(units) - 1}%{job['parallelism']} " in script
    (tmp_path / "build/plan/train").mkdir(parents=True)
    for unit in units:
        (tmp_path / f"build/plan/train/{unit}.json").touch()
    stub = tmp_path / ".venv/bin/emadapt"
    stub.parent.mkdir(parents=True)
    stub.write_text('#!/bin/sh\necho "$@ $EMADAPT_TRACKING"\n')
    stub.chmod(0o755)
    (container,) = job["template"]["spec"]["containers"]
    command = [*container["command"][:-1], ROOT / container["command"][-1]]
    environment = {"PATH": os.environ["PATH"], variable: str(index)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)
    plans = sorted((f"{unit}.json" for unit in units), key=str)
    assert done.stdout.decode() == f"train {plans[index].removesuffix('.json')} later\n"
