"""Outputs: their names, what they say of how they were made, and putting them in place."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

from emadapt.errors import InputError
from emadapt.segment.job import Job, Order
from emadapt.training.overlays import CLASSES
from emadapt.volumes.opening import bare_name, check_apart
from emadapt.volumes.writing import WRITERS, suffix_of

MEANING = {
    "mask": "255 where the probability is above the threshold",
    "ids": "ids of classes, 0 in the background",
    "probabilities": "255 times the probability",
    "instances": "number of the connected component",
}
"""What the values of each kind of output are, and those of a mask of several classes."""
SAID = (
    "scale",
    "voxel_nm",
    "unit",
    "weights",
    "window",
    "zoom",
    "second_zoom",
    "dataset",
    "sigma",
    "threshold",
    "version",
)
"""Fields of a job that outputs name; no paths, which say who has a file, and where."""
WITHOUT_MODEL = ("scale", "voxel_nm", "version")
"""Of a mask that was only numbered."""


def targets(output: str, kinds: tuple[str, ...]) -> dict[str, Path]:
    """Where each kind of output goes: `m.tif`, `m-probabilities.tif`, `m-instances.csv`.

    Raises:
        InputError: the output is of a kind that cannot be written.
    """
    suffix = suffix_of(output)
    stem = output[: -len(suffix)]
    named = {kind: Path(f"{stem}-{kind}{suffix}") for kind in kinds if kind != "mask"}
    table = {"table": Path(f"{stem}-instances.csv")} if "instances" in kinds else {}
    return named | table | {"mask": Path(output)}  # the mask last: once it is there, all are


def check_output(order: Order, is_finished: bool) -> None:
    """Raise an InputError, before any work, if the outputs cannot be written.

    `is_finished`: a run was stopped while it put its outputs in place.
    """
    places = list(targets(order.output, order.kinds).values())
    parent = Path(order.output).resolve().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise _refused(order.output, f"no folder {parent} that can be written to", "one")
    for place in places:
        check_apart(place, order.input)
    there = [path for path in places if path.exists()]
    if there and not order.overwrite and not is_finished:
        raise InputError(
            ", ".join(map(str, there)),
            found="an output of that name",
            expected="none",
            do="Choose another name, or replace it with --overwrite.",
        )
    for path in there:
        if path.is_dir() and not _is_ours(path):
            found = "a folder that emadapt did not write"
            raise _refused(path, found, "none, or an output of `emadapt segment`")


def _refused(path: str | Path, found: str, expected: str) -> InputError:
    return InputError(path, found=found, expected=expected, do="Choose another output.")


def _is_ours(path: Path) -> bool:
    """Whether a Zarr says that it was segmented by emadapt."""
    try:
        return "emadapt" in json.loads((path / ".zattrs").read_text())
    except (OSError, ValueError):
        return False


def finish(job: Job, group: Path, output: str) -> Path:
    """Make the file or folder to be renamed, of the finished array in the group KIND of a run."""
    write = WRITERS[suffix_of(output).lower()]
    return write(group, group.name, job.voxel_nm, provenance(job, group.name))


def provenance(job: Job, kind: str) -> dict[str, Any]:
    """What an output says of how it was made; of the input its name and size, not its folder."""
    name = bare_name(job.input)
    sizes = [size for file, size, _ in job.stamp if file == name.partition(":/")[0]]
    source = {"input": name, **({"input_bytes": sizes[0]} if sizes else {})}
    named = SAID if job.model else WITHOUT_MODEL
    kept = {key: value for key, value in job.to_json().items() if key in named}
    several = bool(job.channels) and kind != "instances"
    values = MEANING["ids" if several and kind == "mask" else kind]
    about = {"kind": kind, "values": values, **source, **kept}
    if several:
        del about["threshold"]
        colours = zip(job.classes, itertools.cycle(CLASSES), strict=False)
        about["classes"] = [
            {"id": number, "name": name, "colour": colour}
            for number, (name, colour) in enumerate(colours, 1)
        ]
    return about


def publish(made: dict[Path, Path], aside: Path) -> None:
    """Rename what is made to its place; what is there is put aside first, never mixed with it."""
    aside.mkdir(exist_ok=True)
    for source, target in made.items():
        if not source.exists():  # renamed before an interruption
            continue
        if target.exists():
            shutil.rmtree(aside / target.name, ignore_errors=True)
            target.rename(aside / target.name)
        source.rename(target)
