"""Outputs: their names, what they say of how they were made, and putting them in place."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from emadapt.errors import InputError
from emadapt.segment.job import Job
from emadapt.segment.partial import Partial
from emadapt.volumes.opening import bare_name
from emadapt.volumes.writing import WRITERS, suffix_of

MEANING = {
    "mask": "255 where the probability is above the threshold",
    "probabilities": "255 times the probability",
    "instances": "number of the connected component",
}
"""What the values of each kind of output are."""
SAID = (
    "scale",
    "voxel_nm",
    "unit",
    "weights",
    "window",
    "zoom",
    "dataset",
    "sigma",
    "threshold",
    "version",
)
"""Fields of a job that outputs name; no paths, which say who has a file, and where."""


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


def finish(partial: Partial, kind: str, output: str) -> Path:
    """Make the output of a kind from its finished array, still within the run's folder.

    Returns:
        The file or folder to be renamed.
    """
    write = WRITERS[suffix_of(output).lower()]
    job = partial.job
    return write(partial.folder / kind, kind, job.voxel_nm, provenance(job, kind))


def provenance(job: Job, kind: str) -> dict[str, Any]:
    """What an output says of how it was made; of the input its name and size, not its folder."""
    name = bare_name(job.input)
    sizes = [size for file, size, _ in job.stamp if file == name.partition(":/")[0]]
    source = {"input": name, **({"input_bytes": sizes[0]} if sizes else {})}
    kept = {key: value for key, value in job.to_json().items() if key in SAID}
    return {"kind": kind, "values": MEANING[kind], **source, **kept}


def publish(made: dict[Path, Path], aside: Path) -> None:
    """Rename what is made to its place; what is there is put aside first, never mixed with it.

    Raises:
        InputError: what was made is gone, from the run's folder and from its place.
    """
    aside.mkdir(exist_ok=True)
    for source, target in made.items():
        if not source.exists():
            if not target.exists():
                raise InputError(
                    source,
                    found="nothing",
                    expected="what was made, or it in its place",
                    do="Run it again.",
                )
            continue  # renamed before an interruption
        if target.exists():
            shutil.rmtree(aside / target.name, ignore_errors=True)
            target.rename(aside / target.name)
        source.rename(target)
