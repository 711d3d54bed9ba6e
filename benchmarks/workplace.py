"""A temporary checkout with volumes of noise and a study, in which the verbs of emadapt run."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import yaml

from emadapt.training.costs import cost_of


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A temporary folder, made the working directory."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        yield Path(folder)


def write_volume(name: str, slices: int, side: int) -> None:
    """Write a dataset of noise in data/NAME, written slice by slice."""
    rng, folder = np.random.default_rng(0), Path("data") / name
    folder.mkdir(parents=True)
    for file, high in (("image", 256), ("label", 2)):
        with tifffile.TiffWriter(folder / f"{file}.tif") as writer:
            for _ in range(slices):
                plane = rng.integers(0, high, (side, side), dtype=np.uint8)
                writer.write(plane, photometric="minisblack", contiguous=True)


def write_study(
    backbone: dict[str, Any],
    regimes: dict[str, dict[str, Any]],
    train: dict[str, Any],
    voxel_nm: Sequence[float] = (5, 5, 5),
) -> None:
    """Write params.yaml: a study of the dataset `noise` with one backbone `b` of random weights."""
    study = {
        "name": "benchmark",
        "datasets": ["noise"],
        "backbones": ["b"],
        "regimes": list(regimes),
        "train_sets": ["noise"],
        "seeds": [0],
    }
    params = {
        "study": study,
        "datasets": {"noise": {"layout": "stack", "voxel_nm": [*voxel_nm], "foreground": [1]}},
        "train_sets": {"noise": ["noise"]},
        "backbones": {"b": {"source": "random", "views": 1, **backbone}},
        "regimes": regimes,
        "split": {"val": 0.125, "test": 0.25, "gap_nm": 0.0},
        "train": {"val_slices": 1, "warmup_steps": 0, **train},
        "diagnose": "default",
    }
    Path("params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def emadapt(*words: str) -> tuple[float, float]:
    """Run a verb in a process of its own, without tracking.

    Returns:
        Its seconds, and the largest memory in MB of all processes that have run so far.
    """
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "emadapt", *words],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"EMADAPT_TRACKING": "off"},
    )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return time.perf_counter() - started, peak


def train(regime: str) -> dict[str, Any]:
    """Train the unit of a regime; its history: `epochs`, `seconds`, `peak_mb`."""
    emadapt("train", f"b-{regime}-noise-0")
    folder = Path(f"build/units/b-{regime}-noise-0")
    history, card = (json.loads((folder / f).read_text()) for f in ("history.json", "model.json"))
    return history | cost_of(card["key"])
