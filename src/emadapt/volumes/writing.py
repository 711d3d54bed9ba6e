"""Formats that are written. A format is a file of this room and an entry of `WRITERS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from emadapt.errors import InputError
from emadapt.volumes.voxel import Voxel
from emadapt.volumes.write_tiff import write_ome_tiff, write_tiff
from emadapt.volumes.write_zarr import write_zarr

Writer = Callable[[Path, str, Voxel, Mapping[str, Any]], Path]
"""(Group with a finished array `0`, name, voxel in nm, how it was made) -> file or folder."""

WRITERS: dict[str, Writer] = {
    ".ome.tif": write_ome_tiff,
    ".ome.tiff": write_ome_tiff,
    ".tif": write_tiff,
    ".tiff": write_tiff,
    ".ome.zarr": write_zarr,
    ".zarr": write_zarr,
}
"""By the suffix of an output's name."""


def suffix_of(output: str) -> str:
    """The suffix of `WRITERS` that a name ends with, as it is written there.

    Raises:
        InputError: it ends with none.
    """
    for suffix in WRITERS:
        if output.lower().endswith(suffix) and len(Path(output).name) > len(suffix):
            return output[-len(suffix) :]
    expected = f"a name with {', '.join(WRITERS)}"
    raise InputError(
        output, found="an output of unknown kind", expected=expected, do="Choose one of these."
    )
