"""Open a volume by its name. A format is a file of this room and an entry of `FORMATS`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from emadapt.errors import InputError
from emadapt.volumes.folder import open_folder
from emadapt.volumes.hdf5 import open_hdf5
from emadapt.volumes.nifti import open_nifti, open_nifti_label
from emadapt.volumes.png import open_png
from emadapt.volumes.source import Choice, Source, as_image, unreadable
from emadapt.volumes.tiff import open_tiff
from emadapt.volumes.zarrs import is_zarr, open_zarr

Opener = Callable[[Path, Choice], Source]
"""(File or folder, which image within it) -> volume."""

FORMATS: dict[str, Opener] = {
    ".tif": open_tiff,
    ".tiff": open_tiff,
    ".png": open_png,
    ".h5": open_hdf5,
    ".hdf5": open_hdf5,
    ".hdf": open_hdf5,
    ".he5": open_hdf5,
    ".nii": open_nifti,
    ".nii.gz": open_nifti,
    ".zarr": open_zarr,
}
"""By the suffix of the name; other folders are folders of slices."""
PLACE = re.compile(r"\w+=(\d+|z)")
"""A place along an axis, or an axis that is z."""


def open_source(text: str, scale: int = 0) -> Source:
    """Open a volume; only what describes it is read.

    Args:
        text: a TIFF, PNG, NIfTI or HDF5 file, a folder of TIFF or PNG slices, a Zarr array or
            group, or an OME-Zarr image (`v.zarr`, `v.zarr/within`). Of several images in a file one
            is named after `:/` (`v.h5:/raw`, `v.tif:/1`), of several channels one after its axis
            (`v.tif:/c=0`, `v.h5:/raw,c=0`).
        scale: of an OME-Zarr image, 0 for the finest.

    Raises:
        InputError: it is not there, not one of these, or no stack of grey slices.
    """
    path, inside = _split(text)
    words = inside.split(",")
    at = dict(word.split("=") for word in words if PLACE.fullmatch(word))
    named = ",".join(word for word in words if not PLACE.fullmatch(word))
    try:
        return _opener(path)(path, Choice(named, scale, at))
    except InputError:
        raise
    except Exception as error:  # whatever a library meets in what a file says of itself
        raise unreadable(text, "no volume that can be read", error) from error


def open_image(text: str, scale: int = 0) -> Source:
    """As `open_source`, for grey values: see `as_image`."""
    return as_image(open_source(text, scale))


def open_onto(text: str, other: Source) -> Source:
    """As `open_source`; a NIfTI file is turned onto another one, see `open_nifti_label`."""
    files = Path(text), *other.files
    if len(files) == 2 and all(file.name.lower().endswith((".nii", ".nii.gz")) for file in files):
        return open_nifti_label(*files)
    return open_source(text)


def bare_name(text: str) -> str:
    """A volume's name without the folders above it: `em.tif`, `em.h5:/raw`, `em.zarr/0`."""
    path, inside = _split(text)
    first = next((p for p in (path, *path.parents) if p.suffix.lower() == ".zarr"), path)
    return f"{path.relative_to(first.parent)}" + (f":/{inside}" if inside else "")


def check_apart(output: Path, volume: str) -> None:
    """Raise an InputError for an output that is a volume to be read, or is within or around it."""
    place, source = output.resolve(), _split(volume)[0].resolve()
    if source == place or place in source.parents or source in place.parents:
        found, expected = "the input itself, or a part of it or around it", "another place"
        raise InputError(output, found=found, expected=expected, do="Choose another output.")


def _split(text: str) -> tuple[Path, str]:
    """A file, and the name of an image within it after `:/`."""
    file, _, inside = text.partition(":/")
    known = Path(file).suffix.lower() in FORMATS or is_zarr(Path(file))
    return (Path(file), inside) if inside and known else (Path(text), "")


def _opener(path: Path) -> Opener:
    if is_zarr(path):
        return open_zarr
    if path.is_dir():
        return open_folder
    name = path.name.lower()
    for suffix, opener in FORMATS.items():
        if name.endswith(suffix) and path.is_file():
            return opener
    raise InputError(
        path,
        found="a file of another kind" if path.exists() else "no such volume",
        expected=f"a name with {', '.join(FORMATS)}, or a folder of slices",
        do="Check the path.",
    )
