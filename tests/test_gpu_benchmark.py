"""benchmarks/gpu.sh, as far as it runs without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gpu, workplace
from shipped import emadapt

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_all_of_it_runs_in_small(tmp_path, monkeypatch):
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
def test_the_script_runs_a_section(tmp_path):
    words = ["--small", "--out", str(tmp_path / "gpu.json"), "setup"]
    environment = os.environ | {"PYTHON": sys.executable}
    subprocess.run([ROOT / "benchmarks/gpu.sh", *words], env=environment, check=True)
    assert (tmp_path / "gpu.json").is_file()
