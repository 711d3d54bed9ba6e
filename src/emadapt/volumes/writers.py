"""Outputs that open elsewhere: OME-TIFF stacks, and OME-Zarr 0.4 images with their scales; both say where they come from."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import track

from emadapt.errors import InputError
from emadapt.segment.job import CHUNK, Job
from emadapt.segment.partial import DTYPES, Partial, create_array
from emadapt.volumes.readers import Voxel, bare_name

TIFF_SUFFIXES = (".ome.tif", ".ome.tiff", ".tif", ".tiff")
ZARR_SUFFIXES = (".ome.zarr", ".zarr")
SMALLEST = 256
"""Scales end where a slice is no larger."""
CLASSIC = 2**32 - 2**25
"""Bytes, before compression, from which on a TIFF is a BigTIFF."""
TILED = 2**28
"""Pixels of a slice from which on a TIFF is tiled; ImageJ itself does not read tiles, Bio-Formats does."""

Array = npt.NDArray[Any]


def suffix_of(output: str) -> str:
    """The suffix by which the kind of file is chosen.

    Raises:
        InputError: it is none of these.
    """
    for suffix in (*TIFF_SUFFIXES, *ZARR_SUFFIXES):
        if output.lower().endswith(suffix) and len(Path(output).name) > len(suffix):
            return output[-len(suffix) :]
    raise InputError(
        output,
        found="an output of unknown kind",
        expected=f"a name with {', '.join((*TIFF_SUFFIXES, *ZARR_SUFFIXES))}",
        do="Choose one of these.",
    )


def targets(output: str, kinds: tuple[str, ...]) -> dict[str, Path]:
    """Where each kind of output goes, the table of instances among them: `m.tif`, `m-probabilities.tif`, `m-instances.csv`."""
    suffix = suffix_of(output)
    stem = output[: -len(suffix)]
    named = {kind: Path(f"{stem}-{kind}{suffix}") for kind in kinds if kind != "mask"}
    table = {"table": Path(f"{stem}-instances.csv")} if "instances" in kinds else {}
    return named | table | {"mask": Path(output)}  # the mask last: where it is, all is


def finish(partial: Partial, kind: str, output: str) -> Path:
    """Make the output of a kind from its finished array, still within the run's folder.

    Returns:
        The file or folder to be renamed.
    """
    if suffix_of(output).lower() in ZARR_SUFFIXES:
        add_scales(partial, kind)
        return partial.folder / kind
    path = partial.folder / f"{kind}.tif"
    write_tiff(path, partial.array(kind), partial.job, kind)
    return path


def provenance(job: Job, kind: str) -> dict[str, Any]:
    """What an output says of how it was made; of the input its name and size, for a path says who has it, and where."""
    meaning = {
        "mask": "255 where the probability is above the threshold",
        "probabilities": "255 times the probability",
        "instances": "number of the connected component",
    }
    known = job.to_json()
    kept = {
        k: known[k]
        for k in (
            "scale",
            "voxel_nm",
            "unit",
            "weights",
            "window",
            "zoom",
            "dataset",
            "domain",
            "sigma",
            "threshold",
            "flips",
            "version",
        )
    }
    return {"kind": kind, "values": meaning[kind], **_named(job), **kept}


def _named(job: Job) -> dict[str, Any]:
    """`input`, and where it is a single file `input_bytes`."""
    name = bare_name(job.input)
    sizes = [size for file, size, _ in job.stamp if file == name.partition(":/")[0]]
    return {"input": name, **({"input_bytes": sizes[0]} if sizes else {})}


def write_tiff(path: Path, array: Any, job: Job, kind: str) -> None:
    """An OME-TIFF, compressed, slice by slice; the same array gives the same bytes."""
    import tifffile

    z, y, x = job.shape
    about = json.dumps(provenance(job, kind))
    unique = hashlib.md5(json.dumps([about, job.stamp]).encode(), usedforsecurity=False).hexdigest()
    um = [round(v / 1e3, 9) for v in job.voxel_nm]
    metadata = {
        "axes": "ZYX",
        "Description": about,
        "Name": kind,
        "UUID": unique,
        **{f"PhysicalSize{a}": v for a, v in zip("ZYX", um, strict=True)},
        **{f"PhysicalSize{a}Unit": "µm" for a in "ZYX"},
    }
    tiles = (CHUNK, CHUNK) if y * x > TILED else None
    parts = _tiles(array) if tiles else _slices(array)
    with tifffile.TiffWriter(
        path, bigtiff=z * y * x * np.dtype(DTYPES[kind]).itemsize > CLASSIC, ome=True
    ) as tif:
        tif.write(
            parts,
            shape=(z, y, x),
            dtype=DTYPES[kind],
            photometric="minisblack",
            tile=tiles,
            compression="zlib",
            metadata=metadata,
            software="emadapt",
            resolution=(1e4 / um[2], 1e4 / um[1]),
            resolutionunit="CENTIMETER",
        )
    next(parts, None)  # for its progress: tifffile takes what it needs and does not ask for more


def _slices(array: Any) -> Iterator[Array]:
    """(Y, X) slices; those of a chunk are read together."""
    depth = array.chunks[0]
    for z in track(range(0, array.shape[0], depth), description="segment: writing"):
        yield from np.asarray(array[z : z + depth])


def _tiles(array: Any) -> Iterator[Array]:
    """Tiles of CHUNK x CHUNK, slice by slice."""
    for z in track(range(array.shape[0]), description="segment: writing"):
        for y in range(0, array.shape[1], CHUNK):
            rows = np.asarray(array[z, y : y + CHUNK])
            yield from (
                np.ascontiguousarray(rows[:, x : x + CHUNK])
                for x in range(0, array.shape[2], CHUNK)
            )


def add_scales(partial: Partial, kind: str) -> None:
    """Coarser scales of an output, and the metadata of OME-Zarr 0.4; memory does not grow with the volume."""
    import zarr

    factors = scale_factors(partial.job.shape, partial.job.voxel_nm)
    group = partial.folder / kind
    for level, factor in enumerate(factors[1:], 1):
        finer = zarr.open_array(group / str(level - 1), mode="r")
        step = [b // a for a, b in zip(factors[level - 1], factor, strict=True)]
        shape = tuple(-(-n // s) for n, s in zip(finer.shape, step, strict=True))
        coarse = create_array(group, level, shape, DTYPES[kind], finer.chunks[0])
        _shrink(finer, coarse, step, mean=kind == "probabilities")
    root = zarr.open_group(group, mode="r+")
    root.attrs.update(
        {
            "multiscales": [_multiscale(partial.job, kind, factors)],
            "emadapt": provenance(partial.job, kind),
        }
    )


def scale_factors(shape: tuple[int, int, int], voxel_nm: Voxel) -> list[list[int]]:
    """Of each scale against the finest, (z, y, x): at each step those axes are halved whose voxels are the shortest."""
    factors = [[1, 1, 1]]
    while max(n // f for n, f in zip(shape[1:], factors[-1][1:], strict=True)) > SMALLEST:
        now = factors[-1]
        sizes = [
            v * f if n // f > 1 else math.inf for v, f, n in zip(voxel_nm, now, shape, strict=True)
        ]  # what cannot be halved
        factors.append(
            [f * (2 if s <= 1.5 * min(sizes) else 1) for f, s in zip(now, sizes, strict=True)]
        )
    return factors


def _shrink(finer: Any, coarse: Any, step: list[int], mean: bool) -> None:
    """Fill an array from a finer one, a row of chunks at a time: means, or of labels the first voxel of each cell."""
    depth, rows, _ = coarse.chunks
    for z in track(range(0, coarse.shape[0], depth), description="segment: a coarser scale"):
        for y in range(0, coarse.shape[1], rows):
            part = np.asarray(
                finer[z * step[0] : (z + depth) * step[0], y * step[1] : (y + rows) * step[1]]
            )
            small = _means(part, step) if mean else part[tuple(slice(None, None, s) for s in step)]
            coarse[z : z + depth, y : y + rows] = small


def _means(part: Array, step: list[int]) -> Array:
    """Means of cells, rounded; cells at the far ends may be smaller."""
    total, count = part.astype(np.uint32), np.ones(part.shape, np.uint32)
    for axis, s in enumerate(step):
        edges = np.arange(0, part.shape[axis], s)
        total, count = np.add.reduceat(total, edges, axis), np.add.reduceat(count, edges, axis)
    return ((total + count // 2) // count).astype(part.dtype)


def _multiscale(job: Job, kind: str, factors: list[list[int]]) -> dict[str, Any]:
    """`multiscales` of OME-Zarr 0.4. Means lie in the middle of their cells, hence the translation."""
    datasets = []
    for level, factor in enumerate(factors):
        scale = [v * f for v, f in zip(job.voxel_nm, factor, strict=True)]
        changes: list[dict[str, Any]] = [{"type": "scale", "scale": scale}]
        if kind == "probabilities":
            changes.append(
                {
                    "type": "translation",
                    "translation": [
                        v * (f - 1) / 2 for v, f in zip(job.voxel_nm, factor, strict=True)
                    ],
                }
            )
        datasets.append({"path": str(level), "coordinateTransformations": changes})
    axes = [{"name": a, "type": "space", "unit": "nanometer"} for a in "zyx"]
    return {
        "version": "0.4",
        "name": kind,
        "axes": axes,
        "datasets": datasets,
        "type": "mean" if kind == "probabilities" else "nearest",
    }


def publish(made: dict[Path, Path], aside: Path) -> None:
    """Rename what is made to where it belongs; what is there is put aside first, so that a name never holds half of each.

    Raises:
        InputError: what was made is gone, here and where it belongs.
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
