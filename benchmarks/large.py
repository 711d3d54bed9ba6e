"""A large volume through mask, objects and measures: seconds, and peak memory of a process.

`python -m benchmarks.large Z Y X` writes a synthetic OME-Zarr of that size, and a mask of its
objects, in the current folder. It fits the smallest model to pixels four times as wide, segments
the volume on two dask workers, killed twice and resumed, and measures the objects. The objects of
the mask that was drawn are measured, too. With --again the volume is also segmented without a kill,
and the results are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import tifffile
import zarr

from benchmarks.timing import print_table
from benchmarks.workplace import write_study
from emadapt.volumes.write_zarr import create_array

COARSE = 4
"""Voxels are drawn so many times as wide, and repeated."""
VOXEL_NM = 40.0, 5.0, 5.0
DRAWN_NM = 40.0, 20.0, 20.0
SLAB, PER_UM3 = 16, 0.7
UNIT = "b-frozen-noise-0"


class Cost(NamedTuple):
    """Seconds, seconds of processors, and the most memory in MB that a process had."""

    seconds: float
    cpu_s: float
    peak_mb: float


def drawn(shape: tuple[int, ...]) -> np.ndarray:
    """A mask (Z, Y, X) of ellipsoids that are 0.3 to 1.8 µm long, in voxels of `DRAWN_NM`."""
    rng, mask = np.random.default_rng(0), np.zeros(shape, bool)
    size = np.multiply(shape, DRAWN_NM)
    for _ in range(round(PER_UM3 * size.prod() / 1e9)):
        turned = np.linalg.qr(rng.standard_normal((3, 3)))[0]
        to_ball = turned / rng.uniform((150, 150, 400), (250, 250, 900))
        centre, reach = rng.random(3) * size, np.linalg.norm(np.linalg.inv(to_ball), axis=0)
        low = np.maximum((centre - reach) // DRAWN_NM, 0).astype(int)
        high = ((centre + reach) // DRAWN_NM + 1).astype(int)
        part = mask[tuple(map(slice, low, high))]
        places = np.moveaxis(np.indices(part.shape), 0, -1) + low
        part |= (((places * DRAWN_NM - centre) @ to_ball) ** 2).sum(-1) <= 1
    return mask


def write(name: str, volume: np.ndarray) -> None:
    """Write a drawn volume as an OME-Zarr of one scale, in voxels of `VOXEL_NM`, slab by slab."""
    z, y, x = volume.shape
    array = create_array(Path(name), 0, (z, y * COARSE, x * COARSE), "uint8", SLAB)
    for z0 in range(0, z, SLAB):
        array[z0 : z0 + SLAB] = volume[z0 : z0 + SLAB].repeat(COARSE, 1).repeat(COARSE, 2)
    scaled = [{"type": "scale", "scale": VOXEL_NM}]
    zarr.open_group(name).attrs["multiscales"] = [
        {
            "version": "0.4",
            "axes": [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"],
            "datasets": [{"path": "0", "coordinateTransformations": scaled}],
        }
    ]


def fit(image: np.ndarray, mask: np.ndarray) -> None:
    """Train the smallest model on drawn slices."""
    folder = Path("data/noise")
    folder.mkdir(parents=True)
    for name, volume in (("image", image), ("label", mask.astype(np.uint8))):
        tifffile.imwrite(folder / f"{name}.tif", volume, photometric="minisblack")
    backbone = {"arch": "tiny_dinov2", "tile": 252, "overlap": 0.1}
    settings = {"epochs": 2, "steps_per_epoch": 60}
    write_study(backbone, {"frozen": {"kind": "frozen"}}, settings, DRAWN_NM)
    run("ingest", "noise")
    run("train", UNIT)


def run(*words: str, stop: Callable[[], bool] = lambda: False) -> Cost:
    """What a verb and its processes take; all are killed once `stop` says so."""
    command, started = [sys.executable, "-m", "emadapt", *words], time.perf_counter()
    environment = os.environ | {"EMADAPT_TRACKING": "off"}
    process = psutil.Popen(command, env=environment, start_new_session=True)
    cpu: dict[int, float] = {}
    peak = 0
    while process.poll() is None:
        for each in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):  # it has ended since
                cpu[each.pid] = sum(each.cpu_times()[:2])
                peak = max(peak, each.memory_info().rss)
        if stop():
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.2)
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"{' '.join(words)}: {process.returncode}")
    return Cost(time.perf_counter() - started, sum(cpu.values()), peak / 2**20)


def segment(output: str, killed_in: tuple[str, ...] = ()) -> Cost:
    """Segment the volume, killed once two blocks of each of these phases are done."""

    def begun(phase: str) -> bool:
        return len([*Path(f"{output}.partial/done").glob(f"{phase}-*")]) > 1

    words = "segment", "image.zarr", output, "--model", f"build/units/{UNIT}", "--instances"
    words = *words, "--min-voxels", "1000", "--dask", "local:2"
    tries = [run(*words, stop=lambda phase=phase: begun(phase)) for phase in killed_in]
    seconds, cpu, peaks = zip(*tries, run(*words), strict=True)
    return Cost(sum(seconds), sum(cpu), max(peaks))


def digest(pattern: str) -> str:
    """Of all files of these names."""
    found = hashlib.sha256()
    for path in sorted(path for path in Path().glob(pattern) if path.is_file()):
        found.update(path.read_bytes())
    return found.hexdigest()


def main() -> None:
    """Print a table of steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", nargs=3, type=int)
    parser.add_argument("--again", action="store_true")
    asked = parser.parse_args()
    z, y, x = asked.shape
    mask = drawn((z, y // COARSE, x // COARSE))
    noise = np.random.default_rng(1).normal(170, 12, mask.shape).astype(np.uint8)
    image = np.where(mask, noise - 80, noise)
    write("image.zarr", image)
    write("drawn.zarr", mask.astype(np.uint8) * 255)
    fit(image[:48, :512, :512], mask[:48, :512, :512])
    steps = {
        "segment --instances, killed twice": segment("mask.zarr", ("mask", "instances")),
        "measure, objects": run("measure", "mask-instances.zarr", "found.csv", "--jobs", "2"),
        "measure, a mask": run("measure", "drawn.zarr", "drawn.csv", "--jobs", "2"),
    }
    if asked.again:
        steps["segment --instances"] = segment("again.zarr")
        same = digest("mask*/0/**/*") == digest("again*/0/**/*")
        print(f"the same bytes: {same}")
    print_table([{"step": step, **cost._asdict()} for step, cost in steps.items()])


if __name__ == "__main__":
    main()
