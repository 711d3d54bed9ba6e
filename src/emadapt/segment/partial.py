"""OUTPUT.partial: what is done of a run, block by block, so that a killed run can go on."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from emadapt.errors import InputError
from emadapt.files import write_json, write_text
from emadapt.segment.job import Job, from_json
from emadapt.segment.runner import Runner, open_runner
from emadapt.volumes.write_zarr import create_array

DTYPES = {
    "mask": "uint8",
    "probabilities": "uint8",
    "instances": "uint32",
    "tiles": "uint16",
    "cores": "uint32",
}
"""Kind of output -> dtype. A mask is 0 and 255; 255 of `probabilities` is 1. Two are no outputs:
`tiles`, probabilities in steps of 1 / STEPS that are yet to be smoothed along z, and `cores`,
numbers of the interiors of objects that are yet to be grown."""
STEPS = 65535
SAID = {"stamp": "content of the volume", "kinds": "outputs", "card": "model.json"}
"""What fields of a job are called in an error, where their names do not say it."""
MARKER = "made-by-emadapt-segment"
"""A file in every folder that this module makes. No other folder is ever cleared or removed."""


def shape_of(job: Job, kind: str, shape: tuple[int, int, int]) -> tuple[int, ...]:
    """That of (Z, Y, X) voxels of an output; of several classes, probabilities have each."""
    return (*job.channels, *shape) if kind in ("probabilities", "tiles") else shape


class Partial:
    """The folder of a run.

    It holds run.json (the job), an OME-Zarr group for each kind of output whose array `0` is filled
    block by block, what phases keep in parts/, and done/PHASE-NUMBER.json for each finished block.
    """

    def __init__(self, folder: Path, job: Job) -> None:
        self.folder, self.job, self.blocks = folder, job, job.blocks()

    @functools.cached_property
    def runner(self) -> Runner:
        """The volume and the model, opened at first use."""
        return open_runner(self.job)

    def array(self, kind: str) -> Any:
        """The array of an output, see `shape_of`, open for writing."""
        import zarr

        return zarr.open_array(self.folder / kind / "0", mode="r+")

    def part(self, name: str) -> Path:
        """A file of a phase."""
        return self.folder / "parts" / name

    def mark(self, phase: str, number: int, facts: dict[str, Any]) -> None:
        """Note that a block is finished and all of it is written."""
        write_json(self._mark(phase, number), facts)

    def left(self, phase: str) -> list[int]:
        """Numbers of blocks that are not finished."""
        have = {path.name for path in (self.folder / "done").glob(f"{phase}-*.json")}
        return [n for n in range(len(self.blocks)) if self._mark(phase, n).name not in have]

    def facts(self, phase: str) -> list[dict[str, Any]]:
        """What was noted of each block."""
        return [json.loads(self._mark(phase, n).read_text()) for n in range(len(self.blocks))]

    def _mark(self, phase: str, number: int) -> Path:
        return self.folder / "done" / f"{phase}-{number:06d}.json"


def opened(folder: str) -> Partial:
    """A run that another process may have begun; opened once a process."""
    stat = (Path(folder) / "run.json").stat()
    return _opened(folder, (stat.st_ino, stat.st_mtime_ns))


@functools.lru_cache(maxsize=1)
def _opened(folder: str, _stamp: tuple[int, int]) -> Partial:
    """The stamp keeps a process that lives on from taking an older run of the same name."""
    return Partial(Path(folder), from_json(json.loads((Path(folder) / "run.json").read_text())))


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder of a run for this process alone; made if it does not exist."""
    folder.mkdir(exist_ok=True)
    if not (folder / MARKER).exists():
        if any(folder.iterdir()):
            found, expected = "a folder that emadapt did not make", "none: a run's results go there"
            raise InputError(
                folder, found=found, expected=expected, do="Move it, or choose another output."
            )
        write_text(folder / MARKER, "Repeat the command of this run to go on with it.\n")
    try:
        with FileLock(folder / "lock", timeout=0):
            yield
    except Timeout:
        found, expected = "a run that is still going", "one run for an output"
        raise InputError(folder, found=found, expected=expected, do="Wait for it.") from None


def clear(folder: Path) -> None:
    """Empty a folder that is `held`, so that it can be begun anew."""
    (folder / "run.json").unlink(missing_ok=True)  # first: without it the rest is no run
    for path in folder.iterdir():
        if path.name not in (MARKER, "lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def begin(folder: Path, job: Job, overwrite: bool) -> Partial:
    """Set up a folder that is `held`, or take over what a run of the same job left there."""
    run = folder / "run.json"
    if run.is_file():
        try:
            known = dict(json.loads(run.read_text()))
        except ValueError:  # damaged
            known = {}
        wanted = job.to_json()
        if known == wanted:
            return opened(str(folder))
        if not overwrite:
            keys = sorted(known.keys() | wanted.keys())
            odd = [SAID.get(key, key) for key in keys if known.get(key) != wanted.get(key)]
            raise InputError(
                folder,
                found=f"a run that was stopped and had another {', '.join(odd)}",
                expected="one that can be gone on with",
                do="Repeat the command of that run, or begin anew with --overwrite.",
            )
    clear(folder)
    (folder / "parts").mkdir()
    cored = job.cored and "instances" in job.kinds
    between = {"tiles": job.reach, "cores": cored}
    for kind in (*job.kinds, *(kind for kind, wanted in between.items() if wanted)):
        create_array(folder / kind, 0, shape_of(job, kind, job.shape), DTYPES[kind], job.depth)
    write_json(run, job.to_json())  # last: without it the folder counts as empty
    return opened(str(folder))
