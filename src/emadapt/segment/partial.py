"""OUTPUT.partial: what is done of a run, block by block. A run that was killed goes on with the blocks that are left."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from emadapt.errors import InputError
from emadapt.files import write_json
from emadapt.models.predict import Probability, smooth_z
from emadapt.segment.job import Block, Job, Runner, from_json, open_runner
from emadapt.volumes.write_zarr import create_array

DTYPES = {"mask": "uint8", "probabilities": "uint8", "instances": "uint32", "tiles": "uint16"}
"""Kind of output -> dtype. A mask is 0 and 255; 255 of `probabilities` is 1. `tiles` is no output: probabilities that are to be
smoothed along z, in steps of 1 / STEPS."""
STEPS = 65535


class Partial:
    """The folder of a run.

    It holds run.json (the job), an OME-Zarr group for each kind of output whose array `0` is filled block by block, what phases
    keep in parts/, and done/PHASE-NUMBER.json for each block that is finished.
    """

    def __init__(self, folder: Path, job: Job) -> None:
        self.folder, self.job, self.blocks = folder, job, job.blocks()

    def array(self, kind: str, level: int = 0) -> Any:
        """The (Z, Y, X) array of an output, open for writing."""
        import zarr

        return zarr.open_array(self.folder / kind / str(level), mode="r+")

    def part(self, name: str) -> Path:
        """A file of a phase."""
        return self.folder / "parts" / name

    def mark(self, phase: str, number: int, facts: dict[str, Any]) -> None:
        """A block is finished, and all of it is written."""
        write_json(self._mark(phase, number), facts)

    def left(self, phase: str) -> list[int]:
        """Numbers of blocks that are not finished."""
        have = {path.name for path in (self.folder / "done").glob(f"{phase}-*.json")}
        return [n for n in range(len(self.blocks)) if self._mark(phase, n).name not in have]

    def facts(self, phase: str) -> list[dict[str, Any]]:
        """What was said of each block."""
        return [json.loads(self._mark(phase, n).read_text()) for n in range(len(self.blocks))]

    def _mark(self, phase: str, number: int) -> Path:
        return self.folder / "done" / f"{phase}-{number:06d}.json"


def work(folder: str, phase: str, number: int) -> int:
    """Finish one block of a phase, in whatever process this is: what a worker of a cluster is sent.

    Returns:
        The number.
    """
    partial = opened(folder, stamp_of(folder))
    PHASES[phase](partial, number)
    return number


@functools.lru_cache(maxsize=1)
def opened(folder: str, _stamp: tuple[int, int]) -> Partial:
    """A run that another process has begun."""
    return Partial(Path(folder), from_json(json.loads((Path(folder) / "run.json").read_text())))


def stamp_of(folder: str) -> tuple[int, int]:
    """So that a process that lives on never takes an older run of the same name."""
    stat = (Path(folder) / "run.json").stat()
    return stat.st_ino, stat.st_mtime_ns


@functools.lru_cache(maxsize=1)
def _runner(folder: str, _stamp: tuple[int, int]) -> Runner:
    return open_runner(opened(folder, _stamp).job)


def runner_of(partial: Partial) -> Runner:
    """The run's volume and model, opened once a process."""
    folder = str(partial.folder)
    return _runner(folder, stamp_of(folder))


def begin(folder: Path, job: Job, overwrite: bool) -> Partial:
    """Make the folder of a run, or take the one that a run of the same job left.

    Raises:
        InputError: there is one of another job.
    """
    run = folder / "run.json"
    if run.is_file():
        try:
            known = json.loads(run.read_text())
        except ValueError:
            known = {}
        if known == job.to_json():
            return Partial(folder, job)
        if not overwrite:
            odd = sorted(
                k
                for k in known.keys() | job.to_json().keys()
                if known.get(k) != job.to_json().get(k)
            )
            raise InputError(
                folder,
                found=f"a run that was stopped and had another {', '.join(odd)}",
                expected="one that can be gone on with",
                do="Repeat the command of that run, or begin anew with --overwrite.",
            )
    for path in folder.iterdir():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "parts").mkdir()
    for kind in (*job.kinds, *(["tiles"] if job.reach else [])):
        create_array(folder / kind, 0, job.shape, DTYPES[kind], job.depth)
    write_json(run, job.to_json())  # last: without it the folder counts as empty
    return Partial(folder, job)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder for this process alone, made if it is not there.

    Raises:
        InputError: another process has it, or it cannot be made.
    """
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(
            folder,
            found=f"a place where no folder can be made ({error.strerror})",
            expected="one that can be written to",
            do="Choose another output.",
        ) from error
    try:
        with FileLock(folder / "lock", timeout=0):
            yield
    except Timeout:
        raise InputError(
            folder,
            found="a run that is under way",
            expected="one run for an output",
            do="Wait for it.",
        ) from None


def segment_block(partial: Partial, number: int, loaded: Any = None) -> None:
    """A block through the model: probabilities to be smoothed along z, or at once what is written.

    Args:
        partial: the run.
        number: of the block.
        loaded: what was read of it ahead; None: nothing.
    """
    block, job, runner = partial.blocks[number], partial.job, runner_of(partial)
    loaded = runner.load(block) if loaded is None else loaded
    rows = runner.probability(block, loaded)
    if not job.reach:
        _threshold(partial, number, rows)
        return
    kept = np.empty(_extent(block, job), np.uint16)
    for z, y, some in rows:
        kept[z - block.z0, y - block.y0 : y - block.y0 + len(some)] = np.rint(some * STEPS)
    partial.array("tiles")[within(block)] = kept
    partial.mark("tiles", number, {})


def smooth_block(partial: Partial, number: int) -> None:
    """Phase `mask` after `tiles`: a block's probabilities smoothed along z, with slices of the blocks beside it."""
    block, job = partial.blocks[number], partial.job
    array, z0, z1 = (
        partial.array("tiles"),
        max(0, block.z0 - job.reach),
        min(job.shape[0], block.z1 + job.reach),
    )
    around = (
        (z, np.asarray(array[z, block.y0 : block.y1], np.float32) / np.float32(STEPS))
        for z in range(z0, z1)
    )
    _threshold(
        partial,
        number,
        (
            (z, block.y0, rows)
            for z, rows in smooth_z(around, job.sigma)
            if block.z0 <= z < block.z1
        ),
    )


def _threshold(partial: Partial, number: int, rows: Iterable[tuple[int, int, Probability]]) -> None:
    """Write the mask of a block and, where they are asked for, its probabilities."""
    block, job = partial.blocks[number], partial.job
    out = {
        kind: np.empty(_extent(block, job), np.uint8) for kind in job.kinds if kind != "instances"
    }
    for z, y, some in rows:
        place = z - block.z0, slice(y - block.y0, y - block.y0 + len(some))
        out["mask"][place] = np.where(some > job.threshold, 255, 0)
        if "probabilities" in out:
            out["probabilities"][place] = np.rint(some * 255)
    for kind, values in out.items():
        partial.array(kind)[within(block)] = values
    partial.mark("mask", number, {"foreground": int(np.count_nonzero(out["mask"]))})


def _extent(block: Block, job: Job) -> tuple[int, int, int]:
    return block.z1 - block.z0, block.y1 - block.y0, job.shape[2]


def within(block: Block) -> tuple[slice, slice, slice]:
    """Where a block lies in the volume."""
    return slice(block.z0, block.z1), slice(block.y0, block.y1), slice(None)


def _mask(partial: Partial, number: int) -> None:
    (smooth_block if partial.job.reach else segment_block)(partial, number)


def _components(partial: Partial, number: int) -> None:
    from emadapt.segment.instances import label_block

    label_block(partial, number)


def _instances(partial: Partial, number: int) -> None:
    from emadapt.segment.instances import number_block

    number_block(partial, number)


PHASES: dict[str, Callable[[Partial, int], None]] = {
    "tiles": segment_block,
    "mask": _mask,
    "components": _components,
    "instances": _instances,
}
"""What is done with all blocks, one phase after the other; `tiles` for models that smooth along z, the last two for instances."""
