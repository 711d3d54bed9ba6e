"""Slices of volumes in NIfTI, HDF5 and Zarr, opened as `emadapt segment` opens them."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emadapt.errors import InputError

SUFFIXES = (".nii", ".nii.gz", ".h5", ".hdf5", ".zarr", ".ome.zarr")
HELD = 2**28
"""Bytes of neighbouring slices that are kept, where the file stores them together."""


class Stack:
    """A volume, some slices at a time: those that a chunk of the file holds are decoded once."""

    def __init__(self, path: Path) -> None:
        from emadapt.volumes.readers import open_source

        self.source, self.lock = open_source(str(path)), threading.Lock()
        self.n_slices = self.source.shape[0]
        size = self.source.shape[1] * self.source.shape[2] * self.source.dtype.itemsize
        self.depth = max(1, min(self.source.depth, HELD // size))
        self.first, self.held = 0, np.empty((0, 0, 0))

    def read(self, z: int) -> npt.NDArray[Any]:
        """Slice z, (Y, X)."""
        with self.lock:
            if not self.first <= z < self.first + len(self.held):
                self.first = z // self.depth * self.depth
                self.held = self.source.read(
                    self.first, min(self.first + self.depth, self.n_slices)
                )
            return np.array(self.held[z - self.first])


@functools.lru_cache(maxsize=4)
def _open(path: Path, _stamp: tuple[Any, ...]) -> Stack:
    return Stack(path)


def is_stack(path: Path) -> bool:
    """Whether the name is that of a volume of these kinds."""
    return path.name.lower().endswith(SUFFIXES)


def open_stack(path: Path) -> Stack:
    """A volume, open.

    Raises:
        InputError: it is not there, damaged, or no single stack of grey slices.
    """
    if not path.exists():
        raise InputError(
            path,
            found="no such volume",
            expected="a NIfTI or HDF5 file, or a Zarr",
            do="Check the path.",
        )
    files = [path, *sorted(path.iterdir())] if path.is_dir() else [path]
    stats = [f.stat() if f.exists() else f.lstat() for f in files]  # a link may lead nowhere
    return _open(
        path, tuple((stat.st_mtime_ns, stat.st_size) for stat in stats)
    )  # never an older one of the same name
