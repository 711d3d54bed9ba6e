"""Folders of slices, one TIFF or PNG file each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from emadapt.errors import InputError
from emadapt.volumes.png import has_one_bit, read_png
from emadapt.volumes.source import Array, Source, only_one, stamp, unlike
from emadapt.volumes.tiff import open_tiff

SLICE_SUFFIXES = (".tif", ".tiff", ".png")


def open_folder(path: Path, inside: str = "", scale: int = 0) -> Source:
    """The slices of a folder, in the order of their numbers."""
    only_one(path, inside, scale)
    return open_slices(in_order(list_slices(path)), str(path))


def open_slices(files: Sequence[Path], name: str) -> Source:
    """Files in this order as one volume.

    Files of 1 bit a pixel among others are read as 0 and 255 (three of VNC's twenty labels).
    """
    one_bit = [_has_one_bit(file) for file in files]  # looks at every file
    keep_bits = all(one_bit)
    first = _read(files[0], keep_bits)

    def cut(z0: int, z1: int, y0: int, y1: int) -> Array:
        wanted = files[z0:z1]
        return np.stack([_alike(_read(f, keep_bits), first, f)[y0:y1] for f in wanted])

    shape = (len(files), *first.shape)
    return Source(name, shape, first.dtype, None, 1, cut, stamp(*files), tuple(files))


def _has_one_bit(file: Path) -> bool:
    """Whether a slice has 1 bit a pixel; refuses a file with several slices."""
    if file.suffix.lower() == ".png":
        return has_one_bit(file)
    with closing(open_tiff(file)) as source:
        if source.shape[0] > 1:
            raise InputError(
                file,
                found=f"a stack of {source.shape[0]} slices in a folder of slices",
                expected="one slice a file",
                do="Use layout `stack`, or pass the stack itself.",
            )
        return source.dtype == bool


def _read(file: Path, keep_bits: bool) -> Array:
    if file.suffix.lower() == ".png":
        array = read_png(file)
    else:
        with closing(open_tiff(file)) as source:
            array = np.array(source.read(0, 1)[0])  # no view: the file is closed
    return array.astype(np.uint8) * 255 if array.dtype == bool and not keep_bits else array


def _alike(array: Array, first: Array, file: Path) -> Array:
    if (array.shape, array.dtype) != (first.shape, first.dtype):
        expected = f"{first.shape}, {first.dtype}, as the first"
        raise unlike(file, array.shape, array.dtype, expected)
    return array


def list_slices(folder: Path) -> list[Path]:
    """Image files of a folder, by name; nothing else may be in it."""
    if not folder.is_dir():
        do = "Check the dataset's `layout`."
        raise InputError(folder, found="no such folder", expected="the slices", do=do)
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    foreign = [p.name for p in entries if p.suffix.lower() not in SLICE_SUFFIXES or not p.is_file()]
    if foreign:
        raise InputError(
            folder,
            found=some(foreign),
            expected=f"only {', '.join(SLICE_SUFFIXES)} files",
            do="Move everything else out of the folder.",
        )
    if not entries:
        do = "Put the slices there."
        raise InputError(folder, found="an empty folder", expected="one file per slice", do=do)
    return entries


def in_order(files: Sequence[Path]) -> list[Path]:
    """By the last number of their names if each has its own, else by their names."""
    numbers = {file: number_of(file) for file in files}
    if None not in numbers.values() and len(set(numbers.values())) == len(files):
        return sorted(files, key=lambda file: numbers[file] or 0)
    return sorted(files, key=lambda file: natural(file.stem))


def number_of(file: Path) -> int | None:
    """The last number in a file's name, if it has one."""
    digits = re.findall(r"\d+", file.stem)
    return int(digits[-1]) if digits else None


def natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which slice10 comes after slice9."""
    parts = re.split(r"(\d+)", text)
    return tuple((1, int(p), "") if p.isdigit() else (0, 0, p) for p in parts)


def some(items: Sequence[str], most: int = 5) -> str:
    """The first few names of a list, for an error."""
    names = sorted(items, key=natural)
    rest = f"; and {len(names) - most} more" if len(names) > most else ""
    return "; ".join(names[:most]) + rest
